"""Where the CUDA toolkit lies, found as setup.py finds it."""

import functools
import importlib.util
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def include():
    """Its headers, or None where there is none."""
    spec = importlib.util.spec_from_file_location("sparsekd_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    home = setup.find_cuda_home(os.environ)
    return Path(home) / "include" if home else None
