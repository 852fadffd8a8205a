"""linear_kd_loss with the Triton kernel, through Triton's interpreter (interpreted.py), as the CPU's own is tested."""

import interpreted
import pytest
import test_linear_kd_loss as same
import torch
from conftest import check_op
from torch.autograd import gradcheck

from sparsekd.sparse import ops

pytestmark = pytest.mark.skipif(not interpreted.SUPPORTED, reason=interpreted.REASON)


@pytest.fixture(autouse=True)
def kernels():
    """The ops of CPU tensors run the Triton kernels, interpreted."""
    with interpreted.as_cpu_ops():
        yield


@pytest.mark.parametrize("seed", [pytest.param(s, marks=pytest.mark.slow if s >= 24 else ()) for s in range(100)])
def test_random_configurations(seed):
    same.check_case(same.random_case(1000 + seed))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_online(divergence, monkeypatch):
    """More classes than registers hold, in blocks; the gradient takes the place of the logits."""
    from sparsekd.kernels import kd_loss

    monkeypatch.setattr(kd_loss, "ONE_BLOCK", 0)
    monkeypatch.setattr(kd_loss, "BLOCK_C", dict.fromkeys(kd_loss.BLOCK_C, 16))
    same.check_case(same.Case((9,), classes=50, divergence=divergence, label_smoothing=0.1, chunk_rows=4))


def test_half_precision_keeps_gradients_that_are_below_its_least():
    """A mean over so many rows brings single gradients to 1e-8, which float16 has not."""
    case = same.Case((3000,), 2, 2, 3, dtype=torch.float16, biases=(False, False), chunk_rows=1500, labels="all")
    made, target = same.make(case)
    tensors, wide = same.learned(made), same.learned(made)
    got = same.gradients(same.run(case, tensors, target), tensors)[1]
    want = same.gradients(same.run_reference(case, wide, target), wide)[1]
    assert float((got.double() - want).abs().max()) <= 4e-3 * float(want.abs().max())


@pytest.mark.parametrize("divergence", ["forward_kl", pytest.param("jsd", marks=pytest.mark.slow)])
def test_opcheck_and_gradcheck(divergence):
    case = same.Case((3,), 2, 3, 4, divergence=divergence, dtype=torch.float64, chunk_rows=2)
    arguments = same.arguments(case)
    check_op(torch.ops.sparsekd.linear_kd_loss, arguments, (0, 1, 2))
    made, target = same.make(case)
    assert gradcheck(
        lambda s, w, b: same.run(case, [s, w, b, *made[3:]], target), [t.requires_grad_() for t in made[:3]]
    )


def test_opcheck_of_the_triton_op():
    from sparsekd.kernels import registration

    op = registration.triton_op("linear_kd_loss")
    torch.library.opcheck(op, same.arguments(same.Case()), test_utils=("test_schema", "test_faketensor"))


def test_a_target_out_of_range_is_nan():
    x = torch.randn(3, 4)
    assert ops.linear_kd_loss(x, torch.randn(5, 4), x, torch.randn(5, 4), torch.tensor([0, 5, 1])).isnan()
