"""
The file that ./run.sh new writes: it is a variant as every other, its model begins as the baseline, and bad names and
parts get one line.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_gpt
import variants
from train_gpt import RunError
from variants import check, new

ROOT = Path(__file__).resolve().parents[2]
BEGINS_OTHERWISE = {"optimizer", "schedule"}
TINY = train_gpt.make_config(dict(vocab_size=256, layers=2, model_dim=32, heads=2, head_dim=16, mlp_hidden=64,
                                  sequence_length=32, batch_tokens=128))
every_part = pytest.mark.parametrize("part", new.PARTS)


@pytest.fixture
def idea(part, write_file) -> str:
    """The name of a variant that `new` has written for the part."""
    name = f"new_{part}"
    write_file(name, new.source_of(name, new.PARTS[part]))
    return name


@every_part
def test_it_replaces_its_part_and_begins_as_the_baseline(part, idea):
    rows = check.random_rows(TINY, 2)
    losses = []
    for specs in ((), (idea,)):
        with variants.applied(specs, TINY) as changed:
            assert not specs or changed == {idea: [new.PARTS[part].replaced]}
            model = check.build(TINY)
            losses.append(model(rows[:, :-1], rows[:, 1:]))
    assert torch.equal(*losses)
    assert (sum(p.numel() for p in model.parameters()) > sum(p.numel() for p in check.build(TINY).parameters())) == (
        part not in BEGINS_OTHERWISE)


@pytest.mark.parametrize("part", [pytest.param(part, marks=() if part == "attention" else pytest.mark.slow)
                                  for part in new.PARTS])
def test_it_is_sound(part, idea, capsys):
    assert check.main([idea]) == 0, capsys.readouterr().out


def test_the_linter_has_nothing_to_say(tmp_path):
    for part in new.PARTS:
        new.write(f"new_{part}", part, tmp_path)
    result = subprocess.run([sys.executable, "-m", "ruff", "check", "--config", ROOT / "pyproject.toml", tmp_path],
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(new, "FOLDER", tmp_path)
    assert new.main(["my_idea", "--part", "mlp"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == str(tmp_path / "my_idea.py") and "./run.sh check my_idea" in second
    assert "class MyIdea(train_gpt.MLP):" in (tmp_path / "my_idea.py").read_text()
    assert new.main(["my_idea", "--part", "mlp"]) == 1
    assert capsys.readouterr().err.startswith(f"variants.new: error: {tmp_path / 'my_idea.py'}: there is a file of ")


@pytest.mark.parametrize("name, part, message", [
    ("swiglu_mlp", "mlp", "there is a variant or a command swiglu_mlp already; choose another name"),
    ("check", "mlp", "there is a variant or a command check already"),
    ("My-Idea", "mlp", "'My-Idea' is no name for a variant; use small letters, digits and _"),
    ("../idea", "mlp", "is no name for a variant"),
    ("class", "mlp", "is no name for a variant"),
    ("my_idea", "mpl", "there is no part 'mpl', the nearest is mlp; choose from mlp, attention, "),
    ("my_idea", "", "there is no part ''; choose from "),
])
def test_bad_names_and_parts(name, part, message, tmp_path):
    with pytest.raises(RunError) as caught:
        new.write(name, part, tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(RunError, match="cannot be written: No such file or directory; mend"):
        new.write("my_idea", "mlp", tmp_path / "none")
