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
class LayerReport:
    """One layer. Times are milliseconds of all its calls in one forward; 0.0 where nothing was measured."""

    name: str
    kind: str
    kernel: str
    reason: str
    shape: tuple[int, ...] = ()
    sparsity: float = 0.0
    vector: int = 0
    dense_ms: float = 0.0
    dense_as: str = ""
    sparse_ms: float = 0.0
    speedup: float = 0.0
    speedup_low: float = 0.0
    speedup_high: float = 0.0
    dense_bytes: int = 0
    sparse_bytes: int = 0
    source: str = ""  # of the times: "measured", "kept" (measured before) or "predicted"
    error: float = 0.0  # of a predicted speed-up, typically


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


# By the first number of a cell, else by its text; another click turns the order round; empty cells stay below.
SORT = """
document.querySelectorAll("th button").forEach((button, column) => button.onclick = () => {
  const head = button.parentNode, body = document.querySelector("tbody"), rows = [...body.rows];
  const down = head.getAttribute("aria-sort") === "ascending";
  const texts = new Map(rows.map(row => [row, row.cells[column].textContent]));
  const numeric = rows.every(row => !texts.get(row) || /^[0-9]/.test(texts.get(row)));
  document.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
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

COLUMNS = ("layer", "kernel", "sparsity", "V", "dense ms", "sparse ms", "speed-up", "interval", "bytes", "why")


@dataclass
class Report:
    """Dense and sparse times of a model, by layer and as a whole, and where they were taken."""

    machine: dict[str, str]
    layers: list[LayerReport] = field(default_factory=list)
    network: list[NetworkReport] = field(default_factory=list)

    def rows(self) -> list[tuple[str, ...]]:
        """The layers as text, under COLUMNS."""
        rows = []
        for layer in self.layers:
            timed = layer.sparse_ms > 0
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
                    size,
                    layer.reason,
                )
            )
        return rows

    def summary(self) -> list[str]:
        """One sentence per batch size."""
        return [
            f"batch {n.batch}, {n.threads} thread(s): dense {n.dense_ms:.3f} ms ({n.dense_as}), "
            f"as converted {n.sparse_ms:.3f} ms, {n.speedup:.2f}x ({n.speedup_low:.2f}-{n.speedup_high:.2f})"
            for n in self.network
        ]

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

    def save_html(self, path: str | os.PathLike) -> None:
        """One page that opens from disk and needs nothing else; a click on a column's head sorts by it."""
        longest = max((max(layer.dense_ms, layer.sparse_ms) for layer in self.layers), default=0.0) or 1.0
        body = []
        for layer, row in zip(self.layers, self.rows(), strict=True):
            cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
            bars = "".join(
                f'<div class="{name}" style="width:{100 * value / longest:.1f}%"></div>'
                for name, value in (("dense", layer.dense_ms), ("sparse", layer.sparse_ms))
            )
            body.append(f"<tr>{cells}<td class=bars>{bars}</td></tr>")
        facts = "".join(f"<li>{html.escape(key)}: {html.escape(value)}</li>" for key, value in self.machine.items())
        facts += "".join(f"<li><b>{html.escape(sentence)}</b></li>" for sentence in self.summary())
        head = "".join(f"<th><button>{column}</button></th>" for column in COLUMNS) + "<th>dense / sparse</th>"
        page = (
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>sparsekd report</title>'
            '<meta name="viewport" content="width=device-width,initial-scale=1"><style>'
            "body{font:15px system-ui,sans-serif;margin:1rem;color:#222}.wide{overflow-x:auto}"
            "table{border-collapse:collapse}td,th{padding:.3rem .6rem;border-bottom:1px solid #ddd;text-align:left;"
            "white-space:nowrap}td:nth-child(10){white-space:normal;min-width:20rem}"
            "th button{all:unset;cursor:pointer;font-weight:bold}th button:focus-visible{outline:2px solid #2a7}"
            ".bars{min-width:10rem}.dense,.sparse{height:.6rem;margin:1px}"
            ".dense{background:#bbb}.sparse{background:#2a7}</style>"
            f"<h1>Dense against sparse, layer by layer</h1><ul>{facts}</ul>"
            f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
            f"<script>{SORT}</script></html>"
        )
        write_text(path, page)

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
