"""Predicts, before any GPU has run the kernels, how long ResNet-50's convolutions take: dense and sparse.

    python benchmarks/predict.py                   # writes benchmarks/results/predicted.json

A PREDICTION, nothing here was timed. For each layer, sparsity and pattern, time is the larger of what the arithmetic
takes and what moving bytes takes, plus launches. What the sparse kernels do before is counted as it is built, with
plans that are kept: the layout, where images are not taken as they lie, and the order of the values. "kept" is with
activations that stay in lanes from layer to layer, as they do on tensor cores after optimize_for_inference in batches
divisible by 8. The arithmetic follows from the models of cycles by which the library chooses its tiles
(csrc/cuda/conv2d_choice.cpp, whose constants were fitted to launches on an H200, and conv2d_tensor_tiling.cpp), so that
what is predicted is the least that the library sees; of 2:4 from what nvcc made of the kernel
(`results/gpu_static.json`). ASSUMPTIONS says the rest; they are in the file too. Break-even is the sparsity from which
on the sparse layer is predicted to be faster than the dense one in the same precision, for fp32 than the dense one in
TF32 too. Dense is taken to be as fast on tensor cores as large matrix products, which favours it. 2:4 is 50% whatever
the sparsity, so that its times don't fall; what it does at every call is to put its values in order.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from library_tiles import core_cycles, tiling

RESULTS = Path(__file__).resolve().parent / "results"
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Device:
    """Peaks from NVIDIA's whitepapers (A100, H100 SXM5, Ada), at boost clock."""

    name: str
    arch: str  # whose row of gpu_static.json stands for it
    multiprocessors: int
    gigahertz: float
    gigabytes: float  # a second
    lanes: int  # fp32 multiply-adds a cycle and SM
    tensor_macs: int  # fp16 with fp32 sums, dense, a cycle and SM
    sync_share: float  # of these by mma.sync, and by mma.sp
    shared_bytes: int  # of a block

    def seconds(self, cycles_of_an_sm: float) -> float:
        return cycles_of_an_sm / (self.gigahertz * 1e9)


DEVICES = (
    Device("A100", "8.0", 108, 1.41, 2039, 64, 1024, 1.0, 163 << 10),
    Device("H100", "9.0", 132, 1.83, 3350, 128, 2048, 0.6, 227 << 10),
    # GeForce multiplies fp16 with fp32 sums at half of its rate with fp16 sums.
    Device("RTX 4090", "8.6", 128, 2.52, 1008, 128, 256, 1.0, 99 << 10),
)

ASSUMPTIONS = {
    # Share of the fp32 peak that cuDNN reaches, and how many times faster it is for 3x3 with stride 1. Of the H100 as
    # an H200 showed at batch 32 (0.32-0.54 for 1x1, 0.41-0.78 for 3x3: results/gpu-h200.json, "layers"); of the others
    # not measured, in favour of dense.
    "dense_fp32": {"A100": 0.85, "H100": 0.5, "RTX 4090": 0.85},
    "dense_winograd": {"A100": 1.5, "H100": 1.0, "RTX 4090": 1.5},
    # What it takes at least in fp32: cycles for each input channel and tap, one after another, and microseconds beside
    # them. At batch 1 an H200's layers took this within a third but the thin 1x1 ones, and their sum within 1%.
    "dense_fp32_step": 42,
    "dense_fp32_us": 4.0,
    # Share of the tensor cores' peak that dense reaches, fp16 and TF32 (at half of fp16's): that of large matrix
    # products, which convolutions don't exceed, so that it favours dense. 298 of 312 TFLOPS on the A100, and 143 of 156
    # in TF32 (github.com/NVIDIA/cutlass/discussions/241: convolutions gain alike); 645-797 of 989 on the H100 and
    # 155-168 of 165 on the RTX 4090 from 2048 on (github.com/zzc0721/torch-performance-test-data, issues 79 and 78).
    "dense_tensor": {"A100": 0.95, "H100": 0.8, "RTX 4090": 1.0},
    "bandwidth": 0.85,  # share of the memory's; the second-level cache is not modelled
    "latency": 0.8,  # share of its bound that a sparse kernel reaches, for what nobody hides
    "between_instructions": 5.7,  # cycles from one instruction of a warp to the next, as an H100 showed
    "launch_us": 2.0,  # of each kernel, back to back in a stream
    "columns_even": "each row group has its share of the non-zeros",
    "l2_bytes": 32,  # of the second-level cache, a cycle and SM: the 2:4 kernel reads activations again for each tap
}

