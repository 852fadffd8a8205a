"""The accuracy tables: cells are told apart, run once, start from the same student, and are compared seed by seed."""

import importlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield tuple(importlib.import_module(name) for name in ("accuracy", "accuracy_cells", "accuracy_tables"))
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_cells_have_names_of_their_own_and_all_seeds_of_a_stage_come_before_the_next(scripts):
    _, cells, tables = scripts
    for name in ("shapes", "digits"):
        made = cells.cells(name)
        assert len({cell.name for cell in made}) == len(made)
        order = cells.ordered(name, range(3))
        assert len(set(order)) == len(order) == 3 * len(made)
    dense = [seed for cell, seed in cells.ordered("shapes", range(3)) if cell.pattern == "dense" and not cell.recipe]
    assert dense == [0, 0, 1, 1, 2, 2]
    made = set(cells.cells("shapes"))
    assert all({*pair} <= made for _, pairs in tables.comparisons("shapes") for pair in pairs)


def test_what_is_asked_of_the_tables_is_among_the_cells(scripts):
    _, cells, _ = scripts
    made = {(c.pattern, c.sparsity, c.importance, c.distilled) for c in cells.cells("shapes") if c == c.plain}
    for sparsity in (0.8, 0.9, 0.95):
        for pattern in ("unstructured", "4x1", "4x1-permuted", "8x1-permuted"):
            for importance in ("magnitude", "gradient"):
                assert {(pattern, sparsity, importance, taught) for taught in (True, False)} <= made
    assert {("2:4", 0.5), ("4:2:10", 0.8), ("4:2:20", 0.9)} <= {(pattern, sparsity) for pattern, sparsity, *_ in made}
    assert {("unstructured", 0.9, "taylor", True), ("unstructured", 0.9, "movement", True)} <= made


def test_differences_are_of_the_same_seeds(scripts, tmp_path):
    _, cells, tables = scripts
    (tmp_path / "shapes").mkdir()
    accuracies = {cells.Cell("4x1-permuted"): {0: 0.9, 2: 0.8}, cells.Cell("4x1"): {0: 0.88, 1: 0.1, 2: 0.79}}
    for cell, values in accuracies.items():
        for seed, accuracy in values.items():
            (tmp_path / "shapes" / f"{cell.name}-{seed}.json").write_text(json.dumps({"accuracy": accuracy}))
    (tmp_path / "shapes" / "teacher.json").write_text(json.dumps({"accuracy": 0.95}))
    text = "\n".join(tables.section("shapes", tmp_path))
    assert "| 90% 4x1, permuted less consecutive; distilled | +1.50 ± 0.71 (2) |" in text
    total = len(cells.cells("shapes"))
    assert f"**5 of {3 * total} cells are done**: 2, 1, 2 of {total} by seed" in text and "Teacher 95.00," in text
    assert "| 90% 4x1 | - | - | 59.00 ± 42.67 | - |" in text and "Made" not in text


def test_a_mean_of_differences_is_of_seeds_that_have_them_all(scripts, tmp_path):
    _, cells, tables = scripts
    (tmp_path / "shapes").mkdir()
    ways = [(importance, taught) for importance in ("magnitude", "gradient") for taught in (True, False)]
    made = {"seconds": 1800, "machine": "a machine", "date": "2026-01-02"}
    for index, (importance, taught) in enumerate(ways):
        for seed in range(3 if index else 2):  # one way lacks the last seed
            for pattern, more in (("4x1", 0), ("4x1-permuted", 0.01 * (index + seed))):
                name = cells.Cell(pattern, importance=importance, distilled=taught).name
                file = tmp_path / "shapes" / f"{name}-{seed}.json"
                file.write_text(json.dumps({"accuracy": 0.5 + more} | made))
    text = "\n".join(tables.section("shapes", tmp_path))
    label = "90% 4x1, permuted less consecutive; mean of magnitude and gradient, distilled and not"
    assert f"| {label} | +2.00 ± 0.71 (2) |" in text
    assert "Made 2026-01-02 on a machine, one thread each; 11.0 hours of one core in all." in text


@pytest.mark.parametrize("name", ["shapes", "digits"])
def test_what_is_committed(scripts, name):
    """The tables are those of the cells beside them; these come from one teacher and lost what their names say."""
    accuracy, cells, tables = scripts
    assert "\n".join(tables.section(name, accuracy.RESULTS)) in (accuracy.RESULTS / "README.md").read_text()
    accuracy.check_done(SimpleNamespace(name=name, settings=cells.SETTINGS[name], results=accuracy.RESULTS / name))
    for cell, seed in cells.ordered(name, range(3)):
        file = accuracy.RESULTS / name / f"{cell.name}-{seed}.json"
        result = json.loads(file.read_text()) if file.exists() else {}
        assert result.get("sparsity", cell.sparsity) == pytest.approx(cell.sparsity, abs=0.002), file


@pytest.mark.slow
def test_a_cell_is_run_once_from_a_student_that_is_trained_again_where_missing(scripts, tmp_path, monkeypatch, capsys):
    accuracy, cells, _ = scripts
    small = cells.Settings(images=128, teacher_epochs=1, dense_epochs=1, epochs=2, width=4, teacher_width=4)
    monkeypatch.setitem(accuracy.SETTINGS, "digits", small)
    made = [cells.dense(True), cells.Cell("4x1", lasso=4), cells.Cell(schedule="once", importance="gradient")]
    monkeypatch.setattr(accuracy, "ordered", lambda name, seeds: [(cell, seed) for seed in seeds for cell in made])
    where = ("digits", tmp_path / "results", tmp_path / "runs")
    bench = accuracy.Bench(*where)
    accuracy.run(bench, range(1), 1, where)
    for cell in made[1:]:
        result = json.loads(bench.path(f"{cell.name}-0").read_text())
        assert result["sparsity"] == pytest.approx(0.9, abs=0.02) and len(result["layers"]) == 4
    student = bench.student(0)
    state = torch.load(bench.runs / "dense-0.pt", weights_only=True)
    assert all(torch.equal(value, state[name]) for name, value in student.state_dict().items())
    capsys.readouterr()
    accuracy.run(bench, range(1), 1, where)
    assert capsys.readouterr().out == ""
    before = bench.path("dense-distilled-0").read_text()
    bench.path("dense-distilled-0").unlink()
    shutil.rmtree(bench.runs)
    bench.runs.mkdir()
    accuracy.run(bench, range(1), 1, where)  # the dense ones are trained again, to the same bits
    old, new = json.loads(before), json.loads(bench.path("dense-distilled-0").read_text())
    assert old["start"] == new["start"] and old["accuracy"] == new["accuracy"]
    accuracy.check_done(bench)
    teacher = json.loads(bench.path("teacher").read_text())
    bench.path("teacher").write_text(json.dumps(teacher | {"weights": "another"}))
    with pytest.raises(SystemExit, match="Expected .*-distilled-0.json to come from the teacher another, got"):
        accuracy.check_done(bench)
    (bench.runs / "teacher.pt").unlink()
    with pytest.raises(SystemExit, match="Expected a teacher with weights another, which the cells in .* come from"):
        accuracy.run(bench, range(1), 1, where)
