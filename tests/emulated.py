"""The CUDA operators on the emulator: csrc/cuda, compiled by g++, behind ``torch.ops.sparsekd_emulated``.

The same wrappers and kernels that nvcc compiles serve CPU tensors here, every access checked; see tests/emulator.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

import sparsekd  # noqa: F401  (registers the schemas that are repeated here)

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT / "tests" / "emulator"
BUILD = ROOT / "build" / "emulated"  # objects and libraries, named after what they are made of
CXX = os.environ.get("CXX", "c++")
OPERATORS = (
    *("conv2d_tiling", "conv2d_plan", "conv2d_planned"),
    *("conv2d", "conv2d_fused", "conv2d_input_grad", "conv2d_weight_grad", "transpose_pattern"),
    *("conv2d_24", "conv2d_24_fused"),
    *("linear", "linear_input_grad", "linear_weight_grad", "kd_loss_forward"),
)


def included(source):
    """A source and the files of the project that it includes, however deep."""
    files = {source}
    for name in re.findall(r'#include "([^"]+)"', source.read_text()):
        found = next((folder / name for folder in (source.parent, EMULATOR) if (folder / name).is_file()), None)
        files |= included(found.resolve()) if found else set()
    return files


def command_of(source):
    # gcc calls a hook at every access of the kernels; the rest is compiled as it is.
    flags = ["-O1", "-g", "-fsanitize=thread"] if source.suffix == ".cu" else ["-O2", "-DSPARSEKD_EMULATED"]
    with_torch = source.suffix == ".cpp" and source.parent != EMULATOR
    torch_headers = [f"-I{path}" for path in include_paths()] if with_torch else []
    return [CXX, "-std=c++20", "-fPIC", *flags, f"-I{EMULATOR}", *torch_headers, "-x", "c++", "-c"]


def compile_object(source, folder=BUILD):
    """The object of a source: an earlier one made of the same text, else a new one in ``folder``."""
    command = command_of(source)
    digest = hashlib.sha256(repr((torch.__version__, command)).encode())
    for text in sorted(file.read_bytes() for file in included(source)):
        digest.update(text)
    name = f"{source.name}-{digest.hexdigest()[:16]}.o"
    if not (BUILD / name).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"{source.name}-*.o"):
            old.unlink()
        made = folder / f"{name}.{os.getpid()}"  # whole or not there, for runs side by side
        subprocess.run([*command, str(source), "-o", str(made)], check=True)
        made.replace(folder / name)
        return folder / name
    return BUILD / name


def link(objects, library):
    libraries = [*(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu", "-ltorch"]
    made = library.with_name(f"{library.name}.{os.getpid()}")
    subprocess.run([CXX, "-shared", *map(str, objects), *libraries, "-o", str(made)], check=True)
    made.replace(library)
    return library


def sources(csrc):
    folders = (csrc / "cuda", EMULATOR)
    return [file for folder in folders for ending in ("cu", "cpp") for file in sorted(folder.glob(f"*.{ending}"))]


def compile_changed(folder, changed):
    """A library in ``folder`` with each {file name: text} of ``changed`` in place of the real source."""
    csrc = folder / "csrc"
    for file in [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").iterdir()]:
        copy = csrc / file.relative_to(ROOT / "csrc")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(changed.get(file.name, file.read_text()))
    return link([compile_object(source, folder) for source in sources(csrc)], folder / "libsparsekd_emulated.so")


@functools.cache
def library_path():
    objects = [compile_object(source) for source in sources(ROOT / "csrc")]
    digest = hashlib.sha256(" ".join(file.name for file in objects).encode()).hexdigest()[:16]
    library = BUILD / f"libsparsekd_emulated-{digest}.so"
    if not library.is_file():
        for old in BUILD.glob("*.so"):
            old.unlink()
        link(objects, library)
    return library


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
def as_cpu_ops(names):
    """Within it the emulator's kernels serve these operators on the CPU; yields how often each was called."""
    calls = dict.fromkeys(names, 0)

    def counted(name):
        def run(*args):
            calls[name] += 1
            return getattr(emulator().ops, name)(*args)

        return run

    library = torch.library.Library("sparsekd", "IMPL")
    for name in names:
        library.impl(name, counted(name), "CPU")
    try:
        yield calls
    finally:
        library._destroy()


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
    for one, other in zip(*(r if isinstance(r, (tuple, list)) else [r] for r in results), strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)), f"{name} depends on the order of lanes"
    return results[0]


def costs(kernel=""):
    """What requests took under the last ``counting``, of kernels with that in their name.

    Returns:
        {(space, kind, bytes a lane): (actual, ideal)}, in wavefronts of shared and 32-byte sectors of global memory.
    """
    totals = {}
    for line in emulator().functions.emulator_costs().decode().splitlines():
        _, space, kind, size, _, actual, ideal, name = line.split(maxsplit=7)
        if kernel not in name:
            continue
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


SETUP = """
import sys, torch
sys.path.insert(0, {tests!r})
import emulated
from pathlib import Path
from sparsekd.sparse import formats
emulator = emulated.load(Path({library!r}))
torch.manual_seed(0)
said = ""
def run(name, *arguments):
    global said
    try:
        return getattr(emulator.ops, name)(*arguments)
    except RuntimeError as error:
        said = said or str(error).splitlines()[0]
"""


def said_of(library, *runs):
    """What the emulator first complains of while code calls ``run(operator, *arguments)``, in a process of its own."""
    code = SETUP.format(tests=str(ROOT / "tests"), library=str(library)) + "".join(runs) + 'print("said:", said)'
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout.rpartition("said:")[2].strip()
