"""Whether another network gives the same results: up to rounding, and no more than that."""

import pytest
import torch

from sparsekd.sparse.recorded import check_near


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_is_that_of_the_dtype(dtype):
    x = torch.linspace(-3, 3, 50).to(dtype)
    rounding = max(1e-3, 8 * torch.finfo(dtype).eps)
    check_near({"of": x}, {"of": x + 3 * rounding * 0.7})
    with pytest.raises(RuntimeError, match=r"Expected the results of the original, got .* off \(largest 3\)"):
        check_near([x], [x + 3 * rounding * 1.5])


def test_what_is_no_number_stands_in_the_same_places():
    x = torch.tensor([1.0, float("inf"), -float("inf"), float("nan"), 5.0])
    check_near(x, x + 1e-6)
    for i, value in [(1, -float("inf")), (1, 1e30), (2, float("nan")), (3, 0.0), (3, float("inf"))]:
        other = x.clone()
        other[i] = value
        with pytest.raises(RuntimeError, match="Expected infinite results and NaN where the original has them"):
            check_near(x, other)
    for value in (float("nan"), float("inf"), 6.0):
        other = x.clone()
        other[0] = value
        with pytest.raises(RuntimeError, match=r"Expected the results of the original, got .* off \(largest 5\)"):
            check_near(x, other)


def test_shapes():
    with pytest.raises(RuntimeError, match=r"Expected a result of shape \(2,\), got \(1, 2\)"):
        check_near(torch.zeros(2), torch.zeros(1, 2))
    check_near((torch.zeros(0), torch.tensor([1])), (torch.zeros(0), torch.tensor([1])))
