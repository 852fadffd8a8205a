"""What figures depend on: the processor, the libraries and their threads."""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.metadata
import platform
from pathlib import Path

import torch

__all__ = [
    "TIMED",
    "clock",
    "extension_file",
    "generates_code",
    "identity",
    "loaded_isa",
    "place",
    "processor",
    "timed_on",
]

TIMED = ("cpu", "cuda")  # the types of devices whose clocks are known


@functools.cache
def processor() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def extension_file() -> Path | None:
    """Where `sparsekd._C` lies, found without importing anything."""
    package = Path(__file__).resolve().parent.parent
    found = importlib.machinery.PathFinder.find_spec("_C", [str(package)])
    return Path(found.origin) if found and found.origin else None


def loaded_isa() -> str | None:
    """The instruction set that the kernels chose, or None when the extension is not loaded."""
    if not hasattr(torch.ops.sparsekd, "cpu_isa"):
        return None
    return str(torch.ops.sparsekd.cpu_isa())


def generates_code() -> bool | None:
    """Whether the CPU kernels make code for final patterns, or None when the extension is not loaded."""
    if not hasattr(torch.ops.sparsekd, "generates_code"):
        return None
    return bool(torch.ops.sparsekd.generates_code())


@functools.cache
def _build() -> str:
    """What tells one build of the kernels from another."""
    file = extension_file()
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()[:12] if file else ""
    except OSError:
        return ""


@functools.cache
def _version() -> str:
    try:
        return importlib.metadata.version("sparsekd")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


def identity(device: torch.device | None = None) -> dict[str, str]:
    """What a measured time is good for: the same on another machine or with another build is another time."""
    on_gpu = device is not None and device.type == "cuda"
    return ({"gpu": torch.cuda.get_device_name(device)} if on_gpu else {}) | {
        "processor": processor(),
        "kernels": loaded_isa() or "none",
        "torch": torch.__version__,
        "sparsekd": _version(),
        "build": _build(),
        "threads": str(torch.get_num_threads()),
    }


def clock(device: torch.device | None = None) -> str:
    """A GPU's events, as it works on after the call; else CPU time, which does not see neighbours, but adds up over
    threads.
    """
    if device is not None and device.type == "cuda":
        return "cuda"
    return "cpu" if torch.get_num_threads() == 1 else "wall"


def place(tensor: torch.Tensor) -> torch.device:
    """Where a tensor's work is done, and timed. All that chooses between sparse and dense asks here."""
    return tensor.device


def timed_on(device: torch.device) -> dict[str, object]:
    """What :func:`sparsekd.measure.timing.compare` is told of a device, whose work a CPU's clock need not see."""
    return {"device": device, "clock": clock(device)}
