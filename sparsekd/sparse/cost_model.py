"""What a layer takes, dense and sparse, without running it.

    log(ms) = log(a . terms) + r(traits)

``terms`` are what the kernels spend time on (multiplications, bytes in and out, rows, a call), ``a >= 0`` by
non-negative least squares of relative errors. What that leaves is interpolated between the layers that were measured:
``r`` is the posterior mean of a Gaussian process (Rasmussen and Williams, Gaussian Processes for Machine Learning,
2006, algorithm 2.1) over logarithms of sizes. ``benchmarks/cost_model.py`` measures, fits and checks; its result lies
beside this file, with the machine that it was measured on. Times of other precisions than float32 are float32's.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from ..measure import tuned
from .problem import Problem

FILE = Path(__file__).with_name("cost_model.safetensors")
KINDS = ("conv2d", "point", "depthwise", "linear")
WAYS = ("dense", "sparse")


@dataclass(frozen=True)
class Prediction:
    """Milliseconds of one layer. In half of the layers that the fit had not seen, the speed-up was off by less than
    ``error``, relatively."""

    dense_ms: float
    sparse_ms: float
    error: float

    @property
    def speedup(self) -> float:
        return self.dense_ms / self.sparse_ms


def kind(problem: Problem) -> str:
    """Which of the fitted laws a layer follows."""
    if problem.kind == "linear":
        return "linear"
    if problem.groups > 1 and problem.groups == problem.in_channels:
        return "depthwise"
    return "point" if problem.output == (1, 1) else "conv2d"


def native(problem: Problem) -> bool:
    """Whether torch runs a dense convolution by its own loops, not by oneDNN (so decides its Convolution.cpp)."""
    plain = math.prod(problem.stride) * math.prod(problem.dilation) == 1 and problem.batch < 16
    elements = problem.batch * problem.in_channels * math.prod(problem.size)
    small = problem.groups == 1 and min(problem.kernel) <= 3 and problem.batch == 1 and elements <= 20480
    return (plain and math.prod(problem.kernel) == 1) or small


def terms(problem: Problem, way: str, vector: int = 1, density: float = 1.0) -> np.ndarray:
    """What time is spent on, in units of about a microsecond each."""
    pixels = problem.batch * math.prod(problem.output)
    work = pixels * problem.weights * density / 1e5
    read = problem.batch * problem.in_channels * math.prod(problem.size) / 1e4
    written = pixels * problem.out_channels / 1e4
    kept = problem.weights * density / 1e4
    one = problem.kind == "linear" and problem.batch == 1  # a product with a vector has kernels of its own
    far = max(problem.weights * density - 1e6, 0) / 1e4  # beyond a cache of 4 MB
    found = [1.0, work * (not one), read, written, kept * one, kept * (not one), far]
    if way == "dense" and problem.kind == "conv2d":
        own = native(problem)
        found += [own, work * own, read * math.prod(problem.kernel) * own, kept * own]
    if way == "sparse":
        rows = problem.out_channels / vector
        found += [work / vector * (not one), rows * pixels / 1e4 * (not one), rows / 1e2]
    return np.array(found)


def traits(problem: Problem, way: str, vector: int = 1, density: float = 1.0) -> np.ndarray:
    """Where a layer lies among others."""
    height, width = problem.output
    logs = [
        problem.batch,
        problem.in_channels / problem.groups,
        problem.out_channels / problem.groups,
        max(height, 1),
        max(width, 1),
        math.prod(problem.kernel),
        math.prod(problem.stride),
        problem.groups,
    ]
    flags = [
        math.prod(problem.dilation) > 1,
        problem.layout == "nhwc",
        (problem.in_channels // problem.groups) % 8 != 0 or (problem.out_channels // problem.groups) % 8 != 0,
        width % 8 / 8,
    ]
    if way == "dense":
        flags.append(problem.kind == "conv2d" and native(problem))
    if way == "sparse":
        logs += [density, vector, max(density * problem.columns, 0.1)]
    return np.array([*np.log(logs), *map(float, flags)])


def covariance(one: np.ndarray, other: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Of the residuals of two sets of layers, from their traits: a rational quadratic kernel."""
    one, other = one / scales, other / scales
    squares = (one**2).sum(1)[:, None] + (other**2).sum(1)[None] - 2 * one @ other.T
    return 1 / (1 + np.maximum(squares, 0) / 2)


@dataclass(frozen=True)
class Law:
    """One fitted ``log(ms)``."""

    weights: np.ndarray  # a
    centres: np.ndarray  # traits of the layers that were measured
    scales: np.ndarray
    heights: np.ndarray

    def ms(self, problem: Problem, way: str, vector: int, density: float) -> float:
        base = float(self.weights @ terms(problem, way, vector, density))
        at = traits(problem, way, vector, density)[None]
        return base * math.exp(float(covariance(at, self.centres, self.scales)[0] @ self.heights))


@functools.cache
def fitted() -> tuple[dict[tuple[str, str], Law], dict]:
    """The laws by (kind, way), and what is known of the fit."""
    with safe_open(FILE, framework="numpy") as file:
        facts = json.loads(file.metadata()["facts"])
        laws = {}
        for name, way in ((name, way) for name in KINDS for way in WAYS):
            parts = (file.get_tensor(f"{name}.{way}.{part.name}") for part in fields(Law))
            laws[name, way] = Law(*(part.astype(np.float64) for part in parts))
    return laws, facts


def unknown(device: torch.device) -> str | None:
    """Why nothing is predicted on a device; None where it is."""
    if device.type == "cpu":
        return None
    return f"not measured (SPARSEKD_TUNE={tuned.mode()}), and the cost model knows CPUs alone, got {device.type}"


def predict(problems: Sequence[Problem], vector: int, density: float) -> Prediction:
    """The time of a layer called once for each problem, at a density (kept weights over all) in vectors of V."""
    laws, facts = fitted()
    name = kind(problems[0])
    density = max(density, 1e-4)
    dense = sum(laws[name, "dense"].ms(problem, "dense", 1, 1.0) for problem in problems)
    sparse = sum(laws[name, "sparse"].ms(problem, "sparse", vector, density) for problem in problems)
    return Prediction(dense, sparse, facts["error"])
