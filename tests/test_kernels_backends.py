"""Who serves an op on CUDA: the table in kernels/registration.py, and what is said where a backend is not built."""

import warnings

import pytest
import torch
from sparsekd.kernels import checks, registration

from sparsekd.sparse import ops

F16, F32, F64 = torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize(
    "call, backend",
    [
        (("conv2d", F32, 1, False), "cuda"),
        (("conv2d", F32, 4, True), "cuda"),
        (("conv2d", F16, 4, False), "cuda"),
        (("conv2d", F32, 64, False), "cuda"),
        (("conv2d", F32, 8, True), "triton"),
        (("conv2d", F16, 8, False), "cuda"),
        (("conv2d_fused", torch.bfloat16, 128, False), "cuda"),
        (("conv2d_input_grad", F16, 8, False), "triton"),
        (("linear", torch.bfloat16, 128, False), "triton"),
        (("conv2d", F64, 1, False), "triton"),
        (("kd_loss_forward", F32, None, False), "cuda"),
        (("linear_kd_loss", F32, None, False), "triton"),
    ],
)
def test_the_table(call, backend):
    assert registration.choice(registration.Call(*call)).backend == backend


class Native:
    def call_boxed(self, keys, *args):
        return "cuda"


@pytest.fixture
def counted(monkeypatch):
    """What a call of each kind went to, with neither backend asked to compute."""
    monkeypatch.setattr(registration, "triton_op", lambda name: lambda *args: "triton")
    monkeypatch.setattr(checks, "uses_tf32", lambda convolution: False)
    registration.fallbacks.clear()
    yield registration.fallbacks
    registration.fallbacks.clear()


def arguments(vector):
    return torch.empty(1, 1, 1, 1), torch.empty(1, vector)


def test_the_first_choice_serves_in_silence(counted):
    run = registration._chosen("conv2d_input_grad", Native(), True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(None, *arguments(1)) == "cuda"
        assert run(None, *(t.half() for t in arguments(8))) == "triton"
    assert not counted


@pytest.mark.parametrize(
    "native, has_triton, wanted, got", [(None, True, "cuda", "triton"), (1, False, "triton", "cuda")]
)
def test_a_backend_that_is_not_built_is_counted_and_said_once(counted, native, has_triton, wanted, got):
    run = registration._chosen("conv2d_input_grad", native and Native(), has_triton)
    call = arguments(1) if wanted == "cuda" else [t.half() for t in arguments(8)]
    with pytest.warns(
        RuntimeWarning, match=f"Expected the {wanted} backend of conv2d_input_grad .* the {got} backend serves it"
    ):
        assert run(None, *call) == got
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(None, *call) == got
    assert ops.fallbacks == {("conv2d_input_grad", wanted, got): 2}
    with ops.strict_backends(), pytest.raises(RuntimeError, match=f"Expected the {wanted} backend .* got none built"):
        run(None, *call)
    assert run(None, *call) == got


def test_tf32_is_what_torch_itself_would_use():
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    try:
        for of_conv, of_matmul in (("ieee", "tf32"), ("tf32", "ieee")):
            conv.fp32_precision, matmul.fp32_precision = of_conv, of_matmul
            assert checks.precision_of(F32) == of_conv
            assert checks.precision_of(F32, convolution=False) == of_matmul
            assert checks.precision_of(F16) == "ieee"
    finally:
        conv.fp32_precision, matmul.fp32_precision = before


def test_each_op_on_cuda_goes_through_the_table():
    for name in registration.OPS:
        kernels = torch._C._dispatch_dump(f"sparsekd::{name}")
        (active,) = [line for line in kernels.splitlines() if line.startswith("CUDA:")]
        assert "registration.py" in active
