"""The steps of gpu_run.sh that are Python: golden products, tuning, benchmarks, plots.

    python benchmarks/gpu_run.py [--rehearse] --folder OUT golden | tune | bench | plot

Every result is checked before it is timed; both precisions are named. `bench` times both backends of a convolution and
compares with cuDNN (contiguous and channels_last; fp32, TF32, fp16), cuSPARSE for 1 x 1 convolutions, and eager and
compiled PyTorch for the losses. `tune` and `bench` end within their time: what they then have not come to is named.
What its writers guessed before the first run is in results/guessed.json (the model of time is predict.py's).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from sparsekd.kernels import configs
from torch import nn

import sparsekd
from sparsekd.measure.timing import compare
from sparsekd.sparse import formats, formats_24, ops, reference

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


SECONDS = {"tune": 75, "bench": 110}  # after which no new case is begun
BACKENDS = ("triton", "cuda")


class Run:
    """Sizes, device and clock, of the day or of its rehearsal."""

    def __init__(self, rehearse: bool, folder: Path) -> None:
        self.rehearse, self.folder = rehearse, folder
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.layers, self.kinds = (TINY_LAYERS, TINY_KINDS) if rehearse else (LAYERS, KINDS)
        self.densities, self.batch = (TINY_DENSITIES, 1) if rehearse else (DENSITIES, 32)
        self.backends = BACKENDS[:1] if rehearse else BACKENDS  # on the CPU, Triton's interpreter alone
        self.left_out: list[str] = []

    @contextlib.contextmanager
    def kernels(self):
        """On the CPU, the Triton kernels through the interpreter."""
        if not self.rehearse:
            yield
            return
        sys.path.insert(0, str(HERE.parent / "tests"))
        import interpreted

        if not interpreted.SUPPORTED:
            raise SystemExit(f"Expected Triton 3.8 to rehearse with, got another: {interpreted.REASON}")
        with interpreted.as_cpu_ops():
            yield

    def time(self, engines: dict) -> dict[str, float]:
        """Milliseconds, the least of the rounds."""
        rounds = dict(rounds=1, warmup=0, min_time=1e-9) if self.rehearse else dict(rounds=7, min_time=0.002)
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
        )
        (self.folder / name).write_text(json.dumps(about | {"results": found}, indent=1) + "\n")


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


def golden(run: Run) -> None:
    """Products of whole numbers are exact in every precision: any wrong place in a fragment shows."""
    found = {}
    for precision, dtype in (*PRECISIONS.items(), ("bf16", torch.bfloat16)):
        for backend in run.backends:
            with tf32(precision == "tf32"), ops.only_backend(backend):
                for vector in (8, 16) if run.rehearse else (8, 16, 32, 64, 128):
                    channels = 16 if run.rehearse else 128
                    weight = torch.randint(-3, 4, (max(vector, 16), channels, 1, 1)).double()
                    packed = formats.pack(weight, torch.ones_like(weight, dtype=torch.bool), vector, 1, False)
                    input = torch.randint(-3, 4, (2, channels, 4, 4)).double()
                    values, crow, col, rows = (None if t is None else t.to(run.device) for t in packed)
                    geometry = dict(out_channels=weight.shape[0], kernel_size=1, row_indices=rows)
                    got = ops.conv2d(input.to(run.device, dtype), values.to(dtype), crow, col, **geometry)
                    want = F.conv2d(input, weight).to(dtype)
                    found[f"{backend} {precision} V={vector}"] = bool(torch.equal(got.cpu(), want))
    for precision, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        weight, mask = torch.randint(-3, 4, (48, 128, 1, 1)).double(), two_of_four(48, 128, 1)
        input = torch.randint(-3, 4, (2, 128, 4, 4)).double()
        values, metadata = (t.to(run.device) for t in formats_24.pack_24(weight, mask))
        got = ops.conv2d_24(input.to(run.device, dtype), values.to(dtype), metadata, kernel_size=1)
        found[f"{precision} 2:4"] = bool(torch.equal(got.cpu(), F.conv2d(input, weight * mask).to(dtype)))
    run.write("golden.json", found)
    if not all(found.values()):
        raise SystemExit(f"Expected exact products, got {found}")


def tune(run: Run) -> None:
    """The tiles of each layer, as Triton's kernels would serve it."""
    found = {}
    cases = [(shape, *kind) for kind in run.kinds if kind[1] >= 8 for shape in run.layers]
    for shape, precision, vector in run.within(SECONDS["tune"], cases):
        problems = []
        plain = configs.config_for

        def noted(problem, device, launch, problems=problems, plain=plain):
            problems.append(problem)
            return plain(problem, device, launch)

        with tf32(precision == "tf32"), ops.only_backend("triton"):
            layer = Layer(run, shape, precision, vector, run.densities[0])
            with mock.patch.object(configs, "config_for", noted):
                layer.check(precision)

            def with_config(config, layer=layer):
                with mock.patch.object(configs, "config_for", lambda problem, device, launch: config):
                    return layer.sparse()

            candidates, few = configs.candidates_conv2d, 2 if run.rehearse else 6
            with mock.patch.object(configs, "candidates_conv2d", lambda *a: candidates(*a)[:few]):  # noqa: B023
                best, seconds = configs.tune(
                    problems[0], run.device, with_config, lambda f: run.time({"it": f})["it"] / 1e3
                )
        tried = dict(zip(configs.names(seconds), seconds.values(), strict=True))
        found[f"{shape} {precision} V={vector}"] = dict(best=configs.names([best])[0], seconds=tried)
    run.write("tuned.json", found)


