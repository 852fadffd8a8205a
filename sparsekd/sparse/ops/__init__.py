"""The Python half of every operator: what it takes and gives, its fake kernel and its gradient, a file each.

Schemas are in ``csrc/ops.cpp``, meanings in ``reference.py``. Weights are sparse (V x 1 vector-CSR, see
``formats.py``), activations dense.

    registered.py   loads and calls them        arguments.py   what arguments have in common
    rules.py        what fakes and gradients have in common
"""

from .arguments import same_padding
from .conv2d import conv2d, conv2d_fused, transpose_pattern
from .conv2d_24 import conv2d_24, conv2d_24_fused
from .conv2d_planned import (
    LANES,
    Plan,
    conv2d_plan,
    for_tensor_cores,
    from_lanes,
    takes_core_plans,
    takes_plans,
    to_lanes,
)
from .kd_loss import kd_loss
from .linear import linear
from .linear_kd_loss import linear_kd_loss
from .max_pool2d import max_pool2d
from .registered import cpu_isa, fallbacks, only_backend, strict_backends, tuning_tiles, uses_tf32
from .squeeze_excite import squeeze_excite

__all__ = [
    "LANES",
    "Plan",
    "conv2d",
    "conv2d_24",
    "conv2d_24_fused",
    "conv2d_fused",
    "conv2d_plan",
    "cpu_isa",
    "fallbacks",
    "for_tensor_cores",
    "from_lanes",
    "kd_loss",
    "linear",
    "linear_kd_loss",
    "max_pool2d",
    "only_backend",
    "same_padding",
    "squeeze_excite",
    "strict_backends",
    "takes_core_plans",
    "takes_plans",
    "to_lanes",
    "transpose_pattern",
    "tuning_tiles",
    "uses_tf32",
]
