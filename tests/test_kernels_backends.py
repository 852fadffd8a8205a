"""Who serves an op on CUDA: the table in kernels/registration.py, and what is said where a backend is not built."""

import contextlib
import warnings

import pytest
import test_linear_kd_loss
import torch
from sparsekd.kernels import checks, registration
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsekd.sparse import ops
from sparsekd.sparse.ops import registered

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


def native(keys, *args):
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
    run = registration._chosen("conv2d_input_grad", native, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(None, *arguments(1)) == "cuda"
        assert run(None, *(t.half() for t in arguments(8))) == "triton"
    assert not counted


@pytest.mark.parametrize(
    "kernel, has_triton, wanted, got", [(None, True, "cuda", "triton"), (native, False, "triton", "cuda")]
)
def test_a_backend_that_is_not_built_is_counted_and_said_once(counted, kernel, has_triton, wanted, got):
    run = registration._chosen("conv2d_input_grad", kernel, has_triton)
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


@pytest.mark.parametrize("name", registration.OPS)
def test_each_op_is_a_triton_op(name):
    """Under each torch, of which some infer its schema from the launcher, be one given or not."""
    ours, op = registration.triton_op(name)._schema, getattr(torch.ops.sparsekd, name).default._schema
    for of_ours, of_op in ((ours.arguments, op.arguments), (ours.returns, op.returns)):
        assert [str(a.type) for a in of_ours] == [str(a.type) for a in of_op]
    assert [a.name for a in ours.arguments] == [a.name for a in op.arguments]


def test_each_op_on_cuda_goes_through_the_table():
    for name in registration.OPS:
        kernels = torch._C._dispatch_dump(f"sparsekd::{name}")
        (active,) = [line for line in kernels.splitlines() if line.startswith("CUDA:")]
        assert "registration.py" in active


def test_linear_kd_loss_without_triton_is_counted(counted):
    """Its chunks then go through torch and kd_loss_forward's own kernel."""
    case = test_linear_kd_loss.Case((9,), 3, 4, 5, chunk_rows=4)
    arguments = test_linear_kd_loss.arguments(case)
    run = registration._chosen("linear_kd_loss", registration._linear_kd_loss_chunked, False)
    with pytest.warns(RuntimeWarning, match="Expected the triton backend of linear_kd_loss .* the cuda backend serves"):
        got = run(None, *arguments)
    for one, other in zip(got, torch.ops.sparsekd.linear_kd_loss(*arguments), strict=True):
        assert torch.equal(one, other)
    assert ops.fallbacks == {("linear_kd_loss", "triton", "cuda"): 1}
    with ops.strict_backends(), pytest.raises(RuntimeError, match="Expected the triton backend of linear_kd_loss"):
        run(None, *arguments)


def test_our_kernels_replace_ours_in_silence():
    """And torch, which warns of one such in a process, still warns of others'."""
    for context, said in ((registration.replacing(), 0), (warned_always(), 1)):
        library = torch.library.Library("sparsekd", "IMPL")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with context:
                library.impl("max_pool2d", lambda *args: None, "CPU")
        library._destroy()
        assert len(caught) == said
    assert not torch.is_warn_always_enabled()


@contextlib.contextmanager
def warned_always():
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


class Noted:
    """In the place of torch.library.Library: which ops got a kernel on which key."""

    def __init__(self, *_):
        self.found = set()

    def impl(self, name, function, key, **_):
        self.found.add((name, key))


@pytest.mark.parametrize(
    "has_triton, built, served",
    [
        (False, (), set()),
        (False, ("kd_loss_forward",), {"kd_loss_forward", "linear_kd_loss"}),
        (True, (), {*registration.OPS, "transpose_pattern"}),
    ],
)
def test_what_is_served_where_a_backend_is_missing(monkeypatch, has_triton, built, served):
    """An op that nothing serves has no kernel on CUDA, which ops say at the call."""
    monkeypatch.setattr(registration, "Library", Noted)
    monkeypatch.setattr(registration.importlib.util, "find_spec", lambda name: has_triton or None)
    monkeypatch.setattr(registration, "native_kernel", lambda name: native if name in built else None)
    monkeypatch.setattr(registration, "is_registered", lambda name, key: name in built)
    found = registration.register().found
    assert {name for name, key in found if key == "CUDA"} == served
    assert {name for name, key in found if key == "CPU"} == {"linear_kd_loss"}


def test_a_device_without_a_kernel_is_an_error(monkeypatch):
    monkeypatch.setattr(registered, "ON_CUDA", frozenset())
    with FakeTensorMode(), pytest.raises(NotImplementedError, match="got cuda:0: no kernel is built for this device"):
        x, w = torch.empty(2, 3, device="cuda"), torch.empty(4, 3, device="cuda")
        ops.linear_kd_loss(x, w, x, w, alpha=1.0)


def test_one_backend_alone(counted):
    run = registration._chosen("conv2d_input_grad", native, True)
    for backend in ("cuda", "triton"):
        with ops.only_backend(backend):
            assert {run(None, *arguments(v)) for v in (1, 8)} == {backend}
    assert run(None, *arguments(1)) == "cuda" and not counted
    with ops.only_backend("cuda"), pytest.raises(RuntimeError, match="Expected the cuda backend .* got none built"):
        registration._chosen("conv2d_input_grad", None, True)(None, *arguments(1))
    with pytest.raises(ValueError, match="Expected backend to be cuda or triton, got 'cpu'"), ops.only_backend("cpu"):
        pass
