"""Converted against dense: no network may become slower, at whatever sparsity.

    python benchmarks/never_slower.py --json FILE                       # twelve networks at 0, 50, 90 and 99%
    python benchmarks/never_slower.py --model resnet18 --sparsity 0.9   # a part of it

Random weights, masks at random places in every convolution and linear layer but the first. `convert` measures and
chooses; then the dense network as it was given, the same in channels_last, and the converted one take turns anew, on
one thread by process CPU time. The ratio is of the minima, converted over given; beside it stand the median, over the
rounds, of paired ratios, and the ratio to the better of the two dense ones. Exit code 1: a ratio above 1.05. Where
`convert` left every layer as it was, the two are the same network: such a ratio tells the machine's noise, and no more.
What `convert` itself cost is printed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings

import torch

import sparsekd
from sparsekd.bench import masked
from sparsekd.measure.engines import channels_last
from sparsekd.measure.timing import compare, speedup, threads
from sparsekd.model_names import model_of
from sparsekd.reporting import machine

# Name: (height and width of the input, batch).
MODELS = {
    "resnet18": (224, 1),
    "resnet50": (224, 1),
    "mobilenet_v2": (224, 1),
    "mobilenet_v3_small": (224, 1),
    "efficientnet_b0": (224, 1),
    "vgg11": (224, 1),
    "squeezenet1_1": (224, 4),
    "shufflenet_v2_x1_0": (224, 1),
    "regnet_y_400mf": (224, 4),
    "googlenet": (224, 1),
    "vit_b_16": (224, 1),
    "cifar_resnet20x4": (32, 8),
}
BAR = 1.05


def run(name: str, sparsity: float, rounds: int) -> dict:
    size, batch = MODELS[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that weights are not initialised, that layers stay dense
        model = model_of(name, 10 if name.startswith("cifar") else 1000).eval()
        x = torch.randn(batch, 3, size, size)
        if sparsity:
            masked(model, sparsity, 1)
        began = time.perf_counter(), time.process_time()
        fast = sparsekd.convert(model, x)
    wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
    engines = {"dense": lambda: model(x), "channels_last": channels_last(model, x, 1), "converted": lambda: fast(x)}
    error = float((fast(x) - model(x)).abs().max() / model(x).abs().max())
    timings = compare(engines, rounds=rounds, min_time=0.01, warmup=2, clock="cpu")
    gain = speedup(timings["dense"], timings["converted"])
    best = timings["converted"].min / min(timings["dense"].min, timings["channels_last"].min)
    made, turned = sparsekd.choices(fast).values(), sparsekd.choices(fast).turned
    row = {
        "model": name, "sparsity": sparsity, "batch": batch, "size": size,
        "ms": {way: round(timing.min * 1e3, 3) for way, timing in timings.items()},
        "ratio": round(1 / gain.value, 4), "median_ratio": round(1 / gain.median, 4), "speedup": round(gain.value, 3),
        "ratio_to_better": round(best, 4),
        "sparse_layers": sum(choice.kernel == "sparse" for choice in made), "layers": len(made),
        "same_network": not turned and all(choice.kernel == "dense" for choice in made),
        "convert_seconds": {"wall": round(wall, 1), "cpu": round(cpu, 1)}, "error": error,
    }  # fmt: skip
    print(
        f"{name:20} {sparsity:4.0%}: {row['sparse_layers']:3}/{row['layers']:3} sparse, dense "
        f"{row['ms']['dense']:.2f} ms, converted {row['ms']['converted']:.2f} ms, ratio {row['ratio']:.3f} "
        f"(median {row['median_ratio']:.3f}, to the better {best:.3f}); convert took {wall:.1f} s ({cpu:.1f} s CPU)",
        flush=True,
    )
    return row


def main(argv: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    made.add_argument("--sparsity", nargs="+", type=float, default=[0.0, 0.5, 0.9, 0.99])
    made.add_argument("--rounds", type=int, default=15)
    made.add_argument("--json", metavar="FILE")
    args = made.parse_args(argv)
    with threads(1), torch.no_grad():
        rows = [run(name, sparsity, args.rounds) for name in args.model for sparsity in args.sparsity]
        where = machine()
    changed = [row for row in rows if not row["same_network"]]
    slower = [f"{row['model']} {row['sparsity']:.0%}" for row in changed if row["ratio"] > BAR]
    print(f"{len(changed)} networks changed, worst ratio {max((row['ratio'] for row in changed), default=1.0):.3f}; "
          f"above {BAR}: {', '.join(slower) or 'none'}")  # fmt: skip
    noise = [row["ratio"] for row in rows if row["same_network"]]
    if noise:
        print(f"{len(noise)} stayed as they were: {min(noise):.3f}-{max(noise):.3f} is the machine's noise")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": where, "rows": rows}, file, indent=1)
            file.write("\n")
    return int(bool(slower))


if __name__ == "__main__":
    sys.exit(main())
