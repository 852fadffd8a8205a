"""Tile sizes of the Triton kernels: the first guess, the few that are timed, and what is kept on disk."""

import json
from dataclasses import replace
from pathlib import Path

import interpreted
import pytest
import test_conv2d
import torch
from conftest import assert_near
from sparsekd.kernels import configs, registration, static
from torch import nn

from sparsekd.measure import tuned
from sparsekd.sparse import dispatch, ops

CPU = torch.device("cpu")
PROBLEM = configs.Problem("conv2d", "float16", 16, 8 * 28 * 28, 128, 1152, 0.1, 9, 1)
PROBLEMS = [
    replace(PROBLEM, op=op, dtype=dtype, vector=vector, pixels=pixels, taps=taps, columns=128 * taps)
    for op in ("conv2d", "conv2d_input_grad", "conv2d_weight_grad")
    for dtype in ("float16", "float32", "float64")
    for vector in (8, 16, 32, 64, 128)
    for pixels in (1, 49, 6272)
    for taps in (1, 9)
]


@pytest.mark.parametrize("architecture", configs.ARCHITECTURES)
def test_a_dozen_at_most_that_fit(architecture):
    for problem in PROBLEMS:
        found = configs.candidates_conv2d(problem, architecture, 108)
        assert found[0] == configs.default_conv2d(problem, 108)
        assert len(found) == len(set(found)) <= 12
        assert all(configs.fits(config, problem.element_size, architecture) for config in found)


def test_less_shared_memory_leaves_fewer():
    large = configs.Config(128, 128, 64, 8, 4, lanes=True)
    assert configs.fits(large, 2, 90) and not configs.fits(large, 2, 86)
    assert not configs.fits(configs.Config(256, 128, 32, 4, 1, lanes=True), 2, 90)  # 256 sums a thread
    assert not configs.fits(configs.Config(128, 16, 64), 2, 90)  # 64 addresses a thread


def test_a_small_map_is_split_and_a_large_one_persistent_among_the_candidates():
    small = replace(PROBLEM, pixels=49, out_channels=512, columns=4608)
    assert configs.default_conv2d(small, 108).split_k > 1 and configs.default_conv2d(PROBLEM, 108).split_k == 1
    large = replace(PROBLEM, pixels=64 * 28 * 28)
    assert [c.programs for c in configs.candidates_conv2d(large, 80, 108) if c.programs] == [432]
    assert not any(c.programs for c in configs.candidates_conv2d(small, 80, 108))


@pytest.mark.slow
@pytest.mark.parametrize("vector", [16, 64])
@pytest.mark.parametrize("run", [static._forward, static._input_grad, static._weight_grad], ids=lambda f: f.__name__)
def test_what_fits_does_not_spill(monkeypatch, run, vector):
    """`fits` is a guess; here the compiler is asked, for the architecture with the least shared memory."""
    problems, layer = [], static.Layer(torch.float16, vector, batch=64)
    plain = configs.config_for

    def noted(problem, device, run):
        problems.append(problem)
        return plain(problem, device, run)

    with static.recording(), monkeypatch.context() as patch:
        patch.setattr(configs, "multiprocessors", lambda device: static.MULTIPROCESSORS)
        patch.setattr(configs, "config_for", noted)
        run(layer)
    for config in configs.candidates_conv2d(problems[0], 86, static.MULTIPROCESSORS):
        with static.recording() as launches, monkeypatch.context() as patch:
            patch.setattr(configs, "config_for", lambda problem, device, run, config=config: config)
            run(layer)
        for launch in launches:
            made = static.compile_launch(launch, 86, "")
            registers, spills = made.registers_and_spills
            assert spills == 0 and made.shared <= configs.shared_limit(86), (config, registers, spills, made.shared)


def seconds_by_order(times):
    """A clock that says what it is told, one figure for each candidate."""
    waiting = list(times)
    return lambda call: (call(), waiting.pop(0))[1]


def test_the_fastest_is_kept_on_disk(monkeypatch):
    tried = []
    best, taken = configs.tune(PROBLEM, CPU, tried.append, seconds_by_order([3.0, 1.0, *[2.0] * 10]))
    assert list(taken) == tried and best == tried[1] and taken[best] == 1.0
    monkeypatch.setattr(tuned, "_open", {})  # as in another process
    configs._known_in.cache_clear()
    assert configs.config_for(PROBLEM, CPU) == best
    assert configs.config_for(replace(PROBLEM, vector=8), CPU) != best
    monkeypatch.setenv("SPARSEKD_TUNE", "off")
    assert configs.config_for(PROBLEM, CPU) == configs.default_conv2d(PROBLEM, 1)


def test_one_that_does_not_launch_is_not_taken():
    def run(config):
        if config == configs.default_conv2d(PROBLEM, 1):
            raise configs.triton.runtime.errors.OutOfResources(2, 1, "shared memory")

    best, taken = configs.tune(PROBLEM, CPU, run, lambda call: (call(), 1.0)[1])
    assert taken[configs.default_conv2d(PROBLEM, 1)] == float("inf") and taken[best] == 1.0


def test_what_another_version_wrote_is_not_read(monkeypatch):
    configs._known(CPU).put(configs._key(PROBLEM), {"tile": 3})
    assert configs.config_for(PROBLEM, CPU) == configs.default_conv2d(PROBLEM, 1)


@pytest.mark.skipif(not interpreted.SUPPORTED, reason=interpreted.REASON)
def test_nothing_is_timed_unless_asked_and_then_once(monkeypatch):
    """Through the ops, forward and backward; the results stay what they are."""
    case = test_conv2d.Case(filters_per_group=8, vector=8, padding=(1, 1), size=(4, 5))
    monkeypatch.setattr(configs, "candidates_conv2d", lambda *a: [configs.default_conv2d(a[0], 1), FEW])
    timed = []

    def seconds(call):
        timed.append(call())
        return float(len(timed) % 2)  # the second is the faster

    with interpreted.as_cpu_ops():
        plain, *_ = test_conv2d.check_case(case)
        assert not timed
        for _ in range(2):
            with ops.tuning_tiles(seconds):
                test_conv2d.check_case(case)
            assert len(timed) == 6  # two candidates for the forward and for each gradient
        assert configs.config_for(next(iter(kept_problems())), CPU) == FEW
        assert_near(test_conv2d.check_case(case)[0], plain)
    assert registration.seconds_of is None


FEW = configs.Config(16, 8, 16)


def kept_problems():
    (file,) = Path(tuned.folder()).glob("tuned-*.json")
    return [configs.Problem(**json.loads(key)) for key in tuned.read(file)]


@pytest.mark.skipif(not interpreted.SUPPORTED, reason=interpreted.REASON)
def test_the_dispatch_tunes_before_it_times(monkeypatch):
    monkeypatch.setattr(configs, "candidates_conv2d", lambda *a: [configs.default_conv2d(a[0], 1), FEW])
    conv = nn.Conv2d(2, 8, 1).eval()
    with torch.no_grad():
        conv.weight[:, 1] = 0
    sparse = dispatch.from_dense(conv, vector=8).eval()
    with interpreted.as_cpu_ops():
        choice = dispatch.measure_layer("layer", conv, sparse, [torch.randn(1, 2, 2, 2)], rounds=1)
    assert choice.source == "measured" and [problem.op for problem in kept_problems()] == ["conv2d"]
