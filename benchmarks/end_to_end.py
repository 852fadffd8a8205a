"""Whole networks: sparse against every dense engine at hand (see sparsekd/bench.py).

    pip install onnx onnxscript onnxruntime openvino    # the engines beside torch's own
    python benchmarks/end_to_end.py --model resnet50 --sparsity 0.9 --batch 1 --json FILE
    python benchmarks/end_to_end.py --plot FILE.png --from FILE...    # of files written before; nothing is timed

Random weights, masks at random places in every convolution and linear layer but the first. Engines whose package is not
installed are said and left out; one that fails is said and left out, and the exit code is 1. `sparsekd bench` does the
same for a model of yours.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import nn

from sparsekd.bench import OURS, failed, folded, lines, masked
from sparsekd.bench import run as timed
from sparsekd.measure.engines import DENSE
from sparsekd.measure.timing import peak_flops, threads
from sparsekd.model_names import model_of
from sparsekd.reporting import machine

# Name: height and width of its input.
SUITE = {
    "resnet18": 224,
    "resnet50": 224,
    "mobilenet_v2": 224,
    "vgg16": 224,
    "efficientnet_b0": 224,
    "cifar_resnet20x4": 32,
    "deeplabv3_resnet50": 224,
}


def pruned(name: str, sparsity: float, vector: int) -> nn.Module:
    """The masked network with its batch-norm folded: plain modules, zeros where pruned."""
    torch.manual_seed(0)
    model = model_of(name, 10 if name.startswith("cifar") else 21 if name.startswith("deeplab") else 1000)
    return folded(masked(model, sparsity, vector), torch.zeros(1, 3, SUITE[name], SUITE[name]))


def run(args, name: str, batch: int) -> dict:
    size = args.size or SUITE[name]
    model = pruned(name, args.sparsity, args.vector)
    row = timed(model, torch.randn(batch, 3, size, size), args.against, args.ours, args.rounds, args.min_time)
    print(f"\n{name}, batch {batch}, {args.sparsity:.0%} of every layer but the first, V={args.vector}")
    print("\n".join(lines(row)), flush=True)
    return {"model": name, "sparsity": args.sparsity, "vector": args.vector, **row}


def plot(rows: list[dict], path: str) -> None:
    """Bars of the speed-up over the best dense engine: a group for each network and batch, a bar for each pattern."""
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys((row["batch"], row["model"]) for row in rows))
    groups.sort(key=lambda group: (group[0], list(SUITE).index(group[1])))
    patterns = sorted({(row["vector"], row["sparsity"]) for row in rows})
    figure = Figure(figsize=(max(6.0, 1.1 * len(groups)), 3.6), layout="constrained")
    axes, width = figure.subplots(), 0.8 / len(patterns)
    for i, (vector, sparsity) in enumerate(patterns):
        places, heights = [], []
        for row in rows:
            if (row["vector"], row["sparsity"]) == (vector, sparsity):
                places.append(groups.index((row["batch"], row["model"])) + (i + 0.5) * width - 0.4)
                heights.append(max(row["speedup"][engine][0] for engine in OURS if engine in row["speedup"]))
        bars = axes.bar(places, heights, width, label=f"{sparsity:.0%}, V={vector}")
        axes.bar_label(bars, fmt="%.1f", fontsize=6)
    axes.axhline(1, color="black", linewidth=1)
    names = [f"{model.replace('_', ' ')}\nbatch {batch}" for batch, model in groups]
    axes.set_xticks(range(len(groups)), names, fontsize=6.5)
    axes.set(ylabel="times as fast as the best dense engine")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def read(paths: list[str]) -> list[dict]:
    """The rows of files that were written with ``--json``; the later one counts where two are of one network."""
    rows = {}
    for path in paths:
        for row in json.loads(Path(path).read_text())["rows"]:
            rows[row["model"], row["batch"], row["vector"], row["sparsity"]] = row
    return list(rows.values())


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", nargs="+", choices=list(SUITE), default=list(SUITE))
    made.add_argument("--sparsity", type=float, default=0.9)
    made.add_argument("--vector", type=int, default=1)
    made.add_argument("--batch", type=int, nargs="+", default=[1])
    made.add_argument("--size", type=int, help="height and width of the input (default: the model's)")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--rounds", type=int, default=9)
    made.add_argument("--min-time", type=float, default=0.02, help="seconds of one sample at least")
    made.add_argument("--against", nargs="+", choices=list(DENSE), default=list(DENSE))
    made.add_argument("--ours", nargs="+", choices=list(OURS), default=list(OURS))
    made.add_argument("--json", metavar="FILE")
    made.add_argument("--plot", metavar="FILE", help="a figure of the speed-ups, PNG or SVG (needs matplotlib)")
    made.add_argument("--from", metavar="FILE", nargs="+", dest="files", help="plot these results and time nothing")
    return made


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if not 0 <= args.sparsity < 1:
        raise SystemExit(f"Expected sparsity in [0, 1), got {args.sparsity}")
    if args.files:
        if not args.plot:
            raise SystemExit("Expected --plot FILE with --from, got none")
        plot(read(args.files), args.plot)
        return 0
    rows = []
    with threads(args.threads), torch.no_grad():
        peak = peak_flops() / 1e9
        print("; ".join(f"{key} {value}" for key, value in machine().items()), f"; FMA peak {peak:.0f} GF/s")
        for name in args.model:
            for batch in args.batch:
                rows.append(run(args, name, batch))
        where = machine()
    if args.json:
        with open(args.json, "w") as file:
            settings = {name: value for name, value in vars(args).items() if name not in ("json", "plot", "files")}
            json.dump({"settings": settings, "machine": where, "peak_gflops": peak, "rows": rows}, file, indent=1)
    if args.plot:
        plot(rows, args.plot)
    return int(failed(rows))


if __name__ == "__main__":
    sys.exit(main())
