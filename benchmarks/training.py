"""Times a training step of sparse convolutions, forward and backward, against torch's own, layer by layer.

    python benchmarks/training.py --suite resnet18 --sparsity 0.9 --batch 32

A step is the forward and the gradients of input, weights and bias. Dense (NCHW and channels_last) and sparse are
visited in turn within one run, by process CPU time, minimum over rounds, on one thread unless --threads says otherwise.
The ratio is to the better dense one. Gradients are checked first, against dense ones in float64.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict

import torch
from conv2d import Layer, pruned, suite
from torch import nn

from sparsekd.measure.timing import compare, speedup, threads
from sparsekd.sparse import ops


def step(module: nn.Module, x: torch.Tensor, grad: torch.Tensor):
    """Calls that give the gradients of input, weight (or values) and bias."""
    wanted = [x.requires_grad_(), *module.parameters()]
    return lambda: torch.autograd.grad(module(x), wanted, grad)


def check(layer: Layer, conv: nn.Conv2d, sparse: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> float:
    """Largest relative error of the three gradients."""
    got = step(sparse, x, grad)()
    want = step(conv.double(), x.detach().double(), grad.double())()
    conv.float()
    mine = sparse.to_dense()
    with torch.no_grad():  # the gradient at the non-zeros, in the place of the weights
        mine.weight.zero_()
        packed = sparse.values.detach().clone()
        sparse.values.copy_(got[1])
        mine.weight.copy_(sparse.weight)
        sparse.values.copy_(packed)
    pairs = [(got[0], want[0]), (mine.weight.detach(), want[1] * sparse.mask), (got[2], want[2])]
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    if not worst < 1e-4:
        raise SystemExit(f"Expected the gradients of {layer} within 1e-4 of torch in float64, got {worst:.2g}")
    return worst


def run(layer: Layer, args: argparse.Namespace) -> dict:
    conv, sparse = pruned(layer, args.sparsity, args.vector)
    sparse.train()  # plans the transposed pattern once
    last = nn.Conv2d(
        layer.in_channels, layer.out_channels, layer.kernel, layer.stride, layer.kernel // 2, 1, layer.groups
    )
    last.load_state_dict(conv.state_dict())
    last = last.to(memory_format=torch.channels_last)
    x = torch.randn(args.batch, layer.in_channels, layer.size, layer.size)
    with torch.no_grad():
        grad = torch.randn_like(conv(x))
    worst = check(layer, conv, sparse, x[:1].clone(), grad[:1])
    x_last = x.contiguous(memory_format=torch.channels_last)
    engines = {
        "nchw": step(conv, x, grad),
        "channels_last": step(last, x_last, grad.contiguous(memory_format=torch.channels_last)),
        "sparse": step(sparse, x.clone(), grad),
    }
    timings = compare(engines, rounds=args.rounds, min_time=args.min_time, clock=args.clock)
    best = min(("nchw", "channels_last"), key=lambda name: timings[name].min)
    gain = speedup(timings[best], timings["sparse"])
    return {
        "layer": str(layer), **asdict(layer), "dense": best, "dense_ms": timings[best].min * 1e3,
        "sparse_ms": timings["sparse"].min * 1e3, "speedup": gain.value, "speedup_low": gain.low,
        "speedup_high": gain.high, "error": worst,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="resnet18")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--vector", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--min-time", type=float, default=0.01)
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if not 0 <= args.sparsity < 1:
        raise SystemExit(f"Expected sparsity in [0, 1), got {args.sparsity}")
    torch.manual_seed(0)
    rows = []
    with threads(args.threads):
        print(
            f"forward and backward, float32 on both sides, {args.threads} thread(s), {args.clock} time, "
            f"sparsity {args.sparsity}, V={args.vector}, batch {args.batch}, {ops.cpu_isa()}"
        )
        print(f"{'layer':32} {'dense ms':>9} {'as':>14} {'sparse ms':>9} {'speed-up':>8}  {'interval':13}")
        for layer in suite(args.suite):
            row = run(layer, args)
            rows.append(row)
            interval = f"{row['speedup_low']:.2f}-{row['speedup_high']:.2f}"
            print(
                f"{row['layer']:32} {row['dense_ms']:9.2f} {row['dense']:>14} {row['sparse_ms']:9.2f} "
                f"{row['speedup']:7.2f}x  {interval:13}"
            )
            sys.stdout.flush()
    mean = math.exp(sum(math.log(row["speedup"]) for row in rows) / len(rows))
    print(f"geometric mean of {len(rows)} layers: {mean:.2f}x")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"settings": vars(args), "layers": rows}, file, indent=1)


if __name__ == "__main__":
    main()
