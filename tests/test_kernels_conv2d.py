"""The Triton kernels behind conv2d, conv2d_fused and their gradients, through Triton's interpreter (interpreted.py).

The cases, oracles and gradients are those of test_conv2d.py: here the same ops run these kernels.
"""

import dataclasses
import itertools
import math
import random

import interpreted
import pytest
import test_conv2d
import torch
import torch.nn.functional as F
from conftest import assert_near, check_gradients, check_op
from test_conv2d import OPS, Case, check_case, int32, make, run_op

from sparsekd.kernels import configs, registration
from sparsekd.sparse import ops, reference

pytestmark = pytest.mark.skipif(not interpreted.SUPPORTED, reason=interpreted.REASON)


@pytest.fixture(autouse=True)
def kernels():
    """The ops of CPU tensors run the Triton kernels, interpreted."""
    with interpreted.as_cpu_ops():
        yield


def pick(random, *choices):
    return random.choice(choices)


def random_case(seed):
    """A convolution of a few tiles at most: the interpreter takes about a millisecond for one step of one program."""
    r = random.Random(seed)
    kernel = pick(r, (1, 1), (3, 3), (3, 3), (2, 3), (1, 4), (5, 2))
    dilation = pick(r, (1, 1), (1, 1), (2, 1), (1, 3))
    padding = pick(r, (0, 0), (1, 1), (2, 0), (0, 3))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    beyond = pick(r, (0, 0), (4, 5), (1, 6), (7, 2))
    depthwise = r.random() < 0.1
    density, empty_rows = pick(r, (0.0, False), (0.15, False), (0.4, False), (0.4, True), (1.0, False))
    return Case(
        batch=pick(r, 1, 1, 2, 3, 9, 0) if not depthwise else 2,
        groups=pick(r, 2, 3) if depthwise else pick(r, 1, 1, 1, 2, 3),
        channels_per_group=1 if depthwise else pick(r, 1, 2, 3, 5, 8),
        filters_per_group=pick(r, 1, 2) if depthwise else pick(r, 1, 3, 8, 16, 17, 24),
        kernel=kernel,
        stride=pick(r, (1, 1), (1, 1), (2, 2), (2, 1), (1, 3)),
        dilation=dilation,
        padding=padding,
        size=(least[0] + beyond[0], least[1] + beyond[1]),
        vector=pick(r, 8, 8, 16, 16, 32, 64, 128, 3, 1),
        permuted=r.random() < 0.4,
        density=density,
        empty_rows=empty_rows,
        bias=r.random() < 0.5,
        dtype=pick(r, torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16),
        layout=pick(r, "contiguous", "contiguous", "channels_last", "every_other", "turned"),
        seed=seed,
    )


def random_config(seed):
    """Tiles of any kind, none larger than the interpreter does quickly."""
    r = random.Random(-1 - seed)
    return configs.Config(
        block_m=pick(r, 16, 32, 64),
        block_n=pick(r, 8, 16, 64),
        block_k=pick(r, 16, 32),
        split_k=pick(r, 1, 1, 2, 4),
        lanes=r.random() < 0.5,
        programs=pick(r, 0, 0, 3),
    )


def with_config(monkeypatch, config):
    monkeypatch.setattr(configs, "config_for", lambda problem, device: config)


def check_random(monkeypatch, seed):
    case, config = random_case(seed), random_config(seed)
    with_config(monkeypatch, config)
    try:
        got, input, weight, bias = check_case(case)
    except Exception as error:
        raise AssertionError(f"{case} with {config}: {error!r}") from error
    if case.batch and case.layout in ("contiguous", "channels_last"):
        assert got.stride() == F.conv2d(input, weight, bias, *case.geometry).stride()


@pytest.mark.parametrize("seed", range(60))
def test_random_configurations(monkeypatch, seed):
    check_random(monkeypatch, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60, 400))
def test_more_random_configurations(monkeypatch, seed):
    check_random(monkeypatch, seed)
