"""What a layer takes, told before it is pruned: sizes, fitted laws, and densities that were measured here."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import sparsekd
from sparsekd.measure.timing import Timing
from sparsekd.reporting import vector_of
from sparsekd.sparse import anchors, cost_model
from sparsekd.sparse.cost_model import Law, covariance, fitted, predict
from sparsekd.sparse.problem import Problem

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 7)),
        (nn.Conv2d(4, 6, (2, 4), padding="same", dilation=2), (4, 9, 7)),
        (nn.Conv2d(4, 8, (1, 5), padding=(0, 2), groups=4, bias=False), (1, 4, 5, 6)),
        (nn.Conv1d(4, 6, 4, stride=3, padding=2), (2, 4, 11)),
        (nn.Conv1d(4, 6, 3, padding="valid"), (4, 11)),
        (nn.Linear(4, 6), (2, 5, 4)),
        (nn.Linear(4, 6), (4,)),
    ],
)
def test_a_problem_has_the_sizes_of_the_call(layer, shape):
    x = torch.randn(shape)
    problem, output = Problem.of(layer, x), layer(x)
    assert problem.multiplications == output.numel() * layer.weight[0].numel()
    assert problem.weights == layer.weight.numel() and problem.bias == (layer.bias is not None)
    assert Problem.of(sparsekd.sparse.dispatch.from_dense(layer), x) == problem


def test_a_problem_knows_layouts_and_precisions():
    conv, x = nn.Conv2d(4, 6, 3), torch.randn(2, 4, 8, 8)
    last = Problem.of(conv.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last))
    assert (last.layout, last.weight_layout, last.precision) == ("nhwc", "nhwc", "float32")
    with torch.autocast("cpu", torch.bfloat16):
        assert Problem.of(conv, x).precision == "float32, autocast bfloat16"


def test_a_law_by_hand():
    problem = Problem("linear", 1, 100, 200)
    term = cost_model.terms(problem, "sparse", 4, 0.5)
    at = cost_model.traits(problem, "sparse", 4, 0.5)
    law = Law(np.ones_like(term), at[None], np.ones_like(at), np.array([np.log(2.0)]))
    assert law.ms(problem, "sparse", 4, 0.5) == pytest.approx(2 * term.sum())
    apart = covariance(np.array([[0.0, 0.0]]), np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([1.0, 2.0]))
    assert apart == pytest.approx(np.array([[1 / (1 + 13 / 2), 1.0]]))


SIZES = [
    Problem("conv2d", 1, 256, 256, (14, 14), (3, 3), padding=(2, 2)),
    Problem("conv2d", 8, 64, 256, (28, 28)),
    Problem("conv2d", 1, 64, 64, (28, 28), (3, 3), padding=(2, 2), groups=64),
    Problem("conv2d", 1, 480, 20),
    Problem("linear", 64, 1024, 1024),
]


@pytest.mark.parametrize("problem", SIZES, ids=lambda problem: f"{cost_model.kind(problem)}-{problem.batch}")
def test_fitted_times_are_sensible(problem):
    times = [predict([problem], 1, density) for density in (0.02, 0.1, 0.5)]
    assert all(0.001 < time.sparse_ms < 100 and 0.001 < time.dense_ms < 100 for time in times)
    assert times[0].sparse_ms <= times[1].sparse_ms * 1.1 and times[0].sparse_ms < times[2].sparse_ms
    twice = predict([problem, problem], 1, 0.1)
    assert twice.sparse_ms == pytest.approx(2 * times[1].sparse_ms)
    assert 0 < twice.error < 0.5


def test_what_the_fit_says_of_itself():
    laws, facts = fitted()
    assert set(laws) == {(name, way) for name in cost_model.KINDS for way in cost_model.WAYS}
    assert facts["machine"]["processor"] and facts["held_out"]["right_side"] > 0.9
    assert facts["error"] == facts["held_out"]["median_error"]["speed-up"] < 0.25


# ---- densities that were measured ----


@pytest.fixture
def line(monkeypatch):
    """Every layer takes 1 ms and 10 ms more at density 1, and 4 ms dense. Counts the runs."""
    runs = []

    def compare(engines, **options):
        runs.append(list(engines))
        ms = {name: 4.0 if name in ("as it is", "channels_last") else 1 + 10 * float(name) for name in engines}
        return {name: Timing(name, "cpu", 1, (value / 1e3,), (value / 1e3,)) for name, value in ms.items()}

    monkeypatch.setattr(anchors, "compare", compare)
    return runs


def test_every_sparsity_from_one_measurement(line):
    layer = nn.Conv2d(64, 64, 3, padding=1)
    for sparsity in (0.5, 0.8, 0.9, 0.99):
        (choice,) = sparsekd.would_it_be_faster(layer, sparsity, (1, 64, 8, 8)).values()
        assert choice.sparse_ms == pytest.approx(1 + 10 * (1 - sparsity), rel=1e-3) and choice.dense_ms == 4.0
        assert choice.kernel == ("sparse" if sparsity > 0.7 else "dense") and choice.error == anchors.ERROR
        assert choice.sparsity == sparsity and "densities measured here" in choice.reason
    assert len(line) == 1
    sparsekd.would_it_be_faster(layer, 0.9, (1, 64, 8, 8), "4x1")
    sparsekd.would_it_be_faster(layer, 0.9, (2, 64, 8, 8))
    assert len(line) == 3


def test_off_measures_nothing(line, monkeypatch):
    monkeypatch.setenv("SPARSEKD_TUNE", "off")
    (choice,) = sparsekd.would_it_be_faster(nn.Linear(64, 32), 0.9, (4, 64)).values()
    expected = predict([Problem("linear", 4, 64, 32)], 1, 1 - 0.9)
    assert (choice.dense_ms, choice.sparse_ms) == (expected.dense_ms, expected.sparse_ms) and line == []
    assert choice.error == fitted()[1]["error"] and "cost model" in choice.reason


def test_below_the_sparsity_where_convert_looks_it_is_dense(line):
    layer = nn.Linear(4, 2)  # two densities of its own at most
    assert sparsekd.would_it_be_faster(layer, 0.0, (1, 4))[""].kernel == "dense"


def test_a_whole_network_by_name(line):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    assert list(sparsekd.would_it_be_faster(net, 0.9, (1, 3, 4, 4))) == ["0", "2"]
    assert type(net[0]) is nn.Conv2d and bool(net[0].weight.all())


def test_between_and_beyond():
    points = [(0.1, 2.0), (0.2, 3.0), (0.5, 9.0)]
    for density, ms in ((0.15, 2.5), (0.2, 3.0), (0.35, 6.0), (1.0, 19.0), (0.05, 1.5), (0.0, 1.0)):
        assert anchors._between(points, density) == pytest.approx(ms)
    assert anchors._between([(0.1, 1.0), (0.2, 9.0)], 0.0) == 0.5  # no time is below 0
    assert anchors._between([(0.5, 3.0)], 0.1) == 3.0


def test_names_of_patterns():
    assert [vector_of(name) for name in ("unstructured", "1x1", "4x1", "v8")] == [1, 1, 4, 8]
    for name in ("4x2", "x1", "v", "v0", "0x1", "2:4", "v4x1", "-4x1"):
        with pytest.raises(ValueError, match="Expected pattern to be"):
            vector_of(name)


# ---- the scripts ----


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_collect_fit_and_check(tmp_path, monkeypatch):
    made = script("cost_model")
    rows, file = tmp_path / "rows.json", tmp_path / "laws.safetensors"
    small = ["--networks", '{"mobilenet_v3_small": 64, "reference_student": 32}', "--batch", "1", "--cases", "2"]
    assert made.main(["collect", *small, "--random", "20", "--rounds", "1", "--out", str(rows)]) == 0
    monkeypatch.setattr(made, "FILE", file)
    assert made.main(["fit", "--rows", str(rows)]) == 0
    monkeypatch.setattr(cost_model, "FILE", file)
    fitted.cache_clear()
    try:
        assert predict([SIZES[0]], 1, 0.1).sparse_ms > 0
        found = tmp_path / "found.json"
        small = ["--networks", '{"reference_student": 32}', "--rounds", "1", "--cases", "1"]
        assert made.main(["check", *small, "--json", str(found)]) in (0, 1)  # as the machine's noise has it
        assert set(json.loads(found.read_text())["all"]) == {"cases", "foretold", "laws", "again"}
    finally:
        fitted.cache_clear()


def test_masks_that_leave_channels_unlike():
    weight = torch.zeros(64, 32, 3, 3)
    mask = script("cost_model").skewed_mask(weight, 0.9, 4, 1)
    assert mask.shape == weight.shape and float(mask.float().mean()) == pytest.approx(0.1, abs=2e-3)
    kept = mask.view(64, -1).sum(1)
    assert int(kept.max()) > 3 * int(kept.min()) and torch.equal(mask[0], mask[3])


@pytest.mark.slow
def test_never_slower_tells(tmp_path, capsys):
    made = script("never_slower")
    found = tmp_path / "found.json"
    code = made.main(["--model", "cifar_resnet20x4", "--sparsity", "0.9", "--rounds", "3", "--json", str(found)])
    (row,) = json.loads(found.read_text())["rows"]
    assert code == (row["ratio"] > made.BAR) and row["sparse_layers"] > 10 and row["error"] < 1e-4
    assert "worst ratio" in capsys.readouterr().out
