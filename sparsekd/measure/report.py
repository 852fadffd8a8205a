"""What was measured, as a table, JSON, Markdown, one HTML page or a picture. Knows nothing of how it was measured."""

from __future__ import annotations

import csv
import html
import io
import json
import os
import tempfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path


@dataclass(frozen=True)
class LayerTimes:
    """How a layer runs, and why. Times are milliseconds of all its calls in one forward, 0.0 where none is known."""

    name: str
    kind: str  # "Conv1d", "Conv2d" or "Linear"
    kernel: str  # "sparse" or "dense"
    reason: str
    shape: tuple[int, ...] = ()  # of the input
    sparsity: float = 0.0
    vector: int = 0
    dense_ms: float = 0.0  # the better of the two dense ways
    dense_as: str = ""
    sparse_ms: float = 0.0
    speedup: float = 0.0
    speedup_low: float = 0.0
    speedup_high: float = 0.0
    dense_bytes: int = 0
    sparse_bytes: int = 0
    source: str = ""  # of the times: "measured", "kept" (measured before, from disk) or "predicted"
    error: float = 0.0  # of a predicted speed-up: in half of the layers it is less off than this, relatively


@dataclass(frozen=True)
class LayerReport(LayerTimes):
    """One layer."""

    dense_share: float = 0.0  # of the machine's FMA peak that the useful work reaches
    sparse_share: float = 0.0


@dataclass(frozen=True)
class NetworkReport:
    """The whole network at one batch size."""

    batch: int
    threads: int
    dense_ms: float
    dense_as: str
    sparse_ms: float
    speedup: float
    speedup_low: float
    speedup_high: float


@dataclass(frozen=True)
class AccuracyPoint:
    """A model's accuracy, in whatever unit the user has, and its milliseconds."""

    name: str
    accuracy: float
    ms: float


# By the first number of a cell, else by its text; another click turns the order round; empty cells stay below.
SORT = """
document.querySelectorAll("#layers th button").forEach((button, column) => button.onclick = () => {
  const head = button.parentNode, body = document.querySelector("#layers tbody"), rows = [...body.rows];
  const down = head.getAttribute("aria-sort") === "ascending";
  const texts = new Map(rows.map(row => [row, row.cells[column].textContent]));
  const numeric = rows.every(row => !texts.get(row) || /^[0-9]/.test(texts.get(row)));
  document.querySelectorAll("#layers th").forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  rows.sort((a, b) => {
    const one = texts.get(a), two = texts.get(b);
    if (!one || !two) return !one - !two;
    const order = numeric ? parseFloat(one) - parseFloat(two) : one.localeCompare(two, "en", {numeric: true});
    return down ? -order : order;
  });
  body.append(...rows);
});
"""

COLUMNS = (
    "layer", "kernel", "sparsity", "V", "dense ms", "sparse ms", "speed-up", "interval", "of peak", "bytes", "why",
)  # fmt: skip
NETWORK = ("batch", "threads", "dense ms", "as converted ms", "speed-up", "interval")


STYLE = (
    "body{font:15px system-ui,sans-serif;margin:1rem;color:#222}.wide{overflow-x:auto}"
    "table{border-collapse:collapse}td,th{padding:.3rem .6rem;border-bottom:1px solid #ddd;text-align:left;"
    "white-space:nowrap}#layers td:nth-child(11){white-space:normal;min-width:20rem}"
    "th button{all:unset;cursor:pointer;font-weight:bold}th button:focus-visible{outline:2px solid #2a7}"
    ".bars{min-width:10rem}.dense,.sparse{height:.6rem;margin:1px}.dense{background:#bbb}.sparse{background:#2a7}"
    "svg{width:100%;max-width:40rem;font-size:13px}circle{fill:#2a7}path{fill:none;stroke:#888}"
)


def _bars(dense: float, sparse: float, longest: float) -> str:
    return "".join(
        f'<div class="{name}" style="width:{100 * value / longest:.1f}%"></div>'
        for name, value in (("dense", dense), ("sparse", sparse))
    )


