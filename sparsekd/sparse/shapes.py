"""What a swapped layer does with inputs of other shapes than it was converted with (detection, serving).

By the cost model, set right by what was measured at the shape of the conversion; by measurement, when such a shape is
first seen, under SPARSEKD_TUNE=full. On a GPU, of which the cost model knows nothing, a shape that is not measured runs
sparse. Where dense is faster, the layer runs dense: with a dense weight that is made once, and again when the values
have changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..measure import machine, tuned
from . import cost_model
from .dispatch import Choice, choose, predict_layer
from .modules import SparseModule

MOST = 1000  # shapes that are remembered


class Shapes:
    """Chooses between sparse and dense for each shape that one layer meets.

    ``made`` holds the choices, by input shape, dtype and kind of device.

    Args:
        choice: of the conversion, for ``layer`` on ``inputs``.
    """

    def __init__(self, choice: Choice, layer: SparseModule, inputs: Sequence[Tensor]) -> None:
        self.converted = choice
        self.made: dict[tuple, Choice] = {_key(x): choice for x in inputs}
        # By how much the cost model is off at the shape that was measured, on the processor.
        predicted = predict_layer(choice.name, layer, inputs)
        self._right = choice.speedup / predicted.speedup if predicted.speedup else None
        self._dense: nn.Module | None = None
        self._values: Tensor | tuple | None = None  # that it was made of

    def prefers_dense(self, layer: SparseModule, x: Tensor) -> bool:
        """Whether ``layer(x)`` is better computed dense."""
        made = self.made.get(_key(x))
        if made is None:
            made = self._choose(layer, x)
            if len(self.made) >= MOST:
                self.made.clear()
            self.made[_key(x)] = made
        # A dense weight made while a graph is captured would be there only when the graph has run.
        return made.kernel == "dense" and (self._current(layer) or not _captured(x))

    def dense(self, layer: SparseModule) -> nn.Module:
        """The layer with a dense weight."""
        if not self._current(layer):
            values = layer.values.detach()
            kept = values.clone() if values.is_cpu else _stamp(values)
            self._dense, self._values = layer.to_dense().eval(), kept
        self._dense.bias = layer.bias
        return self._dense

    def _current(self, layer: SparseModule) -> bool:
        """Whether the dense weight is that of the present values.

        On the CPU the values themselves tell, which may be changed behind autograd's back; to compare them on a GPU
        would let the host wait for it at each forward, so that there their version tells.
        """
        if self._dense is None:
            return False
        if isinstance(self._values, Tensor):
            return _same(self._values, layer.values)
        return self._values == _stamp(layer.values)

    def _choose(self, layer: SparseModule, x: Tensor) -> Choice:
        name = self.converted.name
        if tuned.mode() == "full" and not _captured(x):
            made = self._measured(layer, x)
        elif (unknown := cost_model.unknown(machine.place(x))) is not None:
            made = self._as_converted(x, unknown)
        else:
            made = self._predicted(predict_layer(name, layer, [x]))
        if made.kernel == "dense":
            warnings.warn(
                "a sparse layer runs dense at a shape that it was not converted with, where that is faster; "
                "sparsekd.choices_by_shape(model) tells",
                stacklevel=4,
            )
        else:
            self._dense = self._values = None  # of no use for now
        return made

    def _measured(self, layer: SparseModule, x: Tensor) -> Choice:
        self.made[_key(x)] = self.converted  # what is measured is the sparse layer, which asks here
        try:
            made = choose(self.converted.name, self.dense(layer), layer, [x])
        finally:
            del self.made[_key(x)]
            layer._shapes = self  # setting anything lets a layer forget its calls, remembered as sparse ones
        tuned.flush()
        return made

    def _as_converted(self, x: Tensor, reason: str) -> Choice:
        """Without times, of which none is known. Nothing is read off the layer, for which the host would wait."""
        of = self.converted
        made = Choice(of.name, of.kind, "sparse", f"sparse as converted: {reason}", tuple(x.shape), of.sparsity)
        return replace(made, vector=of.vector, dense_bytes=of.dense_bytes, sparse_bytes=of.sparse_bytes)

    def _predicted(self, made: Choice) -> Choice:
        if self._right is None:
            return made  # it was converted on a GPU
        gain = made.speedup * self._right
        said = f"predicted {gain:.2g}x at this shape from {self.converted.speedup:.2g}x at that of the conversion"
        low, high = made.speedup_low * self._right, made.speedup_high * self._right
        kernel = "sparse" if gain > 1 else "dense"
        return replace(made, kernel=kernel, reason=said, speedup=gain, speedup_low=low, speedup_high=high)

    def __getstate__(self) -> dict:
        return {**vars(self), "_dense": None, "_values": None}  # made again where needed


def _key(x: Tensor) -> tuple:
    return (x.shape, x.dtype, machine.place(x).type)


def _captured(x: Tensor) -> bool:
    """Whether what is done now goes into a CUDA graph, where nothing can be timed."""
    return machine.place(x).type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stamp(values: Tensor) -> tuple:
    # Tensors made in inference mode count no versions.
    return (values.data_ptr(), values.dtype, values.device, None if values.is_inference() else values._version)


def _same(one: Tensor, other: Tensor) -> bool:
    alike = one.dtype == other.dtype and one.device == other.device
    return alike and torch.equal(one, other)


def choices_by_shape(model: nn.Module) -> dict[str, list[Choice]]:
    """For each converted layer, by name, the choices of all shapes that it has met, that of the conversion first."""
    found = {}
    for name, module in model.named_modules():
        chooser = getattr(module, "_shapes", None)
        if isinstance(module, SparseModule) and chooser is not None:
            found[name] = list(chooser.made.values())
    return found
