"""What the compiler makes of the Triton kernels with their default configurations, for GPUs that are not there.

The layers are those of kernels/static.py, with the alignments that tensors of torch have.
"""

import pytest
import torch
from sparsekd.kernels import configs, static

ALL = [pytest.param(case, id=f"{case[0].__name__[1:]} {case[1]}") for case in static.CASES]


def check(case, architecture):
    launches = static.compiled(case, architecture)
    assert launches
    for made in launches:
        assert static.shortcomings(*case, made) == [], made.kernel


@pytest.mark.parametrize("architecture", configs.ARCHITECTURES)
def test_a_convolution(architecture):
    check((static._forward, static.Layer(torch.float16, 16)), architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", configs.ARCHITECTURES)
@pytest.mark.parametrize("case", ALL)
def test_default_configurations(case, architecture):
    check(case, architecture)


def test_rows_of_the_table(monkeypatch):
    monkeypatch.setattr(static, "CASES", [(static._forward, static.Layer(torch.float16, 16))])
    lanes, conv = static.rows([80])
    assert lanes["kernel"].startswith("to_lanes forward fp16 V=16 3x3") and conv["kernel"].startswith("conv2d forward")
    assert conv["arch"] == "sm_80" and conv["spills"] == 0 and 0 < conv["registers"] <= 255
    assert conv["shared_bytes"] > 0 and conv["loop"]["mma.sync"] > 0 and conv["loop"]["cp.async 16"] > 0
    assert conv["wrong"] == [] and lanes["wrong"] == []


def test_a_spill_is_seen():
    """A tile far beyond what registers hold."""
    layer = static.Layer(torch.float32, 128)
    input, *packed = layer.tensors()
    config = configs.Config(128, 128, 32, num_warps=4)
    with static.recording() as launches:
        static.conv2d.conv2d(input, *packed, None, None, None, 128, *layer.geometry, config=config, precision="tf32")
    assert static.compile_launch(launches[0], 80, "wide").registers_and_spills[1] > 0


@pytest.mark.parametrize(
    "config, precision, said",
    [
        (configs.Config(64, 16, 64, num_stages=2), "ieee", "vectors of activations"),
        (configs.Config(64, 16, 64, num_stages=1, lanes=True), "ieee", "cp.async"),
    ],
)
def test_what_the_code_lacks_is_said(config, precision, said):
    """Gathered from NCHW two bytes at a time; nothing fetched ahead."""
    layer = static.Layer(torch.float16, 16)
    input, *packed = layer.tensors()
    with static.recording() as launches:
        static.conv2d.conv2d(input, *packed, None, None, None, 128, *layer.geometry, config=config, precision=precision)
    made = static.compile_launch(launches[-1], 80, "")
    assert any(said in sentence for sentence in static.shortcomings(static._forward, layer, made))
