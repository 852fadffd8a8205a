"""convert and what builds on it where layers are on a GPU: its clock decides, under its name.

No GPU takes part: tensors on the CPU are said to be on one, and its events tell what each layer is set to take.
"""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from torch import nn

import sparsekd
from sparsekd import bench, reporting
from sparsekd.measure import machine, timing
from sparsekd.sparse.modules import SparseConv2d
from sparsekd.sparse.ops import registered

torch.manual_seed(0)


class Gpu:
    """Milliseconds that it has worked, what a layer adds to them, and the clocks that were asked."""

    def __init__(self) -> None:
        self.now, self.clocks = 0.0, []
        self.dense, self.sparse = 1.0, 0.5

    def works(self, kind: str, method):
        def run(*args, **kwargs):
            self.now += getattr(self, kind)
            return method(*args, **kwargs)

        return run


class Event:
    gpu: Gpu

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: object) -> None:
        self.at = self.gpu.now = self.gpu.now + 0.001  # no call takes no time

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    made = Event.gpu = Gpu()
    monkeypatch.setenv("SPARSEKD_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("SPARSEKD_TUNE", "cached")
    monkeypatch.setattr(machine, "place", lambda tensor: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setattr(registered, "ON_CUDA", registered.ON_CUDA | {"conv2d", "linear"})
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", made.works("dense", nn.Conv2d._conv_forward))
    monkeypatch.setattr(SparseConv2d, "forward", _sparse_forward(made))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(timing, "_repeats_for", lambda engine, min_time, clock, device: made.clocks.append(clock) or 1)
    return made


def _sparse_forward(gpu: Gpu):
    method = SparseConv2d.forward

    def forward(self, input):
        gpu.now += gpu.sparse
        return method(self, input)

    return forward


def network() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1)).eval()
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight.mul_(torch.rand_like(layer.weight) < 0.2)
    return model, torch.randn(2, 8, 6, 6)


def sparse_layers(model: nn.Module) -> int:
    return sum(isinstance(module, SparseConv2d) for module in model.modules())


def test_its_events_choose_sparse_layers(gpu):
    model, x = network()
    fast = sparsekd.convert(model, x)
    assert sparse_layers(fast) == 2 and set(gpu.clocks) == {"cuda"}
    for choice in sparsekd.choices(fast).values():
        assert choice.kernel == "sparse" and choice.source == "measured"
        assert choice.dense_ms == pytest.approx(1.0, rel=0.02) and choice.sparse_ms == pytest.approx(0.5, rel=0.02)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_its_events_keep_dense_layers(gpu):
    gpu.sparse = 1.5
    model, x = network()
    with pytest.warns(UserWarning, match="sparse 1.5 ms does not beat dense 1 ms"):
        fast = sparsekd.convert(model, x)
    assert sparse_layers(fast) == 0 and set(gpu.clocks) == {"cuda"}


def test_a_network_that_is_slower_on_it_goes_back_to_dense(gpu, monkeypatch):
    model, x = network()
    monkeypatch.setattr(nn.BatchNorm2d, "forward", _slow_behind_sparse(gpu, nn.BatchNorm2d.forward))
    with pytest.warns(UserWarning, match="the whole network took"):
        fast = sparsekd.convert(model, x)
    assert sparse_layers(fast) == 0


def _slow_behind_sparse(gpu, method):
    last = {}

    def forward(self, input):
        last["dense"], before = gpu.now, last.get("dense", 0.0)
        if gpu.now - before < 2.0:  # two dense layers took more
            gpu.now += 5.0
        return method(self, input)

    return forward


def test_figures_are_kept_under_its_name(gpu, tmp_path):
    model, x = network()
    sparsekd.convert(model, x)
    (file,) = tmp_path.glob("tuned-*.json")
    assert json.loads(file.read_text())["machine"]["gpu"] == "a GPU"
    again = sparsekd.convert(model, x)
    assert {choice.source for choice in sparsekd.choices(again).values()} == {"kept"}


def test_figures_of_other_settings_are_others(gpu):
    model, x = network()
    sparsekd.convert(model, x)
    now = {setting: getattr(torch.backends.cudnn, setting) for setting in ("benchmark", "allow_tf32")}
    for setting in now:
        with torch.backends.cudnn.flags(enabled=True, **now | {setting: not now[setting]}):
            changed = sparsekd.convert(model, x)
        assert {choice.source for choice in sparsekd.choices(changed).values()} == {"measured"}, setting


def test_without_measuring_layers_stay_dense_and_say_so(gpu, monkeypatch):
    monkeypatch.setenv("SPARSEKD_TUNE", "off")
    model, x = network()
    with pytest.warns(UserWarning, match="the cost model knows CPUs alone, got cuda"):
        fast = sparsekd.convert(model, x)
    assert sparse_layers(fast) == 0 and not gpu.clocks
    assert all(choice.dense_ms == choice.sparse_ms == 0.0 for choice in sparsekd.choices(fast).values())
    with pytest.raises(RuntimeError, match="Expected every pruned layer to become sparse"):
        sparsekd.convert(model, x, strict=True)


