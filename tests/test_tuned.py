"""Measured times on disk: kept, shared by processes, and begun anew when the file is broken."""

import json
import multiprocessing
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsekd import reporting
from sparsekd.measure import machine, tuned
from sparsekd.measure.machine import identity
from sparsekd.measure.tuned import Tuned

FIGURES = {"dense_ms": 2.0, "dense_as": "as it is", "sparse_ms": 1.0}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "tuned-1.json"


def test_kept_after_flush(path):
    first = Tuned(path, {"processor": "one"})
    first.put("a", FIGURES)
    assert first.get("a") == FIGURES and not path.exists()
    first.flush()
    assert Tuned(path, {}).get("a") == FIGURES and Tuned(path, {}).get("b") is None
    assert json.loads(path.read_text())["machine"] == {"processor": "one"}
    assert [file.name for file in path.parent.iterdir() if "broken" in file.name] == []


def test_two_that_write_lose_nothing_of_each_other(path):
    one, other = Tuned(path, {}), Tuned(path, {})
    one.put("a", FIGURES)
    other.put("b", FIGURES)
    one.flush()
    other.flush()
    assert other.get("a") == FIGURES
    assert set(tuned.read(path)) == {"a", "b"}


def write_many(path, name):
    for i in range(20):
        made = Tuned(path, {})
        made.put(f"{name} {i}", FIGURES)
        made.flush()


def test_processes_that_write_at_once_lose_nothing(path):
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=write_many, args=(path, name)) for name in "abc"]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0, 0]
    assert set(tuned.read(path)) == {f"{name} {i}" for name in "abc" for i in range(20)}


BROKEN = {
    "empty": "",
    "torn": '{"version": 1, "figures": {"a": {"ms": 1.',
    "not utf-8": b"\xff\xfe\x00",
    "another version": '{"version": 99, "figures": {}}',
    "no object": "[1, 2]",
    "no figures": '{"version": 1}',
    "a time below 0": '{"version": 1, "figures": {"a": {"ms": -1}}}',
    "a time that is no number": '{"version": 1, "figures": {"a": {"ms": NaN}}}',
    "a list for figures": '{"version": 1, "figures": {"a": [1]}}',
    "very deep": "[" * 200_000,
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_told_and_begun_anew(path, content):
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(UserWarning, match="Expected figures measured before in .*tuned-1.json, got .*tuned-1.broken"):
        made = Tuned(path, {})
    assert len(made) == 0 and path.with_suffix(".broken").exists()
    made.put("a", FIGURES)
    made.flush()
    assert tuned.read(path) == {"a": FIGURES}


def test_a_folder_that_cannot_be_written_is_told_once(tmp_path):
    (tmp_path / "file").write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing can be read there
        made = Tuned(tmp_path / "file" / "tuned-1.json", {})
    made.put("a", FIGURES)
    with pytest.warns(UserWarning, match="Expected to keep measured times in .*SPARSEKD_CACHE_DIR"):
        made.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.flush()
    assert made.get("a") == FIGURES


def test_figures_are_checked(path):
    with pytest.raises(ValueError, match="Expected finite times of at least 0 and texts, got nan"):
        Tuned(path, {}).put("a", {"ms": float("nan")})


def test_the_oldest_go_first(path, monkeypatch):
    monkeypatch.setattr(tuned, "MOST", 2)
    made = Tuned(path, {})
    for key in "abc":
        made.put(key, FIGURES)
    made.flush()
    assert list(tuned.read(path)) == ["b", "c"]


def test_where_and_how():
    assert tuned.folder({"SPARSEKD_CACHE_DIR": "/a"}) == Path("/a")
    assert tuned.folder({"XDG_CACHE_HOME": "/b"}) == Path("/b/sparsekd")
    home = Path("~/.cache/sparsekd").expanduser()
    assert tuned.folder({}) == home
    assert tuned.folder({"XDG_CACHE_HOME": "relative"}) == home  # to be ignored, says the specification
    assert tuned.mode({}) == "cached" and tuned.mode({"SPARSEKD_TUNE": "full"}) == "full"
    with pytest.raises(ValueError, match="Expected SPARSEKD_TUNE to be off, cached or full, got 'on'"):
        tuned.mode({"SPARSEKD_TUNE": "on"})


def test_each_machine_has_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEKD_CACHE_DIR", str(tmp_path))
    here = identity()
    assert tuned.of(here) is tuned.of(here)
    assert tuned.of({**here, "threads": "64"}).path != tuned.of(here).path
    assert {"processor", "kernels", "torch", "sparsekd", "build", "threads"} <= set(here) and all(here.values())


def test_a_time_of_a_gpu_is_of_that_gpu_and_by_its_clock(monkeypatch):
    cuda, asked = torch.device("cuda", 0), []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert identity(cuda) == {"gpu": "a GPU", **identity()} and "gpu" not in identity(torch.device("cpu"))

    def compare(engines, device, clock, **_):
        asked.append((device, clock))
        return {name: types.SimpleNamespace(min=1.0) for name in engines}

    monkeypatch.setattr(reporting, "compare", compare)
    with FakeTensorMode():
        layer, x = nn.Linear(3, 3, device=cuda), torch.empty(2, 3, device=cuda)
        assert reporting.time_dense(layer, x) == 1e3
    reporting.time_dense(nn.Linear(3, 3), torch.empty(2, 3))
    assert asked == [(cuda, "cuda"), (torch.device("cpu"), machine.clock())]