def bench_conv2d(run: Run) -> list[dict]:
    rows = []
    cases = [(shape, *kind, density) for density in run.densities for kind in run.kinds for shape in run.layers]
    for shape, precision, vector, density in run.within(SECONDS["bench"], cases):
        with tf32(precision == "tf32"):
            layer = Layer(run, shape, precision, vector, density)
            last = [t.to(memory_format=torch.channels_last) for t in (layer.input, layer.weight)]
            pad = layer.kernel // 2
            engines = {
                "dense": lambda layer=layer, pad=pad: F.conv2d(layer.input, layer.weight, padding=pad),
                "dense channels_last": lambda last=last, pad=pad: F.conv2d(*last, padding=pad),
                "sparsekd": layer.sparse,  # by the backend that kernels/registration.py names
            }
            error = layer.check(precision)
            for backend in run.backends if vector >= 8 else ():
                with ops.only_backend(backend):
                    error = max(error, layer.check(precision))
                engines[backend] = layer.by(backend)
            if layer.kernel == 1 and precision != "fp16":
                csr = layer.weight.flatten(1).to_sparse_csr()
                columns = layer.input.transpose(0, 1).flatten(1).contiguous()
                engines["cuSPARSE"] = lambda csr=csr, columns=columns: csr @ columns
            ms = run.time(engines)
        dense = min(ms["dense"], ms["dense channels_last"])
        about = dict(layer=list(shape), precision=precision, vector=vector, density=density, error=error)
        rows.append(about | dict(ms=ms, speedup=dense / ms["sparsekd"]))
        print(*(f"{k}={v}" for k, v in about.items()), f"{rows[-1]['speedup']:.2f}x", flush=True)
    return rows


