"""Predicted against measured: how well it is known what a layer takes, dense and sparse, before it is pruned.

    python benchmarks/cost_model.py check --json FILE            # networks that the laws were not fitted to
    python benchmarks/cost_model.py collect --out rows.json      # measure layers of other networks and random ones
    python benchmarks/cost_model.py fit --rows rows.json ...     # write sparsekd/sparse/cost_model.safetensors

`check` asks for each layer what `would_it_be_faster` says (four densities with positions at random, measured here) and
what the fitted laws say (nothing measured here), and then measures it with masks that leave channels unlike each other.
It does so twice: how far the second time is from the first is what noise alone makes of a true prediction.
It prints the median errors, and in how many of layer x sparsity cases a prediction is on the right side of break-even.
Exit code 1: an error above 15%, or fewer than 95% on the right side, of what `would_it_be_faster` says.

All ways to run a layer take turns within one run: on one thread by process CPU time, minimum over rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.optimize
import torch
from safetensors.numpy import save_file
from torch import nn

from sparsekd.measure.machine import clock
from sparsekd.measure.timing import compare, peak_flops, threads
from sparsekd.model_names import model_of
from sparsekd.reporting import machine
from sparsekd.sparse import anchors
from sparsekd.sparse.anchors import random_mask
from sparsekd.sparse.cost_model import FILE, WAYS, Law, covariance, fitted, kind, predict, terms, traits
from sparsekd.sparse.cost_model import KINDS as KINDS_OF_LAW
from sparsekd.sparse.dispatch import KINDS, dense_engines, evaluating, from_dense
from sparsekd.sparse.problem import Problem
from sparsekd.sparse.surgery import record_inputs

# Network: height and width of its input.
FIT = {
    "resnet18": 224, "resnet50": 224, "mobilenet_v2": 224, "vgg16": 224, "efficientnet_b0": 224,
    "cifar_resnet20x4": 32, "densenet121": 224, "googlenet": 224, "regnet_y_400mf": 224, "shufflenet_v2_x1_0": 224,
    "convnext_tiny": 224, "vit_b_16": 224, "resnext50_32x4d": 160, "reference_teacher": 32,
}  # fmt: skip
CHECK = {
    "resnet34": 224, "wide_resnet50_2": 192, "mnasnet1_0": 224, "squeezenet1_1": 224, "vgg11": 192,
    "regnet_x_800mf": 224, "efficientnet_b1": 240, "reference_student": 32, "mobilenet_v3_large": 224,
}  # fmt: skip
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
LARGEST = 8e8  # multiplications of a layer that is measured; larger ones take long and are no different


def layers_of(name: str, size: int, batch: int) -> dict[Problem, tuple[nn.Module, torch.Tensor]]:
    """The different layers of a network, plain, with the input of each."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about weights that are not initialised
        model = model_of(name, 10 if name.startswith(("cifar", "reference")) else 1000).eval()
    found = {}
    for layer, inputs in record_inputs(model, torch.randn(batch, 3, size, size)).items():
        if type(layer) in KINDS:
            found.setdefault(Problem.of(layer, inputs[0]), (layer, inputs[0]))
    return {problem: pair for problem, pair in found.items() if problem.multiplications <= LARGEST}


