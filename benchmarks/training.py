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

import torch
from conv2d import HEADER, Layer, figures, line, parsed, parser_of, pruned, suite
from torch import nn

from sparsekd.measure.timing import compare, threads
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
    return figures(layer, timings) | {"error": worst}


def main() -> None:
    args, rows = parsed(parser_of(__doc__, batch=32, rounds=5)), []
    with threads(args.threads):
        print(
            f"forward and backward, float32 on both sides, {args.threads} thread(s), {args.clock} time, "
            f"sparsity {args.sparsity}, V={args.vector}, batch {args.batch}, {ops.cpu_isa()}"
        )
        print(HEADER)
        for layer in suite(args.suite):
            row = run(layer, args)
            rows.append(row)
            print(line(row), flush=True)
    mean = math.exp(sum(math.log(row["speedup"]) for row in rows) / len(rows))
    print(f"geometric mean of {len(rows)} layers: {mean:.2f}x")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"settings": vars(args), "layers": rows}, file, indent=1)


if __name__ == "__main__":
    main()