@pytest.mark.parametrize("mode", ["off", "cached"])
def test_layers_that_are_asked_for_are_sparse(gpu, monkeypatch, mode):
    monkeypatch.setenv("SPARSEKD_TUNE", mode)
    gpu.sparse = 9.0
    model, x = network()
    fast = sparsekd.convert(model, x, mapping={"*": {"kernel": "sparse"}}, strict=True)
    assert sparse_layers(fast) == 2 and not gpu.clocks


def test_a_build_without_its_kernels_keeps_layers_dense(gpu, monkeypatch):
    monkeypatch.setattr(registered, "ON_CUDA", frozenset())
    model, x = network()
    fast = sparsekd.convert(model, x)
    assert sparse_layers(fast) == 0 and "no sparse kernel is built for CUDA" in sparsekd.choices(fast)["0"].reason


def test_other_devices_are_refused(gpu, monkeypatch):
    monkeypatch.setattr(machine, "place", lambda tensor: torch.device("mps"))
    model, x = network()
    fast = sparsekd.convert(model, x)
    assert sparse_layers(fast) == 0
    assert "only layers on the CPU and on CUDA" in sparsekd.choices(fast)["0"].reason


def test_all_that_builds_on_it_asks_its_clock(gpu, monkeypatch):
    monkeypatch.setattr(reporting, "peak_flops", lambda *_, **__: 1e12)
    model, x = network()
    fast = sparsekd.optimize_for_inference(model, x)
    assert sparse_layers(fast) == 2 and sparsekd.choices(fast)
    made = sparsekd.report(sparsekd.convert(model, x), x)
    assert made.machine["GPU"] == "a GPU" and made.machine["clock"] == "CUDA events"
    assert {layer.kernel for layer in made.layers} == {"sparse"} and made.network[0].speedup > 1
    foretold = sparsekd.would_it_be_faster(model, 0.9, tuple(x.shape))
    assert [choice.dense_ms for choice in foretold.values()] == pytest.approx([1.0, 1.0], rel=0.02)
    assert sparsekd.latency_budget(model, x, "1.1x").network_ms == pytest.approx(2.0, rel=0.02)
    assert bench.run(model, x, against=["eager"], rounds=2, min_time=0.005)["clock"] == "cuda"
    assert gpu.clocks and set(gpu.clocks) == {"cuda"}


def test_without_measuring_nothing_is_foretold(gpu, monkeypatch):
    monkeypatch.setenv("SPARSEKD_TUNE", "off")
    model, x = network()
    for choice in sparsekd.would_it_be_faster(model, 0.9, tuple(x.shape)).values():
        assert choice.kernel == "dense" and not choice.dense_ms and "the cost model knows CPUs alone" in choice.reason
    with pytest.raises(ValueError, match="the cost model knows CPUs alone, got cuda"):
        sparsekd.latency_budget(model, x, "1.5x")
    assert not gpu.clocks


@torch.no_grad()
@pytest.mark.parametrize("mode, kernel", [("cached", "sparse"), ("full", "dense")])
def test_other_shapes_are_measured_or_stay_sparse(gpu, monkeypatch, mode, kernel):
    model, x = network()
    fast = sparsekd.convert(model, x)
    monkeypatch.setenv("SPARSEKD_TUNE", mode)
    gpu.sparse, other = 3.0, torch.randn(3, 8, 6, 6)
    with contextlib.nullcontext() if mode == "cached" else pytest.warns(UserWarning, match="runs dense at a shape"):
        got = fast(other)
    torch.testing.assert_close(got, model(other), rtol=1e-4, atol=1e-5)
    for met in sparsekd.choices_by_shape(fast).values():
        assert [choice.kernel for choice in met] == ["sparse", kernel]
        assert met[1].dense_ms == pytest.approx(0.0 if mode == "cached" else 1.0, rel=0.02)


def test_sparse_layers_stay_with_their_choices_when_optimised(gpu):
    model, x = network()
    mapping = {"0": {"kernel": "sparse"}, "3": {"kernel": "dense"}}
    with pytest.warns(UserWarning, match="asked for by mapping"):
        converted = sparsekd.convert(model, x, mapping=mapping)
    fast = sparsekd.optimize_for_inference(converted, x)
    reasons = [choice.reason for choice in sparsekd.choices(fast).values()]
    assert sparse_layers(fast) == 2 and reasons[0] == "asked for by mapping" and "beats dense" in reasons[1]


def test_random_numbers_go_on_as_if_nothing_was_measured(monkeypatch):
    """torch.manual_seed seeds GPUs as well."""
    kept = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    fork = contextlib.nullcontext
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: kept.append(list(devices)) or fork())
    model, x = network()
    sparsekd.convert(model, x, mapping={"*": {"kernel": "sparse"}})
    assert kept == [[0, 1]] * len(kept) and len(kept) >= 3
