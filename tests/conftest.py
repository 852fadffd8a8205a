"""What the tests share: seeds, one table of tolerances, the way to run a check under another instruction set."""

import functools
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import sparsekd

# The same examples in every run: a failure is found again, and a pass does not depend on luck. `--hypothesis-profile
# explore` looks at new ones.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile("fixed")

# dtype: (relative, absolute). Relative is to the largest element, see `assert_near`. Half types are computed in float32
# and rounded once, so they are off by half a unit in the last place of the largest element, here allowed twice.
TOLERANCE = {
    torch.float64: (1e-10, 0.0),
    torch.float32: (1e-4, 0.0),
    torch.float16: (2.0**-10, 2.0**-24),
    torch.bfloat16: (2.0**-7, 0.0),
}


def assert_near(got, want, dtype=None, what="result"):
    """Largest absolute error over largest absolute value, within TOLERANCE of the dtype.

    Single elements may cancel to nearly zero, where no summation order keeps relative digits; the largest does not.
    """
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)} for {tuple(want.shape)}"
    if want.numel() == 0:
        return
    relative, absolute = TOLERANCE[dtype or got.dtype]
    got, want = got.detach().double(), want.detach().double()
    error, size = float((got - want).abs().max()), float(want.abs().max())
    assert error <= relative * size + absolute, f"{what}: off by {error:.3g}, largest element {size:.3g}"


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_figures_of_before(tmp_path_factory, monkeypatch):
    """Nothing that was measured on this machine before, or in another test, is known."""
    monkeypatch.setenv("SPARSEKD_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "no-cache" / uuid.uuid4().hex))
    monkeypatch.delenv("SPARSEKD_TUNE", raising=False)


@pytest.fixture
def one_thread():
    """For layers and batches so small that waking a second thread takes longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check_gradients(function, arguments, positions):
    """First and second derivatives of ``function(*arguments)`` in the float64 arguments at ``positions``."""

    def of_these(*tensors):
        filled = list(arguments)
        for position, tensor in zip(positions, tensors, strict=True):
            filled[position] = tensor
        return function(*filled)

    tensors = [arguments[position].detach().requires_grad_() for position in positions]
    assert gradcheck(of_these, tensors)
    assert gradgradcheck(of_these, tensors)


def check_op(op, arguments, positions):
    """torch.library.opcheck with gradients asked for at ``positions``."""
    arguments = list(arguments)
    for position in positions:
        if arguments[position] is not None:
            arguments[position] = arguments[position].detach().requires_grad_()
    opcheck(op.default, tuple(arguments))


@pytest.fixture
def two_thread_counts():
    """Calls a function on 1 thread and on 2, gives both results, and leaves the number as it was."""

    def run(function):
        before = torch.get_num_threads()
        try:
            results = []
            for count in (1, 2):
                torch.set_num_threads(count)
                results.append(function())
            return results
        finally:
            torch.set_num_threads(before)

    return run


def cpu_flags():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


ISA_FLAGS = {
    "baseline": set(),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512vl", "avx512dq", "avx512bw"},
}


def python_under_isa(isa, code, **variables):
    """A new interpreter with SPARSEKD_CPU_ISA and other variables set, which are read once per process."""
    package = Path(sparsekd.__file__).parent.parent  # the one that is tested here
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), str(package), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "SPARSEKD_CPU_ISA": isa, "PYTHONPATH": path, **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def printed_under_isa(isa, code, **variables):
    """What code, in which tests can be imported, prints under an instruction set that this processor has."""
    check = f"from sparsekd.sparse import ops\nassert ops.cpu_isa() == {isa!r}\n"
    run = python_under_isa(isa, check + code, **variables)
    assert run.returncode == 0, run.stderr
    return run.stdout


@functools.cache
def checks_under_isa(isa):
    """{op: "ok" or what failed} of each op's small sample; one interpreter for all ops."""
    code = """
import json
found = {}
for name in ("conv2d", "conv2d_fused", "linear", "kd_loss", "kd_loss_divergences"):
    try:
        __import__("test_" + name).check_sample()
        found[name] = "ok"
    except AssertionError as error:
        found[name] = str(error)
print(json.dumps(found))
"""
    return json.loads(printed_under_isa(isa, code).splitlines()[-1])


@pytest.fixture(params=list(ISA_FLAGS))
def isa(request):
    """Each instruction set that this processor has."""
    missing = ISA_FLAGS[request.param] - cpu_flags()
    if missing:
        pytest.skip(f"this processor has no {', '.join(sorted(missing))}, which {request.param} needs")
    return request.param


@pytest.fixture
def isa_checks(isa):
    """What the samples gave under each instruction set that this processor has."""
    return checks_under_isa(isa)
