"""The README's example runs as printed."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"


def example():
    return re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)


@pytest.mark.filterwarnings("ignore:.*stay dense.*:UserWarning")
def test_example_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(example(), "README.md", "exec"), scope)
    assert scope["pruner"].sparsity() == pytest.approx(0.9, abs=1e-4)
    assert (tmp_path / "student.safetensors").is_file()
    assert "layer4.1.conv2" in capsys.readouterr().out


def test_example_is_short():
    assert len(example().strip().splitlines()) <= 25
