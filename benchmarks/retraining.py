"""Retraining what pruning left: dense weights with masks held, against swapped modules that have only the non-zeros.

    python benchmarks/retraining.py --sparsity 0.9 --batch 16 --json benchmarks/results/retraining.json

One step is forward, backward, and an optimizer's step; with masks the Pruner holds them in each. Dense as the better of
NCHW and channels_last. Masks are random V x 1 vectors, in every convolution and linear layer but the first convolution
and the last linear layer; all of these are swapped. Time is process CPU time on one thread, the ways in turn, minimum
over rounds. Memory is that of weights (with their indices), gradients and the optimizer's state.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsekd import hold_masks
from sparsekd.measure.report import write_text
from sparsekd.measure.timing import compare, speedup, threads
from sparsekd.model_names import model_of
from sparsekd.pruning.layers import find_prunable
from sparsekd.reporting import machine
from sparsekd.sparse.anchors import random_mask
from sparsekd.sparse.dispatch import from_dense
from sparsekd.sparse.surgery import put_in_place

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-4),
}


def masked(model: nn.Module, sparsity: float, vector: int) -> dict[str, Tensor]:
    """Zeros at random places, in place; parameter name to mask."""
    masks = {}
    for name, layer in find_prunable(model, "first_last").items():
        masks[name] = random_mask(layer.weight, sparsity, vector, getattr(layer, "groups", 1))
        with torch.no_grad():
            layer.weight.mul_(masks[name])
    return masks


def swapped(model: nn.Module, masks: dict[str, Tensor], vector: int) -> nn.Module:
    layers = {model.get_submodule(name.rpartition(".")[0]): mask for name, mask in masks.items()}
    return put_in_place(model, {layer: from_dense(layer, mask, vector) for layer, mask in layers.items()})


def stepper(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, after: Callable) -> Callable:
    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        after()

    return step


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    def size(tensors) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    state = [value for own in optimizer.state.values() for value in own.values() if isinstance(value, Tensor)]
    return {
        "weights": size(model.state_dict().values()),
        "gradients": size(p.grad for p in model.parameters() if p.grad is not None),
        "optimizer": size(state),
    }


def run(name: str, args: argparse.Namespace, vector: int, kind: str) -> dict:
    torch.manual_seed(0)
    plain = model_of(name, 10).train()
    masks = masked(plain, args.sparsity, vector)
    x, y = torch.randn(args.batch, 3, args.size, args.size), torch.randint(10, (args.batch,))
    ways, models = {}, {}
    for way in ("masks", "masks, channels_last", "swapped"):
        model, images = copy.deepcopy(plain), x
        if way == "swapped":
            model = swapped(model, masks, vector)
        elif way != "masks":
            model, images = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        optimizer = OPTIMIZERS[kind](model.parameters())
        after = (lambda: None) if way == "swapped" else hold_masks(model, masks, optimizer).step
        ways[way], models[way] = stepper(model, optimizer, images, y, after), (model, optimizer)
        ways[way]()
    # The same gradients lead to the same weights: checked before anything is timed.
    one, other = models["masks"][0], models["swapped"][0]
    for key in masks:
        path = key.rpartition(".")[0]
        a, b = one.get_submodule(path).weight, other.get_submodule(path).weight
        if not torch.allclose(a, b, rtol=1e-3, atol=1e-5 + 2e-4 * (kind == "Adam")):
            raise SystemExit(
                f"Expected equal weights after one step, got {float((a - b).abs().max()):.3g} off in {key}"
            )
    timings = compare(ways, rounds=args.rounds, min_time=1e-3, warmup=1, clock="cpu")
    best = min(("masks", "masks, channels_last"), key=lambda way: timings[way].min)
    gain = speedup(timings[best], timings["swapped"])
    return {
        "model": name, "vector": vector, "optimizer": kind, "sparsity": args.sparsity, "batch": args.batch,
        "dense": best, "ms": {way: timing.min * 1e3 for way, timing in timings.items()},
        "speedup": [gain.value, gain.low, gain.high],
        "bytes": {way: held_bytes(*models[way]) for way in ("masks", "swapped")},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["reference_teacher", "cifar_resnet20x4"])
    parser.add_argument("--vectors", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--optimizers", nargs="+", choices=tuple(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    rows = []
    with threads(1):
        where = machine()
        print("; ".join(f"{key} {value}" for key, value in where.items()))
        for name in args.models:
            for kind in args.optimizers:
                for vector in args.vectors:
                    row = run(name, args, vector, kind)
                    rows.append(row)
                    held = {
                        way: {key: f"{size / 1e6:.2f}" for key, size in b.items()} for way, b in row["bytes"].items()
                    }
                    print(f"{name} {kind} V={vector}: {row['ms']}, {row['speedup'][0]:.2f}x; MB {held}", flush=True)
                    if args.json:
                        settings = {key: value for key, value in vars(args).items() if key != "json"}
                        write_text(
                            args.json, json.dumps({"machine": where, "settings": settings, "rows": rows}, indent=1)
                        )


if __name__ == "__main__":
    main()
