"""Whole networks: sparse against every dense engine at hand.

    pip install onnx onnxscript onnxruntime openvino    # the engines beside torch's own
    python benchmarks/end_to_end.py --model resnet50 --sparsity 0.9 --batch 1

Random weights, masks at random places in every convolution and linear layer but the first; batch-norm is folded for all
engines (torch.fx), which therefore get the same plain network. Each engine's output is checked against that network in
float64 first. Then all are visited in turn within one run, minimum over rounds: on one thread by process CPU time, on
more by wall time. The speed-up is against the fastest dense engine. Engines whose package is not installed are said
and left out; one that fails is said and left out, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

import sparsekd
from sparsekd.measure.timing import compare, peak_flops, speedup, threads
from sparsekd.reporting import machine
from sparsekd.sparse.anchors import random_mask
from sparsekd.sparse.dispatch import KINDS

# Name: (how it is made, height and width of its input).
SUITE = {
    "resnet18": ("torchvision", 224),
    "resnet50": ("torchvision", 224),
    "mobilenet_v2": ("torchvision", 224),
    "vgg16": ("torchvision", 224),
    "efficientnet_b0": ("torchvision", 224),
    "cifar_resnet20x4": ("sparsekd", 32),
    "deeplabv3_resnet50": ("torchvision", 224),
}
DENSE = ("eager", "channels_last", "inductor", "onnxruntime", "openvino")
OURS = ("convert", "optimize_for_inference")
Engine = Callable[[], Tensor]


class Main(nn.Module):
    """The one output that segmentation networks are asked for."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)["out"]


def pruned(name: str, sparsity: float, vector: int) -> nn.Module:
    """The masked network with its batch-norm folded: plain modules, zeros where pruned."""
    torch.manual_seed(0)
    if name == "cifar_resnet20x4":
        from sparsekd.reference_models import cifar_resnet20

        model = cifar_resnet20(width=64)
    else:
        import torchvision

        options = {"weights_backbone": None} if name.startswith("deeplab") else {}
        model = torchvision.models.get_model(name, weights=None, **options)
        model = Main(model) if name.startswith("deeplab") else model
    model.eval()
    layers = [module for module in model.modules() if type(module) in KINDS]
    with torch.no_grad():
        for layer in layers[1:]:
            mask = random_mask(layer.weight, sparsity, vector, getattr(layer, "groups", 1))
            # Scaled, so that what is left carries a signal to the end for the outputs to be compared by.
            layer.weight.mul_(mask).div_((1 - sparsity) ** 0.5)
        return fuse(model)


def eager(model: nn.Module, x: Tensor, args) -> Engine:
    return lambda: model(x)


def channels_last(model: nn.Module, x: Tensor, args) -> Engine:
    x = x.contiguous(memory_format=torch.channels_last)
    model = sparsekd.to_dense(model).to(memory_format=torch.channels_last)
    return lambda: model(x)


def inductor(model: nn.Module, x: Tensor, args) -> Engine:
    import torch._inductor.config as config

    config.freezing = True
    torch._dynamo.reset()
    compiled = torch.compile(sparsekd.to_dense(model))
    return lambda: compiled(x)


def exported(model: nn.Module, x: Tensor) -> bytes:
    import io

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(sparsekd.to_dense(model), (x,), file, dynamo=False, input_names=["x"], output_names=["y"])
    return file.getvalue()


