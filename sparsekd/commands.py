"""What the commands of the command line do: each takes the parsed words and returns what --json writes."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from .model_names import model_of


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


def _sgd(args, model):
    import torch

    for name, value in (("lr", args.lr), ("momentum", args.momentum)):
        if not 0 <= value < math.inf:
            raise ValueError(f"Expected --{name} of at least 0 and finite, got {value}")
    return torch.optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum)


def _checkpoint(args) -> Path:
    """Where an interrupted run is kept, out of the way unless it goes on."""
    from .distillation.checkpoint import put_aside

    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = out.with_name(f"{out.name}.checkpoint")
    if not args.resume:
        put_aside(checkpoint)
    return checkpoint


def _saved(args, model, test, checkpoint: Path) -> dict:
    """Saves a trained model and says its accuracy."""
    from .distillation import evaluate
    from .sparse.checkpoint import save

    save(model, args.out)
    checkpoint.unlink(missing_ok=True)
    accuracy, size = evaluate(model, test), Path(args.out).stat().st_size
    print(f"accuracy {accuracy:.4f} on {args.data}, {args.out} of {size} bytes")
    return {"accuracy": accuracy, "data": args.data, "out": str(args.out), "bytes": size}


def _images(args, train):
    """The first of the training images, as many as --batch says."""
    if args.batch < 1:
        raise ValueError(f"Expected --batch of at least 1, got {args.batch}")
    return train.images[: args.batch]


def _fit(args, model, teacher, train, test, pruned: bool = False) -> dict:
    """Trains by the one loop, prunes on the way when asked, saves, says the accuracy."""
    from .compress import find_target, penalty_of_pattern
    from .distillation import Distiller
    from .latency import latency_budget
    from .pruning import CubicSL, Pruner

    optimizer = _sgd(args, model)
    pruner, penalty = None, args.penalty
    if pruned:
        penalty = penalty_of_pattern(penalty, args.pattern)
        sparsity, timed = find_target(*_asked(args), args.budget)
        budget = args.budget or "global"
        if timed is not None:
            budget = latency_budget(model, _images(args, train), timed, args.pattern, _ignored(args))
        steps = len(train) * args.epochs
        schedule = None
        if args.gradual:
            schedule = CubicSL(start=0, end=max(steps // 2, 1), update_frequency=max(steps // 40, 1))
        pruner = Pruner(
            model, sparsity, args.importance, args.pattern, budget, schedule=schedule, optimizer=optimizer,
            ignored_layers=_ignored(args), importance_steps=min(32, len(train)),
        )  # fmt: skip
        print(f"dense: {', '.join(pruner.dense_layers) or 'no layer'}")
    settings = {"penalty": penalty, "penalty_weight": args.penalty_weight} if penalty else {}
    if teacher is not None:
        settings["loss"] = _loss(args)
    checkpoint = _checkpoint(args)
    Distiller(model, teacher, **settings).fit(
        train, args.epochs, optimizer, pruner=pruner, val_loader=test, checkpoint=checkpoint, progress=True
    )
    if pruner is not None:
        pruner.squash_mask()
    return _saved(args, model, test, checkpoint)


def _ignored(args) -> str | list[str]:
    return "first_last" if args.ignored_layers is None else args.ignored_layers


def _loss(args):
    """That of --loss, at --temperature where it has one."""
    from .distillation import DistillationLoss, KDLoss

    if args.loss == "kd":
        return KDLoss(args.temperature, args.alpha)
    return DistillationLoss(args.loss, args.alpha, **({} if args.loss == "mse" else {"temperature": args.temperature}))


def _asked(args) -> tuple[float | None, str | None]:
    """--sparsity and --target; 0.9 where neither is given."""
    return (0.9 if args.sparsity is None and args.target is None else args.sparsity), args.target


def train(args) -> dict:
    loaded, training, test = _data(args)
    return _fit(args, _model(args, args.model, None, loaded.classes), None, training, test)


def distill(args) -> dict:
    loaded, training, test = _data(args)
    teacher = _model(args, args.teacher_model, args.teacher, loaded.classes)
    return _fit(args, _model(args, args.model, args.weights, loaded.classes), teacher, training, test)


def prune(args) -> dict:
    loaded, training, test = _data(args)
    teacher = _model(args, args.teacher_model, args.teacher, loaded.classes) if args.teacher else None
    model = _model(args, args.model, args.weights, loaded.classes)
    return _fit(args, model, teacher, training, test, pruned=True)


def compress(args) -> dict:
    from .compress import compress as whole_recipe

    loaded, training, test = _data(args)
    teacher = _model(args, args.teacher_model, args.teacher, loaded.classes) if args.teacher else None
    model = _model(args, args.model, args.weights, loaded.classes)
    sparsity, target = _asked(args)
    checkpoint = _checkpoint(args)
    fast = whole_recipe(
        model,
        teacher,
        training,
        sparsity,
        args.pattern,
        args.epochs,
        target=target,
        importance=args.importance,
        budget=args.budget,
        ignored_layers=_ignored(args),
        loss=_loss(args),
        penalty=args.penalty,
        penalty_weight=args.penalty_weight if args.penalty else 0.0,
        optimizer=_sgd(args, model),
        val_loader=test,
        example_inputs=_images(args, training),
        checkpoint=checkpoint,
        progress=True,
    )
    from .sparse.convert import choices

    print(choices(fast).summary())
    return _saved(args, fast, test, checkpoint)


def sensitivity(args) -> dict:
    from itertools import islice

    from .distillation import evaluate
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
    if args.png:
        found.save_png(args.png)
    return json.loads(found.to_json())


def _example(args, model, batch: int):
    """Random images that the model has taken once."""
    import torch

    from .sparse.dispatch import evaluating

    for name, value in (("batch", batch), ("size", args.size)):
        if value < 1:
            raise ValueError(f"Expected --{name} of at least 1, got {value}")
    images = torch.randn(batch, 3, args.size, args.size)
    try:
        with evaluating(model):
            model(images)
    except RuntimeError as error:
        raise ValueError(f"Expected a model that takes images {list(images.shape)} (--size), got: {error}") from error
    return images


def _pruned(args):
    """The model of --weights, or one with random weights at random places of --sparsity; in eval mode."""
    from .bench import masked
    from .reporting import vector_of

    if not 0 <= args.sparsity < 1:
        raise ValueError(f"Expected sparsity in [0, 1), got {args.sparsity}")
    vector = vector_of(args.pattern)
    model = _model(args, args.model, args.weights, args.num_classes).eval()
    if args.weights:
        return model
    print(f"random weights at random places, every layer but the first at sparsity {args.sparsity}, V={vector}")
    return masked(model, args.sparsity, vector)


def convert(args) -> dict:
    from .measure.timing import threads
    from .reporting import report
    from .sparse.checkpoint import save
    from .sparse.convert import convert as convert_model

    model = _model(args, args.model, args.weights, args.num_classes).eval()
    with threads(args.threads):
        images = _example(args, model, args.batch)
        converted = convert_model(model, images, progress=True)
        made = report(converted, images, progress=True)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        save(converted, args.out)
    return _show(made, args)


def report(args) -> dict:
    from .measure.timing import threads
    from .reporting import report as report_on
    from .sparse.convert import convert as convert_model

    accuracy = dict(map(_accuracy, args.accuracy))
    model = _pruned(args)
    images = _example(args, model, args.batch[0])
    with threads(args.threads[0]):
        converted = convert_model(model, images, progress=True)
        made = report_on(
            converted, images, args.batch, threads=args.threads, accuracy=accuracy or None, progress=True
        )  # fmt: skip
    return _show(made, args)


def _accuracy(text: str) -> tuple[str, tuple[float, float]]:
    name, _, numbers = text.rpartition("=")
    try:
        accuracy, ms = map(float, numbers.split(","))
    except ValueError:
        name = ""
    if not name:
        raise ValueError(f"Expected --accuracy NAME=ACCURACY,MILLISECONDS, got {text!r}")
    return name, (accuracy, ms)


def bench(args) -> dict:
    import torch

    from .bench import failed, folded, lines, run
    from .measure.timing import peak_flops, threads
    from .reporting import machine

    if args.rounds < 1:
        raise ValueError(f"Expected --rounds of at least 1, got {args.rounds}")
    model, rows = _pruned(args), []
    with torch.no_grad():
        model = folded(model, _example(args, model, args.batch[0]))
        for count in args.threads:
            with threads(count):
                where, peak = machine(), peak_flops() / 1e9
                print("; ".join(f"{key} {value}" for key, value in where.items()), f"; FMA peak {peak:.0f} GF/s")
                for batch in args.batch:
                    row = run(model, _example(args, model, batch), args.against, rounds=args.rounds)
                    print(f"{args.model}, batch {batch}, {count} thread(s), {row['clock']} clock")
                    print("\n".join(lines(row)), flush=True)
                    rows.append({**row, "machine": where, "peak_gflops": peak})
    kept = ("model", "weights", "sparsity", "pattern", "size", "seed", "rounds")
    result = {"settings": {name: getattr(args, name) for name in kept}, "rows": rows}
    if failed(rows):
        result["exit"] = 1
        print("sparsekd: an engine failed, as said above", file=sys.stderr)
    return result


def _show(made, args) -> dict:
    print(made)
    for name in ("html", "csv", "png"):
        path = getattr(args, name)
        if path:
            getattr(made, f"save_{name}")(path)
    return json.loads(made.to_json())


def doctor(args) -> dict:
    from .measure.doctor import print_report
    from .measure.doctor import report as look

    findings = look()
    print_report(findings)
    return {"findings": [finding._asdict() for finding in findings]}


def demo(args) -> dict:
    from .demo import run

    return {"out": str(run(args))}


def completion(args) -> None:
    try:
        import shtab
    except ImportError as error:
        raise ValueError(f"Expected shtab to be installed (pip install shtab), got: {error}") from error
    print(shtab.complete(args.top, args.shell))
