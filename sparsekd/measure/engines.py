"""Dense engines to compare with: torch's own ways, and others where their packages are installed."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["DENSE", "exported", "make"]

Engine = Callable[[], Tensor]


def eager(model: nn.Module, x: Tensor, threads: int) -> Engine:
    return lambda: model(x)


def channels_last(model: nn.Module, x: Tensor, threads: int) -> Engine:
    x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    return lambda: model(x)


def inductor(model: nn.Module, x: Tensor, threads: int) -> Engine:
    import torch._inductor.config as config

    config.freezing = True
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model))
    return lambda: compiled(x)


def exported(model: nn.Module, x: Tensor) -> bytes:
    """The network as ONNX."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), file, dynamo=False, input_names=["x"], output_names=["y"])
    return file.getvalue()


def onnxruntime(model: nn.Module, x: Tensor, threads: int) -> Engine:
    if x.device.type != "cpu":
        raise ImportError(f"for {x.device.type} (it takes part on the CPU alone)")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting would count as CPU time
    session = ort.InferenceSession(exported(model, x), options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino(model: nn.Module, x: Tensor, threads: int) -> Engine:
    if x.device.type != "cpu":
        raise ImportError(f"for {x.device.type} (it takes part on the CPU alone)")
    import openvino as ov

    core = ov.Core()
    network = core.read_model(io.BytesIO(exported(model, x)))
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(network, "CPU", settings).create_infer_request()
    feed = {0: ov.Tensor(x.numpy(), shared_memory=True)}
    return lambda: torch.from_numpy(request.infer(feed, share_outputs=True)[0])


DENSE = {
    "eager": eager,
    "channels_last": channels_last,
    "inductor": inductor,  # with freezing
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}


def make(name: str, model: nn.Module, x: Tensor, threads: int) -> Engine:
    """A plain network in eval mode, ready to be called on ``x``. ImportError where the engine's package is missing."""
    if name not in DENSE:
        raise ValueError(f"Expected an engine out of {', '.join(DENSE)}, got {name!r}")
    return DENSE[name](model, x, threads)
