"""Times sparse convolutions against torch's own, layer by layer.

    python benchmarks/conv2d.py --suite resnet18 --sparsity 0.9 --batch 1

Each layer's result is checked first. Then dense (NCHW, channels_last, and oneDNN with its weight packed beforehand, as
inductor's freezing uses it) and sparse, whose entries are brought into the kernel's order beforehand as
optimize_for_inference does it, are visited in turn within one run, by process CPU time, minimum over rounds, on
one thread unless --threads says otherwise. The ratio is to the best dense one. GF/s count the non-zeros' multiply-adds
twice, and the share is of the FMA peak measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass

import torch
from torch import nn

from sparsekd.measure.timing import Timing, compare, peak_flops, speedup, threads
from sparsekd.sparse import ops
from sparsekd.sparse.modules import SparseConv2d


@dataclass(frozen=True)
class Layer:
    in_channels: int
    out_channels: int
    kernel: int
    size: int  # input height and width
    stride: int = 1
    groups: int = 1

    def __str__(self) -> str:
        depth = f" g{self.groups}" if self.groups > 1 else ""
        shape = f"{self.in_channels}->{self.out_channels}"
        return f"{self.kernel}x{self.kernel} {shape} {self.size}² s{self.stride}{depth}"


def layers_of(model: nn.Module, size: int) -> list[Layer]:
    """Every different convolution of a network but its first, in order."""
    found: dict[Layer, None] = {}

    def record(conv, args, output):
        shape = args[0].shape
        found[Layer(shape[1], conv.out_channels, conv.kernel_size[0], shape[-1], conv.stride[0], conv.groups)] = None

    handles = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size))
    for handle in handles:
        handle.remove()
    return list(found)[1:]


def suite(name: str) -> list[Layer]:
    import torchvision.models as zoo

    if name == "cifar_resnet20x4":
        from sparsekd.reference_models import cifar_resnet20

        return layers_of(cifar_resnet20(width=64), 32)
    names = {"resnet18": zoo.resnet18, "resnet50": zoo.resnet50, "mobilenet_v2": zoo.mobilenet_v2, "vgg16": zoo.vgg16}
    if name not in names:
        raise SystemExit(f"Expected a suite out of {', '.join([*names, 'cifar_resnet20x4'])}, got {name!r}")
    return layers_of(names[name](weights=None), 224)


def pruned(layer: Layer, sparsity: float, vector: int) -> tuple[nn.Conv2d, SparseConv2d]:
    """A convolution with random weights at random places, and its sparse twin."""
    conv = nn.Conv2d(
        layer.in_channels, layer.out_channels, layer.kernel, layer.stride, layer.kernel // 2, 1, layer.groups, bias=True
    )
    groups = -(-layer.out_channels // vector)
    columns = conv.weight[0].numel()
    keep = torch.zeros(groups * columns, dtype=torch.bool)
    keep[torch.randperm(keep.numel())[: max(round((1 - sparsity) * keep.numel()), 1)]] = True
    mask = keep.view(groups, 1, columns).expand(-1, vector, -1).reshape(groups * vector, columns)[: layer.out_channels]
    mask = mask.reshape(conv.weight.shape)
    with torch.no_grad():
        conv.weight.mul_(mask)
    return conv.eval(), SparseConv2d.from_dense(conv, mask, vector)


def prepacked(conv: nn.Conv2d, x: torch.Tensor):
    """oneDNN's convolution, its weight in the blocked layout that it prefers for this input."""
    geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
    weight = torch._C._nn.mkldnn_reorder_conv2d_weight(conv.weight.to_mkldnn(), *geometry, x.size())
    return lambda: torch.ops.mkldnn._convolution_pointwise(x, weight, conv.bias, *geometry, "none", [], "")


def run(layer: Layer, args: argparse.Namespace) -> dict:
    conv, sparse = pruned(layer, args.sparsity, args.vector)
    last = pruned(layer, args.sparsity, args.vector)[0]
    last.load_state_dict(conv.state_dict())
    last = last.to(memory_format=torch.channels_last)
    sparse.freeze()
    x = torch.randn(args.batch, layer.in_channels, layer.size, layer.size)
    x_last = x.contiguous(memory_format=torch.channels_last)
    expected, got = conv.double()(x.double()), sparse(x)
    conv.float()
    error = float((got - expected).abs().max() / expected.abs().max())
    if not error < 1e-5:
        raise SystemExit(f"Expected {layer} within 1e-5 of torch in float64, got {error:.2g}")
    engines = {
        "nchw": lambda: conv(x),
        "channels_last": lambda: last(x_last),
        "prepacked": prepacked(conv, x_last),
        "sparse": lambda: sparse(x),
    }
    timings = compare(engines, rounds=args.rounds, min_time=args.min_time, clock=args.clock)
    flops = 2 * sparse.nnz * expected.shape[0] * expected.shape[2] * expected.shape[3]
    return figures(layer, timings) | {"gflops": flops / timings["sparse"].min / 1e9, "error": error}


