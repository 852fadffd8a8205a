"""Tile sizes: a small set per architecture, a first guess, and what a tuner found, kept on disk.

Nothing is timed on a first call: without a tuned entry a kernel runs with :func:`default_conv2d`. Within
:func:`registration.tuning`, as when the dispatch measures a layer, the candidates of each new layer are timed (a second
or two) and the winner is kept on disk; ``sparsekd/measure/tuned.py`` says where, and how to turn that off.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace

import torch
import triton

from ..measure import tuned
from . import registration
from .checks import cdiv, power_of_2

# Bytes of shared memory that one block may have: CUDA C++ Programming Guide, "Technical specifications".
SHARED_BYTES = {70: 96 << 10, 75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
ARCHITECTURES = (80, 86, 90, 100)  # those that are compiled for where there is no GPU


@dataclass(frozen=True)
class Config:
    """How one launch is tiled."""

    block_m: int  # pixels
    block_n: int  # output channels
    block_k: int  # columns
    num_warps: int = 4
    num_stages: int = 3
    split_k: int = 1
    lanes: bool = False  # read the input through lanes.py
    programs: int = 0  # of the persistent grid; 0: one for each tile


def shared_limit(architecture: int) -> int:
    known = [a for a in SHARED_BYTES if a <= architecture]
    return SHARED_BYTES[max(known)] if known else 48 << 10


def architecture_of(device: torch.device) -> int:
    if device.type != "cuda":
        return ARCHITECTURES[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """1 where there is no GPU to ask, as when a graph is traced."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 1
    return _multiprocessors(device.index if device.index is not None else torch.cuda.current_device())


def fits(config: Config, element_size: int, architecture: int) -> bool:
    """Whether the staged tiles fit in shared memory, and sums and addresses in registers.

    Registers are a guess that leaves room. An element that is gathered by itself takes about five of them for its
    address, its mask and what is fetched ahead; one in a vector takes its own size.
    """
    staged = (config.block_m + config.block_n) * config.block_k * element_size + 8 * config.block_k
    if staged * max(config.num_stages, 1) > shared_limit(architecture):
        return False
    threads = 32 * config.num_warps
    sums = config.block_m * config.block_n * (2 if element_size == 8 else 1) / threads
    gathered = config.block_m * config.block_k / threads
    return sums + gathered * element_size / 4 <= 160 if config.lanes else sums + 5 * gathered < 220


def _hint(size: int) -> int:
    """A number, for a size that is symbolic while a graph is traced."""
    return size if isinstance(size, int) else size.node.hint if size.node.has_hint() else 1 << 14


@dataclass(frozen=True)
class Problem:
    """What the choice of tiles depends on. The density is that of the columns, in steps of a tenth."""

    op: str
    dtype: str
    vector: int
    pixels: int
    out_channels: int
    columns: int  # of a row group, kept and not
    density: float
    taps: int
    stride: int

    @classmethod
    def of(cls, op: str, dtype: torch.dtype, vector: int, pixels: int, out_channels: int, columns: int, taps: int,
           stride: int, n_vectors: int, row_groups: int) -> Problem:  # fmt: skip
        pixels, out_channels, columns, n_vectors = map(_hint, (pixels, out_channels, columns, n_vectors))
        density = n_vectors / max(_hint(row_groups) * columns, 1)
        return cls(
            op,
            str(dtype).removeprefix("torch."),
            vector,
            pixels,
            out_channels,
            columns,
            round(density, 1),
            taps,
            stride,
        )

    @property
    def element_size(self) -> int:
        return getattr(torch, self.dtype).itemsize


def _block_n(vector: int) -> int:
    return min(max(power_of_2(vector), 16 if vector > 8 else 8), 128)


def _split_k(problem: Problem, config_m: int, block_k: int, columns_kept: float, multiprocessor_count: int) -> int:
    """Enough tiles for every multiprocessor, as long as each keeps a few steps of work."""
    tiles = cdiv(problem.pixels, config_m) * max(cdiv(problem.out_channels, problem.vector), 1)
    split = 1
    while split < 16 and tiles * split * 2 <= 2 * multiprocessor_count and columns_kept / (split * 2) >= 2 * block_k:
        split *= 2
    return split


def default_conv2d(problem: Problem, multiprocessor_count: int) -> Config:
    """The first guess: wide tiles where there are pixels for them, split-K where there are not.

    Without lanes each gathered element has an address and a mask of its own in registers, so tiles are smaller there.
    """
    block_n = _block_n(problem.vector)
    kept = max(problem.columns * problem.density, 1)
    half, forward = problem.element_size == 2, problem.op == "conv2d"
    lanes = problem.element_size <= 4 and problem.taps > 1 and problem.pixels >= 64
    lanes &= problem.op != "conv2d_weight_grad"
    narrow_grad = problem.op == "conv2d_weight_grad" and block_n <= 16
    deep = {2: 64 if lanes and forward or narrow_grad else 32, 4: 32, 8: 16}[problem.element_size]
    block_k = min(max(power_of_2(int(kept)), 16), deep)
    block_m = min(max(power_of_2(problem.pixels), 16), 128 if lanes and forward and half and block_n < 128 else 64)
    warps = 8 if block_n == 128 and not (lanes and half) else 4
    split = _split_k(problem, block_m, block_k, kept, multiprocessor_count)
    stages = 3 if lanes or (not half and problem.op != "conv2d_input_grad") else 2
    return Config(block_m, block_n, block_k, warps, stages, split, lanes)


