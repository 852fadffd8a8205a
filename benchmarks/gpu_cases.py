"""What the steps of gpu_run.py share: the day's sizes or those of its rehearsal, its clock, and its layers."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from sparsekd.measure.timing import compare
from sparsekd.sparse import formats, ops

HERE = Path(__file__).resolve().parent
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16}
TOLERANCE = {"fp32": 1e-4, "tf32": 5e-3, "fp16": 5e-3}  # of the largest element
# (channels in, channels out, kernel, map) of ResNet-50; precision and V of each.
LAYERS = [
    (64, 64, 3, 56),
    (128, 128, 3, 28),
    (256, 256, 3, 14),
    (512, 512, 3, 7),
    (256, 1024, 1, 14),
    (1024, 256, 1, 14),
]
KINDS = [("fp32", 1), ("fp32", 4), ("tf32", 16), ("tf32", 64), ("fp16", 8), ("fp16", 16), ("fp16", 32), ("fp16", 64)]
DENSITIES = (0.1, 0.25)
TINY_LAYERS, TINY_KINDS, TINY_DENSITIES = (
    [(16, 16, 3, 4), (16, 16, 1, 4)],
    [("fp32", 1), ("tf32", 16), ("fp16", 8)],
    (0.25,),
)
BACKENDS = ("triton", "cuda")
GRAPH_CALLS = 10  # in a captured graph: replaying one takes a few microseconds


class Run:
    """Sizes, device and clock, of the day or of its rehearsal."""

    def __init__(self, rehearse: bool, folder: Path) -> None:
        self.rehearse, self.folder = rehearse, folder
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.layers, self.kinds = (TINY_LAYERS, TINY_KINDS) if rehearse else (LAYERS, KINDS)
        self.densities, self.batch = (TINY_DENSITIES, 1) if rehearse else (DENSITIES, 32)
        self.backends = BACKENDS[:1] if rehearse else BACKENDS  # on the CPU, Triton's interpreter alone
        self.left_out: list[str] = []
        self.by_calls: dict[str, str] = {}  # engines that could not be captured, and why

    @contextlib.contextmanager
    def kernels(self):
        """On the CPU, the Triton kernels through the interpreter."""
        if not self.rehearse:
            torch.backends.cudnn.benchmark = True  # cuDNN's best algorithm, not the one that it guesses
            yield
            return
        sys.path.insert(0, str(HERE.parent / "tests"))
        import interpreted

        if not interpreted.SUPPORTED:
            raise SystemExit(f"Expected Triton 3.8 to rehearse with, got another: {interpreted.REASON}")
        with interpreted.as_cpu_ops():
            yield

    def time(self, engines: dict) -> dict[str, float]:
        """Milliseconds, the least of the rounds. Of the device alone: calls are captured as graphs, which are replayed.

        An engine that can't be captured is timed from call to call, which is said and kept in ``by_calls``.
        """
        if self.rehearse:
            timings = compare(engines, device=self.device, rounds=1, warmup=0, min_time=1e-9)
            return {n: t.min * 1e3 for n, t in timings.items()}
        graphs, calls = {}, {}
        for name, engine in engines.items():
            try:
                graphs[name] = graph_of(engine)
            except RuntimeError as error:
                calls[name], self.by_calls[name] = engine, str(error).splitlines()[0]
                print(f"{name}: timed by calls, as it can't be captured ({self.by_calls[name]})", flush=True)
        timings = compare({n: g.replay for n, g in graphs.items()}, device=self.device, rounds=7, min_time=0.002)
        ms = {n: t.min * 1e3 / GRAPH_CALLS for n, t in timings.items()} | (self.time_calls(calls) if calls else {})
        return {name: ms[name] for name in engines}

    def time_calls(self, engines: dict) -> dict[str, float]:
        """Milliseconds from call to call, what Python takes for each included."""
        rounds = dict(rounds=1, warmup=0, min_time=1e-9) if self.rehearse else dict(rounds=5, min_time=0.005)
        return {n: t.min * 1e3 for n, t in compare(engines, device=self.device, **rounds).items()}

    def within(self, seconds: float, cases: Iterable) -> Iterator:
        """The cases that are begun in time; the others are noted."""
        until = time.monotonic() + (float("inf") if self.rehearse else seconds)
        for case in cases:
            if time.monotonic() < until:
                yield case
            else:
                self.left_out.append(str(case))

    def write(self, name: str, found: object) -> None:
        if self.left_out:
            print(f"{len(self.left_out)} cases left out, as time was up:", *self.left_out, sep="\n  ")
        device = "a rehearsal on the CPU" if self.rehearse else torch.cuda.get_device_name()
        about = dict(
            device=device,
            torch=torch.__version__,
            cuda=torch.version.cuda,
            rehearsal=self.rehearse,
            left_out=self.left_out,
            by_calls=self.by_calls,
        )
        (self.folder / name).write_text(json.dumps(about | {"results": found}, indent=1) + "\n")


def graph_of(engine: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """GRAPH_CALLS calls one after another, captured; on a stream of their own, where they first run three times.

    RuntimeError where they wait for the device, before a capture is begun: one that fails leaves torch's allocator and
    random generator in the middle of it.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            engine()
        torch.cuda.set_sync_debug_mode("error")
        try:
            engine()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(GRAPH_CALLS):
            engine()
    return graph


@contextlib.contextmanager
def tf32(allowed: bool):
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


class Layer:
    """A convolution's tensors, dense and packed."""

    def __init__(self, run: Run, shape: tuple, precision: str, vector: int, density: float) -> None:
        in_channels, self.out_channels, self.kernel, size = shape
        dtype = PRECISIONS[precision]
        torch.manual_seed(0)
        weight = torch.randn(self.out_channels, in_channels, self.kernel, self.kernel) / in_channels**0.5
        keep = torch.rand(-(-self.out_channels // vector), 1, *weight.shape[1:]) < density
        mask = keep.expand(-1, vector, -1, -1, -1).flatten(0, 1)[: self.out_channels]
        self.weight = (weight * mask).to(run.device, dtype)
        self.packed = [
            None if t is None else t.to(run.device) for t in formats.pack(weight * mask, mask, vector, 1, False)
        ]
        self.packed[0] = self.packed[0].to(dtype)
        self.input = torch.randn(run.batch, in_channels, size, size).to(run.device, dtype)

    def sparse(self) -> torch.Tensor:
        values, crow, col, rows = self.packed
        geometry = dict(out_channels=self.out_channels, kernel_size=self.kernel, padding=self.kernel // 2)
        return ops.conv2d(self.input, values, crow, col, row_indices=rows, **geometry)

    def by(self, backend: str):
        """:meth:`sparse` by one backend alone."""

        def run() -> torch.Tensor:
            with ops.only_backend(backend):
                return self.sparse()

        return run

    def check(self, precision: str) -> float:
        want = F.conv2d(self.input.double(), self.weight.double(), padding=self.kernel // 2)
        error = float((self.sparse().double() - want).abs().max() / want.abs().max())
        if not error <= TOLERANCE[precision]:
            raise SystemExit(f"Expected the convolution within {TOLERANCE[precision]} of the dense one, got {error}")
        return error


def two_of_four(out_channels: int, in_channels: int, kernel: int) -> torch.Tensor:
    """A mask that keeps two of each four input channels at random."""
    scores = torch.rand(out_channels, in_channels // 4, 4, kernel, kernel)
    return (scores.argsort(2).argsort(2) < 2).view(out_channels, in_channels, kernel, kernel)
