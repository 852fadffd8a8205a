"""What the compiler makes of the Triton kernels with their default configurations, for GPUs that are not there.

The layers are those of kernels/static.py, with the alignments that tensors of torch have.
"""

import pytest
import torch
from sparsekd.kernels import configs, static

ALL = [pytest.param(case, id=f"{case[0].__name__[1:]} {case[1]}") for case in static.CASES]
PRODUCT = {80: "mma.sync", 86: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}


def check(case, architecture):
    run, layer = case
    launches = static.compiled(case, architecture)
    assert launches
    for made in launches:
        registers, spills = made.registers_and_spills
        assert spills == 0 and registers <= 255, f"{made.kernel}: {spills} bytes spilled of {registers} registers"
        assert made.shared <= configs.shared_limit(architecture)
    if run is static._loss:
        return
    (product,) = [made for made in launches if made.kernel in ("_conv2d_kernel", "_conv2d_weight_grad_kernel")]
    if layer.dtype == torch.float32 and not layer.tf32:
        assert not product.loop  # float32 as it is, which tensor cores have not
        return
    assert product.loop[PRODUCT[architecture]], product.loop
    if run is static._forward:
        assert product.loop["cp.async"], "the next columns are fetched while these are multiplied"
        if architecture < 90:
            assert product.loop["ldmatrix"]
        if layer.dtype.itemsize == 2 and layer.kernel > 1 and layer.size > 7:
            # In lanes: every activation comes in a vector of 16 bytes.
            config = launches_config(layer)
            assert config.lanes
            vectors = config.block_m * config.block_k * layer.dtype.itemsize // 16 // (32 * product.num_warps)
            assert product.loop["cp.async 16"] >= vectors
            assert product.loop["cp.async"] - product.loop["cp.async 16"] <= 2 + config.block_k // 8  # the columns


def launches_config(layer):
    pixels = layer.batch * (layer.size // layer.stride) ** 2
    columns = layer.channels * layer.kernel**2
    row_groups = layer.channels // layer.vector
    problem = configs.Problem.of(
        "conv2d", layer.dtype, layer.vector, pixels, layer.channels, columns, layer.kernel**2, layer.stride,
        row_groups * (columns // 10), row_groups,
    )  # fmt: skip
    return configs.default_conv2d(problem, static.MULTIPROCESSORS)


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
    assert conv["shared_bytes"] > 0 and conv["instructions"]["mma.sync"] > 0


def test_a_spill_is_seen():
    """A tile far beyond what registers hold."""
    layer = static.Layer(torch.float32, 128)
    input, *packed = layer.tensors()
    config = configs.Config(128, 128, 32, num_warps=4)
    with static.recording() as launches:
        static.conv2d.conv2d(input, *packed, None, None, None, 128, *layer.geometry, config=config, precision="tf32")
    assert static.compile_launch(launches[0], 80, "wide").registers_and_spills[1] > 0
