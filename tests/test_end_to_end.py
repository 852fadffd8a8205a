"""benchmarks/end_to_end.py: every engine answers alike, and one that does not is told and not timed."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).resolve().parent.parent / "benchmarks" / "end_to_end.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("end_to_end", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


QUICK = ("--model", "cifar_resnet20x4", "--size", "16", "--rounds", "1", "--min-time", "0.0001")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*stay dense.*:UserWarning")
def test_one_small_network(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "channels_last", lambda model, x, args: lambda: model(x) + 1)
    path = tmp_path / "rows.json"
    assert bench.main([*QUICK, "--against", "eager", "channels_last", "--json", str(path)]) == 1
    (row,) = json.loads(path.read_text())["rows"]
    assert set(row["ms"]) == {"eager", "convert", "optimize_for_inference"} and row["best_dense"] == "eager"
    assert "off float64" in row["out"]["channels_last"]
    assert "layers are sparse; measuring and swapping took" in capsys.readouterr().out


def test_batch_norm_is_folded_and_the_first_layer_whole(bench):
    model = bench.pruned("cifar_resnet20x4", 0.9, 1)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    first, second = [m.weight for m in model.modules() if isinstance(m, torch.nn.Conv2d)][:2]
    assert bool((first != 0).all())
    assert float((second != 0).float().mean()) == pytest.approx(0.1, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inductor", "onnxruntime", "openvino"])
def test_other_engines(bench, name):
    if name != "inductor":
        pytest.importorskip("onnx")
        pytest.importorskip(name)
    model, x = bench.pruned("cifar_resnet20x4", 0.9, 1), torch.randn(2, 3, 32, 32)
    args = bench.parser().parse_args(["--against", name, "--ours", "convert"])
    with torch.no_grad():
        torch.testing.assert_close(getattr(bench, name)(model, x, args)(), model(x), rtol=1e-3, atol=1e-4)
