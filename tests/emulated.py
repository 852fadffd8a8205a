"""The CUDA operators on the emulator: csrc/cuda, compiled by g++, behind ``torch.ops.sparsekd_emulated``.

The same wrappers and kernels that nvcc compiles serve CPU tensors here, every access checked; see tests/emulator.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import subprocess
import types
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

import sparsekd  # noqa: F401  (registers the schemas that are repeated here)

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    *sorted((ROOT / "csrc" / "cuda").glob("*.cu")),
    *sorted((ROOT / "csrc" / "cuda").glob("*.cpp")),
    *sorted((ROOT / "tests" / "emulator").glob("*.cpp")),
]
OPERATORS = ("conv2d", "conv2d_fused")


def compile_library(folder, changed=None):
    """Builds the library in ``folder``, with each {file name: text} of ``changed`` in place of the real source."""
    folder.mkdir(parents=True, exist_ok=True)
    include = [f"-I{ROOT / 'tests' / 'emulator'}"]
    if changed:
        for file in sorted((ROOT / "csrc").glob("*.h")) + sorted((ROOT / "csrc" / "cuda").iterdir()):
            copy = folder / "csrc" / file.relative_to(ROOT / "csrc")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(changed.get(file.name, file.read_text()))
    here = folder if changed else ROOT
    objects = []
    for source in SOURCES:
        source = here / source.relative_to(ROOT) if source.suffix == ".cu" else source
        built = folder / f"{source.name}.o"
        # gcc calls a hook at every access of the kernels; the rest is compiled as it is.
        flags = ["-O1", "-g", "-fsanitize=thread"] if source.suffix == ".cu" else ["-O2", "-DSPARSEKD_EMULATED"]
        torch_headers = [f"-I{path}" for path in include_paths()] if source.parent.name == "cuda" else []
        command = [os.environ.get("CXX", "c++"), "-std=c++20", "-fPIC", *flags, *include]
        command += torch_headers if source.suffix == ".cpp" else []
        if changed and source.suffix == ".cpp" and source.parent.name == "cuda":
            built = library_folder() / f"{source.name}.o"  # host code stays as it is
        else:
            subprocess.run([*command, "-x", "c++", "-c", str(source), "-o", str(built)], check=True)
        objects.append(str(built))
    library = folder / "libsparsekd_emulated.so"
    libraries = [*(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu", "-ltorch"]
    subprocess.run([os.environ.get("CXX", "c++"), "-shared", *objects, *libraries, "-o", str(library)], check=True)
    return library


@functools.cache
def library_folder():
    """Named after what is compiled, so that it is compiled again when that changes and only then."""
    digest = hashlib.sha256(torch.__version__.encode())
    rooms = [ROOT / "csrc", ROOT / "csrc" / "cuda", ROOT / "tests" / "emulator"]
    for file in sorted(file for room in rooms for file in room.glob("*.*")):
        digest.update(file.read_bytes())
    digest.update(Path(__file__).read_bytes())
    return ROOT / "build" / f"emulated-{digest.hexdigest()[:16]}"


@functools.cache
def library_path():
    path = library_folder() / "libsparsekd_emulated.so"
    return path if path.is_file() else compile_library(library_folder())


def load(path=None):
    """``ops`` and the emulator's own functions, as attributes."""
    library = torch.library.Library("sparsekd_emulated", "DEF")
    for name in OPERATORS:
        schema = str(getattr(torch.ops.sparsekd, name).default._schema)
        library.define(schema.removeprefix("sparsekd::"))
    path = path or library_path()
    torch.ops.load_library(str(path))
    functions = ctypes.CDLL(str(path))
    functions.emulator_set_seed.argtypes = [ctypes.c_uint64]
    functions.emulator_costs.restype = ctypes.c_char_p
    return types.SimpleNamespace(ops=torch.ops.sparsekd_emulated, functions=functions, library=library)


emulator = functools.cache(load)


@contextlib.contextmanager
def lane_order(seed):
    """Blocks, warps and lanes take turns in an order drawn from ``seed``; 0 is their own."""
    emulator().functions.emulator_set_seed(seed)
    try:
        yield
    finally:
        emulator().functions.emulator_set_seed(0)


def in_two_orders(name, *arguments):
    """The operator's result, after a look that it does not depend on who goes first."""
    results = []
    for seed in (0, 12345):
        with lane_order(seed):
            results.append(getattr(emulator().ops, name)(*arguments))
    assert torch.equal(results[0], results[1]), f"{name} depends on the order of lanes"
    return results[0]


def costs():
    """What the requests since the last call of ``counting`` took: {(space, kind, bytes a lane): (actual, ideal)}."""
    totals = {}
    for line in emulator().functions.emulator_costs().decode().splitlines():
        _, space, kind, size, _, actual, ideal = line.split()
        before = totals.get((space, kind, int(size)), (0, 0))
        totals[space, kind, int(size)] = (before[0] + int(actual), before[1] + int(ideal))
    return totals


@contextlib.contextmanager
def counting():
    emulator().functions.emulator_count(1)
    try:
        yield
    finally:
        emulator().functions.emulator_count(0)
