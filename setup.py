"""Builds the one extension, `sparsekd._C`: csrc/ops.cpp and csrc/cpu/*.cpp, and csrc/cuda/* where there is a toolkit.

Everything that can be said without code is in pyproject.toml. The environment decides the rest:

    SPARSEKD_CUDA=0|1        leave the CUDA half out | insist on it; unset: build it when it can be built
    CUDA_HOME                the toolkit, when the right one is not the first found
    TORCH_CUDA_ARCH_LIST     its architectures; where no GPU is seen, 8.0+PTX
    CXX, MAX_JOBS            the compiler; how many files at once
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
CXX_FLAGS = ["-O3", "-g0", "-std=c++20", "-fopenmp", "-fvisibility=hidden"]
SANITIZE_FLAGS = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
# Stable ABI of Python 3.10: one built file serves every later Python. Spelled as torch spells it, so that the two
# definitions agree.
LIMITED_API = "-DPy_LIMITED_API=0x030A0000"
# Where no GPU is seen: the oldest with tensor cores that the kernels are written for, and PTX for the later ones. One
# architecture keeps the build that `make test` does within minutes; who builds for others names them.
DEFAULT_ARCHITECTURES = "8.0+PTX"


class BuildError(SystemExit):
    """Ends the build with one sentence instead of a traceback."""

    def __init__(self, sentence):
        super().__init__(f"\nsparsekd: {sentence}\n")


# ---- the toolkit ----


def holds_toolkit(folder):
    return (Path(folder) / "include" / "cuda_runtime.h").is_file()


def toolkits_of_nvcc(nvcc):
    """The folders that an nvcc on the PATH may belong to. It may be a link, or a script that calls the real one."""
    nvcc = Path(nvcc)
    programs = [nvcc, nvcc.resolve()]
    try:
        head = nvcc.read_bytes()[:4096]
    except OSError:
        head = b""
    if head.startswith(b"#!"):
        named = re.findall(r"(/[^\s\"'$]+/nvcc)\b", head.decode(errors="ignore"))
        programs += [path for name in named for path in (Path(name), Path(name).resolve())]
    return [program.parent.parent for program in programs]


def find_cuda_home(environ, usual=None):
    """The first folder that holds include/cuda_runtime.h, or None: the environment's, nvcc's, then the usual places.

    torch takes the parent of whatever `nvcc` is first on the PATH, which is wrong for wrapper scripts, and believes
    CUDA_HOME without a look.
    """
    if usual is None:
        usual = [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True), Path("/opt/cuda")]
    candidates = [environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    nvcc = shutil.which("nvcc", path=environ.get("PATH", ""))
    if nvcc:
        candidates += toolkits_of_nvcc(nvcc)
    return next((str(folder) for folder in [*candidates, *usual] if holds_toolkit(folder)), None)


def nvcc_release(cuda_home):
    """What `nvcc --version` calls itself, such as "13.0", or None where it does not run."""
    try:
        said = subprocess.run([str(Path(cuda_home) / "bin" / "nvcc"), "--version"], capture_output=True, text=True)
    except OSError:
        return None
    found = re.search(r"release (\d+\.\d+)", said.stdout)
    return found.group(1) if found else None


def why_not_cuda(cuda_home, nvcc, torch_cuda):
    """One sentence on why the CUDA half can't be built, or None when it can.

    Never decided by torch.cuda.is_available(): machines that build need no GPU.
    """
    if cuda_home is None:
        return "Expected a CUDA toolkit with include/cuda_runtime.h (at CUDA_HOME, nvcc or /usr/local/cuda), got none"
    if nvcc is None:
        return f"Expected an nvcc that runs in {cuda_home}/bin, got none"
    if torch_cuda is None:
        return "Expected a torch built for CUDA, got a CPU-only torch"
    if nvcc.split(".")[0] != torch_cuda.split(".")[0]:
        return (
            f"Expected nvcc {torch_cuda.split('.')[0]}.x, the CUDA release that torch was built for ({torch_cuda}), "
            f"got {nvcc} in {cuda_home}; point CUDA_HOME at a matching toolkit"
        )
    return None


def wants_cuda(switch, obstacle):
    """Whether to build the CUDA half, from SPARSEKD_CUDA (None when unset) and why_not_cuda's sentence."""
    if switch not in (None, "", "0", "1"):
        raise BuildError(f"Expected SPARSEKD_CUDA to be 0, 1 or unset, got {switch!r}")
    if switch == "0":
        return False
    if switch == "1" and obstacle:
        raise BuildError(f"{obstacle}; SPARSEKD_CUDA=1 asks for the CUDA half, without it the CPU half is built alone")
    return obstacle is None


