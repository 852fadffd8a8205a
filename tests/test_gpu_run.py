"""benchmarks/gpu_run.sh, rehearsed on the CPU: every step that the day on a GPU has."""

import os
import subprocess
import sys
import types
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


def test_an_engine_that_cannot_be_captured_is_timed_by_calls(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu_cases

    def graph_of(engine):
        if engine():
            raise RuntimeError("called a synchronizing CUDA operation\nwith more lines")
        return types.SimpleNamespace(replay=engine)

    def compare(engines, **_):
        return {name: types.SimpleNamespace(min=1.0) for name in engines}

    monkeypatch.setattr(gpu_cases, "graph_of", graph_of)
    monkeypatch.setattr(gpu_cases, "compare", compare)
    run = gpu_cases.Run(False, tmp_path)
    ms = run.time({"waits": lambda: True, "runs on": lambda: False})
    assert list(ms.items()) == [("waits", 1e3), ("runs on", 1e3 / gpu_cases.GRAPH_CALLS)]
    assert run.by_calls == {"waits": "called a synchronizing CUDA operation"}
    assert "waits: timed by calls" in capsys.readouterr().out
