"""The command line, one sentence for everything that is wrong, and nothing harmed by it."""

from pathlib import Path

import pytest
import torch
from test_cli import TINY, few_images, run, tiny  # noqa: F401  (a fixture for all tests)

from sparsekd.reference_models import reference_student
from sparsekd.sparse.checkpoint import save

PRUNE = ("prune", *TINY, "--weights", "weights.safetensors", "--out", "out.safetensors")
TRAIN = ("train", *TINY, "--out", "out.safetensors")
ERRORS = {
    "sparsity of 1.5": ((*PRUNE, "--sparsity", 1.5), "Expected sparsity in [0, 1), got 1.5"),
    "sparsity of -0.1": ((*PRUNE, "--sparsity", -0.1), "Expected sparsity in [0, 1), got -0.1"),
    "sparsity of nan": ((*PRUNE, "--sparsity", "nan"), "Expected sparsity in [0, 1), got nan"),
    "unknown importance": (
        (*PRUNE, "--importance", "tailor"),
        "Expected importance to be one of 'gradient', 'magnitude', 'random', 'taylor', 'snip', 'movement', 'fisher', ",
    ),
    "alpha": (("distill", *TINY, "--teacher", "weights.safetensors", "--teacher-model", "test_cli:tiny", "--alpha", 2,
               "--out", "out.safetensors"), "Expected alpha in [0, 1], got 2"),
    "temperature": (("distill", *TINY, "--teacher", "weights.safetensors", "--teacher-model", "test_cli:tiny",
                     "--temperature", 0, "--out", "out.safetensors"), "Expected temperature to be positive"),
    "no epochs": ((*TRAIN, "--epochs", 0), "Expected epochs to be an int of at least 1, got 0"),
    "no batch": ((*TRAIN, "--batch-size", 0), "Expected a batch size of at least 1, got 0"),
    "learning rate": ((*TRAIN, "--lr", -1), "Expected --lr of at least 0 and finite, got -1"),
    "a loss that runs away": ((*TRAIN, "--lr", 1e30), "Expected a finite loss, got"),
    "missing data folder": ((*TRAIN, "--data", "cifar10", "--root", "nowhere"), "Expected CIFAR-10's folder"),
    "no data folder": ((*TRAIN, "--data", "cifar10"), "Expected a root folder for cifar10, got none"),
    "unknown model": (("train", "--model", "resnet1001", "--out", "out.safetensors"), "Expected a model out of"),
    "unknown package": (("train", "--model", "no.such:thing", "--out", "x"), "Expected the package no.such to be"),
    "unknown factory": (("train", "--model", "test_cli:huge", "--out", "x"), "Expected a function huge in test_cli"),
    "no module": (("train", "--model", "test_cli:no_module", "--out", "x"), "Expected test_cli:no_module to make a"),
    "missing weights": (("convert", *TINY, "--weights", "none.safetensors"), "Expected a file saved by sparsekd.save"),
    "corrupt weights": (("convert", *TINY, "--weights", "corrupt.safetensors"), "Expected a whole file saved by"),
    "torn weights": (("convert", *TINY, "--weights", "torn.safetensors"), "Expected a whole file saved by"),
    "weights of another model": (("convert", "--weights", "weights.safetensors"), "Expected conv1.weight of shape"),
    "corrupt checkpoint": ((*TRAIN, "--resume"), "Expected a checkpoint of this training of ReferenceNet in"),
    "sparsity of 1": (("bench", *TINY, "--sparsity", 1), "Expected sparsity in [0, 1), got 1"),
    "no threads": (("bench", *TINY, "--size", 32, "--threads", 0), "Expected a number of threads of at least 1, got 0"),
    "far too many threads": (
        ("bench", *TINY, "--size", 32, "--threads", 100000), "Expected at most 1024 threads, got 100000"
    ),
    "answers that nothing can compare": (
        ("bench", "--model", "test_cli:boxes", "--size", 8), "Expected a network whose answers are tensors"
    ),
    "unknown model of timm's": (("bench", "--model", "timm:none"), "Expected a model of timm's (timm.list_models())"),
    "no images": (("bench", *TINY, "--size", 32, "--batch", 0), "Expected --batch of at least 1, got 0"),
    "no size": (("bench", *TINY, "--size", -3), "Expected --size of at least 1, got -3"),
    "a size that does not fit": (("bench", *TINY, "--size", 64), "Expected a model that takes images [1, 3, 64, 64]"),
    "no pattern": (("bench", *TINY, "--size", 32, "--pattern", "v0"), "Expected pattern to be"),
    "no rounds": (("bench", *TINY, "--size", 32, "--rounds", 0), "Expected --rounds of at least 1, got 0"),
    "a folder for a file": ((*TRAIN[:-1], "."), "Expected --out to name a file that can be written, got .: a folder"),
    "a page in no folder": (
        ("report", *TINY, "--html", "none/page.html"), "Expected --html to name a file that can be written, got none/"
    ),
    "a file for a parent": (
        ("doctor", "--json", "weights.safetensors/a.json"), "Expected --json to name a file that can be written, got we"
    ),
    "no accuracy": (
        ("report", *TINY, "--size", 32, "--accuracy", "dense=97"), "Expected --accuracy NAME=ACCURACY,MILLISECONDS, got"
    ),
    "no seeds": (("demo", "--seeds", 0), "Expected at least 1 seed, got 0"),
    "demo sparsity": (("demo", "--sparsity", 1.5), "Expected sparsity in (0, 1), got 1.5"),
    "demo without epochs": (("demo", "--epochs", 0), "Expected at least 1 epoch, got 0"),
    "a file for a folder": (
        ("demo", "--out", "weights.safetensors"), "Expected to read or write weights.safetensors/stages"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_one_sentence_and_no_harm(name, tmp_path, capsys):
    torch.manual_seed(0)
    save(tiny(), "weights.safetensors")
    content = Path("weights.safetensors").read_bytes()
    Path("corrupt.safetensors").write_bytes(b"not a model at all")
    Path("torn.safetensors").write_bytes(content[: len(content) // 2])
    Path("out.safetensors").write_bytes(b"of an earlier run")
    if name == "corrupt checkpoint":
        Path("out.safetensors.checkpoint").write_bytes(b"torn")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    words, message = ERRORS[name]
    assert run(*words) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"sparsekd: {message}") and said.count("\n") == 1, said
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="Expected the package no to be importable"):
        run("convert", "--debug", "--weights", "none.safetensors", "--model", "no:thing")


def test_a_bad_word_is_argparses():
    with pytest.raises(SystemExit) as ended:
        run("prune", "--sparsity", "much")
    assert ended.value.code == 2


def test_weights_that_need_more_classes(capsys):
    save(reference_student(12), "twelve.safetensors")
    assert run("convert", "--weights", "twelve.safetensors") == 1
    assert "fc2" in capsys.readouterr().err
    assert run("convert", "--weights", "twelve.safetensors", "--num-classes", 12) == 0


def test_an_interrupt_where_nothing_can_be_resumed(monkeypatch, capsys):
    def interrupt(findings):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsekd.measure.doctor.print_report", interrupt)
    assert run("doctor") == 130
    assert capsys.readouterr().err == "interrupted\n"
