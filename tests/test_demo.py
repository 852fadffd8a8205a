"""The demonstration on a few images: what it writes is what it measured, and an interrupt loses nothing."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparsekd import data, demo_report, evaluate, load
from sparsekd.cli import main
from sparsekd.demo import Demo
from sparsekd.distillation import Distiller
from sparsekd.reference_models import reference_student

KINDS = ("alone", "distilled", "retrained", "random", "both")
pytestmark = pytest.mark.filterwarnings("ignore:.*stay dense.*:UserWarning")


@pytest.fixture(scope="module")
def few():
    whole = data.load("digits")
    part = {"train_images": whole.train_images[:256], "train_labels": whole.train_labels[:256]}
    rest = {"test_images": whole.test_images[:128], "test_labels": whole.test_labels[:128]}
    return data.Data(**{**vars(whole), **part, **rest})


def run(few, folder, *words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", lambda *args, **rest: few)
        return main(["demo", "--epochs", "1", "--seeds", "1", "--out", str(folder), *words])


@pytest.fixture(scope="module")
def finished(few, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    assert run(few, folder) == 0
    return folder


def results(folder):
    return json.loads((Path(folder) / "results.json").read_text())


def test_what_it_leaves(finished):
    files = {file.name for file in finished.iterdir()}
    assert files == {"report.md", "results.json", "accuracy.png", "layers.png", "student.safetensors", "stages"}
    assert all((finished / name).read_bytes().startswith(b"\x89PNG") for name in ("accuracy.png", "layers.png"))
    assert not list((finished / "stages").glob("*.checkpoint"))


def test_the_table_has_every_step(finished):
    rows = {row["model"]: row for row in results(finished)["rows"]}
    assert list(rows) == [
        "teacher",
        "student alone",
        "distilled student",
        "pruned, not retrained",
        "pruned and retrained",
        "distilled, pruned, retrained with the teacher",
    ]
    report = (finished / "report.md").read_text()
    for name, row in rows.items():
        assert [network["batch"] for network in row["networks"]] == [1, 64]
        assert f"| {name} | {100 * row['accuracy']:.2f} | {row['parameters']:,} | {row['bytes']:,} |" in report
    pruned, whole = rows["pruned and retrained"], rows["student alone"]
    kept = 64 * 32 * 9 + 4096 * 256  # conv2 and fc1, of which a tenth remains
    assert whole["parameters"] - pruned["parameters"] == pytest.approx(0.9 * kept, abs=2)
    assert pruned["bytes"] < 0.2 * whole["bytes"]
    assert pruned["spread"] is None  # of one seed


def test_the_saved_student_is_the_one_in_the_table(finished, few):
    model = load(reference_student(), finished / "student.safetensors")
    accuracy = evaluate(model, data.loaders(few)[1])
    row = results(finished)["rows"][-1]
    assert accuracy == pytest.approx(row["accuracy"], abs=0.01)
    for layer in (model.conv2, model.fc1):
        assert int((layer.weight == 0).sum()) == pytest.approx(0.9 * layer.weight.numel(), abs=1)


def test_records_agree_with_the_models(finished, few):
    found, test = results(finished), data.loaders(few)[1]
    for kind, stage in zip(KINDS, ("student", "distilled", "retrained", "random", "both"), strict=True):
        model = load(reference_student(), finished / "stages" / f"{stage}-0.safetensors")
        assert evaluate(model, test) == found["records"][f"{kind}-0"]["accuracy"]
    assert found["records"]["retrained-0"]["sparsity"] == pytest.approx(
        0.9 * (64 * 32 * 9 + 4096 * 256) / sum(p.numel() for p in reference_student().parameters()), abs=1e-5
    )


@pytest.mark.parametrize("step", [3, pytest.param(14, marks=pytest.mark.slow)])  # of the teacher; of a later stage
def test_interrupted_and_resumed(few, finished, tmp_path, monkeypatch, capsys, step):
    left, original = [step], Distiller._objective

    def interrupted(*args):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as context:
        context.setattr(Distiller, "_objective", interrupted)
        assert run(few, tmp_path / "cut") == 130
    assert "--resume" in capsys.readouterr().err
    assert len(list((tmp_path / "cut" / "stages").glob("*.checkpoint"))) == 1
    assert run(few, tmp_path / "cut", "--resume") == 0
    one, other = results(tmp_path / "cut")["records"], results(finished)["records"]
    assert {key: record["accuracy"] for key, record in one.items()} == {k: r["accuracy"] for k, r in other.items()}


def test_another_run_cannot_be_resumed_and_is_kept(few, tmp_path, capsys):
    stages = tmp_path / "stages"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Demo, "run", lambda self: None)
        assert run(few, tmp_path) == 0
        (stages / "teacher.json").write_text("{}")
        assert run(few, tmp_path, "--resume", "--sparsity", "0.5") == 1
        assert "Expected the settings of the run in" in capsys.readouterr().err
        assert (stages / "teacher.json").exists()
        assert run(few, tmp_path, "--sparsity", "0.5") == 0
    assert not (stages / "teacher.json").exists() and (tmp_path / "stages.old" / "teacher.json").exists()


def findings(**accuracies):
    def of(kind, field="accuracy"):
        return accuracies[f"{kind}_{field}" if field != "accuracy" else kind]

    return demo_report.findings(SimpleNamespace(accuracies=of, settings=SimpleNamespace(labels_fraction=0.25)))


def test_findings_by_hand():
    said = findings(
        alone=[0.90, 0.92], distilled=[0.95, 0.95], retrained=[0.90, 0.90], retrained_pruned=[0.5, 0.5],
        random=[0.8, 0.8], random_pruned=[0.2, 0.2], both=[0.94, 0.94], both_pruned=[0.96, 0.96],
    )  # fmt: skip
    assert said[0].startswith("Retraining recovers 98% of what pruning lost (91.00 ± 1.41%")  # 0.40 of 0.41
    assert said[1].startswith("Pruning lost nothing (95.00 ± 0.00% → 96.00 ± 0.00%)")
    assert "50.00 ± 0.00% against 20.00 ± 0.00% before retraining" in said[2]
    assert said[3].endswith("both with the labels of 25% of the images, a difference of +4.00 points.")


def test_synthetic_images_are_called_so(few):
    shown = SimpleNamespace(args=SimpleNamespace(data="shapes"), data=SimpleNamespace(synthetic=True), sparsity=0.9)
    assert "shapes (synthetic images)" in demo_report._title(SimpleNamespace(**vars(shown), seeds=range(3)))


def test_seeds_share_nothing_but_the_teacher(few, tmp_path):
    args = {"data": "digits", "root": None, "download": False, "seed": 0, "resume": False, "out": str(tmp_path)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", lambda *args, **rest: few)
        demo = Demo(SimpleNamespace(**args, sparsity=0.9, seeds=2, epochs=1))
    assert not torch.equal(demo.student(0).fc1.weight, demo.student(1).fc1.weight)
    first, second = (next(iter(demo.loaders(seed)[0]))[1] for seed in (0, 1))
    assert not torch.equal(first, second)
