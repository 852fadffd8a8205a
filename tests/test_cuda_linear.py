"""linear's three operators on CUDA, run by the emulator and checked, against plain PyTorch in float64."""

import dataclasses
import random

import emulated
import pytest
import torch
from conftest import assert_near
from test_cuda_conv2d import sampled

from sparsekd.sparse import formats, reference


@dataclasses.dataclass(frozen=True)
class Case:
    rows: int
    in_features: int
    out_features: int
    vector: int
    density: float
    permuted: bool
    bias: bool
    transposed: bool  # activations that are not contiguous
    dtype: torch.dtype
    seed: int


def draw(seed):
    r = random.Random(seed)
    return Case(
        rows=r.choice([1, 1, 2, 5, 16, 33, 130, 600]),
        in_features=r.choice([1, 3, 17, 64, 100]),
        out_features=r.choice([1, 2, 10, 33, 65]),
        vector=r.choice([1, 1, 2, 3, 4, 8, 16]),
        density=r.choice([0.0, 0.1, 0.3, 1.0]),
        permuted=r.random() < 0.3,
        bias=r.random() < 0.5,
        transposed=r.random() < 0.2,
        dtype=r.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16]),
        seed=seed,
    )


def operands(case):
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.out_features, case.in_features)
    packed = -(-case.out_features // case.vector)
    kept = torch.rand(packed, case.in_features, generator=generator) < case.density
    kept[packed // 2] = False  # a row without non-zeros
    mask = kept.repeat_interleave(case.vector, 0)[: case.out_features]
    permute = False
    if case.permuted:
        permute = torch.randperm(case.out_features, generator=generator).to(torch.int32)
        mask = torch.empty_like(mask).index_copy_(0, permute.long(), mask)
    values, *pattern = formats.pack(torch.randn(shape, generator=generator), mask, case.vector, 1, permute)

    def activations(features):
        made = torch.randn(features, case.rows, generator=generator).to(case.dtype).t()
        return made if case.transposed else made.contiguous()

    input, grad_output = activations(case.in_features), activations(case.out_features)
    bias = torch.randn(case.out_features, generator=generator).to(case.dtype) if case.bias else None
    return input, grad_output, values.to(case.dtype), pattern, bias


@pytest.mark.parametrize("seed", sampled(range(60), 15))
def test_against_the_oracle(seed):
    case = draw(seed)
    input, grad_output, values, pattern, bias = operands(case)
    wide = [None if t is None else t.double() for t in (input, grad_output, values, bias)]
    got = emulated.in_two_orders("linear", input, values, *pattern, None, bias, case.out_features)
    want = reference.linear_reference(wide[0], wide[2], *pattern, wide[3], case.out_features)
    assert_near(got, want, case.dtype, str(case))

    sizes = (case.vector, case.out_features, case.in_features, 1, 1)
    plan = emulated.emulator().ops.transpose_pattern(*pattern, *sizes) if seed % 2 else None
    got = emulated.in_two_orders("linear_input_grad", grad_output, values, *pattern, plan, case.in_features)
    weight = formats.unpack(wide[2], *pattern, (case.out_features, case.in_features))
    assert_near(got, wide[1] @ weight, case.dtype, str(case))

    got = emulated.in_two_orders("linear_weight_grad", input, grad_output, *pattern, case.vector)
    want = formats.gather(wide[1].t() @ wide[0], *pattern, case.vector)
    assert_near(got, want, case.dtype, str(case))
