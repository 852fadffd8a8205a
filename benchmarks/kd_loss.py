"""Times the fused distillation loss against eager PyTorch, forward and backward.

    python benchmarks/kd_loss.py --rows 4096 --classes 1000

Results are checked against the formula in float64 first. Eager is written in the three usual ways, of which the fastest
counts, and the first two are compiled, too (--no-compile where there is no C++ compiler). Bytes are one read of both
logits and one write of the gradient.
"""

from __future__ import annotations

import argparse
import json

import torch
import torch.nn.functional as F

from sparsekd.measure.timing import compare, copy_bandwidth, speedup, threads
from sparsekd.sparse import ops
from sparsekd.sparse.reference import kd_loss_reference

T, ALPHA = 4.0, 0.5


def log_target(student, teacher, target):
    kl = F.kl_div(F.log_softmax(student / T, 1), F.log_softmax(teacher / T, 1), reduction="batchmean", log_target=True)
    return (1 - ALPHA) * F.cross_entropy(student, target) + ALPHA * T * T * kl


def softmax_target(student, teacher, target):
    kl = F.kl_div(F.log_softmax(student / T, 1), F.softmax(teacher / T, 1), reduction="batchmean")
    return (1 - ALPHA) * F.cross_entropy(student, target) + ALPHA * T * T * kl


def soft_cross_entropy(student, teacher, target):
    p = F.softmax(teacher / T, 1)
    entropy = -(p * F.log_softmax(teacher / T, 1)).sum(1).mean()
    kl = F.cross_entropy(student / T, p) - entropy
    return (1 - ALPHA) * F.cross_entropy(student, target) + ALPHA * T * T * kl


def fused(student, teacher, target):
    return ops.kd_loss(student, teacher, target, temperature=T, alpha=ALPHA)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    torch.manual_seed(0)
    student = (3 * torch.randn(args.rows, args.classes)).requires_grad_()
    teacher = 3 * torch.randn(args.rows, args.classes)
    target = torch.randint(args.classes, (args.rows,))

    exact = student.detach().double().requires_grad_()
    loss = kd_loss_reference(exact, teacher.double(), target, T, ALPHA)
    loss.backward()
    eager = {f.__name__: f for f in (log_target, softmax_target, soft_cross_entropy)}
    compiled = {}
    if not args.no_compile:
        compiled = {f"{f.__name__}, compiled": torch.compile(f, fullgraph=True) for f in (log_target, softmax_target)}
    engines = eager | compiled | {"fused": fused}
    for name, function in engines.items():
        student.grad = None
        got = function(student, teacher, target)
        got.backward()
        error = float(abs(got.detach().double() - loss.detach()) / loss.detach())
        grad_error = float((student.grad - exact.grad).abs().max() / exact.grad.abs().max())
        print(f"{name:24} loss off by {error:.1e}, gradient by {grad_error:.1e} (relative, against float64)")
        if error > 1e-4 or grad_error > 1e-4:
            raise SystemExit(f"Expected {name} to equal the formula, got {error:.1e} and {grad_error:.1e}")

    def step(function):
        def run():
            student.grad = None
            function(student, teacher, target).backward()

        return run

    with threads(args.threads):
        timings = compare({name: step(f) for name, f in engines.items()}, rounds=args.rounds, clock=args.clock)
        bandwidth = copy_bandwidth()
    gains = {}
    for kind in filter(None, (eager, compiled)):
        best = min(kind, key=lambda name: timings[name].min)
        gains[best] = speedup(timings[best], timings["fused"])
    rate = 3 * 4 * student.numel() / timings["fused"].min
    print(
        f"({args.rows}, {args.classes}) float32, forward + backward, {args.threads} thread(s), {args.clock} time, "
        f"{ops.cpu_isa()}"
    )
    for name, timing in timings.items():
        print(f"{name:24} {timing.min * 1e3:9.3f} ms")
    for best, gain in gains.items():
        print(f"fused against {best}: {gain}")
    print(f"{rate / 1e9:.1f} GB/s, {rate / bandwidth:.0%} of a copy's")
    if args.json:
        figures = {name: timing.min * 1e3 for name, timing in timings.items()}
        found = {"settings": vars(args), "isa": ops.cpu_isa(), "ms": figures}
        found["speedup"] = {name: gain.value for name, gain in gains.items()}
        with open(args.json, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
