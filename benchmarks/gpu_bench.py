"""The benchmarks of gpu_run.py. Every result is checked before it is timed."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from gpu_cases import PRECISIONS, TOLERANCE, Layer, Run, tf32, two_of_four
from torch import nn

import sparsekd
from sparsekd.bench import folded, masked
from sparsekd.model_names import model_of
from sparsekd.sparse import formats_24, ops, reference

SECONDS = 110  # after which no new convolution is begun


def bench_conv2d(run: Run) -> list[dict]:
    rows = []
    cases = [(shape, *kind, density) for density in run.densities for kind in run.kinds for shape in run.layers]
    for shape, precision, vector, density in run.within(SECONDS, cases):
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
            if precision == "fp32":

                def with_tf32(layer=layer, pad=pad, last=last):
                    with tf32(True):
                        return F.conv2d(*last, padding=pad)

                engines["TF32"] = with_tf32  # a user who allows it: told beside, no engine of the same precision
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

        def wanted(student=student, teacher=teacher, target=target):
            return torch.autograd.grad(reference.kd_loss_reference(student, teacher, target), student)

        def eager(student=student, teacher=teacher, target=target):
            return torch.autograd.grad(plain_kd_loss(student, teacher, target), student)

        def fused(student=student, teacher=teacher, target=target):
            return torch.autograd.grad(ops.kd_loss(student, teacher, target), student)

        rows.append(check_and_time(run, f"kd_loss {n}x{classes}", wanted, eager, fused))
    return rows


def bench_linear_kd_loss(run: Run) -> list[dict]:
    rows = []
    for n, features, classes in [(6, 4, 10)] if run.rehearse else [(4096, 2048, 32000)]:
        made = [torch.randn(s, device=run.device) / features**0.25 for s in ((n, features), (classes, features)) * 2]
        learned, taught = [t.requires_grad_() for t in made[:2]], made[2:]
        target = torch.randint(classes, (n,), device=run.device)

        def wanted(learned=learned, taught=taught, target=target):
            loss = reference.linear_kd_loss_reference(*learned, None, *taught, None, target)
            return torch.autograd.grad(loss, learned)

        def eager(learned=learned, taught=taught, target=target):
            return torch.autograd.grad(plain_kd_loss(F.linear(*learned), F.linear(*taught), target), learned)

        def fused(learned=learned, taught=taught, target=target):
            return torch.autograd.grad(ops.linear_kd_loss(*learned, *taught, target), learned)

        row = check_and_time(run, f"linear_kd_loss {n}x{features}x{classes}", wanted, eager, fused)
        if not run.rehearse:
            for name, function in (("eager", eager), ("sparsekd", fused)):
                torch.cuda.reset_peak_memory_stats()
                function()
                row.setdefault("peak_bytes", {})[name] = torch.cuda.max_memory_allocated()
        rows.append(row)
    return rows


def plain_kd_loss(student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """As one writes it in plain torch, at the settings that ``ops.kd_loss`` has by default."""
    temperature, alpha = 4.0, 0.5
    log_q, log_p = F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1)
    soft = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return (1 - alpha) * F.cross_entropy(student, target) + alpha * temperature**2 * soft


def check_and_time(run: Run, name: str, wanted, eager, fused) -> dict:
    """wanted: gradients by ``reference.py``, which both must give."""
    for engine, of_engine in (("eager", eager), ("sparsekd", fused)):
        for got, want in zip(of_engine(), wanted(), strict=True):
            error = float((got - want).abs().max() / want.abs().max())
            if not error <= 1e-3:
                raise SystemExit(f"Expected {engine}'s gradient of {name} within 1e-3 of the reference's, got {error}")
    engines = {"eager": eager, "sparsekd": fused}
    if not run.rehearse:
        engines["compiled"] = torch.compile(eager)
    ms = run.time(engines)
    best = min(value for engine, value in ms.items() if engine != "sparsekd")
    print(name, f"{best / ms['sparsekd']:.2f}x", flush=True)
    return dict(case=name, ms=ms, speedup=best / ms["sparsekd"])


def bench_end_to_end(run: Run) -> list[dict]:
    """Whole networks, batch-norm folded for all, every convolution but the first with V x 1 weights at a tenth."""
    networks = [("cifar_resnet20", 1, 8)] if run.rehearse else [("cifar_resnet20x4", 256, 32), ("resnet50", 32, 224)]
    kinds = [("fp16", 8)] if run.rehearse else [("fp32", 1), ("fp32", 4), ("tf32", 16), ("fp16", 16), ("fp16", 32)]
    rows = []
    for name, batch, size in networks:
        for precision, vector in kinds:
            rows.append(bench_network(run, name, torch.randn(batch, 3, size, size), precision, vector))
    return rows


def bench_network(run: Run, name: str, x: torch.Tensor, precision: str, vector: int) -> dict:
    torch.manual_seed(0)
    dense = folded(masked(model_of(name, 10), 0.9, vector), x[:1])
    sparse = copy.deepcopy(dense)
    for owner in list(sparse.modules()):
        for child, conv in list(owner.named_children()):
            if isinstance(conv, nn.Conv2d) and conv.in_channels > 3:
                setattr(owner, child, sparsekd.SparseConv2d.from_dense(conv, conv.weight != 0, vector))
    dtype = PRECISIONS[precision]
    dense, sparse, x = dense.to(run.device, dtype), sparse.to(run.device, dtype), x.to(run.device, dtype)
    x_last = x.to(memory_format=torch.channels_last)
    with tf32(precision == "tf32"), torch.no_grad():
        want = dense(x)
        last, optimized = copy.deepcopy(dense).to(memory_format=torch.channels_last), copy.deepcopy(sparse)
        optimized = sparsekd.optimize_for_inference(optimized, x)
        engines = {
            "dense": lambda: dense(x),
            "dense channels_last": lambda: last(x_last),
            "convert": lambda: sparse(x),
            "sparsekd": lambda: optimized(x),
        }
        errors = {n: float((e() - want).abs().max() / want.abs().max()) for n, e in engines.items()}
        if not max(errors.values()) <= 2e-2:
            raise SystemExit(f"Expected networks within 2e-2 of the dense one, got {errors}")
        ms, ms_calls = run.time(engines), run.time_calls(engines)
    speed = min(ms["dense"], ms["dense channels_last"]) / min(ms["sparsekd"], ms["convert"])
    case = f"{name} {precision} V={vector}"
    print(case, f"{speed:.2f}x", flush=True)
    return dict(case=case, ms=ms, ms_calls=ms_calls, speedup=speed, errors=errors)


def bench(run: Run) -> None:
    parts = dict(
        conv2d_24=bench_conv2d_24,
        kd_loss=bench_kd_loss,
        linear_kd_loss=bench_linear_kd_loss,
        end_to_end=bench_end_to_end,
    )
    run.write("results.json", {n: part(run) for n, part in (parts | dict(conv2d=bench_conv2d)).items()})
