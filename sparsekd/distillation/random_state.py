"""The random numbers that a training may draw on: torch's (CPU, GPUs, the loader's generator), Python's, numpy's."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch


def take(generator: torch.Generator | None = None) -> dict:
    """All states as tensors and plain types, which ``torch.load(weights_only=True)`` reads."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "loader": None if generator is None else generator.get_state(),
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {
            "kind": str(kind), "keys": torch.from_numpy(keys.astype(np.int64)), "position": int(position),
            "has_gauss": int(has_gauss), "cached": float(cached),
        },
    }  # fmt: skip


def put(state: Mapping, generator: torch.Generator | None = None) -> None:
    """Puts back what :func:`take` took; states of GPUs only where there are as many."""
    python, numpy = state["python"], state["numpy"]
    if generator is not None and state["loader"] is not None:
        generator.set_state(state["loader"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    torch.set_rng_state(state["torch"])
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
