"""benchmarks/predict.py: the model behaves as times do, and the committed file says that it is a prediction."""

import itertools
import json
import math
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import predict  # noqa: E402
from library_tiles import tiling  # noqa: E402

AS_GOOD = 1.06  # kAsGood in csrc/cuda/direct.h
LAYER = predict.Layer("layer", 256, 256, 3, 1, 14, 1)


@pytest.fixture(scope="module")
def patterns():
    table = json.loads((predict.RESULTS / "gpu_static.json").read_text())
    return predict.patterns({(row["kernel"], row["arch"]): row for row in table["kernels"]})


@pytest.mark.parametrize("device", predict.DEVICES, ids=lambda d: d.name)
def test_fewer_weights_take_no_longer(patterns, device):
    for name, (precision, seconds) in patterns.items():
        for kept in (False, True):
            times = [seconds(device, LAYER, 32, density, kept) for density in (1.0, 0.5, 0.2, 0.05)]
            assert times == sorted(times, reverse=True), name
            assert times[-1] > predict.launches(1)
        kept, not_kept = (seconds(device, LAYER, 32, 0.1, kept) for kept in (True, False))
        assert kept < not_kept if precision == "fp16" else kept == not_kept
        if not name.startswith("2:4"):  # which keeps the order of its values, whatever the batch
            assert seconds(device, LAYER, 3, 0.1, True) == seconds(device, LAYER, 3, 0.1, False)  # no whole lanes


@pytest.mark.parametrize("images", [False, True])
def test_the_library_expects_no_longer_time_of_fewer_weights(images):
    r = random.Random(0)
    for _ in range(100):
        vector, kernel = r.choice([8, 16, 24, 32, 64, 80]), r.choice([1, 3, 5])
        channels, filters = 2 ** r.randint(3, 9), r.randint(1, 512)
        of = r.choice([1, 3, 8, 32]), channels, filters, vector
        size, stride = r.choice([5, 7, 13, 14, 28, 56]), r.choice([1, 2])
        device = r.choice([(8, 163 << 10, 108), (8, 99 << 10, 1), (9, 227 << 10, 132)])
        vectors = [round(channels * kernel**2 * d) * -(-filters // vector) for d in (1.0, 0.6, 0.5, 0.3, 0.1, 0.05)]
        cycles = [tiling((*of, n, size, kernel, stride), device, images)[1] for n in vectors]
        assert cycles == sorted(cycles, reverse=True), (of, size, kernel, stride, device)


def test_dense_is_bounded_by_arithmetic_or_by_bytes():
    a100 = predict.DEVICES[0]
    # 4 * 256 * 256 * 9 * 196 multiply-adds at 95% of 108 * 1024 * 1.41e9 a second, and a launch.
    seconds = predict.dense(a100, LAYER, 4, "fp16")
    assert seconds == pytest.approx(4 * 256 * 256 * 9 * 196 / (0.95 * 108 * 1024 * 1.41e9) + 2e-6)
    thin = predict.Layer("thin", 64, 64, 1, 1, 56, 1)
    moved = 2 * (2 * 32 * 64 * 56 * 56) + 2 * 64 * 64
    assert predict.dense(a100, thin, 32, "fp16") == pytest.approx(moved / (2039e9 * 0.85) + 2e-6)


def test_break_even():
    assert predict.break_even(lambda density: 10 * density, 2.0) == pytest.approx(0.8, abs=1e-3)
    assert predict.break_even(lambda density: 1 + density, 0.5) is None
    assert predict.break_even(lambda density: density, 2.0) == 0.0


def test_the_committed_prediction():
    written = json.loads((predict.RESULTS / "predicted.json").read_text())
    assert "prediction" in written["what"] and "Nothing here was measured" in written["what"]
    assert set(written["assumptions"]) == set(predict.ASSUMPTIONS)
    assert {d["name"] for d in written["devices"]} == {"A100", "H100", "RTX 4090"}
    assert sum(layer["count"] for layer in written["layers"]) == 52
    for row in written["predictions"]:
        assert len(row["layers"]) == len(written["layers"])
        for part in [row, *row["layers"]]:
            for times in (part["sparse_ms"], part["kept_ms"], part["dense_ms"].values()):
                assert all(math.isfinite(ms) and ms > 0 for ms in times)
            # Of tiles on CUDA cores that differ by less, the library takes the one that stores fewest sectors.
            slack = AS_GOOD if row["pattern"].endswith("fp32") else 1.0
            for times in (part["sparse_ms"], part["kept_ms"]):
                assert all(fewer <= more * slack for more, fewer in itertools.pairwise(times)), part


def test_convolutions_on_cuda_cores_are_predicted_as_an_h200_took():
    """Single layers differ by up to a half, all of a kind together by less than a fifth."""
    device = next(d for d in predict.DEVICES if d.name == "H100")  # of which it has the multiprocessors and clock
    sums = {}
    for row in json.loads((predict.RESULTS / "gpu-h200.json").read_text())["layers"]:
        channels, filters, kernel, size = row["layer"]
        layer = predict.Layer("", channels, filters, kernel, 1, size, 1)
        seconds, _ = predict.core_convolution(device, layer, row["batch"], row["vector"], 0.1)
        expected, took = 1e6 * seconds, row["sparse_us"]["conv2d"]
        assert expected == pytest.approx(took, rel=0.5), row
        total = sums.setdefault((row["batch"], row["vector"]), [0.0, 0.0])
        total[0] += expected
        total[1] += took
    assert len(sums) == 3
    for kind, (expected, took) in sums.items():
        assert expected == pytest.approx(took, rel=0.2), kind