@dataclass
class Report:
    """Dense and sparse times of a model, by layer and as a whole, and where they were taken."""

    machine: dict[str, str]
    layers: list[LayerReport] = field(default_factory=list)
    network: list[NetworkReport] = field(default_factory=list)
    accuracy: list[AccuracyPoint] = field(default_factory=list)

    def rows(self) -> list[tuple[str, ...]]:
        """The layers as text, under COLUMNS."""
        rows = []
        for layer in self.layers:
            timed = layer.sparse_ms > 0
            share = f"{layer.sparse_share:.0%} (dense {layer.dense_share:.0%})" if layer.sparse_share else ""
            size = f"{layer.sparse_bytes} of {layer.dense_bytes}" if timed else ""
            rows.append(
                (
                    layer.name,
                    layer.kernel,
                    f"{layer.sparsity:.3f}",
                    str(layer.vector) if layer.vector else "",
                    f"{layer.dense_ms:.3f}" if layer.dense_ms else "",
                    f"{layer.sparse_ms:.3f}" if timed else "",
                    f"{layer.speedup:.2f}x" if timed else "",
                    f"{layer.speedup_low:.2f}-{layer.speedup_high:.2f}" if timed else "",
                    share,
                    size,
                    layer.reason,
                )
            )
        return rows

    def summary(self) -> list[str]:
        """One sentence per batch size and number of threads, and per point of accuracy."""
        return [
            f"batch {n.batch}, {n.threads} thread(s): dense {n.dense_ms:.3f} ms ({n.dense_as}), "
            f"as converted {n.sparse_ms:.3f} ms, {n.speedup:.2f}x ({n.speedup_low:.2f}-{n.speedup_high:.2f})"
            for n in self.network
        ] + [f"{point.name}: accuracy {point.accuracy:g} in {point.ms:.3f} ms" for point in self.accuracy]

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(title="; ".join(f"{key} {value}" for key, value in self.machine.items()))
        for column in COLUMNS:
            table.add_column(column, overflow="fold")
        for row in self.rows():
            table.add_row(*row)
        console = Console(width=160, file=open(os.devnull, "w"), record=True)  # noqa: SIM115 (recorded, not written)
        console.print(table)
        for sentence in self.summary():
            console.print(sentence)
        console.file.close()
        return console.export_text().rstrip()

    def to_json(self) -> str:
        """Everything, as JSON text."""
        content = {
            "machine": self.machine,
            "network": [asdict(row) for row in self.network],
            "layers": [asdict(row) for row in self.layers],
            "accuracy": [asdict(point) for point in self.accuracy],
        }
        return json.dumps(content, indent=1)

    def to_markdown(self) -> str:
        """A Markdown table of the layers under the sentences about the network."""
        lines = [f"- {key}: {value}" for key, value in self.machine.items()]
        lines += [f"- {sentence}" for sentence in self.summary()]
        lines += ["", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in self.rows()]
        return "\n".join(lines) + "\n"

    def to_csv(self) -> str:
        """The layers as CSV text, one line each under the names of their fields."""
        out = io.StringIO()
        writer = csv.DictWriter(out, [column.name for column in fields(LayerReport)], lineterminator="\n")
        writer.writeheader()
        for layer in self.layers:
            writer.writerow({**asdict(layer), "shape": "x".join(map(str, layer.shape))})
        return out.getvalue()

    def save_csv(self, path: str | os.PathLike) -> None:
        """Writes :meth:`to_csv`."""
        write_text(path, self.to_csv())

    def save_html(self, path: str | os.PathLike) -> None:
        """One page that opens from disk and needs nothing else; a click on a column's head sorts by it."""
        facts = "".join(f"<li>{html.escape(key)}: {html.escape(value)}</li>" for key, value in self.machine.items())
        page = (
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>sparsekd report</title>'
            f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style>'
            f"<h1>Dense against sparse, layer by layer</h1><ul>{facts}</ul>{self._networks()}{self._points()}"
            f"<h2>Layers</h2><div class=wide>{self._table()}</div><script>{SORT}</script></html>"
        )
        write_text(path, page)

    def _table(self) -> str:
        longest = max((max(layer.dense_ms, layer.sparse_ms) for layer in self.layers), default=0.0) or 1.0
        body = []
        for layer, row in zip(self.layers, self.rows(), strict=True):
            cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
            bars = _bars(layer.dense_ms, layer.sparse_ms, longest)
            body.append(f"<tr>{cells}<td class=bars>{bars}</td></tr>")
        head = "".join(f"<th><button>{column}</button></th>" for column in COLUMNS) + "<th>dense / sparse</th>"
        return f"<table id=layers><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"

    def _networks(self) -> str:
        if not self.network:
            return ""
        longest = max(max(n.dense_ms, n.sparse_ms) for n in self.network) or 1.0
        rows = []
        for n in self.network:
            cells = (
                n.batch, n.threads, f"{n.dense_ms:.3f} ({n.dense_as})", f"{n.sparse_ms:.3f}", f"{n.speedup:.2f}x",
                f"{n.speedup_low:.2f}-{n.speedup_high:.2f}",
            )  # fmt: skip
            text = "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells)
            rows.append(f"<tr>{text}<td class=bars>{_bars(n.dense_ms, n.sparse_ms, longest)}</td></tr>")
        head = "".join(f"<th>{column}</th>" for column in (*NETWORK, "dense / as converted"))
        return f"<h2>Whole network</h2><div class=wide><table><tr>{head}</tr>{''.join(rows)}</table></div>"

    def _points(self) -> str:
        """Accuracy over latency, drawn."""
        if not self.accuracy:
            return ""
        slowest = max(point.ms for point in self.accuracy) or 1.0
        low, high = (pick(point.accuracy for point in self.accuracy) for pick in (min, max))
        span = (high - low) or 1.0
        marks = []
        for point in self.accuracy:
            x, y = 40 + 420 * point.ms / slowest, 200 - 160 * (point.accuracy - low) / span
            anchor = "end" if x > 300 else "start"
            label = html.escape(f"{point.name}: {point.accuracy:g}, {point.ms:.3g} ms")
            beside = x + (-9 if anchor == "end" else 9)
            marks.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
                f'<text x="{beside:.1f}" y="{y - 8:.1f}" text-anchor="{anchor}">{label}</text>'
            )
        axes = (
            '<path d="M40 20V220H480"/><text x="470" y="236" text-anchor="end">ms</text>'
            '<text x="4" y="14">accuracy</text>'
        )
        return (
            '<h2>Accuracy against latency</h2><svg viewBox="0 0 500 240" role="img" '
            f'aria-label="accuracy against latency">{axes}{"".join(marks)}</svg>'
        )

    def save_png(self, path: str | os.PathLike) -> None:
        """Bars of dense and sparse milliseconds per layer (needs matplotlib)."""
        from matplotlib.figure import Figure

        timed = [layer for layer in self.layers if layer.sparse_ms > 0]
        figure = Figure(figsize=(7, 1.2 + 0.35 * max(len(timed), 1)), layout="constrained")
        axes = figure.subplots()
        places = range(len(timed))
        axes.barh([p - 0.2 for p in places], [layer.dense_ms for layer in timed], 0.4, color="#aaaaaa", label="dense")
        axes.barh([p + 0.2 for p in places], [layer.sparse_ms for layer in timed], 0.4, color="#22aa77", label="sparse")
        axes.set_yticks(list(places), [f"{layer.name} ({layer.sparsity:.0%} removed)" for layer in timed])
        axes.invert_yaxis()
        axes.set_xlabel("ms per forward")
        axes.legend()
        figure.savefig(path, dpi=120)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file aside and renames it, so that an existing one stays whole until the new one is."""
    path = Path(path)
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise
