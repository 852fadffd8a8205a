"""The package as a whole: who imports whom, what is in it, and how its build finds its way."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("sparsekd", "kernels", "csrc", "tests", "benchmarks", ".ci")
PYTHON_FILES = sorted((ROOT / "sparsekd").rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))

# What each room may import of ours, besides itself. Its own files are free to import each other.
MAY_IMPORT = {
    "measure": (),
    "sparse": ("sparsekd.measure",),
    "pruning": ("sparsekd.measure", "sparsekd.sparse.ops", "sparsekd.sparse.formats"),
    "distillation": ("sparsekd.measure", "sparsekd.sparse.ops", "sparsekd.sparse.formats"),
}


# ---- imports ----


def module_name(file):
    """sparsekd/sparse/formats.py is sparsekd.sparse.formats, kernels/conv2d.py is sparsekd.kernels.conv2d."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, "sparsekd")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name):
    parts = name.split(".")
    inside = Path("kernels", *parts[2:]) if parts[1:2] == ["kernels"] else Path(*parts)
    return (ROOT / inside).is_dir() or (ROOT / inside).with_suffix(".py").is_file() or name == "sparsekd._C"


def imports_of(source, module, is_package, is_module=is_module):
    """The full names of all modules that a file imports, wherever in it, `from package import module` included."""
    package = module if is_package else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            below = {f"{base}.{alias.name}" for alias in node.names}
            modules = {name for name in below if name.startswith("sparsekd.") and is_module(name)}
            found |= modules
            if modules != below:
                found.add(base)
    return found


def imports_of_file(file):
    return imports_of(file.read_text(), module_name(file), file.name == "__init__.py")


def within(name, packages):
    return any(name == package or name.startswith(package + ".") for package in packages)


def broken_rules(file, imported):
    """One sentence for each import in `file` that the rules of the rooms forbid."""
    module = module_name(file)
    room = module.split(".")[1] if "." in module else ""
    for name in sorted(imported):
        if within(name, ["kernels"]):
            yield f"{module} imports kernels: it would load twice, under two names"
        if within(name, ["sparsekd._C"]) and not within(module, ["sparsekd.sparse.ops"]):
            yield f"{module} imports {name}: only sparsekd.sparse.ops may"
        if within(name, ["sparsekd.kernels"]) and room != "kernels" and not within(module, ["sparsekd.sparse.ops"]):
            yield f"{module} imports {name}: only sparsekd.sparse.ops may"
        if within(name, ["sparsekd.cli"]) and module not in ("sparsekd.cli", "sparsekd.__main__"):
            yield f"{module} imports {name}: nothing may"
        reserved = within(name, ["sparsekd._C", "sparsekd.kernels"])
        if room in MAY_IMPORT and within(name, ["sparsekd"]) and not reserved:
            if not within(name, [f"sparsekd.{room}", *MAY_IMPORT[room]]):
                yield f"{module} imports {name}: {room} may import {', '.join(MAY_IMPORT[room]) or 'nothing'} of ours"


