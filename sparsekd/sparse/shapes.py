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
        self._values: Tensor | None = None

    def prefers_dense(self, layer: SparseModule, x: Tensor) -> bool:
        """Whether ``layer(x)`` is better computed dense."""
        made = self.made.get(_key(x))
        if made is None:
            made = self._choose(layer, x)
            if len(self.made) >= MOST:
                self.made.clear()
            self.made[_key(x)] = made
        return made.kernel == "dense"

    def dense(self, layer: SparseModule) -> nn.Module:
        """The layer with a dense weight."""
        # Values may be changed behind autograd's back, so they themselves tell.
        if self._dense is None or not _same(self._values, layer.values):
            self._dense, self._values = layer.to_dense().eval(), layer.values.detach().clone()
        self._dense.bias = layer.bias
        return self._dense

    def _choose(self, layer: SparseModule, x: Tensor) -> Choice:
        name = self.converted.name
        on_gpu = machine.place(x).type == "cuda"
        captured = on_gpu and torch.cuda.is_current_stream_capturing()  # into a graph, where nothing can be timed
        if tuned.mode() == "full" and not captured:
            made = choose(name, self.dense(layer), layer, [x])
            tuned.flush()
        elif (unknown := cost_model.unknown(machine.place(x))) is not None:
            made = replace(predict_layer(name, layer, [x]), kernel="sparse", reason=f"sparse as converted: {unknown}")
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


def _same(one: Tensor | None, other: Tensor) -> bool:
    alike = one is not None and one.dtype == other.dtype and one.device == other.device
    return alike and torch.equal(one, other)


def choices_by_shape(model: nn.Module) -> dict[str, list[Choice]]:
    """For each converted layer, by name, the choices of all shapes that it has met, that of the conversion first."""
    found = {}
    for name, module in model.named_modules():
        chooser = getattr(module, "_shapes", None)
        if isinstance(module, SparseModule) and chooser is not None:
            found[name] = list(chooser.made.values())
    return found