# Of the 2:4 kernel, as in gpu_static.py.
TILES_24 = ((4, 8, 2, 2, 1), (4, 4, 2, 4, 1), (4, 4, 1, 2, 2), (4, 4, 2, 2, 3), (2, 4, 2, 2, 1))
LANES = 8  # of the tensor-core kernel
TENSOR_VECTORS = (8, 16, 32, 64)


@dataclass(frozen=True)
class Layer:
    name: str
    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    size: int  # of the output, height and width
    count: int  # such layers

    def macs(self, batch: int) -> float:
        return batch * self.size**2 * self.out_channels * self.in_channels * self.kernel**2

    def bytes(self, batch: int, element: int) -> tuple[float, float, float]:
        """Of input, output and dense weight."""
        read = batch * self.in_channels * (self.size * self.stride) ** 2
        return (
            element * read,
            element * batch * self.out_channels * self.size**2,
            element * self.out_channels * self.in_channels * self.kernel**2,
        )


def resnet50() -> list[Layer]:
    """Every different convolution but the first, at 224 x 224."""
    import torchvision

    found: dict[tuple, list] = {}
    model = torchvision.models.resnet50().eval()

    def hook(name):
        def record(conv, args, output):
            key = (conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0], output.shape[-1])
            found.setdefault(key, [name, 0])[1] += 1

        return record

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d) and name != "conv1":
            module.register_forward_hook(hook(name))
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    return [Layer(name, *key, count) for key, (name, count) in found.items()]


# ---- the model ----


def moved(device: Device, total: float) -> float:
    return total / (device.gigabytes * 1e9 * ASSUMPTIONS["bandwidth"])


def launches(count: int) -> float:
    return count * ASSUMPTIONS["launch_us"] * 1e-6


def dense(device: Device, layer: Layer, batch: int, precision: str) -> float:
    """Seconds of cuDNN's convolution: "fp32", "tf32" or "fp16"."""
    if precision == "fp32":
        rate = device.lanes * ASSUMPTIONS["dense_fp32"][device.name]
        rate *= ASSUMPTIONS["dense_winograd"][device.name] if layer.kernel == 3 and layer.stride == 1 else 1.0
    else:
        rate = device.tensor_macs * ASSUMPTIONS["dense_tensor"][device.name] * (0.5 if precision == "tf32" else 1.0)
    arithmetic = device.seconds(layer.macs(batch) / (rate * device.multiprocessors))
    if precision == "fp32":
        steps = device.seconds(ASSUMPTIONS["dense_fp32_step"] * layer.in_channels * layer.kernel**2)
        arithmetic = max(arithmetic, steps + 1e-6 * ASSUMPTIONS["dense_fp32_us"] - launches(1))
    return max(arithmetic, moved(device, sum(layer.bytes(batch, 2 if precision == "fp16" else 4)))) + launches(1)


def core_convolution(device: Device, layer: Layer, batch: int, vector: int, density: float) -> tuple[float, bool]:
    """Seconds of conv2d_kernel in fp32, and whether it reads images as they lie: the cycles that the library chose its
    tile by, which were fitted to an H200, or those of the multiply-adds where units are fewer than there."""
    vectors = round(layer.in_channels * layer.kernel**2 * density) * math.ceil(layer.out_channels / vector)
    sizes = (batch, layer.in_channels, layer.out_channels, vector, vectors, layer.size, layer.kernel, layer.stride)
    major = int(device.arch.partition(".")[0])
    cycles, flat = core_cycles(sizes, (major, device.shared_bytes, device.multiprocessors))
    products = layer.macs(batch) * density / (device.lanes * device.multiprocessors)
    arithmetic = device.seconds(max(cycles, products / ASSUMPTIONS["latency"]))
    bytes_ = sum(layer.bytes(batch, 4)[:2]) + pattern_bytes(layer, batch, vector, density)
    return max(arithmetic, moved(device, bytes_)) + launches(1), flat


def pattern_bytes(layer: Layer, batch: int, vector: int, density: float) -> float:
    """Of fp32 values and a distance for each vector of them."""
    return layer.bytes(batch, 4)[2] * density * (1 + 1 / vector)


