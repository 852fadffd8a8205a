"""What is installed, what was built, and what of it does not fit: the answer to most reports of "it does not work".

`report()` only looks: it builds nothing, loads nothing and touches no GPU memory. Each finding is a topic, what was
found, and, where something is wrong or missing, one sentence of advice.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import torch

from . import tuned
from .machine import extension_file, generates_code, loaded_isa

__all__ = ["Finding", "print_report", "report"]

REBUILD = "pip install -e . --no-build-isolation"


class Finding(NamedTuple):
    topic: str
    value: str
    advice: str = ""


def _run(*command: str) -> str:
    """What a command says, or nothing when it can't be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _major(release: str) -> int:
    return int(release.split(".")[0])


# ---- versions ----


def versions() -> list[Finding]:
    python = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    old = "" if sys.version_info >= (3, 10) else "sparsekd needs Python 3.10 or newer."
    built_for = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU alone"
    triton, own = _version("triton"), _version("sparsekd")
    return [
        Finding("python", python, old),
        Finding("torch", f"{torch.__version__}, {built_for}"),
        Finding("triton", triton or "not installed", "" if triton else "The Triton kernels are out; all else works."),
        Finding("sparsekd", own or "not installed", "" if own else f"Install it: {REBUILD}"),
    ]


def packages(version: Callable[[str], str | None] = _version) -> list[Finding]:
    """What the commands can use beside torch: model zoos and the engines of `sparsekd bench --against`."""
    found = {name: version(name) for name in ("torchvision", "timm", "onnx", "onnxruntime", "openvino")}
    value = ", ".join(f"{name} {release}" for name, release in found.items() if release)
    missing = [name for name, release in found.items() if not release]
    advice = f"Their models and engines are left out: pip install {' '.join(missing)}" if missing else ""
    return [Finding("other packages", value or "none", advice)]


# ---- our own library ----


def _asked(ask: Callable[[], object]) -> object:
    """What the extension answers; "unknown" where a variable that it reads is wrong, which `environment` tells."""
    try:
        return ask()
    except ValueError:
        return "unknown"


def extension(file: Path | None, isa: str | None) -> list[Finding]:
    processor = torch.backends.cpu.get_cpu_capability()
    if isa is not None:
        return [
            Finding("extension", f"loaded from {file}" if file else "loaded"),
            Finding("CPU kernels", f"{isa} (torch itself uses {processor} here)"),
            generated_code(_asked(generates_code), isa),
        ]
    if file is not None:
        advice = (
            f"It is built but not loaded, perhaps because it was built against another torch. Build it again: {REBUILD}"
        )
        return [Finding("extension", f"{file}, not loaded", advice), Finding("CPU kernels", "none loaded")]
    return [
        Finding("extension", "not built", f"Without it there are no fast operators. Build it: {REBUILD}"),
        Finding("CPU kernels", f"none (torch itself uses {processor} here)"),
    ]


def generated_code(made: bool | str | None, isa: str) -> Finding:
    """Code for final patterns, which needs AVX-512 and memory that may be executed."""
    if made == "unknown":
        return Finding("generated code", made)
    if made:
        return Finding("generated code", "made for layers that are frozen or trained, where it is faster")
    if isa != "avx512":
        return Finding("generated code", "none, as it is made with AVX-512 alone")
    advice = "It is switched off by SPARSEKD_GENERATE=never, or the system gives no memory that may be executed."
    return Finding("generated code", "none", advice)


def environment(environ: Mapping[str, str]) -> list[Finding]:
    ours = sorted(f"{name}={value}" for name, value in environ.items() if name.startswith("SPARSEKD_"))
    advice = []
    isa, switch = environ.get("SPARSEKD_CPU_ISA", ""), environ.get("SPARSEKD_CUDA", "")
    if isa not in ("", "baseline", "avx2", "avx512"):
        advice.append(f"Expected SPARSEKD_CPU_ISA to be baseline, avx2 or avx512, got {isa!r}.")
    if switch not in ("", "0", "1"):
        advice.append(f"Expected SPARSEKD_CUDA to be 0 or 1, got {switch!r}.")
    if (wish := environ.get("SPARSEKD_GENERATE", "")) not in ("", "auto", "always", "never"):
        advice.append(f"Expected SPARSEKD_GENERATE to be auto, always or never, got {wish!r}.")
    return [Finding("environment", ", ".join(ours) or "no SPARSEKD_ variable is set", " ".join(advice))]


def threads(used: int, cores: int) -> list[Finding]:
    advice = ""
    if used > cores:
        advice = f"More threads than cores slow each other down: torch.set_num_threads({cores}) or OMP_NUM_THREADS."
    return [Finding("threads", f"torch uses {used}, {cores} cores may be used", advice)]


def tuned_figures(environ: Mapping[str, str]) -> list[Finding]:
    """What is kept of measurements, and where."""
    try:
        mode, advice = tuned.mode(environ), ""
    except ValueError as error:
        mode, advice = "none", f"{error}."
    folder, count, files = tuned.folder(environ), 0, sorted(tuned.folder(environ).glob("tuned-*.json"))
    for file in files:
        try:
            count += len(tuned.read(file))
        except (ValueError, OSError) as error:
            advice += f" {file.name} is broken ({error}); it is measured anew when it is next used."
    value = f"SPARSEKD_TUNE={mode}; {count} in {len(files)} file(s) of {folder}"
    return [Finding("tuned figures", value, advice.strip())]


# ---- what a build needs ----


def compiler(environ: Mapping[str, str]) -> list[Finding]:
    name = environ.get("CXX") or "c++"
    path = shutil.which(name.split()[0], path=environ.get("PATH"))
    if path is None:
        return [Finding("compiler", f"no {name}", "To build, install g++ 11 or newer, or set CXX.")]
    said = _run(path, "--version").splitlines()
    return [Finding("compiler", f"{path}: {said[0]}" if said else path)]


