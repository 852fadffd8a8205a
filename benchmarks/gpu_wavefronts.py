"""What shared memory has to deliver to the tensor-core convolution, counted by the emulator; needs no GPU.

    python benchmarks/gpu_wavefronts.py            # writes benchmarks/results/gpu_wavefronts.json

For each layer of a ResNet-18 at 90% sparsity and V = 8, 16, 32, 64 the kernel runs in tests/emulator on a small map,
and each request's wavefronts (128 bytes, as the banks allow) are counted. The share of the dense `mma.sync` peak of 8.0
that follows is useful multiply-adds against the cycles of the busier of two units, columns that only fill up a matrix
included:

    tensor cores    what is multiplied, at 1024 multiply-adds a cycle
    shared memory   gathers (ldmatrix), copies into it (cp.async), and the way of weights and distances through the
                    same cache

An upper bound: no latency, no memory, no partly filled tiles. Two kinds of masks, as no trained weights are at hand:
"initial", the largest vectors of torchvision's initial weights; "uneven", the same after each input channel was scaled
by exp(0.5 * normal), since trained networks prefer some channels.

And of 2:4 on sparse tensor cores the same, of what `mma.sp` reaches on 8.0 (2048 a cycle with the zeros) and on 9.0
(60% of 4096): by the number of output channels, which decides the tile.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
SPARSITY, VECTORS, SIZE = 0.9, (8, 16, 32, 64), 16
SPARSE_MACS = {"8.0": 2048.0, "9.0": 0.6 * 4096}  # a cycle of an SM


@functools.cache
def layers() -> list[tuple[str, torch.nn.Conv2d, int]]:
    """Every different convolution of a ResNet-18 but its first, with the outputs a channel that all its like have."""
    import torchvision

    torch.manual_seed(0)
    found = {}
    for name, module in torchvision.models.resnet18().named_modules():
        if isinstance(module, torch.nn.Conv2d) and name != "conv1":
            outputs = (56 >> int(name[5]) - 1) ** 2
            like = found.setdefault((tuple(module.weight.shape), module.stride), [name, module, 0])
            like[2] += outputs
    return [tuple(like) for like in found.values()]


def masks(kind: str, vector: int) -> dict[str, torch.Tensor]:
    """The 10% of all vectors of V output channels with the largest norm, over all layers together."""
    generator = torch.Generator().manual_seed(0)
    norms = {}
    for name, conv, _ in layers():
        weight = conv.weight.detach()
        if kind == "uneven":
            weight = weight * torch.exp(0.5 * torch.randn(1, weight.shape[1], 1, 1, generator=generator))
        grouped = weight.unflatten(0, (-1, vector)).square().mean(1)
        norms[name] = grouped / grouped.mean()  # so that each layer is pruned about as much as the others
    flat = torch.cat([norm.flatten() for norm in norms.values()])
    threshold = flat.kthvalue(int(SPARSITY * flat.numel())).values
    return {name: (norm > threshold).repeat_interleave(vector, 0) for name, norm in norms.items()}


def requests() -> list[tuple[str, str, str, int, int, int, int]]:
    """(place in the code, space, kind, bytes a lane, requests, wavefronts or sectors, the least that are possible)"""
    import emulated

    lines = emulated.emulator().functions.emulator_costs().decode().splitlines()
    split = [line.split(maxsplit=7) for line in lines if "conv2d_tensor_kernel" in line]
    return [(p, space, kind, *map(int, rest[:4])) for p, space, kind, *rest in split]


def measure(conv: torch.nn.Conv2d, mask: torch.Tensor, vector: int) -> dict:
    import emulated

    from sparsekd.sparse import formats

    weight = conv.weight.detach().half()
    values, crow, col, _ = formats.pack(weight, mask, vector)
    size = SIZE if conv.stride[0] == 1 else 2 * SIZE
    input = torch.randn(8, weight.shape[1], size, size, dtype=torch.float16)
    geometry = (weight.shape[0], conv.kernel_size, conv.stride, conv.padding, conv.dilation, 1)
    ops, many = emulated.emulator().ops, [8, weight.shape[1], 8 * size, 8 * size]
    tiling = ops.conv2d_tiling(col, vector, many, *geometry)  # the one for many tiles
    plan = ops.conv2d_plan(crow, col, tiling, vector, many, *geometry)
    with emulated.counting():
        output = ops.conv2d_planned(input, values, plan, tiling, *[None] * 4, "none", True, *geometry)
        counted = requests()
    copies = {p for p, space, kind, size, *_ in counted if (space, kind, size) == ("shared", "write", 16)}
    # What rows need at the end is read by 16 bytes, too: eight rows at once, where an ldmatrix reads 32.
    gathers = [r for r in counted if r[1:4] == ("shared", "read", 16) and r[6] > 2 * r[4]]
    written = [r for r in counted if r[1:4] == ("shared", "write", 16)]
    # Weights, distances and whatever else: four sectors a wavefront.
    loaded = sum(
        max(requests, -(-sectors // 4))
        for place, space, kind, _, requests, sectors, _ in counted
        if (space, kind) == ("global", "read") and place not in copies
    )
    gathered, least = (sum(r[i] for r in gathers) for i in (5, 6))
    copied, copied_least = sum(r[5] for r in written), sum(r[6] for r in written)
    tensor = sum(r[4] for r in gathers) * tiling[0] / 4  # cycles of what an ldmatrix feeds
    useful = values.numel() * output[0, 0].numel() / 1024
    return {
        "columns_per_row": round(len(col) / (len(crow) - 1), 1),
        "gather_factor": round(gathered / least, 3),
        "copy_factor": round(copied / copied_least, 3),
        "filled_factor": round(tensor / useful, 3),
        "wavefronts": {"gathers": gathered, "copies": copied, "weights": loaded},
        "tensor_cycles": round(tensor),
        "useful_cycles": round(useful),
        "share_of_peak": round(useful / max(tensor, gathered + copied + loaded), 3),
        "share_of_peak_without_copies": round(useful / max(tensor, gathered + loaded), 3),
    }


def measure_24(filters: int) -> dict:
    """Of a 3 x 3 layer of 64 channels at 512 places: shared memory against sparse tensor cores."""
    import emulated

    from sparsekd.sparse import formats_24

    input, weight = torch.randn(2, 64, SIZE, SIZE).half(), torch.randn(filters, 64, 3, 3).half()
    kept = weight.abs().unflatten(1, (-1, 4)).argsort(2).argsort(2).flatten(1, 2) >= 2
    values, metadata = formats_24.pack_24(weight, kept)
    input = input.contiguous(memory_format=torch.channels_last)
    with emulated.counting():
        output = emulated.emulator().ops.conv2d_24(input, values, metadata, None, filters, *[(3, 3), *[(1, 1)] * 3, 1])
        costs = emulated.costs("conv2d_24")
    # What is written by 4 bytes, if anything, are results, at the end, which are read by 16.
    _, results = costs.get(("shared", "write", 4), (0, 0))
    moved = sum(actual for (space, *_), (actual, _) in costs.items() if space == "shared") - 2 * results
    shares = {arch: output.numel() * 64 * 9 / macs / moved for arch, macs in SPARSE_MACS.items()}
    return {
        "filters": filters,
        "wavefronts": moved,
        "share_of_mma_sp": {a: round(min(s, 1), 3) for a, s in shares.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="only the first of them")
    parser.add_argument("--masks", nargs="+", default=["initial", "uneven"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_wavefronts.json")
    args = parser.parse_args()
    import emulated

    # One multiprocessor, which is never short of tiles.
    emulated.emulator().functions.emulator_set_device(8, 163 << 10, 1)
    rows, totals = [], {}
    for kind in args.masks:
        for vector in VECTORS:
            chosen, sums = masks(kind, vector), [0, 0]
            for name, conv, outputs in layers()[: args.layers]:
                row = measure(conv, chosen[name], vector)
                rows.append({"masks": kind, "layer": name, "vector": vector, **row})
                sums[0] += row["useful_cycles"] * outputs / SIZE**2
                sums[1] += max(row["tensor_cycles"], sum(row["wavefronts"].values())) * outputs / SIZE**2
                print(
                    f"{kind:8} V={vector:<3} {name:24} {row['columns_per_row']:6.1f} columns  gathers "
                    f"{row['gather_factor']:.2f}x  filled {row['filled_factor']:.2f}x  "
                    f"share {row['share_of_peak']:.0%} ({row['share_of_peak_without_copies']:.0%} without copies)",
                    flush=True,
                )
            totals[f"{kind} V={vector}"] = round(sums[0] / sums[1], 3)
            print(f"{kind:8} V={vector:<3} all layers: {totals[f'{kind} V={vector}']:.0%} of the peak", flush=True)
    sparse = [measure_24(filters) for filters in (64, 128, 256)]
    for row in sparse:
        shares = ", ".join(f"{share:.0%} on {arch}" for arch, share in row["share_of_mma_sp"].items())
        print(f"2:4, {row['filters']} output channels: {shares} of the mma.sp rate")
    written = {"sparsity": SPARSITY, "share_of_peak": totals, "layers": rows, "2:4": sparse}
    args.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