@pytest.mark.parametrize("file", PYTHON_FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_rooms_keep_to_themselves(file):
    assert list(broken_rules(file, imports_of_file(file))) == []


@pytest.mark.parametrize(
    "file,line,broken",
    [
        ("sparse/modules.py", "from ..measure import timing", False),
        ("sparse/modules.py", "from . import ops", False),
        ("sparse/modules.py", "import sparsekd._C", True),
        ("sparse/ops/registered.py", "import sparsekd._C", False),
        ("sparse/ops/registered.py", "from ... import _C", False),
        ("sparse/ops/registered.py", "from ...kernels import conv2d", False),
        ("sparse/ops/registered.py", "from ... import kernels", False),
        ("sparse/ops/registered.py", "import kernels.conv2d", True),
        ("sparse/dispatch.py", "def f():\n    from sparsekd.pruning.pruner import Pruner", True),
        ("sparse/dispatch.py", "import sparsekd", True),
        ("pruning/pruner.py", "from ..sparse.formats import pack", False),
        ("pruning/pruner.py", "from ..sparse import ops, formats", False),
        ("pruning/pruner.py", "from ..sparse import ops, modules", True),
        ("pruning/pruner.py", "from ..sparse import SparseLinear", True),
        ("pruning/pruner.py", "from sparsekd.distillation import KDLoss", True),
        ("pruning/pruner.py", "from . import budget\nimport torch\nfrom torch.nn.utils import prune", False),
        ("distillation/losses.py", "from ..sparse.ops import kd_loss", False),
        ("distillation/losses.py", "from .. import kernels", True),
        ("measure/report.py", "from ..sparse import formats", True),
        ("measure/report.py", "from .timing import compare", False),
        ("compress.py", "from .cli import main", True),
        ("__main__.py", "from .cli import main", False),
        ("compress.py", "from . import pruning, distillation\nfrom .sparse.convert import convert", False),
    ],
)
def test_the_rules_see_what_they_should(file, line, broken):
    modules = {"sparse.ops", "sparse.formats", "sparse.modules", "sparse.convert", "pruning.budget", "measure.timing"}
    known = {f"sparsekd.{name}" for name in (*modules, *MAY_IMPORT, "kernels", "_C")}
    path = ROOT / "sparsekd" / file
    imported = imports_of(line, module_name(path), False, known.__contains__)
    assert bool(list(broken_rules(path, imported))) is broken


# ---- what is there ----


@pytest.mark.parametrize(
    "name", ["setup.py", "pyproject.toml", "Makefile", "requirements.lock", "LICENSE", "CONTRIBUTING.md", ".ci/run"]
)
def test_top_level_files_exist(name):
    assert (ROOT / name).is_file()


def test_ci_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    assert "make test" in script.read_text()


def test_every_public_name_exists():
    import sparsekd

    assert [name for name in getattr(sparsekd, "__all__", ()) if not hasattr(sparsekd, name)] == []
    for room in (*MAY_IMPORT, "kernels"):
        importlib.import_module(f"sparsekd.{room}")


def test_metadata():
    metadata = importlib.metadata.metadata("sparsekd")
    assert metadata["Requires-Python"] == ">=3.10"
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="sparsekd")
    assert script.value == "sparsekd.cli:main"


def test_every_direct_dependency_is_pinned():
    lock = (ROOT / "requirements.lock").read_text()
    pinned = set(re.findall(r"^([\w-]+)==", lock, re.MULTILINE))
    required = {re.match(r"[\w-]+", line).group() for line in importlib.metadata.requires("sparsekd")}
    assert required - {"sparsekd"} <= pinned
    assert not re.search(r"https?://|index-url", lock)  # pip's own configuration says where from


def test_no_file_names_a_folder_of_one_machine():
    texts = [file for file in ROOT.iterdir() if file.suffix in (".py", ".md", ".toml", ".in", ".lock")]
    texts += [ROOT / "Makefile"]
    for folder in FOLDERS:
        found = (ROOT / folder).rglob("*")
        texts += [
            f for f in found if f.suffix in (".py", ".cpp", ".h", ".inc", ".cu", ".cuh", ".sh", ".md", "", ".json")
        ]
    foreign = re.compile(r"(?<![\w.])/(work|root|home)/\w")
    this = Path(__file__).resolve()
    named = [
        str(file.relative_to(ROOT))
        for file in texts
        if file.is_file() and file.resolve() != this and foreign.search(file.read_text(errors="ignore"))
    ]
    assert named == []


# ---- setup.py, imported for its functions ----


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("sparsekd_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_toolkit(folder, with_header=True):
    """A folder that looks like a CUDA toolkit, with an nvcc that says its release."""
    for name in ("bin", "include"):
        (folder / name).mkdir(parents=True)
    if with_header:
        (folder / "include" / "cuda_runtime.h").write_text("")
    return make_program(folder / "bin" / "nvcc", "echo 'Cuda compilation tools, release 13.7, V13.7.1'").parent.parent


def make_program(file, body):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)
    return file


