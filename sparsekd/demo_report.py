"""What the demonstration writes: report.md, results.json, the plots, and the table on the terminal."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from .measure.report import Report, write_text

if TYPE_CHECKING:
    from .demo import Demo


def percent(values: list[float]) -> str:
    """Mean and, of several seeds, standard deviation, in percent."""
    mean = f"{100 * statistics.fmean(values):.2f}"
    return f"{mean} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else mean


def times(row: dict, batch: int) -> tuple[str, str]:
    """Dense and sparse milliseconds at a batch size; no sparse time where nothing was swapped."""
    network = next(n for n in row["networks"] if n["batch"] == batch)
    swapped = f"{network['sparse_ms']:.3f} ({network['speedup']:.2f}x)" if row["sparse_layers"] else "-"
    return f"{network['dense_ms']:.3f}", swapped


def findings(demo: Demo) -> list[str]:
    """What the figures say, each computed from them."""
    alone, distilled = demo.accuracies("alone"), demo.accuracies("distilled")
    kept, pruned = demo.accuracies("retrained"), demo.accuracies("retrained", "pruned")
    random_kept, random_pruned = demo.accuracies("random"), demo.accuracies("random", "pruned")
    both, both_pruned = demo.accuracies("both"), demo.accuracies("both", "pruned")
    said = []
    for name, before, low, after in (
        ("Retraining", alone, pruned, kept),
        ("Retraining with the teacher", distilled, both_pruned, both),
    ):
        lost = statistics.fmean(before) - statistics.fmean(low)
        won = statistics.fmean(after) - statistics.fmean(low)
        if lost > 0:
            said.append(
                f"{name} recovers {won / lost:.0%} of what pruning lost ({percent(before)}% → {percent(low)}% → "
                f"{percent(after)}%)."
            )
        else:
            said.append(
                f"Pruning lost nothing ({percent(before)}% → {percent(low)}%); retraining gives {percent(after)}%."
            )
    said.append(
        f"Gradient importance against random: {percent(pruned)}% against {percent(random_pruned)}% before retraining, "
        f"{percent(kept)}% against {percent(random_kept)}% after it."
    )
    gain = statistics.fmean(distilled) - statistics.fmean(alone)
    fraction = demo.settings.labels_fraction
    labels = f", both with the labels of {fraction:.0%} of the images" if fraction < 1 else ""
    said.append(
        f"Distillation: {percent(distilled)}% against {percent(alone)}% for the student alone{labels}, "
        f"a difference of {100 * gain:+.2f} points."
    )
    return said


def write(demo: Demo, rows: list[dict], curve: dict[str, list[float]], layers: Report, where: dict[str, str]) -> None:
    folder: Path = demo.folder
    _plot_curve(demo, curve, folder / "accuracy.png")
    layers.save_png(folder / "layers.png")
    results = {
        "data": demo.args.data,
        "synthetic": demo.data.synthetic,
        "machine": where,
        "settings": vars(demo.settings),
        "sparsity": demo.sparsity,
        "seeds": list(demo.seeds),
        "rows": rows,
        "records": {f"{kind}-{seed}": record for (kind, seed), record in demo.records.items()},
        "curve": {"sparsity": list(_curve_sparsities()), **curve},
        "layers": json.loads(layers.to_json()),
    }
    write_text(folder / "results.json", json.dumps(results, indent=1))
    write_text(folder / "report.md", _markdown(demo, rows, curve, layers, where))
    demo.console.print(_table(demo, rows))
    for sentence in findings(demo):
        demo.console.print(sentence)
    demo.console.print(f"report.md, results.json, accuracy.png, layers.png and student.safetensors are in {folder}")


def _curve_sparsities() -> tuple[float, ...]:
    from .demo import CURVE

    return CURVE


HEADER = ("model", "accuracy %", "parameters ≠ 0", "bytes on disk", "dense ms, batch 1", "sparse ms, batch 1",
          "dense ms, batch 64", "sparse ms, batch 64")  # fmt: skip


def _cells(row: dict) -> tuple[str, ...]:
    spread = "" if row["spread"] is None else f" ± {100 * row['spread']:.2f}"
    accuracy = f"{100 * row['accuracy']:.2f}{spread}"
    return (row["model"], accuracy, f"{row['parameters']:,}", f"{row['bytes']:,}", *times(row, 1), *times(row, 64))


def _title(demo: Demo) -> str:
    called = f"{demo.args.data} (synthetic images)" if demo.data.synthetic else demo.args.data
    return f"{called}, sparsity {demo.sparsity:g} of the prunable weights, {len(demo.seeds)} seeds"


def _table(demo: Demo, rows: list[dict]) -> Table:
    table = Table(title=_title(demo))
    for column in HEADER:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _markdown(demo: Demo, rows: list[dict], curve: dict, layers: Report, where: dict[str, str]) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in vars(demo.settings).items())
    lines = [
        f"# {_title(demo)}",
        "",
        demo.data.note,
        "",
        f"Machine: {', '.join(f'{key} {value}' for key, value in where.items())}. Settings: {settings}.",
        "Accuracy is on the test images, mean ± standard deviation over seeds; times are of the first seed's model,",
        "dense as the better of NCHW and channels_last, minimum over rounds in which dense and sparse take turns.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
        *("| " + " | ".join(_cells(row)) + " |" for row in rows),
        "",
        *(f"- {sentence}" for sentence in findings(demo)),
        "",
        "## Accuracy against sparsity, pruned and not retrained (first seed)",
        "",
        "| importance | " + " | ".join(f"{s:.0%}" for s in _curve_sparsities()) + " |",
        "|" + "---|" * (1 + len(_curve_sparsities())),
        *(f"| {name} | " + " | ".join(f"{100 * a:.2f}" for a in values) + " |" for name, values in curve.items()),
        "",
        "![accuracy against sparsity](accuracy.png)",
        "",
        "## Layers of the distilled, pruned and retrained student, batch 1",
        "",
        layers.to_markdown(),
        "![milliseconds per layer](layers.png)",
        "",
    ]
    return "\n".join(lines)


def _plot_curve(demo: Demo, curve: dict[str, list[float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in curve.items():
        axes.plot(_curve_sparsities(), [100 * v for v in values], marker="o", label=f"{name}, not retrained")
    for kind, label in (
        ("retrained", "gradient, retrained"),
        ("random", "random, retrained"),
        ("both", "gradient, retrained with the teacher"),
    ):
        values = [100 * v for v in demo.accuracies(kind)]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        axes.errorbar([demo.sparsity], [statistics.fmean(values)], [spread], fmt="s", capsize=4, label=label)
    axes.axhline(
        100 * statistics.fmean(demo.accuracies("alone")), color="#888888", lw=1, ls="--", label="student alone, dense"
    )
    axes.set_xlabel("sparsity of the prunable weights")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(_title(demo))
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