def bench_conv2d_24(run: Run) -> list[dict]:
    """2:4 against dense, both in fp16 and channels_last."""
    rows = []
    for in_channels, out_channels, kernel, size in run.layers:
        torch.manual_seed(0)
        weight = torch.randn(out_channels, in_channels, kernel, kernel).div_(in_channels**0.5).half()
        mask = two_of_four(out_channels, in_channels, kernel)
        values, metadata = (t.to(run.device) for t in formats_24.pack_24(weight, mask))
        weight, input = (weight * mask).to(run.device), torch.randn(run.batch, in_channels, size, size)
        weight, input = (t.to(run.device, torch.float16, memory_format=torch.channels_last) for t in (weight, input))
        pad, wanted = kernel // 2, F.conv2d(input.double(), weight.double(), padding=kernel // 2)
        engines = {
            "dense channels_last": lambda x=input, w=weight, pad=pad: F.conv2d(x, w, padding=pad),
            "sparsekd": lambda x=input, v=values, m=metadata, k=kernel, pad=pad: ops.conv2d_24(
                x, v, m, kernel_size=k, padding=pad
            ),
        }
        error = float((engines["sparsekd"]() - wanted).abs().max() / wanted.abs().max())
        if not error <= TOLERANCE["fp16"]:
            raise SystemExit(f"Expected the 2:4 convolution within {TOLERANCE['fp16']} of the dense one, got {error}")
        ms = run.time(engines)
        layer = [in_channels, out_channels, kernel, size]
        rows.append(dict(layer=layer, error=error, ms=ms, speedup=ms["dense channels_last"] / ms["sparsekd"]))
        print(f"2:4 layer={layer}", f"{rows[-1]['speedup']:.2f}x", flush=True)
    return rows


def bench_kd_loss(run: Run) -> list[dict]:
    rows = []
    for n, classes in [(4, 10)] if run.rehearse else [(256, 1000), (4096, 1000), (4096, 32000)]:
        student = (3 * torch.randn(n, classes, device=run.device)).requires_grad_()
        teacher, target = 3 * torch.randn_like(student), torch.randint(classes, (n,), device=run.device)

        def eager(student=student, teacher=teacher, target=target):
            return torch.autograd.grad(reference.kd_loss_reference(student, teacher, target), student)

        def fused(student=student, teacher=teacher, target=target):
            return torch.autograd.grad(ops.kd_loss(student, teacher, target), student)

        rows.append(check_and_time(run, f"kd_loss {n}x{classes}", eager, fused))
    return rows


def bench_linear_kd_loss(run: Run) -> list[dict]:
    rows = []
    for n, features, classes in [(6, 4, 10)] if run.rehearse else [(4096, 2048, 32000)]:
        made = [torch.randn(s, device=run.device) / features**0.25 for s in ((n, features), (classes, features)) * 2]
        learned, taught = [t.requires_grad_() for t in made[:2]], made[2:]
        target = torch.randint(classes, (n,), device=run.device)

        def eager(learned=learned, taught=taught, target=target):
            loss = reference.linear_kd_loss_reference(*learned, None, *taught, None, target)
            return torch.autograd.grad(loss, learned)

        def fused(learned=learned, taught=taught, target=target):
            return torch.autograd.grad(ops.linear_kd_loss(*learned, *taught, target), learned)

        row = check_and_time(run, f"linear_kd_loss {n}x{features}x{classes}", eager, fused)
        if not run.rehearse:
            for name, function in (("eager", eager), ("sparsekd", fused)):
                torch.cuda.reset_peak_memory_stats()
                function()
                row.setdefault("peak_bytes", {})[name] = torch.cuda.max_memory_allocated()
        rows.append(row)
    return rows


def check_and_time(run: Run, name: str, eager, fused) -> dict:
    for got, want in zip(fused(), eager(), strict=True):
        error = float((got - want).abs().max() / want.abs().max())
        if not error <= 1e-3:
            raise SystemExit(f"Expected the gradient of {name} within 1e-3 of eager's, got {error}")
    engines = {"eager": eager, "sparsekd": fused}
    if not run.rehearse:
        engines["compiled"] = torch.compile(eager)
    ms = run.time(engines)
    best = min(value for engine, value in ms.items() if engine != "sparsekd")
    print(name, f"{best / ms['sparsekd']:.2f}x", flush=True)
    return dict(case=name, ms=ms, speedup=best / ms["sparsekd"])


