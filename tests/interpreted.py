"""The Triton kernels run by Triton's interpreter on CPU tensors, and watched while they run.

Within :func:`interpreting` a launch of a compiled kernel is interpreted instead; the same launchers and kernels as on a
GPU. What the interpreter of Triton 3.8 gets wrong is put right, and what it lets pass is an error:

- ``tl.dot`` on bfloat16 multiplied the bits; a cast from fp32 to bfloat16 cut instead of rounding;
- a load or store outside of every tensor, whether or not the launcher owns the memory (:class:`OutOfBounds`);
- two stores to one element within a launch, which on a GPU is a race (:class:`Overlap`).

Programs run in an order shuffled by ``order_seed``, as a GPU keeps none.

Another version of Triton is left as it is: ``SUPPORTED`` is then False and the tests that need this skip. Where there
is a GPU the kernels are tested on it.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import numpy as np
import torch
from sparsekd.kernels import registration
from torch._library.triton import set_wrap_triton_enabled
from torch._subclasses.fake_tensor import FakeTensor

from sparsekd.sparse import ops

try:
    import triton
    import triton.language as tl
    from triton.runtime import interpreter
except ImportError:  # on a platform without Triton
    triton = None

SUPPORTED = triton is not None and triton.__version__.split(".")[:2] == ["3", "8"]
REASON = f"the interpreter's patches are for Triton 3.8, this is {getattr(triton, '__version__', 'none')}"


class OutOfBounds(RuntimeError):
    pass


class Overlap(RuntimeError):
    pass


# Of the launch that runs: [(first byte, byte after the last, was it stored to)] of each tensor.
_extents: list[tuple[int, int, np.ndarray]] = []
_registered = []
order_seed = 0  # of the order in which a launch's programs run


def _seen(tensor):
    """The bytes between a tensor's first and last element."""
    if tensor.numel() == 0:
        return
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    begin = tensor.data_ptr()
    end = begin + span * tensor.element_size()
    _extents.append((begin, end, np.zeros(end - begin, dtype=bool)))


def _check(pointers, mask, size, store):
    addresses = pointers.data[mask.data].astype(np.int64) if mask is not None else pointers.data.astype(np.int64)
    addresses = addresses.reshape(-1)
    known = np.zeros(addresses.shape, dtype=bool)
    for begin, end, stored in _extents:
        inside = (addresses >= begin) & (addresses + size <= end)
        known |= inside
        if store and inside.any():
            at = addresses[inside] - begin
            if stored[at].any() or np.unique(at).size != at.size:
                raise Overlap("two stores to one element in one launch")
            stored[at] = True
    if not known.all():
        raise OutOfBounds(
            f"{'store to' if store else 'load from'} {int((~known).sum())} addresses outside of every tensor"
        )


def _round_to_bfloat16(data):
    return torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def _widen_bfloat16(data):
    return (data.astype(np.uint32) << 16).view(np.float32)


def _patches():
    """(object, attribute, what it is while kernels are interpreted)."""
    builder = interpreter.InterpreterBuilder

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        wide = [_widen_bfloat16(x.data) if x.dtype.scalar == tl.bfloat16 else x.data for x in (a, b)]
        product = np.matmul(wide[0].astype(d.data.dtype), wide[1].astype(d.data.dtype))
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    plain_cast = builder.cast_impl

    def cast(self, src, dst_type, *_):
        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar in (tl.float32, tl.float64):
            return interpreter.TensorHandle(_round_to_bfloat16(src.data.astype(np.float32)), dst_type.scalar)
        if src.dtype.scalar == tl.bfloat16 and dst_type.scalar in (tl.float32, tl.float64):
            wide = _widen_bfloat16(src.data).astype(interpreter._get_np_dtype(dst_type))
            return interpreter.TensorHandle(wide, dst_type.scalar)
        return plain_cast(self, src, dst_type)

    plain_load, plain_store = builder.create_masked_load, builder.create_masked_store

    def create_masked_load(self, ptrs, mask, *rest):
        _check(ptrs, mask, ptrs.get_element_ty().primitive_bitwidth // 8, store=False)
        return plain_load(self, ptrs, mask, *rest)

    def create_masked_store(self, ptrs, value, mask, *rest):
        _check(ptrs, mask, ptrs.get_element_ty().primitive_bitwidth // 8, store=True)
        return plain_store(self, ptrs, value, mask, *rest)

    executor = interpreter.GridExecutor
    plain_args = executor._init_args_hst

    def init_args(self, args, kwargs):
        args, kwargs = plain_args(self, args, kwargs)
        _extents.clear()
        for tensor in [*args, *kwargs.values()]:
            if isinstance(tensor, torch.Tensor):
                _seen(tensor)
        return args, kwargs

    plain_dim, plain_idx = builder.set_grid_dim, builder.set_grid_idx

    def set_grid_dim(self, *grid):
        plain_dim(self, *grid)
        self.order = np.random.default_rng(order_seed).permutation(int(np.prod(grid)))

    def set_grid_idx(self, *index):
        chosen = self.order[np.ravel_multi_index(index, self.grid_dim)]
        plain_idx(self, *map(int, np.unravel_index(chosen, self.grid_dim)))

    def run(self, *args, grid, warmup, **kwargs):
        if any(isinstance(arg, FakeTensor) for arg in args):
            return None  # as where a graph is traced
        with np.errstate(all="ignore"):  # as a GPU does
            return interpreter.InterpretedFunction(self.fn).run(*args, grid=grid, warmup=warmup, **kwargs)

    def call(self, *args, **kwargs):  # of one kernel by another, those of Triton's own library among them
        return interpreter.InterpretedFunction(self.fn)(*args, **kwargs)

    casts = ("cast_impl", "create_fp_to_fp", "create_si_to_fp", "create_ui_to_fp", "create_fp_ext", "create_fp_trunc")
    return [
        (builder, "create_dot", create_dot),
        *((builder, name, cast) for name in casts),
        (builder, "create_masked_load", create_masked_load),
        (builder, "create_masked_store", create_masked_store),
        (builder, "set_grid_dim", set_grid_dim),
        (builder, "set_grid_idx", set_grid_idx),
        (executor, "_init_args_hst", init_args),
        (triton.runtime.jit.JITFunction, "run", run),
        (triton.runtime.jit.JITFunction, "__call__", call),
    ]


@contextlib.contextmanager
def interpreting():
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in _patches():
            stack.enter_context(mock.patch.object(owner, name, replacement))
        stack.enter_context(set_wrap_triton_enabled(False))
        yield


@contextlib.contextmanager
def as_cpu_ops():
    """The project's ops run these kernels, interpreted, for tensors on the CPU."""
    library = registration.register("CPU")
    _registered.append(library)
    takes_plans, ops.takes_plans = ops.takes_plans, lambda *_: False  # plans are for the CPU's own kernels
    try:
        # New tensors hold NaN, so that what is read before it was written, or never written, shows.
        with interpreting(), filled_with_nan():
            yield
    finally:
        ops.takes_plans = takes_plans
        _registered.pop()._destroy()


@contextlib.contextmanager
def cpu_kernels():
    """Within :func:`as_cpu_ops`, the CPU's own kernels again."""
    _registered.pop()._destroy()
    try:
        yield
    finally:
        _registered.append(registration.register("CPU"))


@contextlib.contextmanager
def filled_with_nan():
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