def random_layers(count: int, seed: int = 0) -> dict[Problem, tuple[nn.Module, torch.Tensor]]:
    """Layers of sizes that no network above has."""
    draw, found = random.Random(seed), {}

    def size(low: float, high: float) -> int:
        return round(low * (high / low) ** draw.random())

    while len(found) < count:
        batch, c, k = draw.choice((1, 1, 2, 4, 8, 16)), size(8, 1024), size(8, 1024)
        if draw.random() < 0.25:
            layer, x = nn.Linear(4 * c, 4 * k), torch.randn(size(1, 512), 4 * c)
        else:
            kernel, stride = draw.choice((1, 1, 3, 3, 3, 5, 7)), draw.choice((1, 1, 1, 2))
            c, k = (8 * -(-n // 8) if draw.random() < 0.8 else n for n in (c, k))
            dilation = 2 if kernel > 1 and draw.random() < 0.1 else 1
            padding = dilation * (kernel // 2)
            groups = draw.choice([1] * 8 + [c] + [n for n in (2, 4, 8, 32) if c % n == k % n == 0])
            layer = nn.Conv2d(c, c if groups == c else k, kernel, stride, padding, dilation, groups)
            point = draw.random() < 0.15
            x = torch.randn(batch, c, *((1, 1) if point else (size(4, 96), size(4, 96))))
            layer = nn.Conv2d(c, k, 1) if point else layer
            if draw.random() < 0.15:
                x = x.contiguous(memory_format=torch.channels_last)
        problem = Problem.of(layer, x)
        if problem.multiplications <= LARGEST / 8:
            found[problem] = (layer, x)
    return found


def product() -> torch.Tensor:
    """What the machine's speed of the moment is read off."""
    a = torch.ones(192, 192)
    return a @ a


def measured(
    problem: Problem,
    layer: nn.Module,
    x: torch.Tensor,
    cases: list[tuple[int, float]],
    rounds: int,
    mask_of: Callable = random_mask,
) -> dict:
    """Milliseconds of the dense layer and of its sparse twins of each (V, sparsity)."""
    engines, twins = {**dense_engines(layer, [x]), "reference": product}, {}
    for vector, sparsity in cases:
        mask = mask_of(layer.weight, sparsity, vector, problem.groups)
        if mask.any():
            twins[vector, sparsity] = from_dense(layer, mask, vector)
            engines[vector, sparsity] = lambda twin=twins[vector, sparsity]: twin(x)
    with evaluating(layer):
        for twin in twins.values():
            twin.eval()
        timings = compare(engines, rounds=rounds, min_time=0.002, warmup=2, clock=clock())
    dense = min(set(timings) & {"as it is", "channels_last"}, key=lambda name: timings[name].min)
    return {
        "problem": problem.as_row(),
        "reference_ms": timings["reference"].min * 1e3,
        "dense_ms": timings[dense].min * 1e3,
        "dense_as": dense,
        "sparse": [[case[0], twin.density, timings[case].min * 1e3] for case, twin in twins.items()],
    }


def collected(networks: dict[str, int], batches: list[int], extra: int, cases: int, rounds: int, seed: int):
    """Rows of all different layers so far, after each source; `cases` of (V, sparsity) for each, drawn at random."""
    draw, rows, seen = random.Random(seed), [], set()
    sources = [(name, batch) for name in networks for batch in batches] + ([("random", 0)] if extra else [])
    for name, batch in sources:
        layers = layers_of(name, networks[name], batch) if batch else random_layers(extra, seed)
        for problem, (layer, x) in layers.items():
            if problem in seen:
                continue
            seen.add(problem)
            every = [(vector, sparsity) for vector in (1, 1, 4, 8) for sparsity in SPARSITIES]
            drawn = list(dict.fromkeys(draw.sample(every, cases)))
            rows.append({"network": name, **measured(problem, layer, x, drawn, rounds)})
        print(f"{name}, batch {batch}: {len(rows)} layers so far", file=sys.stderr, flush=True)
        yield rows


def collect(args) -> int:
    networks = FIT if args.networks is None else args.networks
    peak = peak_flops() / 1e9
    for rows in collected(networks, args.batch, args.random, args.cases, args.rounds, args.seed):
        Path(args.out).write_text(json.dumps({"machine": machine(), "peak_gflops": peak, "rows": rows}))
    return 0


def read(files: list[str]) -> tuple[list[tuple[Problem, dict]], dict, float]:
    """(problem, row) of all files, with times in milliseconds of an undisturbed machine; the machine; its peak.

    The machine's speed changes with its neighbours. Each row holds a product of matrices that took turns with it.
    """
    rows, contents = [], [json.loads(Path(file).read_text()) for file in files]
    usual = float(np.quantile([row["reference_ms"] for content in contents for row in content["rows"]], 0.1))
    for row in (row for content in contents for row in content["rows"]):
        sizes = {key: tuple(value) if isinstance(value, list) else value for key, value in row["problem"].items()}
        slower = row["reference_ms"] / usual
        row["dense_ms"] /= slower
        row["sparse"] = [(vector, density, ms / slower) for vector, density, ms in row["sparse"]]
        rows.append((Problem(**sizes), row))
    return rows, contents[0]["machine"], 2 * 192**3 / usual / 1e6


def table(rows: list[tuple[Problem, dict]], name: str, way: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Terms, traits and milliseconds of all rows that follow one law."""
    cases = []
    for problem, row in rows:
        if kind(problem) == name and way == "dense":
            cases.append((problem, 1, 1.0, row["dense_ms"]))
        elif kind(problem) == name:
            cases += [(problem, *case) for case in row["sparse"]]
    made = [(terms(p, way, v, d), traits(p, way, v, d), ms) for p, v, d, ms in cases]
    return tuple(np.array(column) for column in zip(*made, strict=True))


def law_of(term: np.ndarray, trait: np.ndarray, ms: np.ndarray, most: int = 600) -> Law:
    """Fits one law. Scales, height and noise are those of the largest marginal likelihood on `most` of the rows."""
    weights, _ = scipy.optimize.nnls(term / ms[:, None], np.ones(len(ms)))
    rest = np.log(ms) - np.log(term @ weights)
    some = np.random.default_rng(0).permutation(len(ms))[:most]
    x, y, count = torch.from_numpy(trait[some]), torch.from_numpy(rest[some]), trait.shape[1]
    usual = np.log(2 * trait.std(0) + 1e-1)

    def unlikely(parameters):
        free = torch.tensor(parameters, requires_grad=True)
        with torch.enable_grad():
            scaled = x / free[:count].exp()
            squares = (scaled**2).sum(1)[:, None] + (scaled**2).sum(1) - 2 * scaled @ scaled.T
            between = free[-2].exp() / (1 + squares.clamp_min(0) / 2) + free[-1].exp() * torch.eye(len(y)).double()
            root = torch.linalg.cholesky(between)
            solved = torch.cholesky_solve(y[:, None], root)[:, 0]
            prior = ((free[:count] - torch.from_numpy(usual)) ** 2).sum() / 8
            loss = y @ solved / 2 + root.diagonal().log().sum() + prior
            loss.backward()
        return loss.item(), free.grad.numpy()

    start = np.array([*usual, math.log(rest.var() + 1e-3), math.log(4e-3)])
    bounds = [(-4, 6)] * count + [(-8, 3), (-9, 0)]
    found = scipy.optimize.minimize(
        unlikely, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 60}
    )
    scales, height, noise = np.exp(found.x[:count]), *np.exp(found.x[-2:])
    between = covariance(trait, trait, scales) + noise / height * np.eye(len(ms))
    return Law(weights, trait, scales, np.linalg.solve(between, rest))


def errors(rows: list[tuple[Problem, dict]], laws: dict) -> dict:
    """How far predictions are from what was measured."""
    off, right = {"dense": [], "sparse": [], "speed-up": []}, []
    for problem, row in rows:
        dense = laws[kind(problem), "dense"].ms(problem, "dense", 1, 1.0)
        off["dense"].append(abs(dense / row["dense_ms"] - 1))
        for vector, density, ms in row["sparse"]:
            sparse = laws[kind(problem), "sparse"].ms(problem, "sparse", vector, density)
            off["sparse"].append(abs(sparse / ms - 1))
            off["speed-up"].append(abs(dense / sparse * ms / row["dense_ms"] - 1))
            right.append((dense > sparse) == (row["dense_ms"] > ms))
    return {
        "layers": len(off["dense"]),
        "cases": len(right),
        "median_error": {name: round(float(np.median(values)), 4) for name, values in off.items()},
        "error_of_nine_in_ten": {name: round(float(np.quantile(values, 0.9)), 4) for name, values in off.items()},
        "right_side": round(float(np.mean(right)), 4),
    }


def fitted_laws(rows: list[tuple[Problem, dict]]) -> dict:
    return {(name, way): law_of(*table(rows, name, way)) for name in KINDS_OF_LAW for way in WAYS}


def fit(args) -> int:
    rows, where, peak = read(args.rows)
    # The error that users are told is that on every fifth layer, by the laws of the other four.
    order = np.random.default_rng(0).permutation(len(rows))
    held = {int(i) for i in order[: len(rows) // 5]}
    told = errors([rows[i] for i in sorted(held)], fitted_laws([row for i, row in enumerate(rows) if i not in held]))
    print(json.dumps(told, indent=1))
    facts = {"machine": where, "peak_gflops": peak, "layers": len(rows), "held_out": told}
    facts["error"] = told["median_error"]["speed-up"]
    tensors = {}
    for (name, way), law in fitted_laws(rows).items():
        for part in dataclasses.fields(law):
            tensors[f"{name}.{way}.{part.name}"] = getattr(law, part.name).astype(np.float32)
    save_file(tensors, FILE, metadata={"facts": json.dumps(facts)})
    return 0


def skewed_mask(weight: torch.Tensor, sparsity: float, vector: int, groups: int) -> torch.Tensor:
    """As magnitude leaves it where channels differ in size: some keep much more than others."""
    if groups > 1 or weight.shape[0] % vector:
        return random_mask(weight, sparsity, vector, groups, seed=1)
    rows = weight.shape[0] // vector
    score = torch.rand(rows, weight[0].numel()) * torch.rand(rows, 1).mul(2).exp()
    least = score.flatten().kthvalue(max(round(sparsity * score.numel()), 1)).values
    return (score > least).repeat_interleave(vector, 0).view(weight.shape)


def checked(networks: dict[str, int], args) -> dict[str, list[dict]]:
    """For each network and case: measured, and predicted before by densities measured here and by the laws."""
    draw, found = random.Random(args.seed), {}
    for name, batch in ((name, batch) for name in networks for batch in args.batch):
        for problem, (layer, x) in layers_of(name, networks[name], batch).items():
            for vector in args.vector:
                sparsities = draw.sample(args.sparsity, min(args.cases, len(args.sparsity)))
                figures = anchors.measured(layer, [x], vector, {"reference": product})
                before = figures.pop("reference")
                foretold = {s: anchors.read_off(figures, 1 - s) for s in sparsities}
                laws = {s: predict([problem], vector, 1 - s) for s in sparsities}
                row = measured(problem, layer, x, [(vector, s) for s in sparsities], args.rounds, skewed_mask)
                slower = row["reference_ms"] / before  # than when it was foretold, for its neighbours
                nominal = before / (2 * 192**3 / fitted()[1]["peak_gflops"] / 1e6)  # slower than when it was fitted
                again = measured(problem, layer, x, [(vector, s) for s in sparsities], args.rounds, skewed_mask)
                later = row["reference_ms"] / again["reference_ms"]
                for at, (case, (_, density, ms)) in enumerate(zip(sparsities, row["sparse"], strict=True)):
                    found.setdefault(f"{name}, batch {batch}", []).append(
                        {
                            "layer": str(list(problem.as_row().values())[:11]),
                            "vector": vector,
                            "density": density,
                            "measured": [row["dense_ms"] / slower, ms / slower],
                            "foretold": [foretold[case].dense_ms, foretold[case].sparse_ms],
                            "again": [ms / slower * later for ms in (again["dense_ms"], again["sparse"][at][2])],
                            "laws": [laws[case].dense_ms * nominal, laws[case].sparse_ms * nominal],
                        }
                    )
        print(f"{name}, batch {batch}: {summary(found[f'{name}, batch {batch}'])}", flush=True)
    return found


def summary(cases: list[dict]) -> dict:
    """Median relative errors, and how often the prediction was on the right side of break-even."""
    result = {"cases": len(cases)}
    for way in ("foretold", "laws", "again"):
        predicted, measured = (np.array([case[key] for case in cases]) for key in (way, "measured"))
        off = np.abs(predicted / measured - 1)
        gains = [array[:, 0] / array[:, 1] for array in (predicted, measured)]
        result[way] = {
            "dense_ms": round(float(np.median(off[:, 0])), 4),
            "sparse_ms": round(float(np.median(off[:, 1])), 4),
            "speedup": round(float(np.median(np.abs(gains[0] / gains[1] - 1))), 4),
            "right_side": round(float(np.mean((gains[0] > 1) == (gains[1] > 1))), 4),
        }
    return result


def check(args) -> int:
    found: dict[str, list[dict]] = {}
    networks = CHECK if args.networks is None else args.networks
    for name, size in networks.items():
        found |= checked({name: size}, args)
        every = summary([case for cases in found.values() for case in cases])
        if args.json:
            content = {"machine": machine(), "fit": fitted()[1], "all": every}
            content["networks"] = {network: summary(cases) for network, cases in found.items()}
            content["cases"] = found
            Path(args.json).write_text(json.dumps(content) + "\n")
    print(f"all: {every}")
    told = every["foretold"]
    return int(max(told["dense_ms"], told["sparse_ms"], told["speedup"]) > 0.15 or told["right_side"] < 0.95)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(dest="command", required=True)
    command = commands.add_parser("collect")
    command.set_defaults(function=collect)
    command.add_argument("--out", required=True)
    command.add_argument("--networks", type=json.loads, help='{"name": size}')
    command.add_argument("--random", type=int, default=300, help="random layers beside those of networks")
    command.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    command.add_argument("--cases", type=int, default=4, help="of (V, sparsity) for each layer")
    command.add_argument("--rounds", type=int, default=7)
    command.add_argument("--seed", type=int, default=0)
    command = commands.add_parser("fit")
    command.set_defaults(function=fit)
    command.add_argument("--rows", nargs="+", required=True, metavar="FILE")
    command = commands.add_parser("check")
    command.set_defaults(function=check)
    command.add_argument("--networks", type=json.loads, help='{"name": size}')
    command.add_argument("--batch", type=int, nargs="+", default=[1])
    command.add_argument("--vector", type=int, nargs="+", default=[1, 4])
    command.add_argument("--sparsity", type=float, nargs="+", default=list(SPARSITIES))
    command.add_argument("--cases", type=int, default=3, help="sparsities for each layer, drawn from these")
    command.add_argument("--rounds", type=int, default=7)
    command.add_argument("--seed", type=int, default=1)
    command.add_argument("--json", metavar="FILE")
    return made


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    with threads(1), torch.no_grad():
        return args.function(args)


if __name__ == "__main__":
    sys.exit(main())
