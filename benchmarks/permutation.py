"""How much importance a grouping of output channels keeps: of neighbours, chosen, and found by a slow search.

    python benchmarks/permutation.py                # nets trained on shapes, 3 seeds; goes on where it was stopped
    python benchmarks/permutation.py --gradual      # the same groupings where the net is trained while it is pruned

Each layer of the dense students of ``accuracy.py`` (all but the first convolution and the linear layer) is pruned by
|w| to the sparsity, in vectors of V output channels. A grouping keeps a share of the layer's importance. The slow
search is simulated annealing (Kirkpatrick, Gelatt, Vecchi, Science 1983): from a random grouping, swaps of two channels
of two groups for ``--seconds`` of process CPU time, at a temperature that falls from the usual size of a change to a
thousandth of it. Rows are kept in ``benchmarks/results/permutation.json``.

``--gradual`` prunes all layers together as the cells of ``accuracy.py`` are pruned, by labels alone, up to the last
mask: what is left there of the sum of |w| that the dense student had, beside what is left of the same layers at the
same sparsities without a step of training.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from accuracy import Bench
from torch import Tensor, nn

from sparsekd import CubicSL, Distiller, Pruner
from sparsekd.measure.report import write_text
from sparsekd.pruning.layers import find_prunable
from sparsekd.pruning.patterns import Layout
from sparsekd.pruning.permutation import choose_permutation, kept_importance

RESULTS = Path(__file__).parent / "results" / "permutation.json"
SETTLED = 2000  # swaps after which the threshold is that of the grouping as it is now


def anneal(scores: Tensor, vector: int, sparsity: float, seconds: float, seed: int = 0) -> tuple[Tensor, int]:
    """A grouping of the output channels of ``scores [K, ...]``, and how many swaps it took."""
    rows = scores.flatten(1).double().numpy()  # [K, columns]
    count, draw = len(rows), np.random.default_rng(seed)
    filling = -count % vector  # rows of zeros at the end of the last group, where they stay
    rows = np.concatenate([rows, np.zeros((filling, rows.shape[1]))])
    members = np.concatenate([draw.permutation(count), np.arange(count, len(rows))]).reshape(-1, vector)
    real = [vector] * (len(members) - 1) + [vector - filling]  # members of each group
    sums = rows[members].sum(1)  # [groups, columns]
    kept = max(round((1 - sparsity) * sums.size), 1)

    def threshold() -> float:
        return float(np.partition(sums.ravel(), sums.size - kept)[sums.size - kept])

    def worth(values: np.ndarray) -> float:
        return float(np.maximum(values - tau, 0.0).sum())

    def proposal() -> tuple[int, int, int, int, np.ndarray, np.ndarray, float]:
        one, other = draw.choice(len(members), 2, replace=False) if len(members) > 2 else (0, 1)
        i, j = draw.integers(real[one]), draw.integers(real[other])
        change = rows[members[other, j]] - rows[members[one, i]]
        new_one, new_other = sums[one] + change, sums[other] - change
        gain = worth(new_one) + worth(new_other) - worth(sums[one]) - worth(sums[other])
        return one, i, other, j, new_one, new_other, gain

    tau = threshold()
    hot = float(np.std([proposal()[-1] for _ in range(200)]))
    began, swaps, progress = time.process_time(), 0, 0.0
    while progress < 1:
        if swaps % SETTLED == 0:
            tau, progress = threshold(), (time.process_time() - began) / seconds
            heat = hot * 1e-3**progress
        swaps += 1
        one, i, other, j, new_one, new_other, gain = proposal()
        if gain > 0 or draw.random() < np.exp(gain / heat):
            sums[one], sums[other] = new_one, new_other
            members[one, i], members[other, j] = members[other, j], members[one, i]
    return torch.from_numpy(members.flatten()[:count]), swaps


def measure(scores: Tensor, vector: int, sparsity: float, seconds: float) -> dict:
    """One layer: the shares of its importance that are kept."""
    began = time.process_time()
    found = choose_permutation(scores, vector, sparsity)
    took = time.process_time() - began
    order, swaps = anneal(scores, vector, sparsity, seconds)
    return {
        "unstructured": found.kept_unstructured,
        "consecutive": found.kept_consecutive,
        "permuted": found.kept_permuted,
        "annealed": kept_importance(scores, vector, sparsity, Layout(), order),
        "total": float(scores.double().sum()),
        "seconds": took,
        "annealing_swaps": swaps,
    }


def left(bench: Bench, seed: int, pattern: str, sparsity: float, gradual: bool) -> float:
    """The sum of |w| of the pruned layers when the last mask is made, over that of the dense student."""
    model, train = bench.student(seed), bench.loader(seed + 100)
    before = _magnitude(model)
    epochs, settings = bench.settings.epochs // 2, bench.settings  # of pruning; as many of retraining are left out
    optimizer = bench.optimizer(model, settings.lr, settings.weight_decay, settings.epochs * len(train))
    schedule = CubicSL(start=0, end=epochs * len(train), update_frequency=10) if gradual else None
    pruner = Pruner(model, sparsity, "magnitude", pattern, "erk", schedule, optimizer, importance_steps=1)
    if gradual:
        Distiller(model, None).fit(train, epochs, optimizer, pruner=pruner, progress=False)
    else:
        pruner.step()
    pruner.squash_mask()
    return _magnitude(model) / before


def _magnitude(model: nn.Module) -> float:
    return sum(float(layer.weight.detach().abs().sum()) for layer in find_prunable(model, "first_last").values())


def measure_gradual(bench: Bench, rows: list[dict], args: argparse.Namespace) -> list[str]:
    """Adds the rows that are missing; returns a table: means over seeds, and the range of what permuting adds."""
    patterns = [f"{vector}x1{suffix}" for vector in sorted(args.vectors) for suffix in ("", "-permuted")]
    for seed in range(args.seeds):
        for pattern in patterns:
            place = {"data": args.data, "seed": seed, "pattern": pattern, "sparsity": args.sparsity}
            if not any(place.items() <= row.items() for row in rows):
                shares = (left(bench, seed, pattern, args.sparsity, gradual) for gradual in (False, True))
                rows.append(place | dict(zip(("once", "gradual"), shares, strict=True)))
                write_text(args.json, json.dumps({"rows": rows}, indent=1) + "\n")
    made = [f"{'pattern':14} {'at once':>9} {'gradually':>9} {'permuting adds':>20} {'':>20}"]
    own = {(row["pattern"], row["seed"]): row for row in rows if row.get("data") == args.data and "pattern" in row}
    for pattern in patterns:
        line = f"{pattern:14}"
        for how in ("once", "gradual"):
            line += f" {sum(own[pattern, seed][how] for seed in range(args.seeds)) / args.seeds:9.4f}"
        for how in ("once", "gradual") if pattern.endswith("permuted") else ():
            plain = pattern.removesuffix("-permuted")
            gain = [own[pattern, seed][how] / own[plain, seed][how] - 1 for seed in range(args.seeds)]
            line += f" {how + f' {min(gain):+.1%}..{max(gain):+.1%}':>20}"
        made.append(line)
    return made


def lines(rows: list[dict]) -> list[str]:
    """A table: the mean over seeds of what the layers of a net keep together."""
    names = ("unstructured", "consecutive", "permuted", "annealed")
    heads = " ".join(f"{name:>12}" for name in names)
    made = [f"{'V':>3} {'sparsity':>8} {'seeds':>5} {heads} {'over consecutive':>16} {'of annealed':>14}"]
    for vector, sparsity in sorted({(row["vector"], row["sparsity"]) for row in rows}):
        chosen = [row for row in rows if (row["vector"], row["sparsity"]) == (vector, sparsity)]
        seeds = sorted({row["seed"] for row in chosen})
        kept = {name: [] for name in names}
        for seed in seeds:
            own = [row for row in chosen if row["seed"] == seed]
            total = sum(row["total"] for row in own)
            for name, values in kept.items():
                values.append(sum(row[name] * row["total"] for row in own) / total)
        gain = [a / b - 1 for a, b in zip(kept["permuted"], kept["consecutive"], strict=True)]
        share = [a / b for a, b in zip(kept["permuted"], kept["annealed"], strict=True)]
        means = " ".join(f"{sum(kept[name]) / len(seeds):12.4f}" for name in names)
        gains, shares = f"{min(gain):+.1%}..{max(gain):+.1%}", f"{min(share):.1%}..{max(share):.1%}"
        made.append(f"{vector:3} {sparsity:8.0%} {len(seeds):5} {means} {gains:>16} {shares:>14}")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="shapes", choices=("shapes", "digits"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--vectors", type=int, nargs="+", default=[16, 4])
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--seconds", type=float, default=60.0, help="of annealing, for each layer")
    parser.add_argument("--gradual", action="store_true", help="what is left when the last mask of a training is made")
    parser.add_argument("--runs", type=Path, default=Path("runs/permutation"), help="where trained nets are kept")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE")
    args = parser.parse_args()
    rows = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
    bench = Bench(args.data, args.runs / "results", args.runs)
    if args.gradual:
        print("\n".join(measure_gradual(bench, rows, args)))
        return
    for seed in range(args.seeds):
        model = bench.student(seed)
        for vector in args.vectors:
            for name, layer in find_prunable(model, "first_last").items():
                place = {"data": args.data, "seed": seed, "layer": name, "vector": vector, "sparsity": args.sparsity}
                if any(place.items() <= row.items() for row in rows):
                    continue
                row = place | measure(layer.weight.detach().abs(), vector, args.sparsity, args.seconds)
                rows.append(row | {"annealing_seconds": args.seconds})
                write_text(args.json, json.dumps({"rows": rows}, indent=1) + "\n")
                kept = ", ".join(f"{key} {row[key]:.4f}" for key in ("consecutive", "permuted", "annealed"))
                print(f"seed {seed} V={vector} {name}: {kept}", flush=True)
    print("\n".join(lines([row for row in rows if row["data"] == args.data and "vector" in row])))


if __name__ == "__main__":
    main()