def bench_end_to_end(run: Run) -> list[dict]:
    """CIFAR ResNet-20 four times as wide, every convolution but the first with V x 1 weights at a tenth."""
    width, batch, size = (4, 1, 8) if run.rehearse else (64, 256, 32)
    rows = []
    for precision, vector in [("fp16", 8)] if run.rehearse else [("fp32", 4), ("tf32", 16), ("fp16", 16), ("fp16", 32)]:
        torch.manual_seed(0)
        from sparsekd.reference_models import cifar_resnet20

        dense = cifar_resnet20(width).eval()
        sparse = cifar_resnet20(width).eval()
        sparse.load_state_dict(dense.state_dict())
        for owner in list(sparse.modules()):
            for name, conv in list(owner.named_children()):
                if isinstance(conv, nn.Conv2d) and conv.in_channels > 3:
                    keep = torch.rand(-(-conv.out_channels // vector), 1, *conv.weight.shape[1:]) < 0.1
                    mask = keep.expand(-1, vector, -1, -1, -1).flatten(0, 1)[: conv.out_channels]
                    setattr(owner, name, sparsekd.SparseConv2d.from_dense(conv, mask, vector))
        dtype = PRECISIONS[precision]
        dense, sparse = dense.to(run.device, dtype), sparse.to(run.device, dtype)
        x = torch.randn(batch, 3, size, size).to(run.device, dtype)
        last, x_last = dense.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        with tf32(precision == "tf32"), torch.no_grad():
            want = sparsekd.to_dense(sparse)(x)
            error = float((sparse(x) - want).float().abs().max() / want.float().abs().max())
            if not error <= 2e-2:
                raise SystemExit(f"Expected the sparse network within 2e-2 of the dense one, got {error}")
            engines = {"dense channels_last": lambda m=last, x=x_last: m(x), "sparsekd": lambda m=sparse, x=x: m(x)}
            ms = run.time(engines)
        speed = ms["dense channels_last"] / ms["sparsekd"]
        rows.append(dict(case=f"ResNet-20 x4 {precision} V={vector}", ms=ms, speedup=speed, error=error))
        print(rows[-1]["case"], f"{speed:.2f}x", flush=True)
    return rows


def bench(run: Run) -> None:
    parts = dict(
        conv2d_24=bench_conv2d_24,
        kd_loss=bench_kd_loss,
        linear_kd_loss=bench_linear_kd_loss,
        end_to_end=bench_end_to_end,
    )
    run.write("results.json", {n: part(run) for n, part in (parts | dict(conv2d=bench_conv2d)).items()})


def plot(run: Run) -> None:
    """Speed-ups over the fastest dense engine, and what was guessed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = json.loads((run.folder / "results.json").read_text())
    guessed = json.loads((HERE / "results" / "guessed.json").read_text())["conv2d"]
    rows = found["results"]["conv2d"]
    names = list(dict.fromkeys(f"{r['precision']} V={r['vector']} at {r['density']:.0%}" for r in rows))
    figure, axes = pyplot.subplots(figsize=(10, 0.4 * len(names) + 2))
    for place, name in enumerate(names):
        mine = [r for r in rows if f"{r['precision']} V={r['vector']} at {r['density']:.0%}" == name]
        axes.plot([r["speedup"] for r in mine], [place] * len(mine), "o", color="tab:blue", alpha=0.7)
        if name in guessed:
            axes.plot(guessed[name], place, "|", color="tab:red", markersize=14)
    axes.set_yticks(range(len(names)), names)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xlabel("times faster than cuDNN (the better layout); red: guessed")
    axes.set_title(f"conv2d, {found['device']}")
    figure.tight_layout()
    figure.savefig(run.folder / "results.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("golden", "tune", "bench", "plot"))
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        raise SystemExit("Expected a GPU, or --rehearse; got neither")
    run = Run(args.rehearse, args.folder)
    with run.kernels():
        dict(golden=golden, tune=tune, bench=bench, plot=plot)[args.step](run)


if __name__ == "__main__":
    main()