def cuda_cores(device: Device, layer: Layer, batch: int, vector: int, density: float) -> float:
    """Seconds of a call in fp32. One launch puts values in the order of the plan and, but for planes that are taken as
    they lie, copies to lanes."""
    seconds, flat = core_convolution(device, layer, batch, vector, density)
    copied = 0 if flat else 2 * layer.bytes(batch, 4)[0]
    return moved(device, copied + 2 * pattern_bytes(layer, batch, vector, density)) + launches(1) + seconds


def tensor_cores(device: Device, layer: Layer, batch: int, vector: int, density: float, kept: bool) -> float:
    """Seconds of conv2d_tensor_kernel in fp16: the cycles that the library chose its tile by."""
    kept = kept and batch % LANES == 0
    vectors = round(layer.in_channels * layer.kernel**2 * density) * math.ceil(layer.out_channels / vector)
    sizes = (batch, layer.in_channels, layer.out_channels, vector, vectors, layer.size, layer.kernel, layer.stride)
    major = int(device.arch.partition(".")[0])
    _, cycles = tiling(sizes, (major, device.shared_bytes, device.multiprocessors), not kept)
    read, written, weight = layer.bytes(batch, 2)
    pattern = weight * density * (1 + 2 / vector)
    before = moved(device, 2 * weight * density) + launches(1)
    if not kept:
        before += moved(device, 2 * read) + launches(1)
    arithmetic = device.seconds(cycles / ASSUMPTIONS["latency"])
    return before + max(arithmetic, moved(device, read + written + pattern)) + launches(1)


