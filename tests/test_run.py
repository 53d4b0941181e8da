"""run.sh, with a stand-in for the virtual environment's Python that writes down how it was called."""
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

STAND_IN = """#!/usr/bin/env bash
case "$*" in
*device_count*) echo "${GPUS:-0}" ;;
*"TRACKS.get"*) [ "${!#}" = short ] && echo 12 || echo 0 ;;
*) echo "$*" >> "$CALLS" ;;
esac
exit "${EXIT:-0}"
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of what run.sh looks at, with an environment that is already set up."""
    for name in ("run.sh", "requirements.txt", "train_gpt.py"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(STAND_IN)
    python.chmod(0o755)
    shutil.copy(ROOT / "requirements.txt", tmp_path / ".venv/requirements.installed.txt")
    return tmp_path


def call(checkout, *arguments, **environment):
    """(exit code, what the stand-in was called with, stderr)"""
    calls = checkout / "calls"
    calls.unlink(missing_ok=True)
    result = subprocess.run([checkout / "run.sh", *arguments], capture_output=True, text=True, cwd="/", env={**os.environ, "CALLS": str(calls), **environment})
    return result.returncode, calls.read_text().splitlines() if calls.exists() else [], result.stderr


def test_alone_it_prepares_the_embedded_corpus_and_trains(checkout):
    assert call(checkout)[1] == ["data/local_corpus.py", "train_gpt.py"]
    (checkout / "data/python_bytes").mkdir(parents=True)
    (checkout / "data/python_bytes/meta.json").write_text("{}")
    assert call(checkout, "--steps", "3")[1] == ["train_gpt.py --steps 3"]


def test_a_track_gets_its_shards_and_every_gpu(checkout):
    assert call(checkout, "--track", "short", GPUS="8")[1] == ["data/cached_fineweb10B.py 12",
                                                             "-m torch.distributed.run --standalone --nproc_per_node=8 train_gpt.py --track short"]
    assert call(checkout, "--track=short", "--data", "mine", GPUS="1")[1] == ["train_gpt.py --track=short --data mine"]
    assert call(checkout, "--track", "unknown")[1] == ["train_gpt.py --track unknown"]  # whose own message says which there are


def test_compare_gets_its_data_and_starts_its_ranks_itself(checkout):
    assert call(checkout, "compare", "baseline", "swiglu_mlp", "--seeds", "2", GPUS="8")[1] == ["data/local_corpus.py", "compare.py baseline swiglu_mlp --seeds 2"]
    assert call(checkout, "compare", "baseline", "--track", "short")[1] == ["data/cached_fineweb10B.py 12", "compare.py baseline --track short"]
    assert call(checkout, "compare", "--help")[1] == ["compare.py --help"]


def test_with_fineweb_and_a_gpu_it_takes_a_real_track(checkout):
    (checkout / "data/fineweb10B").mkdir(parents=True)
    (checkout / "data/fineweb10B/fineweb_train_000001.bin").write_text("")
    assert call(checkout, "--seed", "2", GPUS="1")[1][-1] == "train_gpt.py --seed 2 --track small"
    assert call(checkout, GPUS="0")[1] == ["data/local_corpus.py", "train_gpt.py"]


def test_the_exit_code_is_the_trainers(checkout):
    assert call(checkout, "--data", "x", EXIT="0")[0] == 0
    assert call(checkout, "python", "-m", "variants", EXIT="7")[:2] == (7, ["-m variants"])


def test_changed_requirements_are_installed_once(checkout):
    (checkout / "requirements.txt").write_text("torch==0\n")
    assert "-m pip install" in call(checkout, "--data", "x")[1][0]
    assert call(checkout, "--data", "x")[1] == ["train_gpt.py --data x"]


def test_a_wrong_python_is_one_line(checkout):
    (checkout / "requirements.txt").write_text("torch==0\n")
    code, calls, errors = call(checkout, PYTHON="/bin/false")
    assert (code, calls) == (1, []) and errors.startswith("run.sh: error: /bin/false is not Python 3.11 or newer; install one") and errors.count("\n") == 1


def test_test_runs_linter_and_tests(checkout):
    assert call(checkout, "test", "-k", "loader")[1] == ["-m ruff check .", "-m pytest -n auto -k loader"]
