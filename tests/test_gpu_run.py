"""benchmarks/gpu_run.sh, rehearsed on the CPU: every step that the day on a GPU has."""

import os
import subprocess
import sys
from pathlib import Path

import interpreted
import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu_run.sh"
FILES = {
    "doctor.txt",
    "build.log",
    "tests.log",
    "golden.json",
    "tuned.json",
    "results.json",
    "results.png",
    "steps.txt",
}


def rehearse(folder, *more, python=sys.executable):
    environment = {**os.environ, "PYTHON": python}
    command = ["bash", str(SCRIPT), "--rehearse", str(folder), *more]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.skipif(not interpreted.SUPPORTED, reason=interpreted.REASON)
def test_the_rehearsal(tmp_path):
    ran = rehearse(tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert {file.name for file in tmp_path.iterdir()} == FILES
    assert all(file.stat().st_size for file in tmp_path.iterdir())
    again = rehearse(tmp_path)
    assert again.returncode == 0 and again.stdout.count("done before") == 7


def test_a_step_that_fails_stops_the_run_and_is_not_done(tmp_path):
    ran = rehearse(tmp_path, python="false")
    assert ran.returncode == 1 and "build: failed" in ran.stderr
    assert not (tmp_path / "steps.txt").exists()
    assert rehearse(tmp_path, "too many").returncode == 2
