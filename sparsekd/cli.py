"""The command line: sparsekd demo | train | distill | prune | compress | sensitivity | convert | report | ..."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

from .commands import bench, completion, compress, convert, demo, distill, doctor, prune, report, sensitivity, train

DATA = ("digits", "shapes", "cifar10")
AGAINST = (
    "eager",
    "channels_last",
    "inductor",
    "onnxruntime",
    "openvino",
)  # of measure/engines.py
LOSSES = ("kd", "dkd", "jsd", "reverse_kl", "dist", "logit_standardisation", "mse")  # of distillation/logit_losses.py
SHELLS = ("bash", "zsh", "tcsh")


EXAMPLES = {
    "demo": "sparsekd demo\nsparsekd demo --data shapes --seeds 1",
    "train": "sparsekd train --model reference_teacher --out teacher.safetensors",
    "distill": "sparsekd distill --teacher teacher.safetensors --out distilled.safetensors",
    "prune": (
        "sparsekd prune --weights distilled.safetensors --teacher teacher.safetensors --out both.safetensors\n"
        "sparsekd prune --weights alone.safetensors --sparsity 0.95 --pattern 4x1 --gradual --out pruned.safetensors"
    ),
    "compress": (
        "sparsekd compress --teacher teacher.safetensors --target 0.9 --epochs 12 --out small.safetensors\n"
        "sparsekd compress --weights distilled.safetensors --teacher teacher.safetensors --target 1.3x --pattern 4x1 "
        "--out fast.safetensors"
    ),
    "sensitivity": "sparsekd sensitivity --weights distilled.safetensors --importance gradient --png sensitivity.png",
    "convert": (
        "sparsekd convert --weights both.safetensors --html report.html\n"
        "sparsekd convert --model my_package.nets:make --weights pruned.safetensors --size 224 --out fast.safetensors"
    ),
    "report": (
        "sparsekd report --model resnet50 --sparsity 0.9 --batch 1 8 --threads 1 2 --html report.html\n"
        "sparsekd report --weights both.safetensors --accuracy dense=97.8,0.55 --accuracy sparse=97.6,0.45 --json -"
    ),
    "bench": (
        "sparsekd bench --model torchvision:resnet50 --sparsity 0.9\n"
        "sparsekd bench --model timm:resnet18 --pattern v4 --batch 1 8 --threads 2 --against eager inductor\n"
        "sparsekd bench --model my_package.nets:make --checkpoint pruned.safetensors --size 64"
    ),
    "doctor": "sparsekd doctor\nsparsekd doctor --json -",
    "completion": (
        "sparsekd completion bash > ~/.local/share/bash-completion/completions/sparsekd\n"
        'sparsekd completion zsh > "${fpath[1]}/_sparsekd"'
    ),
}
EXIT_CODES = """\
exit codes: 0 success; 1 an error, told in one sentence (--debug shows where), or an engine of bench that failed;
2 words that are not understood; 130 interrupted"""


def _shown(size: int, num_classes: int, several: bool) -> argparse.ArgumentParser:
    """Options of the commands that end in times."""
    made = argparse.ArgumentParser(add_help=False)
    count = {"nargs": "+", "default": [1]} if several else {"default": 1}
    made.add_argument("--num-classes", type=int, default=num_classes)
    made.add_argument("--batch", type=int, help="images at once", **count)
    made.add_argument("--threads", type=int, help="threads that torch uses", **count)
    made.add_argument("--size", type=int, default=size, help="height and width of the input")
    made.add_argument("--seed", type=int, default=0)
    return made


def _reported() -> argparse.ArgumentParser:
    """Options of the commands that end in a report by layer."""
    made = argparse.ArgumentParser(add_help=False)
    for name, said in (("html", "a page to write"), ("csv", "a table to write"), ("png", "a picture to write")):
        made.add_argument(f"--{name}", metavar="FILE", help=said)
    return made


def _random() -> argparse.ArgumentParser:
    """Options of the commands that take weights or make random ones."""
    made = argparse.ArgumentParser(add_help=False)
    made.add_argument("--model", default="resnet18", help="torchvision's name, timm:NAME or package.module:factory")
    made.add_argument(
        "--weights", "--checkpoint", metavar="FILE", help="a pruned model (sparsekd prune --out); default: random ones"
    )
    made.add_argument("--sparsity", type=float, default=0.9, help="of random weights: fraction removed")
    made.add_argument("--pattern", default="unstructured", help="of random weights: unstructured, v4 (or 4x1), v8, ...")
    return made


def parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
    shared.add_argument("--json", metavar="FILE", help="write the result as JSON; - for standard output, alone there")
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
    taught.add_argument("--loss", choices=LOSSES, default="kd", help="the teacher's term (default: kd)")
    taught.add_argument("--temperature", type=float, default=4.0)
    taught.add_argument("--alpha", type=float, default=0.5, help="weight of the teacher's term")
    pruned = argparse.ArgumentParser(add_help=False)
    pruned.add_argument("--sparsity", type=float, help="fraction of the prunable weights to remove (default: 0.9)")
    pruned.add_argument("--target", help="instead: a sparsity 0.9, a speed-up 2x or a time 3.5ms of the network")
    pruned.add_argument("--importance", default="gradient", help="gradient, magnitude, taylor, movement, wanda, ...")
    pruned.add_argument("--pattern", default="unstructured", help="unstructured, 4x1, 4x1-permuted, 2:4, ...")
    pruned.add_argument(
        "--budget", choices=("global", "uniform", "erk", "latency"), help="default: latency for a time, else global"
    )
    pruned.add_argument(
        "--ignored-layers", nargs="*", metavar="GLOB",
        help="layers that stay dense, none where no name follows (default: the first convolution, the last linear)",
    )  # fmt: skip
    pruned.add_argument("--batch", type=int, default=1, help="images at once, of a target of time")
    top = argparse.ArgumentParser(
        prog="sparsekd",
        description="Distil, prune, swap layers for sparse ones, measure.",
        epilog=f"sparsekd COMMAND --help shows options and examples\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(function, said: str, *parents):
        examples = "\n".join(f"  {line}" for line in EXAMPLES[function.__name__].splitlines())
        made = commands.add_parser(
            function.__name__,
            help=said,
            description=said,
            parents=[shared, *parents],
            epilog=f"examples:\n{examples}\n\n{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
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
    made = command(prune, "prune a trained model and retrain it, with a teacher or without", fit, taught, pruned)
    made.add_argument("--model", default="reference_student")
    made.add_argument("--weights", required=True, metavar="FILE", help="the trained model's weights")
    made.add_argument("--teacher", metavar="FILE", help="retrain under this teacher")
    made.add_argument("--gradual", action="store_true", help="on a cubic schedule instead of once")
    made = command(compress, "all of it in one go: distil, prune, retrain, swap", fit, taught, pruned)
    made.add_argument("--model", default="reference_student")
    made.add_argument("--weights", metavar="FILE", help="start from these weights")
    made.add_argument("--teacher", metavar="FILE", help="the teacher's weights; without one, by labels alone")
    made = command(sensitivity, "what each layer costs when it alone is pruned, the most sensitive first", data)
    made.add_argument("--model", default="reference_student")
    made.add_argument("--weights", required=True, metavar="FILE", help="the trained model's weights")
    made.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9, 0.95])
    made.add_argument("--importance", default="magnitude", help="gradient, magnitude, taylor, wanda, ...")
    made.add_argument("--pattern", default="unstructured")
    made.add_argument("--batches", type=int, default=32, help="for an importance that needs data")
    made.add_argument("--batch-size", type=int, default=64)
    made.add_argument("--png", metavar="FILE", help="a picture to write")
    made.add_argument("--recipe", metavar="FILE", help="YAML of these options by name; the command line wins")
    made = command(
        convert, "swap pruned layers for sparse ones and report what that bought", _shown(32, 10, False), _reported()
    )
    made.add_argument("--model", default="reference_student")
    made.add_argument("--weights", required=True, metavar="FILE")
    made.add_argument("--out", metavar="FILE", help="packed safetensors to write")
    made = command(
        report, "dense against sparse layer by layer, with reasons", _random(), _shown(224, 1000, True), _reported()
    )
    made.add_argument(
        "--accuracy", action="append", default=[], metavar="NAME=ACCURACY,MS", help="a point of accuracy over latency"
    )
    made = command(bench, "a whole network against the dense engines at hand", _random(), _shown(224, 1000, True))
    made.add_argument("--against", nargs="+", choices=AGAINST, default=["eager", "channels_last"], metavar="ENGINE",
                      help=f"out of {', '.join(AGAINST)} (default: eager channels_last)")  # fmt: skip
    made.add_argument("--rounds", type=int, default=9, help="visits of each engine; the fastest counts")
    command(doctor, "what is built, what is missing, what to do about it")
    made = command(completion, "print a script that completes this command in a shell (needs shtab)")
    made.add_argument("shell", choices=SHELLS)
    made.set_defaults(top=top)
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


def check_files(args: argparse.Namespace) -> None:
    """Before any work: what is to be written at its end must have a place."""
    for option in ("json", "html", "csv", "png", "out"):
        name = getattr(args, option, None)
        if not name or name == "-" or (args.command, option) == ("demo", "out"):  # that is a folder
            continue
        path = Path(name)
        folder = path.parent
        while option == "out" and not folder.exists():  # made on the way
            folder = folder.parent
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            why = "a folder" if path.is_dir() else f"a file in {folder}, which is no folder that can be written to"
            raise ValueError(f"Expected --{option} to name a file that can be written, got {name}: {why}")


def main(argv: list[str] | None = None) -> int:
    """Runs one command; 0 when it succeeds, 1 after one sentence about an error, 130 when interrupted."""
    words = sys.argv[1:] if argv is None else list(argv)
    args = None
    try:
        args = parser().parse_args(with_recipe(words))
        check_files(args)
        # JSON for standard output has it to itself.
        aside = contextlib.redirect_stdout(sys.stderr) if args.json == "-" else contextlib.nullcontext()
        with aside:
            result = args.function(args) or {}
        code = result.pop("exit", 0)
        if args.json == "-":
            print(json.dumps(result, indent=1))
        elif args.json:
            from .measure.report import write_text

            write_text(args.json, json.dumps(result, indent=1) + "\n")
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
    return code


if __name__ == "__main__":
    sys.exit(main())
