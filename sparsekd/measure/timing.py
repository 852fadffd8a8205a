"""How long something takes, and how sure that is.

Engines that are to be compared are visited in turn within one run, many times over, and each counts by its fastest
round: whatever else the machine does can only add time. On the CPU the clock is the process's CPU time, which a busy
neighbour does not move; with one thread it repeats within a few percent where wall time spreads over a factor of two.
It adds up over threads, so scaling over threads is a matter for the wall clock on a quiet machine.

    with threads(1):
        timings = compare({"dense": lambda: conv(x), "sparse": lambda: packed(x)})
    print(speedup(timings["dense"], timings["sparse"]))
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from . import machine

__all__ = [
    "Speedup",
    "Timing",
    "compare",
    "copy_bandwidth",
    "measure_latency",
    "peak_flops",
    "speedup",
    "threads",
]

CLOCKS = ("cpu", "wall", "cuda")
MOST_THREADS = 1024


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one engine. `cpu`, `wall` and `cuda` hold one figure per round; `clock` names the one meant.

    `cuda` is empty unless the device was one.
    """

    name: str
    clock: str
    repeats: int  # calls that each sample was averaged over
    cpu: tuple[float, ...]
    wall: tuple[float, ...]
    cuda: tuple[float, ...] = ()

    @property
    def samples(self) -> tuple[float, ...]:
        return getattr(self, self.clock)

    @property
    def min(self) -> float:
        return min(self.samples)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def __str__(self) -> str:
        return f"{self.name}: {self.min * 1e3:.4g} ms (median {self.median * 1e3:.4g}, {self.clock} clock)"


@dataclass(frozen=True)
class Speedup:
    """How many times faster one engine is than another.

    `value` is the ratio of the two minima. `median` is that of the ratios round by round, and lies in [low, high] with
    the probability `confidence`, whatever the distribution of the times.
    """

    value: float
    median: float
    low: float
    high: float
    confidence: float

    def __str__(self) -> str:
        return (
            f"{self.value:.2f}x (median {self.median:.2f}, {self.confidence:.0%} within {self.low:.2f}-{self.high:.2f})"
        )


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads within the block, and as many as before after it."""
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"Expected a number of threads of at least 1, got {count!r}")
    if count > MOST_THREADS:  # OpenMP ends the process where the system gives it no more
        raise ValueError(f"Expected at most {MOST_THREADS} threads, got {count}")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection in the middle of a sample would be charged to whichever engine runs then.

    None is forced before: with torch imported one takes longer than a layer's measurement.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _sample(engine: Callable[[], object], repeats: int, device: torch.device) -> tuple[float, float, float]:
    """One sample: seconds per call by (CPU, wall, CUDA events)."""
    on_cuda = device.type == "cuda"
    if on_cuda:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        begin.record(torch.cuda.current_stream(device))
    cpu, wall = time.process_time_ns(), time.perf_counter_ns()
    for _ in range(repeats):
        engine()
    if on_cuda:
        end.record(torch.cuda.current_stream(device))
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter_ns() - wall, time.process_time_ns() - cpu
    events = begin.elapsed_time(end) * 1e6 if on_cuda else 0.0
    return tuple(nanoseconds / 1e9 / repeats for nanoseconds in (cpu, wall, events))


def _repeats_for(engine: Callable[[], object], min_time: float, clock: str, device: torch.device) -> int:
    """How many calls last at least `min_time` by the clock: doubled until they do, then scaled."""
    repeats = 1
    while True:
        elapsed = _sample(engine, repeats, device)[CLOCKS.index(clock)] * repeats
        if elapsed >= min_time:
            return repeats
        # At most tenfold a step: a first, short measurement says little.
        repeats = max(repeats * 2, min(repeats * 10, math.ceil(repeats * min_time / max(elapsed, 1e-9))))


def compare(
    engines: Mapping[str, Callable[[], object]],
    rounds: int = 15,
    min_time: float = 0.01,
    warmup: int = 3,
    clock: str | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Time engines against each other: `{name: callable}` to `{name: Timing}`.

    Each of the `rounds` visits every engine once, for so many calls that a sample lasts `min_time` seconds, forward
    and backward by turns so that none always follows the same neighbour. `warmup` calls of each come first. The clock
    is "cpu" (process CPU time), "wall" or "cuda" (events); by default "cuda" on a CUDA device, else "cpu". Gradient
    mode is left as it is.
    """
    device = torch.device(device)
    clock = clock or ("cuda" if device.type == "cuda" else "cpu")
    if not engines:
        raise ValueError("Expected at least one engine to time, got none")
    if clock not in CLOCKS:
        raise ValueError(f"Expected a clock out of {', '.join(CLOCKS)}, got {clock!r}")
    if clock == "cuda" and device.type != "cuda":
        raise ValueError(f'Expected a CUDA device for the clock "cuda", got {device}')
    if rounds < 1 or warmup < 0 or not min_time > 0:
        raise ValueError(f"Expected rounds >= 1, warmup >= 0 and min_time > 0, got {rounds}, {warmup} and {min_time}")

    taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in engines}
    with _no_garbage_collection():
        repeats = {}
        for name, engine in engines.items():
            for _ in range(warmup):
                engine()
            repeats[name] = _repeats_for(engine, min_time, clock, device)
        order = list(engines)
        for _ in range(rounds):
            for name in order:
                taken[name].append(_sample(engines[name], repeats[name], device))
            order.reverse()

    timings = {}
    for name, samples in taken.items():
        cpu, wall, cuda = (tuple(column) for column in zip(*samples, strict=True))
        timings[name] = Timing(name, clock, repeats[name], cpu, wall, cuda if device.type == "cuda" else ())
    return timings


