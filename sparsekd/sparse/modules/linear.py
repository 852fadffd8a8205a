"""SparseLinear."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops
from .packed import SparseModule
from .plain import check_plain, copy_into, keep_all, options


class SparseLinear(SparseModule):
    """Linear layer with sparse weights and dense activations; constructor and behaviour of :class:`torch.nn.Linear`.

    Args:
        mask: bool ``[out_features, in_features]``, True = keep; None keeps all weights.
        vector: V output features share their columns (1: unstructured).

    Input ``[..., in_features]``; dtypes and errors as in :func:`sparsekd.sparse.ops.linear`.
    """

    groups = 1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        mask: Tensor | None = None,
        vector: int | str = 1,
    ) -> None:
        dense = nn.Linear(in_features, out_features, bias, device, dtype)
        super().__init__()
        self._take(dense, keep_all(dense.weight) if mask is None else mask, vector, False)

    def _take(self, linear: nn.Linear, mask: Tensor | None, vector: int | str, permute: bool | Tensor) -> None:
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._adopt(linear, mask, vector, permute)

    @classmethod
    def from_dense(
        cls, linear: nn.Linear, mask: Tensor | None = None, vector: int | str = 1, permute: bool | Tensor = False
    ) -> SparseLinear:
        """Packs ``linear``; arguments and errors as in :meth:`SparseConv2d.from_dense`."""
        check_plain(linear, nn.Linear, "forward")
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._take(linear, mask, vector, permute)
        return module

    def to_dense(self) -> nn.Linear:
        """The plain module with the same weights (zeros where pruned), dtype, device and mode."""
        bias = self.bias is not None
        dense = nn.utils.skip_init(nn.Linear, self.in_features, self.out_features, bias, **options(self.values))
        return copy_into(self, dense)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        self._check_input(input)
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise ValueError(f"Expected an input of shape [..., {self.in_features}], got {list(input.shape)}")
        if self.runs_dense(input):
            return self._shapes.dense(self)(input)
        return ops.linear(
            input,
            self.values,
            self.crow_indices,
            self.col_indices,
            self.bias,
            out_features=self.out_features,
            row_indices=self.row_indices,
            transpose=self._plan(),
        )

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, {self._pattern_repr()}"