def test_cuda_home_from_the_environment_comes_first(build, tmp_path):
    asked, other = make_toolkit(tmp_path / "asked"), make_toolkit(tmp_path / "other")
    path = str(other / "bin")
    assert build.find_cuda_home({"CUDA_HOME": str(asked), "PATH": path}, usual=[]) == str(asked)
    assert build.find_cuda_home({"CUDA_PATH": str(asked), "PATH": path}, usual=[]) == str(asked)


def test_cuda_home_without_headers_is_passed_over(build, tmp_path):
    empty, other = make_toolkit(tmp_path / "empty", with_header=False), make_toolkit(tmp_path / "other")
    environ = {"CUDA_HOME": str(empty), "PATH": str(empty / "bin")}
    assert build.find_cuda_home(environ, usual=[other]) == str(other)
    assert build.find_cuda_home({"CUDA_HOME": str(tmp_path / "nowhere"), "PATH": ""}, usual=[]) is None


def test_cuda_home_through_a_wrapper_script(build, tmp_path):
    toolkit, fallback = make_toolkit(tmp_path / "cuda-13.7"), make_toolkit(tmp_path / "fallback")
    for body in (f'exec {toolkit}/bin/nvcc "$@"', f'exec ccache "{toolkit}/bin/nvcc" "$@"'):
        wrapper = make_program(tmp_path / "bin" / "nvcc", body)
        assert build.find_cuda_home({"PATH": str(wrapper.parent)}, usual=[fallback]) == str(toolkit)


def test_cuda_home_through_a_link(build, tmp_path):
    toolkit = make_toolkit(tmp_path / "cuda-13.7")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(toolkit / "bin" / "nvcc")
    assert build.find_cuda_home({"PATH": str(tmp_path / "bin")}, usual=[]) == str(toolkit)


def test_nvcc_says_its_release(build, tmp_path):
    assert build.nvcc_release(make_toolkit(tmp_path / "cuda")) == "13.7"
    assert build.nvcc_release(tmp_path) is None


def test_cuda_switch(build):
    assert build.wants_cuda(None, None) is True
    assert build.wants_cuda("1", None) is True
    assert build.wants_cuda("0", None) is False
    assert build.wants_cuda(None, "Expected a toolkit, got none") is False
    with pytest.raises(SystemExit, match="Expected a toolkit, got none; SPARSEKD_CUDA=1"):
        build.wants_cuda("1", "Expected a toolkit, got none")
    with pytest.raises(SystemExit, match="Expected SPARSEKD_CUDA to be 0, 1 or unset, got 'yes'"):
        build.wants_cuda("yes", None)


def test_why_not_cuda(build):
    assert build.why_not_cuda("/cuda", "13.7", "13.0") is None
    assert "got none" in build.why_not_cuda(None, None, "13.0")
    assert "an nvcc that runs" in build.why_not_cuda("/cuda", None, "13.0")
    assert "CPU-only torch" in build.why_not_cuda("/cuda", "13.7", None)
    assert "Expected nvcc 12.x" in build.why_not_cuda("/cuda", "13.7", "12.8")


def test_missing_and_unfit_compilers_are_told_in_one_sentence(build, tmp_path):
    with pytest.raises(SystemExit, match="Expected a C\\+\\+20 compiler .* got no '.*gone'"):
        build.check_compiler({"CXX": str(tmp_path / "gone")})
    old = make_program(tmp_path / "old", "echo 'unrecognized option -std=c++20' >&2; exit 1")
    with pytest.raises(SystemExit, match="to compile C\\+\\+20 with OpenMP .* got: unrecognized option"):
        build.check_compiler({"CXX": str(old)})


def test_sources_are_the_whole_of_csrc(build):
    listed = build.sources("ops.cpp", "cpu/*.cpp")
    assert "csrc/ops.cpp" in listed and all((ROOT / name).is_file() for name in listed)
    assert len(listed) == len(set(listed))


def test_importing_asks_for_no_gpu():
    """A machine where CUDA is hidden imports the package and finds its operators."""
    code = "import sparsekd, torch; assert not torch.cuda.is_available(); torch.ops.sparsekd.conv2d"
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
