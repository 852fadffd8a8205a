"""The timer: right about things whose duration is known, and leaving no trace."""

import gc
import math
import time

import pytest
import torch

from sparsekd.measure import timing
from sparsekd.measure.timing import Timing, compare, measure_latency, speedup, threads


def busy(seconds):
    """A callable that burns that much CPU time."""

    def engine():
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    return engine


def made_up(name, samples):
    return Timing(name, "cpu", 1, tuple(samples), tuple(samples))


def test_compare_tells_one_millisecond_from_three():
    timings = compare({"one": busy(1e-3), "three": busy(3e-3)}, rounds=7, min_time=4e-3, warmup=1)
    assert list(timings) == ["one", "three"]
    assert timings["one"].min == pytest.approx(1e-3, rel=0.1)
    assert timings["three"].min == pytest.approx(3e-3, rel=0.1)
    gain = speedup(timings["three"], timings["one"])
    assert gain.value == pytest.approx(3, rel=0.1)
    assert gain.low <= gain.median <= gain.high
    assert "x (median" in str(gain) and "ms" in str(timings["one"])


def test_samples_last_long_enough():
    timing = compare({"short": lambda: None}, rounds=3, min_time=2e-3)["short"]
    assert timing.repeats * timing.median > 1e-3
    assert len(timing.samples) == len(timing.wall) == 3
    assert timing.cuda == ()


def test_engines_take_turns_forward_and_backward():
    calls = []
    engines = {name: (lambda name=name: (calls.append(name), busy(1e-3)())) for name in "abc"}
    compare(engines, rounds=2, min_time=1e-4, warmup=0)
    assert calls[-6:] == ["a", "b", "c", "c", "b", "a"]


def test_cpu_clock_leaves_waiting_out():
    timings = compare({"sleep": lambda: (busy(1e-3)(), time.sleep(5e-3))}, rounds=2, min_time=1e-4, warmup=0)
    assert min(timings["sleep"].wall) >= 5e-3
    assert timings["sleep"].min < 4e-3
    assert compare({"sleep": lambda: time.sleep(2e-3)}, rounds=1, min_time=1e-3, clock="wall")["sleep"].min >= 2e-3


def test_garbage_collection_is_off_inside_and_back_on_afterwards():
    seen = []
    compare({"look": lambda: (seen.append(gc.isenabled()), busy(1e-4)())}, rounds=1, min_time=1e-4)
    assert not any(seen) and gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        compare({"fails": lambda: 1 / 0})
    assert gc.isenabled()


def test_speedup_worked_by_hand():
    # Ratios round by round: 2, 4, 3. Three rounds hold the median between extremes with probability 1 - 2/8.
    gain = speedup(made_up("slow", [2.0, 4.0, 6.0]), made_up("fast", [1.0, 1.0, 2.0]))
    assert (gain.value, gain.median, gain.low, gain.high, gain.confidence) == (2.0, 3.0, 2.0, 4.0, 0.75)


@pytest.mark.parametrize("rounds,left_out,coverage", [(1, 0, 0.0), (6, 0, 0.96875), (9, 1, 0.9609375), (20, 5, 0.9586)])
def test_order_statistics_match_the_sign_test_tables(rounds, left_out, coverage):
    got, reached = timing._order_statistics(rounds, 0.95)
    assert got == left_out
    assert reached == pytest.approx(coverage, abs=1e-4)


def test_interval_covers_the_median_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(400):  # skewed ratios around a median of 2
        ratios = 2 * torch.exp(torch.randn(15, generator=generator)).numpy()
        gain = speedup(made_up("slow", ratios.tolist()), made_up("fast", [1.0] * 15))
        hits += gain.low <= 2 <= gain.high
    assert hits / 400 == pytest.approx(gain.confidence, abs=0.035)
    assert math.isclose(gain.confidence, 0.964, abs_tol=1e-3)


def test_threads_come_back():
    before = torch.get_num_threads()
    with threads(1):
        assert torch.get_num_threads() == 1
    with pytest.raises(RuntimeError), threads(1):
        raise RuntimeError
    assert torch.get_num_threads() == before


def test_latency_in_seconds_and_the_model_as_it_was():
    class Slow(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(3)
            self.modes = []

        def forward(self, x, scale=1):
            self.modes.append((self.training, torch.is_grad_enabled()))
            time.sleep(2e-3)
            return self.norm(x) * scale

    model = Slow()
    model.norm.eval()  # a mixture of modes, to be kept
    statistics = model.norm.running_mean.clone()
    for inputs in (torch.randn(4, 3), (torch.randn(4, 3), 2), {"x": torch.randn(4, 3), "scale": 2}):
        mean, spread = measure_latency(model, inputs, repeat=3, warmup=1)
        assert 2e-3 <= mean < 0.1 and spread >= 0
    assert set(model.modes) == {(False, False)} and len(model.modes) == 12
    assert model.training and not model.norm.training
    assert torch.equal(model.norm.running_mean, statistics)
    assert measure_latency(model, torch.randn(4, 3), repeat=1)[1] == 0.0


def test_peaks_are_plausible():
    with threads(1):
        assert 1e8 < timing.peak_flops(size=256, rounds=2) < 1e13
        assert 1e7 < timing.copy_bandwidth(megabytes=8, rounds=2) < 1e13
    assert 1e8 < timing.peak_flops(size=256, rounds=2)


def test_bad_input_is_told_in_one_sentence():
    nothing = {"a": lambda: None}
    with pytest.raises(ValueError, match="Expected at least one engine"):
        compare({})
    with pytest.raises(ValueError, match="Expected a clock out of .*, got 'sun'"):
        compare(nothing, clock="sun")
    with pytest.raises(ValueError, match="Expected a CUDA device"):
        compare(nothing, clock="cuda")
    with pytest.raises(ValueError, match="Expected rounds >= 1"):
        compare(nothing, rounds=0)
    with pytest.raises(ValueError, match="Expected two timings of one compare"):
        speedup(made_up("a", [1.0]), made_up("b", [1.0, 2.0]))
    with pytest.raises(ValueError, match="Expected a confidence"):
        speedup(made_up("a", [1.0]), made_up("b", [1.0]), confidence=95)
    with pytest.raises(ValueError, match="Expected repeat >= 1"):
        measure_latency(torch.nn.Identity(), torch.ones(1), repeat=0)
    for count in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="Expected a number of threads"), threads(count):
            pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_events_agree_with_the_wall_clock():
    a = torch.randn(2048, 2048, device="cuda")
    timing = compare({"matmul": lambda: a @ a}, rounds=5, device="cuda")["matmul"]
    assert timing.clock == "cuda"
    assert timing.min == pytest.approx(min(timing.wall), rel=0.2)