# ---- the sources ----


def sources(*patterns):
    """Files below csrc that match, relative to the root as setuptools wants them, in a fixed order."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


def check_compiler(environ):
    """Say it in one sentence when something to compile with is missing or too old, not in two hundred of ninja's."""
    compiler = environ.get("CXX") or "c++"
    headers = sysconfig.get_path("include")
    if not (Path(headers) / "Python.h").is_file():
        raise BuildError(f"Expected Python.h in {headers}, got none: install Python's headers (Debian: python3-dev)")
    command = [*compiler.split(), "-std=c++20", "-fopenmp", "-x", "c++", "-", "-o"]
    program = "#include <concepts>\n#include <omp.h>\nint main() { return omp_get_max_threads() < 0; }\n"
    with tempfile.TemporaryDirectory() as folder:
        try:
            tried = subprocess.run([*command, f"{folder}/probe"], input=program, capture_output=True, text=True)
        except OSError:
            raise BuildError(f"Expected a C++20 compiler (g++ 11 or newer, or set CXX), got no {compiler!r}") from None
    if tried.returncode != 0:
        said = (tried.stderr.strip().splitlines() or ["nothing said"])[0]
        raise BuildError(f"Expected {compiler!r} to compile C++20 with OpenMP (g++ 11 or newer does), got: {said}")


def main():
    # Before torch.utils.cpp_extension is imported, since that is when it looks.
    cuda_home = find_cuda_home(os.environ)
    if cuda_home:
        os.environ["CUDA_HOME"] = cuda_home
    import setuptools

    # Without isolation pip does not look at [build-system], and older releases reject pyproject.toml at length.
    if int(setuptools.__version__.split(".")[0]) < 77:
        raise BuildError(f"Expected setuptools 77 or newer (pip install -U setuptools), got {setuptools.__version__}")
    try:
        import torch
    except ImportError:
        raise BuildError(
            "Expected torch in the environment that builds, got none: install torch, then add --no-build-isolation"
        ) from None
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    nvcc = nvcc_release(cuda_home) if cuda_home else None
    obstacle = why_not_cuda(cuda_home, nvcc, torch.version.cuda)
    cuda_sources = sources("cuda/*.cu", "cuda/*.cpp")
    with_cuda = wants_cuda(os.environ.get("SPARSEKD_CUDA"), obstacle)
    if cuda_sources and not with_cuda:
        print(f"sparsekd: building the CPU half alone ({obstacle or 'SPARSEKD_CUDA=0'})", file=sys.stderr)

    sanitize = os.environ.get("SPARSEKD_SANITIZE", "0") not in ("", "0")  # see `make sanitize`
    checks = SANITIZE_FLAGS if sanitize else []
    make, flags, files = CppExtension, {"cxx": [*CXX_FLAGS, *checks, LIMITED_API]}, sources("ops.cpp", "cpu/*.cpp")
    if with_cuda and any(name.endswith(".cu") for name in cuda_sources):
        make, files = CUDAExtension, files + cuda_sources
        flags["cxx"] += ["-DSPARSEKD_CUDA"]
        flags["nvcc"] = ["-O3", "-std=c++20", "-Xcompiler", "-fvisibility=hidden", "-DSPARSEKD_CUDA", LIMITED_API]
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)

    class Build(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            # Editable installs compile in a throw-away folder, everything each time. Kept, ninja compiles what changed.
            # One folder per Python and torch, since their objects don't mix.
            tag = f"{platform.machine()}-{sys.implementation.cache_tag}-torch{torch.__version__}"
            tag += "-sanitize" if sanitize else ""
            self.build_temp = str(Path("build") / f"temp-{tag}")

        def run(self):
            check_compiler(os.environ)
            super().run()

    setuptools.setup(
        ext_modules=[
            make(
                "sparsekd._C",
                files,
                depends=sources("*.h", "**/*.h", "**/*.inc", "**/*.cuh"),
                extra_compile_args=flags,
                extra_link_args=["-fopenmp", *checks],
                py_limited_api=True,
            )
        ],
        cmdclass={"build_ext": Build},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


# setuptools runs this file as __main__, from pip too; a test imports it for its functions.
if __name__ == "__main__":
    main()
