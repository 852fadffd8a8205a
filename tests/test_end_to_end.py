"""Whole networks: every engine answers alike, and one that does not is told and not timed."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsekd import bench
from sparsekd.measure import engines

FILE = Path(__file__).resolve().parent.parent / "benchmarks" / "end_to_end.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("end_to_end", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


QUICK = ("--model", "cifar_resnet20x4", "--size", "16", "--rounds", "1", "--min-time", "0.0001")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*stay dense.*:UserWarning")
def test_one_small_network(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(engines.DENSE, "channels_last", lambda model, x, threads: lambda: model(x) + 1)
    path = tmp_path / "rows.json"
    assert script.main([*QUICK, "--against", "eager", "channels_last", "--json", str(path)]) == 1
    (row,) = json.loads(path.read_text())["rows"]
    assert set(row["ms"]) == {"eager", "convert", "optimize_for_inference"} and row["best_dense"] == "eager"
    assert "off float64" in row["out"]["channels_last"]
    assert "layers are sparse; measuring and swapping took" in capsys.readouterr().out


def test_batch_norm_is_folded_and_the_first_layer_whole(script):
    model = script.pruned("cifar_resnet20x4", 0.9, 1)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    first, second = [m.weight for m in model.modules() if isinstance(m, torch.nn.Conv2d)][:2]
    assert bool((first != 0).all())
    assert float((second != 0).float().mean()) == pytest.approx(0.1, abs=1e-3)


def test_a_plot_of_files_times_nothing(script, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(script, "run", None)
    row = {"model": "resnet18", "batch": 1, "vector": 1, "sparsity": 0.9}
    paths = []
    for i, gain in enumerate((2.0, 3.0)):  # the later file counts
        speedup = {"openvino": [1.0, 1.0, 1.0], "convert": [gain, gain, gain]}
        paths.append(tmp_path / f"{i}.json")
        paths[-1].write_text(json.dumps({"rows": [{**row, "speedup": speedup}]}))
    assert [row["speedup"]["convert"][0] for row in script.read(paths)] == [3.0]
    figure = tmp_path / "figure.svg"
    assert script.main(["--plot", str(figure), "--from", *map(str, paths)]) == 0
    assert figure.read_text().count("</svg>") == 1
    with pytest.raises(SystemExit, match="Expected --plot FILE with --from, got none"):
        script.main(["--from", *map(str, paths)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inductor", "onnxruntime", "openvino"])
def test_other_engines(script, name):
    if name != "inductor":
        pytest.importorskip("onnx")
        pytest.importorskip(name)
    model, x = script.pruned("cifar_resnet20x4", 0.9, 1), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(engines.make(name, model, x, 1)(), model(x), rtol=1e-3, atol=1e-4)


class Several(nn.Module):
    """Like a segmentation network; with a branch that torch.fx can't trace."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return {"out": self.norm(self.conv(x))} if x.sum() > -1e9 else {}


@torch.no_grad()
def test_one_output_of_several_and_no_trace():
    x = torch.randn(1, 3, 8, 8)
    model = bench.folded(Several(), x)
    assert model(x).shape == (1, 4, 6, 6)
    # An exporter puts a network back into its root's mode: dropout would be drawn from then on.
    assert not any(module.training for module in model.modules())


def test_who_is_out_and_why(monkeypatch):
    def missing(model, x, threads):
        raise ModuleNotFoundError("No module named 'other'")

    def broken(model, x, threads):
        raise RuntimeError("cannot\nat all")

    monkeypatch.setitem(engines.DENSE, "openvino", missing)
    monkeypatch.setitem(engines.DENSE, "onnxruntime", broken)
    model, x = nn.Conv2d(3, 4, 3).eval(), torch.randn(1, 3, 8, 8)
    row = bench.run(model, x, ("openvino", "onnxruntime", "eager"), (), rounds=1, min_time=1e-4)
    assert row["out"] == {"openvino": "not installed: No module named 'other'", "onnxruntime": "failed: cannot"}
    assert list(row["ms"]) == ["eager"] and bench.failed([row])
    assert any("not installed" in line for line in bench.lines(row))
    with pytest.raises(ValueError, match="Expected a dense engine that runs, got none"):
        bench.run(model, x, ("openvino",), ())
    with pytest.raises(ValueError, match="Expected an engine out of eager, "):
        engines.make("deepsparse", model, x, 1)