def candidates_conv2d(problem: Problem, architecture: int, multiprocessor_count: int) -> list[Config]:
    """The small set that is timed, the first guess first: at most a dozen, each a step or two away from it."""
    first = default_conv2d(problem, multiprocessor_count)
    turned = problem.element_size <= 4 and problem.taps > 1 and problem.op != "conv2d_weight_grad"
    # With 8 warps ptxas spills the weight gradient (8.6: 8 bytes of 128 registers), that another block fits beside.
    more_warps = dict(num_warps=first.num_warps * 2) if problem.op != "conv2d_weight_grad" else {}
    steps = [
        dict(lanes=not first.lanes) if turned else {},
        dict(programs=4 * multiprocessor_count),  # persistent: as many as run at a time, about
        dict(num_stages=first.num_stages + 1),
        dict(block_k=first.block_k * 2),
        dict(block_k=first.block_k // 2),
        dict(block_m=first.block_m * 2),
        dict(block_m=first.block_m * 2, num_warps=first.num_warps * 2),
        dict(block_m=first.block_m // 2),
        dict(block_m=first.block_m // 2, block_k=first.block_k * 2),
        more_warps,
        more_warps | dict(num_stages=first.num_stages + 1),
    ]
    found = [first]
    kept = max(problem.columns * problem.density, 1)
    for step in steps:
        config = replace(first, **step)
        split = _split_k(problem, config.block_m, config.block_k, kept, multiprocessor_count)
        config = replace(config, split_k=split)
        tiles = cdiv(problem.pixels, config.block_m) * cdiv(problem.out_channels, problem.vector) * split
        if min(config.block_m, config.block_k) < 16 or tiles <= config.programs:
            continue
        if config not in found and fits(config, problem.element_size, architecture):
            found.append(config)
    return found


# --- what was tuned, on disk -----------------------------------------------------------------------------------------


@functools.cache
def _device_name(kind: str, index: int | None) -> str:
    return torch.cuda.get_device_name(index) if kind == "cuda" and torch.cuda.is_available() else kind


def _known(device: torch.device) -> tuned.Tuned:
    """What was tuned on such a device with such a compiler, kept as ``measure/tuned.py`` keeps times."""
    return _known_in(os.environ.get("SPARSEKD_CACHE_DIR"), device.type, device.index)


@functools.cache  # a launch asks
def _known_in(folder: str | None, kind: str, index: int | None) -> tuned.Tuned:
    return tuned.of({"tiles of": _device_name(kind, index), "torch": torch.__version__, "triton": triton.__version__})


def config_for(problem: Problem, device: torch.device, run: Callable[[Config], object] | None = None) -> Config:
    """What the tuner found for such a layer, else the first guess.

    Args:
        run: launches the layer with a configuration; what is timed within :func:`registration.tuning`.
    """
    if tuned.mode() != "off":
        found = _known(device).get(_key(problem))
        if found is not None:
            try:
                return Config(**found)
            except TypeError:
                pass  # written by another version
        if run is not None and registration.seconds_of is not None:
            return tune(problem, device, run, registration.seconds_of)[0]
    return default_conv2d(problem, multiprocessors(device))


@functools.lru_cache(4096)
def _key(problem: Problem) -> str:
    return json.dumps(asdict(problem), sort_keys=True)


def tune(
    problem: Problem, device: torch.device, run: Callable[[Config], object], seconds: Callable[[Callable], float]
) -> tuple[Config, dict[Config, float]]:
    """Times the candidates and keeps the fastest.

    Args:
        run: launches the layer with a configuration.
        seconds: how long a callable takes on the device.

    Returns:
        The winner, and the seconds of each candidate that ran (inf: it did not compile or launch).
    """
    taken: dict[Config, float] = {}
    for config in candidates_conv2d(problem, architecture_of(device), multiprocessors(device)):
        try:
            taken[config] = seconds(functools.partial(run, config))
        except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError, RuntimeError):
            taken[config] = float("inf")
    best = min(taken, key=taken.__getitem__)
    if taken[best] < float("inf"):
        known = _known(device)
        known.put(_key(problem), {name: int(value) for name, value in asdict(best).items()})
        known.flush()
    return best, taken


def names(configs: Iterable[Config]) -> list[str]:
    """For tables: what tells one configuration from another."""
    return [
        f"{c.block_m}x{c.block_n}x{c.block_k} w{c.num_warps} s{c.num_stages}"
        + (f" k{c.split_k}" if c.split_k > 1 else "")
        + (" lanes" if c.lanes else "")
        for c in configs
    ]