def find_nvcc(environ: Mapping[str, str]) -> str | None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        nvcc = Path(environ.get(name) or "/nowhere") / "bin" / "nvcc"
        if nvcc.is_file():
            return str(nvcc)
    usual = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc", path=environ.get("PATH")) or (str(usual) if usual.is_file() else None)


def toolkit(nvcc: str | None, release: str | None, torch_cuda: str | None) -> list[Finding]:
    """Whether nvcc and torch belong to one CUDA release: most source builds that fail, fail here."""
    if nvcc is None:
        advice = (
            "The CPU half builds without it."
            if torch_cuda is None
            else (
                f"To build the CUDA half, install a CUDA {_major(torch_cuda)} toolkit; the CPU half builds without it."
            )
        )
        return [Finding("nvcc", "not found", advice)]
    if release is None:
        return [Finding("nvcc", f"{nvcc}, which does not run", "Point CUDA_HOME at a toolkit that works.")]
    advice = ""
    if torch_cuda is None:
        advice = "torch has no CUDA, so the CUDA half can't be built; install a torch built for CUDA."
    elif _major(release) != _major(torch_cuda):
        advice = (
            f"torch was built for CUDA {torch_cuda}, so the CUDA half needs a toolkit {_major(torch_cuda)}.x: "
            "point CUDA_HOME at one, or set SPARSEKD_CUDA=0."
        )
    return [Finding("nvcc", f"{release} ({nvcc})", advice)]


def asked_architectures(arch_list: str) -> list[int]:
    """TORCH_CUDA_ARCH_LIST as numbers: "8.0;9.0a+PTX" is [80, 90]."""
    return [int(major) * 10 + int(minor) for major, minor in re.findall(r"(\d+)\.(\d)", arch_list)]


def architectures(arch_list: str | None, known_to_nvcc: list[int], release: str | None) -> list[Finding]:
    """Whether nvcc knows what it will be asked for ("Unsupported gpu architecture 'compute_86'")."""
    if not arch_list:
        return []
    unknown = [arch for arch in asked_architectures(arch_list) if known_to_nvcc and arch not in known_to_nvcc]
    advice = ""
    if unknown:
        listed = ", ".join(f"{arch / 10:.1f}" for arch in unknown)
        advice = f"nvcc {release} can't compile for {listed}: take it out of the list or use another toolkit."
    return [Finding("TORCH_CUDA_ARCH_LIST", arch_list, advice)]


# ---- the GPU ----


def runs_on(capability: tuple[int, int], built_for: list[str]) -> bool:
    """Whether code for `built_for` (torch's sm_ and compute_ names) runs on a device.

    Machine code runs on its own generation from its own minor number up; PTX runs on everything newer.
    """
    major, minor = capability
    for name in built_for:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", name)
        if not found:
            continue
        kind, of_major, of_minor, only = found[1], int(found[2]), int(found[3]), found[4]
        if only:
            fits = (of_major, of_minor) == (major, minor)
        elif kind == "sm":
            fits = of_major == major and of_minor <= minor
        else:
            fits = (of_major, of_minor) <= (major, minor)
        if fits:
            return True
    return False


def gpus(devices: list[tuple[str, tuple[int, int]]], built_for: list[str], torch_cuda: str | None) -> list[Finding]:
    if not devices:
        advice = "" if torch_cuda is None else "Everything runs on the CPU."
        return [Finding("GPU", "none in sight", advice)]
    findings = []
    for name, capability in devices:
        advice = ""
        if not runs_on(capability, built_for):
            advice = f"torch was built for {', '.join(built_for)}, which does not run on it: install another torch."
        findings.append(Finding("GPU", f"{name}, compute capability {capability[0]}.{capability[1]}", advice))
    return findings


def _visible_gpus() -> list[tuple[str, tuple[int, int]]]:
    if not torch.cuda.is_available():
        return []
    count = torch.cuda.device_count()
    return [(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in range(count)]


# ---- all of it ----


def report(environ: Mapping[str, str] | None = None) -> list[Finding]:
    """Every finding, in the order in which one would ask."""
    environ = os.environ if environ is None else environ
    nvcc = find_nvcc(environ)
    found = re.search(r"release (\d+\.\d+)", _run(nvcc, "--version")) if nvcc else None
    release = found.group(1) if found else None
    arch_list = environ.get("TORCH_CUDA_ARCH_LIST")
    known = re.findall(r"compute_(\d+)\b", _run(nvcc, "--list-gpu-arch")) if nvcc and arch_list else []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    built_for = torch.cuda.get_arch_list() if torch.version.cuda else []
    return [
        *versions(),
        *packages(),
        *extension(extension_file(), _asked(loaded_isa)),
        *environment(environ),
        *threads(torch.get_num_threads(), cores),
        *tuned_figures(environ),
        *compiler(environ),
        *toolkit(nvcc, release, torch.version.cuda),
        *architectures(arch_list, [int(arch) for arch in known], release),
        *gpus(_visible_gpus(), built_for, torch.version.cuda),
    ]


def print_report(findings: list[Finding] | None = None, file: IO[str] | None = None) -> None:
    """Print a report as two columns, advice below what it is about."""
    findings = report() if findings is None else findings
    width = max((len(finding.topic) for finding in findings), default=0)
    for finding in findings:
        print(f"{finding.topic:<{width}}  {finding.value}", file=file)
        if finding.advice:
            indent = " " * (width + 2) + "-> "
            lines = textwrap.wrap(finding.advice, 100, break_on_hyphens=False, break_long_words=False)
            print(indent + f"\n{' ' * len(indent)}".join(lines), file=file)