def sparse_tensor_cores(device: Device, layer: Layer, batch: int, kept: bool, static) -> float:
    """Seconds of conv2d_24_kernel in fp16. Its weights are 2:4 whatever is pruned beyond that."""
    steps = layer.kernel**2 * math.ceil(layer.in_channels / 64)
    best = math.inf
    for m, n, row_warps, pixel_warps, depth in TILES_24:
        rows, pixels, warps = 16 * m * row_warps, 8 * n * pixel_warps, row_warps * pixel_warps
        staged = rows * 4 + pixels * 8 + rows // 2  # vectors of 16 bytes, in three stages
        if 3 * 16 * staged * depth > device.shared_bytes:
            continue
        row = static[f"conv2d_24_kernel<__half, {m}, {n}, {row_warps}, {pixel_warps}, {depth}>", device.arch]
        products = rows * pixels * 32 / device.tensor_macs / device.sync_share
        # Operands by ldmatrix, metadata, and what is copied.
        wavefronts = warps * (8 * (m + n) + m) + staged / 8
        of_warp = row["instructions_per_fma"] * row["products"]
        step = max(products, wavefronts, warps * of_warp / 4) / ASSUMPTIONS["latency"]
        step = max(step, staged * 16 / ASSUMPTIONS["l2_bytes"])
        blocks = math.ceil(layer.out_channels / rows) * math.ceil(batch * layer.size**2 / pixels)
        turns = math.ceil(blocks / device.multiprocessors)
        together = min(max(16 // (warps * depth), 1), turns)
        alone = math.ceil(steps / depth) * of_warp * ASSUMPTIONS["between_instructions"]
        rounds = math.ceil(turns / together)
        best = min(best, rounds * (max(steps * step * together, alone) + 1000))
    read, written, weight = layer.bytes(batch, 2)
    pattern = weight * (1 / 2 + 1 / 8 / 2)  # values, and two bits each
    # Values into the order of the instruction, with an index of 32 bits each.
    before = 0.0 if kept else moved(device, weight * (1 / 2 + 1 / 2 + 1)) + launches(1)
    return before + max(device.seconds(best), moved(device, read + written + pattern)) + launches(1)


def break_even(sparse, dense_seconds: float) -> float | None:
    """The sparsity from which on `sparse(density)` is faster, or None below 99%."""
    if sparse(0.01) >= dense_seconds:
        return None
    low, high = 0.01, 1.0  # densities
    if sparse(high) < dense_seconds:
        return 0.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if sparse(middle) < dense_seconds else (low, middle)
    return round(1 - low, 3)


def patterns(static: dict) -> dict[str, tuple]:
    """{name: (precision, seconds of device, layer, batch, density and kept)}"""
    found = {}
    for vector in (1, 2, 4, 8):
        found[f"V={vector} fp32"] = (
            "fp32",
            lambda *of, v=vector: cuda_cores(*of[:3], v, of[3]),  # nothing is kept
        )
    for vector in TENSOR_VECTORS:
        found[f"V={vector} fp16"] = (
            "fp16",
            lambda *of, v=vector: tensor_cores(*of[:3], v, *of[3:]),
        )
    found["2:4 fp16"] = ("fp16", lambda *of: sparse_tensor_cores(*of[:3], of[4], static))
    return found


def predicted(device: Device, batch: int, layers: list[Layer], precision: str, seconds, fixed: float | None) -> dict:
    """Dense and sparse ms and break-even of all layers together, and of each.

    Args:
        fixed: the sparsity of a pattern that has but one, which breaks even there or never.
    """

    def even(sparse, dense_s: float) -> float | None:
        if fixed is None:
            return break_even(sparse, dense_s)
        return fixed if sparse(1 - fixed) < dense_s else None

    against = ["fp32", "tf32"] if precision == "fp32" else [precision]

    def of(some: list[Layer]) -> dict:
        def sparse(density: float, kept: bool) -> float:
            return sum(layer.count * seconds(device, layer, batch, density, kept) for layer in some)

        dense_s = {p: sum(layer.count * dense(device, layer, batch, p) for layer in some) for p in against}
        return {
            "dense_ms": {p: round(1e3 * s, 4) for p, s in dense_s.items()},
            "sparse_ms": [round(1e3 * sparse(1 - s, False), 4) for s in SPARSITIES],
            "kept_ms": [round(1e3 * sparse(1 - s, True), 4) for s in SPARSITIES],
            "break_even": {p: even(lambda d: sparse(d, False), s) for p, s in dense_s.items()},
            "break_even_kept": {p: even(lambda d: sparse(d, True), s) for p, s in dense_s.items()},
        }

    one_each = [replace(layer, count=1) for layer in layers]
    return of(layers) | {"layers": [{"layer": layer.name, **of([layer])} for layer in one_each]}


def line(row: dict) -> str:
    def even(value):
        return "never" if value is None else f"{value:.0%}"

    times = " ".join(
        f"{s:.0%} {a:.2f} (kept {b:.2f})"
        for s, a, b in zip(SPARSITIES, row["sparse_ms"], row["kept_ms"], strict=True)
        if s in (0.5, 0.8, 0.9, 0.95)
    )
    dense_said = ", ".join(
        f"{p} {ms:.2f} (even {even(row['break_even'][p])}, kept {even(row['break_even_kept'][p])})"
        for p, ms in row["dense_ms"].items()
    )
    return f"{row['device']:8} batch {row['batch']:<3} {row['pattern']:9} {times} | dense {dense_said}"


def read(name: str, made_by: str) -> dict:
    path = RESULTS / name
    if not path.is_file():
        sys.exit(f"Expected {path}, got none: {made_by} writes it")
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--out", type=Path, default=RESULTS / "predicted.json")
    args = parser.parse_args()
    table = read("gpu_static.json", "make gpu-static ARGS=--update")
    static = {(row["kernel"], row["arch"]): row for row in table["kernels"]}
    layers, rows = resnet50(), []
    print(
        "PREDICTION, not measured: ms of ResNet-50's convolutions but the first (kept: activations stay in lanes), and"
    )
    print("the sparsity that breaks even")
    for device in DEVICES:
        for batch in args.batches:
            for name, (precision, seconds) in patterns(static).items():
                row = {"device": device.name, "batch": batch, "pattern": name}
                row |= predicted(device, batch, layers, precision, seconds, 0.5 if name.startswith("2:4") else None)
                rows.append(row)
                print(line(row))
    written = {
        "what": "A prediction by benchmarks/predict.py. Nothing here was measured.",
        "assumptions": ASSUMPTIONS,
        "nvcc": table["nvcc"],
        "devices": [asdict(device) for device in DEVICES],
        "sparsities": SPARSITIES,
        "layers": [asdict(layer) for layer in layers],
        "predictions": rows,
    }
    args.out.write_text(json.dumps(written) + "\n")
    print(f"Wrote {args.out}")


if __name__ == "__main__":
    main()
