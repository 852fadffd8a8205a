"""The command line: sparsekd demo | train | distill | prune | sensitivity | convert | bench | doctor."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from pathlib import Path

DATA = ("digits", "shapes", "cifar10")


def model_of(name: str, num_classes: int):
    """A model by name: of this package, torchvision, ``timm:name`` or ``package.module:factory``."""
    from torch import nn

    from . import reference_models

    package, _, factory = name.rpartition(":")
    if package == "timm":
        return _imported("timm").create_model(factory, pretrained=False, num_classes=num_classes)
    if package:
        make = getattr(_imported(package), factory, None)
        if not callable(make):
            raise ValueError(f"Expected a function {factory} in {package} that makes the model, got none")
        model = make()
        if not isinstance(model, nn.Module):
            raise TypeError(f"Expected {name} to make a torch.nn.Module, got {type(model).__name__}")
        return model
    ours = {
        "reference_teacher": reference_models.reference_teacher,
        "reference_student": reference_models.reference_student,
        "cifar_resnet20": reference_models.cifar_resnet20,
        "cifar_resnet20x4": lambda num_classes: reference_models.cifar_resnet20(width=64, num_classes=num_classes),
    }
    if name in ours:
        return ours[name](num_classes=num_classes)
    import torchvision

    if name not in torchvision.models.list_models():
        raise ValueError(
            f"Expected a model out of {', '.join(ours)}, torchvision's, timm:NAME or package.module:factory, "
            f"got {name!r}"
        )
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes)


def _imported(package: str):
    # As `python -m` does: a file in the folder where one stands can be named.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"Expected the package {package} to be importable, got: {error}") from error


def _data(args):
    from . import data

    loaded = data.load(args.data, root=args.root, download=args.download)
    return loaded, *data.loaders(loaded, batch_size=args.batch_size, seed=args.seed)


def _model(args, name: str, weights: str | None, num_classes: int):
    import torch

    from .sparse.checkpoint import load

    torch.manual_seed(args.seed)
    model = model_of(name, num_classes)
    return load(model, weights) if weights else model


def _fit(args, model, teacher, train, test, sparsity: float | None = None) -> None:
    """Trains by the one loop, prunes on the way when asked, saves, says the accuracy."""
    import torch

    from .distillation import Distiller, KDLoss, evaluate
    from .distillation.checkpoint import put_aside
    from .pruning import CubicSL, Pruner
    from .sparse.checkpoint import save

    for name, value in (("lr", args.lr), ("momentum", args.momentum)):
        if not 0 <= value < math.inf:
            raise ValueError(f"Expected --{name} of at least 0 and finite, got {value}")
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum)
    pruner = None
    if sparsity is not None:
        steps = len(train) * args.epochs
        schedule = None
        if args.gradual:
            schedule = CubicSL(start=0, end=max(steps // 2, 1), update_frequency=max(steps // 40, 1))
        pruner = Pruner(
            model, sparsity, args.importance, args.pattern, args.budget, schedule=schedule, optimizer=optimizer,
            importance_steps=min(32, len(train)),
        )  # fmt: skip
    settings = {"penalty": args.penalty, "penalty_weight": args.penalty_weight} if args.penalty else {}
    if teacher is not None:
        settings["loss"] = KDLoss(args.temperature, args.alpha)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = out.with_name(f"{out.name}.checkpoint")
    if not args.resume:
        put_aside(checkpoint)
    Distiller(model, teacher, **settings).fit(
        train, args.epochs, optimizer, pruner=pruner, val_loader=test, checkpoint=checkpoint, progress=True
    )
    if pruner is not None:
        pruner.squash_mask()
    save(model, out)
    checkpoint.unlink(missing_ok=True)
    print(f"accuracy {evaluate(model, test):.4f} on {args.data}, {out} of {out.stat().st_size} bytes")


def train(args) -> None:
    loaded, training, test = _data(args)
    _fit(args, _model(args, args.model, None, loaded.classes), None, training, test)


def distill(args) -> None:
    loaded, training, test = _data(args)
    teacher = _model(args, args.teacher_model, args.teacher, loaded.classes)
    _fit(args, _model(args, args.model, args.weights, loaded.classes), teacher, training, test)


def prune(args) -> None:
    loaded, training, test = _data(args)
    teacher = _model(args, args.teacher_model, args.teacher, loaded.classes) if args.teacher else None
    model = _model(args, args.model, args.weights, loaded.classes)
    _fit(args, model, teacher, training, test, sparsity=args.sparsity)


def sensitivity(args) -> None:
    from itertools import islice

    from .distillation import evaluate
    from .measure.report import write_text
    from .pruning import sensitivity as measure

    _, training, test = _data(args)
    model = _model(args, args.model, args.weights, len(set(training.labels.tolist())))
    batches = list(islice(training, args.batches))
    found = measure(
        model, lambda pruned: evaluate(pruned, test), args.sparsities, args.importance, args.pattern, batches=batches
    )
    width = max(len(name) for name in found.layers)
    print(
        f"accuracy {found.baseline:.4f} on {args.data}; one layer pruned by {args.importance}, the others as they are"
    )
    print(f"{'layer':{width}}  " + "  ".join(f"{sparsity:7.0%}" for sparsity in found.sparsities))
    for name in found.ranking():
        print(f"{name:{width}}  " + "  ".join(f"{delta:+7.4f}" for delta in found.deltas()[name]))
    if args.json:
        write_text(args.json, found.to_json())
    if args.png:
        found.save_png(args.png)


def _example(args, model):
    """Random images that the model has taken once."""
    import torch

    from .sparse.dispatch import evaluating

    for name in ("batch", "size"):
        if getattr(args, name) < 1:
            raise ValueError(f"Expected --{name} of at least 1, got {getattr(args, name)}")
    images = torch.randn(args.batch, 3, args.size, args.size)
    try:
        with evaluating(model):
            model(images)
    except RuntimeError as error:
        raise ValueError(f"Expected a model that takes images {list(images.shape)} (--size), got: {error}") from error
    return images


def convert(args) -> None:
    from .measure.timing import threads
    from .reporting import report
    from .sparse.checkpoint import save
    from .sparse.convert import convert as convert_model

    model = _model(args, args.model, args.weights, args.num_classes).eval()
    with threads(args.threads):
        images = _example(args, model)
        converted = convert_model(model, images)
        _show(report(converted, images), args)
    if args.out:
        save(converted, args.out)


def bench(args) -> None:
    import torch

    from .measure.timing import threads
    from .reporting import random_mask, report
    from .sparse.convert import convert as convert_model

    if not 0 <= args.sparsity < 1:
        raise ValueError(f"Expected sparsity in [0, 1), got {args.sparsity}")
    if args.vector < 1:
        raise ValueError(f"Expected --vector of at least 1, got {args.vector}")
    model = _model(args, args.model, None, args.num_classes).eval()
    layers = [m for m in model.modules() if type(m) in (torch.nn.Conv2d, torch.nn.Linear)]
    with torch.no_grad():
        for layer in layers[1:]:
            layer.weight.mul_(random_mask(layer.weight, args.sparsity, args.vector, getattr(layer, "groups", 1)))
    print(f"random weights at random places, every layer but the first at sparsity {args.sparsity}")
    with threads(args.threads):
        images = _example(args, model)
        _show(report(convert_model(model, images), images), args)


def _show(made, args) -> None:
    print(made)
    if args.json:
        from .measure.report import write_text

        write_text(args.json, made.to_json())
    if args.html:
        made.save_html(args.html)


def doctor(args) -> None:
    from .measure.doctor import print_report

    print_report()


def demo(args) -> None:
    from .demo import run

    run(args)


def _shown(size: int, num_classes: int) -> argparse.ArgumentParser:
    """Options of the commands that end in a report of times."""
    made = argparse.ArgumentParser(add_help=False)
    made.add_argument("--num-classes", type=int, default=num_classes)
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--size", type=int, default=size, help="height and width of the input")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--json", metavar="FILE")
    made.add_argument("--html", metavar="FILE")
    return made


def parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("--data", choices=DATA, default="digits", help="images (default: digits; shapes is synthetic)")
    data.add_argument("--root", help="folder of CIFAR-10")
    data.add_argument("--download", action="store_true", help="let torchvision fetch CIFAR-10 into --root")
    data.add_argument("--seed", type=int, default=0)
    data.add_argument("--resume", action="store_true", help="go on from an interrupted run's checkpoint")
    fit = argparse.ArgumentParser(add_help=False, parents=[data])
    fit.add_argument("--epochs", type=int, default=10)
    fit.add_argument("--batch-size", type=int, default=64)
    fit.add_argument("--lr", type=float, default=0.01)
    fit.add_argument("--momentum", type=float, default=0.9)
    fit.add_argument("--penalty", choices=("l1", "l2", "group_lasso"), help="R(W) of the objective L + lambda R(W)")
    fit.add_argument("--penalty-weight", type=float, default=1e-4, help="lambda")
    fit.add_argument("--out", required=True, metavar="FILE", help="safetensors to write")
    fit.add_argument("--recipe", metavar="FILE", help="YAML of these options by name; the command line wins")
    taught = argparse.ArgumentParser(add_help=False)
    taught.add_argument("--teacher-model", default="reference_teacher")
    taught.add_argument("--temperature", type=float, default=4.0)
    taught.add_argument("--alpha", type=float, default=0.5, help="weight of the teacher's term")
    top = argparse.ArgumentParser(prog="sparsekd", description="Distil, prune, swap layers for sparse ones, measure.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(function, said: str, *parents):
        made = commands.add_parser(function.__name__, help=said, description=said, parents=[shared, *parents])
        made.set_defaults(function=function)
        return made

    made = command(demo, "the whole way on real images: distil, prune, retrain, swap, measure", data)
    made.add_argument(
        "--out", default=None, metavar="FOLDER", help="default: runs/demo (runs/demo-DATA for other data)"
    )
    made.add_argument("--sparsity", type=float, default=0.9)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--epochs", type=int, default=None, help="default: what suits the data")
    made = command(train, "train a model alone", fit)
    made.add_argument("--model", default="reference_teacher")
    made = command(distill, "train a student from a teacher", fit, taught)
    made.add_argument("--teacher", required=True, metavar="FILE", help="the teacher's weights (sparsekd train --out)")
    made.add_argument("--model", default="reference_student")
    made.add_argument("--weights", metavar="FILE", help="start from these weights")
    made = command(prune, "prune a trained model and retrain it, with a teacher or without", fit, taught)
    made.add_argument("--model", default="reference_student")
    made.add_argument("--weights", required=True, metavar="FILE", help="the trained model's weights")
    made.add_argument("--teacher", metavar="FILE", help="retrain under this teacher")
    made.add_argument("--sparsity", type=float, default=0.9, help="fraction of the prunable weights to remove")
    made.add_argument("--importance", default="gradient", help="gradient, magnitude, taylor, movement, wanda, ...")
    made.add_argument("--pattern", default="unstructured", help="unstructured, 4x1, 4x1-permuted, 2:4, ...")
    made.add_argument("--budget", default="global", choices=("global", "uniform", "erk"))
    made.add_argument("--gradual", action="store_true", help="on a cubic schedule instead of once")
    made = command(sensitivity, "what each layer costs when it alone is pruned, the most sensitive first", data)
    made.add_argument("--model", default="reference_student")
    made.add_argument("--weights", required=True, metavar="FILE", help="the trained model's weights")
    made.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9, 0.95])
    made.add_argument("--importance", default="magnitude", help="gradient, magnitude, taylor, wanda, ...")
    made.add_argument("--pattern", default="unstructured")
    made.add_argument("--batches", type=int, default=32, help="for an importance that needs data")
    made.add_argument("--batch-size", type=int, default=64)
    made.add_argument("--json", metavar="FILE")
    made.add_argument("--png", metavar="FILE")
    made = command(convert, "swap pruned layers for sparse ones and report what that bought", _shown(32, 10))
    made.add_argument("--model", default="reference_student")
    made.add_argument("--weights", required=True, metavar="FILE")
    made.add_argument("--out", metavar="FILE", help="packed safetensors to write")
    made = command(bench, "dense against sparse on a network with random weights", _shown(224, 1000))
    made.add_argument("--model", default="resnet18")
    made.add_argument("--sparsity", type=float, default=0.9)
    made.add_argument("--vector", type=int, default=1)
    command(doctor, "what is built, what is missing, what to do about it")
    return top


def with_recipe(words: list[str]) -> list[str]:
    """The words with those of ``--recipe FILE`` right after the command, so that later ones win.

    A recipe is a YAML mapping from options without their dashes to a value, to ``true`` for one without a value, or to
    a list: ``{sparsity: 0.9, pattern: 4x1, gradual: true}``.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--recipe")
    file = finder.parse_known_args(words)[0].recipe
    if file is None:
        return words
    try:
        import yaml
    except ImportError as error:
        raise ValueError(f"Expected the package PyYAML for --recipe, got none: {error}") from None
    try:
        recipe = yaml.safe_load(Path(file).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"Expected YAML in {file}, got: {' '.join(str(error).split())}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"Expected a mapping of options in {file}, got {type(recipe).__name__}")
    given = []
    for name, value in recipe.items():
        if value is False or value is None or isinstance(value, dict):
            raise ValueError(f"Expected {name} in {file} to be a number, a text, true or a list, got {value}")
        given.append(f"--{str(name).replace('_', '-')}")
        given += [] if value is True else [str(part) for part in (value if isinstance(value, list) else [value])]
    return [*words[:1], *given, *words[1:]]


def main(argv: list[str] | None = None) -> int:
    """Runs one command; 0 when it succeeds, 1 after one sentence about an error, 130 when interrupted."""
    words = sys.argv[1:] if argv is None else list(argv)
    args = None
    try:
        args = parser().parse_args(with_recipe(words))
        args.function(args)
    except KeyboardInterrupt:
        resumable = "; the same command with --resume goes on" if hasattr(args, "resume") else ""
        print(f"interrupted{resumable}", file=sys.stderr)
        return 130
    except Exception as error:
        if args is not None and args.debug:
            raise
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            error = f"Expected to read or write {error.filename}, got: {error.strerror}"
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        print(f"sparsekd: {said}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
