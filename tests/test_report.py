"""What a report looks like: table, CSV, and the page in a real browser where there is one."""

import csv
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch

import sparsekd
from sparsekd.measure.report import AccuracyPoint, LayerReport, NetworkReport, Report
from sparsekd.measure.timing import Timing

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)


NETWORK = NetworkReport(1, 1, 20.0, "as it is", 6.0, 3.3, 3.1, 3.4)


@pytest.fixture
def made():
    first = LayerReport(
        "layer10.conv", "Conv2d", "sparse", "beats <dense>, 2 & more", (1, 8, 4, 4), 0.9, 1, 10.0, "as it is", 2.0,
        5.0, 4.5, 5.5, 1000, 135, dense_share=0.8, sparse_share=0.4,
    )  # fmt: skip
    second = replace(first, name="layer2.conv", reason="beats", sparsity=0.8, dense_ms=9.5, sparse_ms=4.0)
    layers = [first, second, LayerReport("fc", "Linear", "dense", "not called with example_inputs")]
    network = [NETWORK, replace(NETWORK, batch=8, threads=2)]
    points = [AccuracyPoint("dense", 97.5, 20.0), AccuracyPoint("<sparse>", 97.25, 6.0)]
    return Report({"processor": "one", "threads": "1"}, layers, network, points)


def test_csv_has_every_field(made):
    rows = list(csv.DictReader(io.StringIO(made.to_csv())))
    assert [row["name"] for row in rows] == ["layer10.conv", "layer2.conv", "fc"]
    assert rows[0]["shape"] == "1x8x4x4" and float(rows[0]["sparse_ms"]) == 2.0
    assert rows[0]["reason"] == "beats <dense>, 2 & more"


def test_text_has_every_part(made):
    text = str(made)
    for part in (
        "40% (dense",
        "135 of 1000",
        "batch 8, 2 thread(s)",
        "<sparse>: accuracy 97.25 in 6.000 ms",
        "4.50-5.50",
    ):
        assert part in text, part
    found = json.loads(made.to_json())
    assert [point["ms"] for point in found["accuracy"]] == [20.0, 6.0] and found["network"][1]["threads"] == 2
    assert found["layers"][0]["sparse_share"] == 0.4


def test_files(made, tmp_path):
    made.save_csv(tmp_path / "r.csv")
    assert (tmp_path / "r.csv").read_text() == made.to_csv()
    pytest.importorskip("matplotlib")
    made.save_png(tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"


def test_page_asks_for_nothing_from_outside(made, tmp_path):
    made.save_html(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert not re.search(r"https?:|//[a-z]|src=|href=|@import|url\(", page)
    assert "beats &lt;dense&gt;, 2 &amp; more" in page and 'name="viewport"' in page


# What the page says of itself after clicks on a column's head: the order of its layers, and whether it is as wide as
# the window.
PROBE = """
<script>
const order = () => [...document.querySelectorAll("#layers tbody tr")].map(row => row.cells[0].textContent).join(" ");
const click = column => { document.querySelectorAll("#layers th button")[column].click(); return order(); };
const found = [order(), click(0), click(4), click(4), document.documentElement.scrollWidth <= innerWidth, innerWidth,
  [...document.querySelectorAll("#layers .sparse")].map(bar => bar.getBoundingClientRect().width > 1).join(" "),
  document.querySelectorAll("circle").length,
  document.querySelector("svg").getBoundingClientRect().right <= innerWidth];
document.title = found.join("|");
</script></html>"""


@pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_page_in_a_browser(made, tmp_path, width):
    file = tmp_path / "r.html"
    made.save_html(file)
    file.write_text(file.read_text().replace("</html>", PROBE))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},800", "--dump-dom"]
    ran = subprocess.run([*command, file.as_uri()], capture_output=True, text=True, timeout=60)
    said = re.search(r"<title>(.*?)</title>", ran.stdout).group(1).split("|")
    assert said == [
        "layer10.conv layer2.conv fc",
        "fc layer2.conv layer10.conv",
        "layer2.conv layer10.conv fc",
        "layer10.conv layer2.conv fc",
        "true",
        str(width),
        "true true false",
        "2",
        "true",
    ]


def test_shares_are_of_the_peak(monkeypatch):
    """A layer of 2 million useful operations in 1 ms, on a machine that does 4 in it."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(1000, 1000).eval()
    layer.weight.data[:, 100:] = 0
    fast = sparsekd.convert(layer, torch.randn(10, 1000), mapping={"*": {"kernel": "sparse"}})

    def compare(engines, **options):
        return {name: Timing(name, "cpu", 1, (1e-3,), (1e-3,)) for name in engines}

    monkeypatch.setattr("sparsekd.sparse.dispatch.compare", compare)
    monkeypatch.setattr("sparsekd.reporting.peak_flops", lambda: 4e9)
    (made,) = sparsekd.report(fast, torch.randn(10, 1000)).layers
    assert made.sparse_share == pytest.approx(0.5) and made.dense_share == pytest.approx(5.0)
