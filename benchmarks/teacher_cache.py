"""When a teacher's kept answers pay: milliseconds a batch for asking it, for its answers from memory and from disk.

    python benchmarks/teacher_cache.py

One thread, process CPU time, minimum over rounds; the answers from disk are those of a second run, whose files are in
the system's cache. Each way is checked against the teacher first. ``student`` is the forward and backward of the
student beside it, so that the last column is what an epoch from disk takes of one that asks the teacher.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from torch import nn

from sparsekd import TeacherCache, reference_models
from sparsekd.measure.timing import compare, threads
from sparsekd.reporting import machine


def pairs() -> list[tuple[str, nn.Module, nn.Module, int]]:
    """Name, teacher, student, height and width of an image."""
    from torchvision import models

    return [
        ("reference", reference_models.reference_teacher(), reference_models.reference_student(), 32),
        ("resnet20x4 / resnet20", reference_models.cifar_resnet20(64), reference_models.cifar_resnet20(16), 32),
        ("resnet50 / resnet18", models.resnet50(), models.resnet18(), 224),
    ]


def run(name: str, teacher: nn.Module, student: nn.Module, size: int, batch: int, rounds: int) -> dict:
    x = torch.randn(batch, 3, size, size)
    teacher.eval()
    with tempfile.TemporaryDirectory() as folder:
        memory = TeacherCache(teacher).eval()
        options = {"whole": {}, "top_k": {"top_k": 5}}
        disk = {}
        for kind, settings in options.items():
            TeacherCache(teacher, folder=Path(folder) / kind, **settings).eval()(x)
            disk[kind] = TeacherCache(teacher, folder=Path(folder) / kind, **settings).eval()
        with torch.no_grad():
            want = teacher(x)
        worst = float((disk["whole"](x) - want).abs().max() / want.abs().max())
        if not worst < 1e-3 or not torch.allclose(memory(x), want, rtol=1e-4, atol=1e-4):
            raise SystemExit(f"Expected the answers of {name} within 1e-3 of the teacher's, got {worst:.2g}")

        def ask():
            with torch.no_grad():
                return teacher(x)

        def train():
            student.zero_grad(set_to_none=True)
            student(x).square().mean().backward()

        engines = {
            "teacher": ask, "memory": lambda: memory(x), "disk": lambda: disk["whole"](x),
            "disk, top 5": lambda: disk["top_k"](x), "student": train,
        }  # fmt: skip
        timings = compare(engines, rounds=rounds, min_time=0.01, clock="cpu")
        if any(cache.misses for cache in disk.values()):
            raise SystemExit("Expected every answer on disk, got some that were not")
        ms = {kind: timing.min * 1e3 for kind, timing in timings.items()}
        share = (ms["disk"] + ms["student"]) / (ms["teacher"] + ms["student"])
        size_on_disk = {kind: cache._store.bytes / batch for kind, cache in disk.items()}
    return {"name": name, "batch": batch, "size": size, "ms": ms, "bytes_a_row": size_on_disk, "share": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    rows = []
    with threads(1):
        columns = ("teacher", "memory", "disk", "disk, top 5", "student")
        print(f"{'teacher / student':24}" + "".join(f"{column:>13}" for column in columns) + f"{'epoch':>7}")
        for name, teacher, student, size in pairs():
            batch = args.batch if size == 32 else max(args.batch // 8, 1)
            row = run(name, teacher, student, size, batch, args.rounds)
            rows.append(row)
            times = "".join(f"{row['ms'][column]:13.2f}" for column in columns)
            print(f"{name:24}{times}{row['share']:7.0%}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
