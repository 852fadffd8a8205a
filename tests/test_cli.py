"""The command line: what each command leaves behind (errors: test_cli_errors.py)."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsekd import SparseConv2d, SparseLinear, data, dense_state_dict, evaluate, load, would_it_be_faster
from sparsekd.cli import LOSSES, main, parser
from sparsekd.commands import _loss
from sparsekd.distillation import LOGIT_LOSSES, Distiller
from sparsekd.measure import engines
from sparsekd.model_names import model_of
from sparsekd.reference_models import ReferenceNet
from sparsekd.sparse.checkpoint import save


def tiny():
    """For --model test_cli:tiny."""
    return ReferenceNet(8, 32)


def no_module():
    return "a string"


class Boxes(nn.Conv2d):
    """Answers as detectors do."""

    def forward(self, x):
        return [{"boxes": super().forward(x)}]


def boxes():
    return Boxes(3, 4, 3)


@pytest.fixture(autouse=True)
def few_images(monkeypatch, tmp_path):
    """A quarter of the digits, and a folder of our own to stand in."""
    whole = data.load("digits")
    part = {"train_images": whole.train_images[::4], "train_labels": whole.train_labels[::4]}
    small = data.Data(**{**vars(whole), **part})
    real = data.load
    monkeypatch.setattr(data, "load", lambda name, **rest: small if name == "digits" else real(name, **rest))
    monkeypatch.chdir(tmp_path)
    return small


def run(*words):
    return main([str(word) for word in words])


COMMANDS = (
    "demo",
    "train",
    "distill",
    "prune",
    "compress",
    "sensitivity",
    "convert",
    "report",
    "bench",
    "doctor",
    "completion",
)
TINY = ("--model", "test_cli:tiny")


TRAINED = ("train", *TINY, "--epochs", 4, "--lr", 0.05)


@pytest.fixture
def trained(few_images):
    assert run(*TRAINED, "--out", "alone.safetensors") == 0
    return Path("alone.safetensors")


# --- the recipes -----------------------------------------------------------------------------------------------------


def test_train_says_the_accuracy_of_what_it_saved(few_images, capsys):
    assert run(*TRAINED, "--out", "alone.safetensors") == 0
    said, size = capsys.readouterr().out, Path("alone.safetensors").stat().st_size
    accuracy = evaluate(load(tiny(), "alone.safetensors"), data.loaders(few_images)[1])
    assert f"accuracy {accuracy:.4f} on digits, alone.safetensors of {size} bytes" in said
    assert "epoch 4/4: loss" in said and accuracy > 0.2  # a tenth by chance
    assert [file.name for file in Path().iterdir()] == ["alone.safetensors"]


def test_training_is_the_same_each_time(trained):
    assert run(*TRAINED, "--out", "again/second.safetensors") == 0  # the folder is made
    one, other = load(tiny(), trained).state_dict(), load(tiny(), "again/second.safetensors").state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert run(*TRAINED, "--seed", 1, "--out", "other.safetensors") == 0
    assert not torch.equal(load(tiny(), "other.safetensors").fc1.weight, one["fc1.weight"])


def test_distill_listens_to_the_teacher(trained):
    words = ("distill", *TINY, "--teacher", trained, "--teacher-model", "test_cli:tiny", "--epochs", 1)
    assert run(*words, "--alpha", 0.9, "--out", "distilled.safetensors") == 0
    assert run(*words, "--alpha", 0, "--out", "deaf.safetensors") == 0
    assert run(*words, "--alpha", 0.9, "--loss", "dkd", "--out", "decoupled.safetensors") == 0
    names = ("distilled", "deaf", "decoupled")
    weights = [load(tiny(), f"{name}.safetensors").fc2.weight for name in names]
    assert not any(torch.equal(weights[i], weights[i - 1]) for i in range(3))


def test_losses_have_the_names_that_python_knows():
    """They are written out, so that --help need not import torch."""
    assert {*LOSSES, "kl"} == {"kd", *LOGIT_LOSSES}  # kd is kl, fused
    for name in LOSSES:
        words = ["distill", "--teacher", "a", "--out", "b", "--loss", name, "--temperature", "3", "--alpha", "0.25"]
        loss = _loss(parser().parse_args(words))
        assert loss.alpha == 0.25 and (name == "mse" or getattr(loss, "settings", vars(loss))["temperature"] == 3)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--importance", "magnitude", "--budget", "uniform"),
        ("--importance", "random", "--gradual"),
        ("--teacher", "alone.safetensors", "--teacher-model", "test_cli:tiny"),
        ("--penalty", "l1", "--penalty-weight", 1e-3),
    ],
    ids=["gradient", "magnitude, uniform", "random, gradual", "taught", "penalised"],
)
def test_prune(trained, options, capsys):
    words = ("prune", *TINY, "--weights", trained, "--sparsity", 0.8, "--epochs", 6, "--out", "pruned.safetensors")
    assert run(*words, *options, "--json", "result.json") == 0
    assert "dense: conv1, fc2\n" in capsys.readouterr().out
    found = json.loads(Path("result.json").read_text())
    assert found["bytes"] == Path("pruned.safetensors").stat().st_size and 0.05 < found["accuracy"] <= 1
    model = load(tiny(), "pruned.safetensors")
    weights = [model.conv2.weight, model.fc1.weight]  # the first convolution and the last linear layer stay dense
    count = sum(weight.numel() for weight in weights)
    assert sum(int((weight == 0).sum()) for weight in weights) == round(0.8 * count)
    assert model.conv1.weight.all() and model.fc2.weight.all()
    if "uniform" in options:
        assert [int((w == 0).sum()) for w in weights] == [round(0.8 * w.numel()) for w in weights]


def test_prune_every_layer(trained, capsys):
    words = ("prune", *TINY, "--weights", trained, "--epochs", 1, "--importance", "magnitude", "--budget", "uniform")
    assert run(*words, "--ignored-layers", "--out", "pruned.safetensors") == 0
    assert "dense: no layer\n" in capsys.readouterr().out
    model = load(tiny(), "pruned.safetensors")
    for layer in (model.conv1, model.conv2, model.fc1, model.fc2):
        assert int((layer.weight == 0).sum()) == round(0.9 * layer.weight.numel())


def test_a_recipe_is_its_options_and_the_command_line_wins(trained):
    pytest.importorskip("yaml", reason="PyYAML is not installed")
    Path("recipe.yaml").write_text("sparsity: 0.8\npattern: 4x1\nbudget: uniform\ngradual: true\nepochs: 6\n")
    words = ("prune", *TINY, "--weights", trained)
    assert run(*words, "--recipe", "recipe.yaml", "--out", "recipe.safetensors") == 0
    options = ("--sparsity", 0.8, "--pattern", "4x1", "--budget", "uniform", "--gradual", "--epochs", 6)
    assert run(*words, *options, "--out", "options.safetensors") == 0
    one, other = load(tiny(), "recipe.safetensors"), load(tiny(), "options.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert run(*words, "--recipe", "recipe.yaml", "--sparsity", 0.5, "--out", "half.safetensors") == 0
    assert (load(tiny(), "half.safetensors").fc1.weight == 0).float().mean() == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    "text, said",
    [
        ("a: [", "Expected YAML in recipe.yaml, got:"),
        ("text", "Expected a mapping of options in recipe.yaml, got str"),
        ("sparsity: {a: 1}", "Expected sparsity in recipe.yaml to be a number"),
    ],
)
def test_a_recipe_that_is_none(few_images, capsys, text, said):
    pytest.importorskip("yaml", reason="PyYAML is not installed")
    Path("recipe.yaml").write_text(text)
    assert run("prune", "--weights", "w", "--out", "o", "--recipe", "recipe.yaml") == 1
    assert said in capsys.readouterr().err


def test_compress_is_the_one_call(trained, few_images, monkeypatch):
    """--target in the place of --sparsity; from a YAML recipe; what is saved loads and is as sparse as asked for."""
    pytest.importorskip("yaml", reason="PyYAML is not installed")
    monkeypatch.setenv("SPARSEKD_TUNE", "off")
    Path("recipe.yaml").write_text(
        'target: 0.8\nbudget: uniform\nimportance: magnitude\nepochs: 4\nlr: 0.05\nignored-layers: [conv1, "fc1*"]\n'
    )
    words = ("compress", *TINY, "--weights", trained, "--teacher", trained, "--teacher-model", "test_cli:tiny")
    assert run(*words, "--recipe", "recipe.yaml", "--out", "small.safetensors", "--json", "found.json") == 0
    model, found = load(tiny(), "small.safetensors"), json.loads(Path("found.json").read_text())
    weights = dense_state_dict(model)
    for name in ("conv2.weight", "fc2.weight"):
        assert int((weights[name] == 0).sum()) == round(0.8 * weights[name].numel())
    assert weights["conv1.weight"].all() and weights["fc1.weight"].all()
    assert found["accuracy"] == evaluate(model, data.loaders(few_images)[1])
    assert sorted(file.name for file in Path().glob("small*")) == ["small.safetensors"]


def test_prune_to_a_time(trained, monkeypatch):
    """By the cost model: what is saved is foretold to be as fast as was asked for."""
    monkeypatch.setenv("SPARSEKD_TUNE", "off")
    words = ("prune", *TINY, "--weights", trained, "--target", "1.3x", "--batch", 64, "--epochs", 1)
    assert run(*words, "--pattern", "4x1", "--importance", "magnitude", "--out", "fast.safetensors") == 0
    model, shape = load(tiny(), "fast.safetensors"), (64, 3, 32, 32)
    dense = sum(made.dense_ms for made in would_it_be_faster(model, 0.0, shape).values())
    left = dense
    for name in ("conv2", "fc1"):
        sparsity = float((getattr(model, name).weight == 0).float().mean())
        made = would_it_be_faster(model, sparsity, shape, "4x1")[name]
        left -= made.dense_ms - min(made.dense_ms, made.sparse_ms)
    assert 1.28 < dense / left < 1.5


@pytest.mark.parametrize(
    "words, said",
    [
        (("--target", "fast"), "Expected target to be a sparsity in [0, 1), a speed-up"),
        (("--target", "2x", "--sparsity", 0.5), "Expected either a sparsity or a target, got sparsity=0.5 and target="),
        (("--target", "2x", "--budget", "erk"), "Expected budget=\"latency\" with a target of time, got 'erk'"),
        (("--budget", "latency"), 'Expected a target of time, "2x" or "3.5ms", with budget="latency", got 0.9'),
        (("--target", "2x", "--batch", 0), "Expected --batch of at least 1, got 0"),
    ],
)
def test_targets_that_are_refused(few_images, capsys, words, said):
    save(tiny(), "alone.safetensors")
    for command in ("prune", "compress"):
        assert run(command, *TINY, "--weights", "alone.safetensors", *words, "--out", "o.safetensors") == 1
        assert said in capsys.readouterr().err and not Path("o.safetensors").exists()


def test_sensitivity_is_that_of_really_pruning(trained, few_images, capsys):
    words = ("sensitivity", *TINY, "--weights", trained, "--sparsities", 0.5, 0.9, "--importance", "gradient")
    assert run(*words, "--batches", 4, "--json", "found.json", "--png", "found.png") == 0
    found, said = json.loads(Path("found.json").read_text()), capsys.readouterr().out
    assert set(found["layers"]) == {f"{name}.weight" for name in ("conv1", "conv2", "fc1", "fc2")}
    test = data.loaders(few_images)[1]
    assert found["baseline"] == evaluate(load(tiny(), trained), test)
    assert f"accuracy {found['baseline']:.4f} on digits" in said and "conv1.weight" in said
    assert Path("found.png").stat().st_size > 1000
    assert run(*words, "--batches", 0) == 1  # an importance without data is an error


def test_convert_reports_and_saves(trained, capsys):
    run("prune", *TINY, "--weights", trained, "--epochs", 1, "--out", "pruned.safetensors")
    words = ("convert", *TINY, "--weights", "pruned.safetensors", "--json", "report.json", "--html", "report.html")
    capsys.readouterr()
    threads = torch.get_num_threads()
    assert run(*words, "--out", "swapped.safetensors") == 0
    assert torch.get_num_threads() == threads
    said, found = capsys.readouterr().out, json.loads(Path("report.json").read_text())
    assert [layer["name"] for layer in found["layers"]] == ["conv1", "conv2", "fc1", "fc2"]
    assert "conv2" in said and found["machine"]["threads"] == "1" and found["network"][0]["dense_ms"] > 0
    assert "<table>" in Path("report.html").read_text()
    model, plain = load(tiny(), "swapped.safetensors"), load(tiny(), "pruned.safetensors")
    kinds = {layer["name"]: layer["kernel"] for layer in found["layers"]}
    for name, kernel in kinds.items():
        assert isinstance(getattr(model, name), (SparseConv2d, SparseLinear)) == (kernel == "sparse")
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(model.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-4)


def test_report(capsys):
    words = ("--size", 32, "--sparsity", 0.9, "--pattern", "v4", "--batch", 1, 2, "--threads", 1, 2)
    files = ("--json", "r.json", "--csv", "r.csv", "--html", "r.html", "--accuracy", "dense=97.5,0.5")
    assert run("report", *TINY, *words, *files) == 0
    said, found = capsys.readouterr().out, json.loads(Path("r.json").read_text())
    assert "random weights" in said and "dense: accuracy 97.5 in 0.500 ms" in said
    sparsities = {layer["name"]: layer["sparsity"] for layer in found["layers"]}
    assert sparsities["conv1"] == 0 and sparsities["fc1"] == pytest.approx(0.9, abs=1e-3)
    assert [(row["threads"], row["batch"]) for row in found["network"]] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert Path("r.csv").read_text().startswith("name,kind,kernel") and "<svg" in Path("r.html").read_text()


def test_bench(capsys):
    words = ("--size", 32, "--pattern", "4x1", "--batch", 1, 3, "--rounds", 2, "--against", "eager")
    assert run("bench", *TINY, *words, "--json", "-") == 0
    out, err = capsys.readouterr()
    assert "optimize_for_inference" in err and "random weights" in err
    rows = json.loads(out)["rows"]
    assert [row["batch"] for row in rows] == [1, 3] and rows[0]["best_dense"] == "eager" and rows[0]["clock"] == "cpu"
    assert set(rows[0]["ms"]) == {"eager", "convert", "optimize_for_inference"}


def test_bench_of_a_checkpoint(capsys):
    save(tiny(), "weights.safetensors")
    words = ("--size", 32, "--checkpoint", "weights.safetensors", "--rounds", 2, "--against", "eager")
    assert run("bench", *TINY, *words) == 0
    assert "random weights" not in capsys.readouterr().out


def test_bench_with_an_engine_that_fails(monkeypatch, capsys):
    monkeypatch.setitem(engines.DENSE, "channels_last", lambda model, x, threads: lambda: model(x) + 1)
    assert run("bench", *TINY, "--size", 32, "--rounds", 2) == 1
    assert "off float64" in capsys.readouterr().out


def test_doctor(capsys):
    assert run("doctor") == 0
    assert "torch" in capsys.readouterr().out
    assert run("doctor", "--json", "-") == 0
    assert "torch" in {finding["topic"] for finding in json.loads(capsys.readouterr().out)["findings"]}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_that_are_understood(name, capsys):
    with pytest.raises(SystemExit) as ended:
        run(name, "--help")
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "exit codes: 0 success" in said
    examples = [line.strip() for line in said.splitlines() if line.startswith(f"  sparsekd {name}")]
    assert examples
    for example in examples:
        words = shlex.split(example.partition(" > ")[0])[1:]
        assert parser().parse_args(words).command == name


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion(shell, capsys):
    assert run("completion", shell) == 0
    said = capsys.readouterr().out
    assert "sparsekd" in said and "--against" in said and "onnxruntime" in said


def test_completion_without_shtab(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert run("completion", "bash") == 1
    assert capsys.readouterr().err.startswith("sparsekd: Expected shtab to be installed (pip install shtab), got")


def test_as_a_program():
    made = subprocess.run([sys.executable, "-m", "sparsekd.cli", "--help"], capture_output=True, text=True)
    assert made.returncode == 0
    assert all(name in made.stdout for name in COMMANDS)


# --- models by name --------------------------------------------------------------------------------------------------


def test_models_by_name():
    assert model_of("reference_student", 7).fc2.out_features == 7
    assert model_of("cifar_resnet20x4", 10).conv1.out_channels == 64
    assert model_of("resnet18", 5).fc.out_features == 5
    assert isinstance(model_of("test_cli:tiny", 10), ReferenceNet)


def test_a_file_in_the_folder_where_one_stands(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "mine_of_test_cli.py").write_text("from torch import nn\ndef make(): return nn.Linear(2, 3)\n")
    assert isinstance(model_of("mine_of_test_cli:make", 10), nn.Linear)


# --- interrupted and resumed -----------------------------------------------------------------------------------------


class InterruptAt:
    """Ctrl-C at the n-th step of a training."""

    def __init__(self, monkeypatch, step):
        self.left, self.original = step, Distiller._objective
        monkeypatch.setattr(Distiller, "_objective", lambda *args: self(*args))

    def __call__(self, *args):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.original(*args)


@pytest.mark.parametrize("step", [2, 9])  # within the first epoch, and within the second
def test_interrupted_and_resumed(trained, monkeypatch, capsys, step):
    words = ("prune", *TINY, "--weights", trained, "--epochs", 2, "--out")
    assert run(*words, "whole.safetensors") == 0
    with monkeypatch.context() as context:
        InterruptAt(context, step)
        assert run(*words, "cut.safetensors") == 130
    assert "--resume" in capsys.readouterr().err
    assert Path("cut.safetensors.checkpoint").is_file() and not Path("cut.safetensors").exists()
    assert run(*words, "cut.safetensors", "--resume") == 0
    one, other = load(tiny(), "cut.safetensors").state_dict(), load(tiny(), "whole.safetensors").state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not Path("cut.safetensors.checkpoint").exists()


def test_an_unfinished_run_is_kept_when_a_new_one_begins(monkeypatch, capsys):
    words = ("train", *TINY, "--epochs", 2, "--out", "model.safetensors")
    with monkeypatch.context() as context:
        InterruptAt(context, 8)
        assert run(*words) == 130
    left = Path("model.safetensors.checkpoint").read_bytes()
    assert run(*words) == 0
    assert "is kept as model.safetensors.checkpoint.old" in capsys.readouterr().out
    assert Path("model.safetensors.checkpoint.old").read_bytes() == left
