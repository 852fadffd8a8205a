"""Whole networks: sparse against every dense engine at hand (see sparsekd/bench.py).

    pip install onnx onnxscript onnxruntime openvino    # the engines beside torch's own
    python benchmarks/end_to_end.py --model resnet50 --sparsity 0.9 --batch 1

Random weights, masks at random places in every convolution and linear layer but the first. Engines whose package is not
installed are said and left out; one that fails is said and left out, and the exit code is 1. `sparsekd bench` does the
same for a model of yours.
"""

from __future__ import annotations

import argparse
import json
import sys

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
    return made


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if not 0 <= args.sparsity < 1:
        raise SystemExit(f"Expected sparsity in [0, 1), got {args.sparsity}")
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
            json.dump({"settings": vars(args), "machine": where, "peak_gflops": peak, "rows": rows}, file, indent=1)
    return int(failed(rows))


if __name__ == "__main__":
    sys.exit(main())