def figures(layer: Layer, timings: dict[str, Timing]) -> dict:
    """Of a layer whose sparse way was timed in turn with dense ones."""
    best = min((name for name in timings if name != "sparse"), key=lambda name: timings[name].min)
    gain = speedup(timings[best], timings["sparse"])
    return {
        "layer": str(layer),
        **asdict(layer),
        "dense_ms": timings[best].min * 1e3,
        "dense": best,
        "sparse_ms": timings["sparse"].min * 1e3,
        "speedup": gain.value,
        "speedup_low": gain.low,
        "speedup_high": gain.high,
    }


HEADER = f"{'layer':32} {'dense ms':>9} {'as':>14} {'sparse ms':>9} {'speed-up':>8}  {'interval':13}"


def line(row: dict) -> str:
    """A row of :func:`figures` under HEADER."""
    interval = f"{row['speedup_low']:.2f}-{row['speedup_high']:.2f}"
    return (
        f"{row['layer']:32} {row['dense_ms']:9.3f} {row['dense']:>14} {row['sparse_ms']:9.3f} "
        f"{row['speedup']:7.2f}x  {interval:13}"
    )


def parser_of(description: str, batch: int, rounds: int) -> argparse.ArgumentParser:
    """The options of a benchmark of single layers."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="resnet18")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--vector", type=int, default=1)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--min-time", type=float, default=0.01)
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    parser.add_argument("--json", metavar="FILE")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    if not 0 <= args.sparsity < 1:
        raise SystemExit(f"Expected sparsity in [0, 1), got {args.sparsity}")
    torch.manual_seed(0)
    return args


def plot(rows: list[dict], args: argparse.Namespace, peak: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.28 * len(rows)), layout="constrained")
    names = [row["layer"] for row in rows]
    gains = [row["speedup"] for row in rows]
    below = [gain - row["speedup_low"] for gain, row in zip(gains, rows, strict=True)]
    above = [row["speedup_high"] - gain for gain, row in zip(gains, rows, strict=True)]
    bars = axes.barh(names, gains, xerr=[below, above], color="tab:blue", ecolor="0.4")
    axes.bar_label(bars, [f"{row['gflops'] / peak:.0%} of peak" for row in rows], padding=6, fontsize=7)
    axes.axvline(1, color="0.4", linewidth=1)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    axes.set_xlabel("times as fast as the best dense engine")
    axes.set_title(
        f"{args.suite}, {args.sparsity:.0%} sparse, V={args.vector}, batch {args.batch}, float32, "
        f"{args.threads} thread(s), {ops.cpu_isa()}",
        fontsize=9,
    )
    figure.savefig(args.plot, dpi=120)


def main() -> None:
    parser = parser_of(__doc__, batch=1, rounds=9)
    parser.add_argument("--kernel", type=int, help="only layers of this kernel size")
    parser.add_argument("--plot", metavar="FILE.png", help="bars of the speed-up, layer by layer")
    args, rows = parsed(parser), []
    with threads(args.threads), torch.no_grad():
        peak = peak_flops() / 1e9
        print(
            f"float32 on both sides, {args.threads} thread(s), {args.clock} time, sparsity {args.sparsity}, "
            f"V={args.vector}, batch {args.batch}, {ops.cpu_isa()}, FMA peak {peak:.0f} GF/s"
        )
        print(f"{HEADER} {'GF/s':>6} {'peak':>5}")
        for layer in suite(args.suite):
            if args.kernel and layer.kernel != args.kernel:
                continue
            row = run(layer, args)
            rows.append(row)
            print(f"{line(row)} {row['gflops']:6.1f} {row['gflops'] / peak:5.0%}", flush=True)
    for kernel in sorted({row["kernel"] for row in rows}):
        gains = [row["speedup"] for row in rows if row["kernel"] == kernel]
        mean = math.exp(sum(map(math.log, gains)) / len(gains))
        print(f"geometric mean of {len(gains)} {kernel}x{kernel} layers: {mean:.2f}x")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"settings": vars(args), "peak_gflops": peak, "layers": rows}, file, indent=1)
    if args.plot:
        plot(rows, args, peak)


if __name__ == "__main__":
    main()