def _order_statistics(count: int, confidence: float) -> tuple[int, float]:
    """How many of `count` sorted values to leave out at either end, and the coverage of what is left.

    The median lies below the (k+1)-th smallest with the probability that at most k of `count` fair coins show heads.
    """
    leave_out, coverage, tail = 0, 1 - 2 * 0.5**count, 0.5**count
    for k in range(1, (count + 1) // 2):
        tail += math.comb(count, k) * 0.5**count
        if 1 - 2 * tail < confidence:
            break
        leave_out, coverage = k, 1 - 2 * tail
    return leave_out, max(coverage, 0.0)


def speedup(baseline: Timing, other: Timing, confidence: float = 0.95) -> Speedup:
    """How many times faster `other` is than `baseline`, both out of one `compare`.

    The interval comes from order statistics of the ratios round by round, which the two engines met under like
    conditions. Fewer than six rounds can't reach 95%: then the interval is the whole range, and `confidence` says less.
    """
    if len(baseline.samples) != len(other.samples) or baseline.clock != other.clock:
        raise ValueError(
            "Expected two timings of one compare(), got "
            f"{len(baseline.samples)} rounds by {baseline.clock} clock and {len(other.samples)} by {other.clock}"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"Expected a confidence between 0 and 1, got {confidence}")
    ratios = sorted(slow / fast for slow, fast in zip(baseline.samples, other.samples, strict=True))
    leave_out, reached = _order_statistics(len(ratios), confidence)
    return Speedup(
        value=baseline.min / other.min,
        median=statistics.median(ratios),
        low=ratios[leave_out],
        high=ratios[-1 - leave_out],
        confidence=reached,
    )


def device_of(model: torch.nn.Module, inputs: object) -> torch.device:
    """Where the work happens: the first tensor found among the inputs, then the parameters."""
    if isinstance(inputs, torch.Tensor):
        return machine.place(inputs)
    values = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, (tuple, list)) else ()
    for value in (*values, *model.parameters()):
        if isinstance(value, torch.Tensor):
            return machine.place(value)
    return torch.device("cpu")


def measure_latency(
    model: torch.nn.Module, example_inputs: object, repeat: int = 50, warmup: int = 5
) -> tuple[float, float]:
    """Wall-clock seconds of one forward pass: `(mean, standard deviation)` over `repeat` calls, each timed by itself.

    What a user waits for, on the threads that torch has; to tell two models apart use `compare`. The inputs are a
    tensor, a tuple of positional or a dict of named arguments. The model runs in eval mode without gradients, and is
    handed back as it was.
    """
    if repeat < 1 or warmup < 0:
        raise ValueError(f"Expected repeat >= 1 and warmup >= 0, got {repeat} and {warmup}")
    positional = example_inputs if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    named = {}
    if isinstance(example_inputs, Mapping):
        positional, named = (), dict(example_inputs)
    device = device_of(model, example_inputs)
    training = {module: module.training for module in model.modules()}
    model.eval()
    seconds = []
    try:
        with torch.no_grad(), _no_garbage_collection():
            for _ in range(warmup):
                model(*positional, **named)
            for _ in range(repeat):
                seconds.append(_sample(lambda: model(*positional, **named), 1, device)[1])
    finally:
        for module, mode in training.items():
            module.training = mode
    return statistics.fmean(seconds), statistics.stdev(seconds) if len(seconds) > 1 else 0.0


def peak_flops(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, size: int = 1024, rounds: int = 7
) -> float:
    """The peak: floating-point operations per second of torch's best dense product on its present threads.

    What a kernel's GFLOP/s are to be read against, when both are measured in one run: it is a little under what the
    multipliers could do, and follows the clock frequency of the moment. The better of a large square matmul and a 3x3
    convolution counts: not every library behind torch.mm takes the widest vectors that a processor has, and on a GPU
    the two have settings of their own for TF32.
    """
    device = torch.device(device)
    a = torch.randn(size, size, device=device, dtype=dtype)
    b, out = torch.randn_like(a), torch.empty_like(a)
    products, flops = {"matmul": lambda: torch.mm(a, b, out=out)}, {"matmul": 2 * size**3}
    if dtype.is_floating_point:
        channels, side = max(size // 4, 1), 28
        made = dict(device=device, dtype=dtype)
        x = torch.randn(1, channels, side, side, **made).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, 3, 3, **made).contiguous(memory_format=torch.channels_last)
        products["convolution"] = lambda: torch.conv2d(x, weight, padding=1)
        flops["convolution"] = 2 * (channels * (3 * side - 2)) ** 2  # without the taps on padding
    with torch.no_grad():
        timings = compare(products, rounds, **machine.timed_on(device))
    return max(flops[name] / timing.min for name, timing in timings.items())


def copy_bandwidth(device: torch.device | str = "cpu", megabytes: int = 128, rounds: int = 7) -> float:
    """Bytes per second of a large copy, each byte counted once read and once written."""
    device = torch.device(device)
    source = torch.ones(megabytes << 18, device=device)  # float32, touched so that its pages are there
    target = torch.zeros_like(source)
    timing = compare({"copy": lambda: target.copy_(source)}, rounds, **machine.timed_on(device))
    return 2 * source.numel() * source.element_size() / timing["copy"].min