def onnxruntime(model: nn.Module, x: Tensor, args) -> Engine:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = args.threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting would count as CPU time
    session = ort.InferenceSession(exported(model, x), options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino(model: nn.Module, x: Tensor, args) -> Engine:
    import io

    import openvino as ov

    core = ov.Core()
    network = core.read_model(io.BytesIO(exported(model, x)))
    settings = {"INFERENCE_NUM_THREADS": args.threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(network, "CPU", settings).create_infer_request()
    feed = {0: ov.Tensor(x.numpy(), shared_memory=True)}
    return lambda: torch.from_numpy(request.infer(feed, share_outputs=True)[0])


def convert(model: nn.Module, x: Tensor, args) -> Engine:
    fast = sparsekd.convert(model, x)
    print(f"convert: {sparsekd.choices(fast).summary()}")
    return lambda: fast(x)


def optimize_for_inference(model: nn.Module, x: Tensor, args) -> Engine:
    fast = sparsekd.optimize_for_inference(model, x)
    return lambda: fast(x)


def prepared(model: nn.Module, x: Tensor, args) -> tuple[dict[str, Engine], dict[str, str]]:
    """The engines that answer as the network does in float64, and why each of the others is out."""
    expected = sparsekd.to_dense(model).double()(x.double())
    engines, out = {}, {}
    for name in (*args.against, *args.ours):
        try:
            engine = globals()[name](model, x, args)
            error = float((engine().double() - expected).abs().max() / expected.abs().max())
        except ImportError as missing:
            out[name] = f"not installed: {missing}"
        except Exception as failure:  # other people's engines fail in many ways
            out[name] = f"failed: {(str(failure).strip().splitlines() or [type(failure).__name__])[0]}"
        else:
            if error < 1e-4:
                engines[name] = engine
            else:
                out[name] = f"failed: {error:.2g} off float64"
    return engines, out


def run(args, name: str, batch: int) -> dict:
    source, size = SUITE[name]
    model = pruned(name, args.sparsity, args.vector)
    x = torch.randn(batch, 3, args.size or size, args.size or size)
    engines, out = prepared(model, x, args)
    dense = [engine for engine in args.against if engine in engines]
    if not dense:
        raise SystemExit(f"Expected a dense engine that runs, got none: {out}")
    clock = "cpu" if args.threads == 1 else "wall"
    timings = compare(engines, rounds=args.rounds, min_time=args.min_time, warmup=2, clock=clock)
    best = min(dense, key=lambda engine: timings[engine].min)
    row = {"model": name, "batch": batch, "clock": clock, "best_dense": best, "out": out, "ms": {}, "speedup": {}}
    print(f"\n{name}, batch {batch}, {args.sparsity:.0%} of every layer but the first, V={args.vector}")
    for engine, timing in timings.items():
        gain = speedup(timings[best], timing)
        row["ms"][engine] = timing.min * 1e3
        row["speedup"][engine] = [gain.value, gain.low, gain.high]
        print(f"  {engine:24} {timing.min * 1e3:9.2f} ms {gain.value:6.2f}x  {gain.low:.2f}-{gain.high:.2f}")
    for engine, reason in out.items():
        print(f"  {engine:24} {reason}")
    sys.stdout.flush()
    return row


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", nargs="+", choices=list(SUITE), default=list(SUITE))
    made.add_argument("--sparsity", type=float, default=0.9)
    made.add_argument("--vector", type=int, default=1)
    made.add_argument("--batch", type=int, nargs="+", default=[1])
    made.add_argument("--size", type=int, help="height and width of the input (default: the model's)")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--rounds", type=int, default=9)
    made.add_argument("--min-time", type=float, default=0.02, help="seconds of one sample at least")
    made.add_argument("--against", nargs="+", choices=DENSE, default=list(DENSE))
    made.add_argument("--ours", nargs="+", choices=OURS, default=list(OURS))
    made.add_argument("--json", metavar="FILE")
    return made


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if not 0 <= args.sparsity < 1:
        raise SystemExit(f"Expected sparsity in [0, 1), got {args.sparsity}")
    rows = []
    with threads(args.threads), torch.no_grad():
        peak = peak_flops() / 1e9
        print("; ".join(f"{key} {value}" for key, value in machine().items()), f"; FMA peak {peak:.0f} GF/s")
        for name in args.model:
            for batch in args.batch:
                rows.append(run(args, name, batch))
        where = machine()
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"settings": vars(args), "machine": where, "peak_gflops": peak, "rows": rows}, file, indent=1)
    return int(any(reason.startswith("failed") for row in rows for reason in row["out"].values()))


if __name__ == "__main__":
    sys.exit(main())
