"""
run.sh, with a stand-in for the environment's Python that writes down how it was called, at the end with the real one.

RUN_SH_BASH=/path/to/bash runs all of it under another bash, such as macOS' 3.2.
"""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data.shards import write_meta, write_shard

ROOT = Path(__file__).resolve().parent.parent
BASH = os.environ.get("RUN_SH_BASH", "bash")
SPIN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
VERBS = ("train compare new check skills variants generate visualize runs clean board data task study bench test "
         "python help").split()
FOLDERS = ("data", "tasks", "studies", "benchmarks")  # of scripts that run.sh names

PIP = "-m pip install --quiet --disable-pip-version-check -r @/requirements.txt"

# The environment's Python: probes are answered, all else is written to $CALLS.
STAND_IN = """#!/usr/bin/env bash
case "$*" in
*device_count*) [ -z "${NO_TORCH:-}" ] && ! [ -e "$(dirname "$0")/no_torch" ] && echo "${GPUS:-0}"; exit ;;
"-I -c import torch") echo "Traceback"; echo "ImportError: no such library"; exit 1 ;;
"-I -c " | "-I -m pip --version") exit ;;
*TRACKS.get*) [ "${!#}" = short ] && echo 12 || echo 0; exit ;;
esac
echo "$*" >>"$CALLS"
[ -z "${SHOW:-}" ] || echo "${!SHOW-unset}"
case "$*" in
"-m pip install"*)
    for _ in $(seq 6000); do [ -e "${HOLD:-/nowhere}" ] || break; sleep 0.01; done
    exit "${PIP:-0}" ;;
"-m ruff"*) exit "${RUFF:-0}" ;;
esac
exit "${EXIT:-0}"
"""

# The interpreter that environments are made from: the real one, whose environments hold the stand-in.
BASE = f"""#!/usr/bin/env bash
if [ "$1 $2" != "-m venv" ]; then exec {sys.executable} "$@"; fi
echo "venv" >>"$CALLS"
[ -z "${{NO_VENV:-}}" ] || exit 1
mkdir -p "$3/bin"
touch "$3/pyvenv.cfg"
cp "$STAND_IN" "$3/bin/python"
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of what run.sh looks at, with an environment that is set up; beside it what environments are made from."""
    folder = tmp_path / "checkout"
    for name in FOLDERS:
        (folder / name).mkdir(parents=True)
        for file in (ROOT / name).glob("*.py"):
            shutil.copy(file, folder / name)
    for name in ("run.sh", "requirements.txt", "train_gpt.py"):
        shutil.copy(ROOT / name, folder)
    for name, text in (("stand-in", STAND_IN), ("base", BASE)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/pyvenv.cfg").touch()
    shutil.copy(tmp_path / "stand-in", folder / ".venv/bin/python")
    shutil.copy(ROOT / "requirements.txt", folder / ".venv/requirements.installed.txt")
    return folder


def settings_of(checkout, environment):
    files = dict(CALLS="calls", STAND_IN="stand-in", PYTHON="base")
    beside = {name: checkout.parent / file for name, file in files.items()}
    inherited = {name: value for name, value in os.environ.items() if name not in (*SPIN, "VENV", "PYTHONPATH")}
    return {**inherited, **{name: str(value) for name, value in {**beside, **environment}.items()}}


def execute(checkout, *arguments, folder="/", script=None, **environment):
    return subprocess.run([BASH, script or checkout / "run.sh", *arguments], cwd=folder, capture_output=True, text=True,
                          env=settings_of(checkout, environment))


def read_calls(checkout):
    """What the stand-in was called with since the last time, the checkout's path written as @."""
    calls = checkout.parent / "calls"
    lines = calls.read_text().replace(str(checkout), "@").splitlines() if calls.exists() else []
    calls.unlink(missing_ok=True)
    return lines


def call(checkout, *arguments, **settings):
    """(exit code, what the stand-in was called with, stderr) of run.sh, or of a link to it, called from a folder."""
    result = execute(checkout, *arguments, **settings)
    return result.returncode, read_calls(checkout), result.stderr


def give_corpus(folder):
    (folder / "data/python_bytes").mkdir(parents=True)
    for name in ("meta.json", "python_train_000000.bin"):
        (folder / "data/python_bytes" / name).write_text("{}")


# ---- training and comparing -------------------------------------------------


def test_alone_it_prepares_the_embedded_corpus_and_trains(checkout):
    assert call(checkout)[1] == ["-P -m data.local_corpus", "@/train_gpt.py"]
    give_corpus(checkout)
    assert call(checkout, "--steps", "3")[1] == ["@/train_gpt.py --steps 3"]
    assert call(checkout, "train", "--steps", "3")[1] == ["@/train_gpt.py --steps 3"]


@pytest.mark.parametrize("gpus", ["0", "1", "2"])
def test_without_arguments_it_trains_on_any_number_of_gpus(checkout, gpus):
    give_corpus(checkout)
    launch = "-P -m torch.distributed.run --standalone --nproc_per_node=2 " if gpus == "2" else ""
    for arguments in ([], ["train"]):
        assert call(checkout, *arguments, GPUS=gpus) == (0, [f"{launch}@/train_gpt.py"], "")


def test_a_track_gets_its_shards_and_every_gpu(checkout):
    launch = "-P -m torch.distributed.run --standalone --nproc_per_node=8"
    assert call(checkout, "--track", "short", GPUS="8")[1] == ["-P -m data.cached_fineweb10B 12",
                                                             f"{launch} @/train_gpt.py --track short"]
    assert call(checkout, "--track=short", "--data", "a", GPUS="1")[1] == ["@/train_gpt.py --track=short --data a"]
    assert call(checkout, "--track", "unknown")[1] == ["@/train_gpt.py --track unknown"]  # it says which there are
    assert call(checkout, "--resume", "a.pt")[1] == ["@/train_gpt.py --resume a.pt"]
    assert call(checkout, "--resume=a.pt")[1] == ["@/train_gpt.py --resume=a.pt"]


def test_help_prepares_nothing(checkout):
    assert call(checkout, "train", "--help", GPUS="2")[1] == ["@/train_gpt.py --help"]
    assert call(checkout, "--track", "short", "-h")[1] == ["@/train_gpt.py --help"]
    assert call(checkout, "compare", "--help")[1] == ["@/compare.py --help"]


def test_compare_gets_its_data_and_starts_its_ranks_itself(checkout):
    assert call(checkout, "compare", "baseline", "swiglu_mlp", "--seeds", "2", GPUS="8")[1] == [
        "-P -m data.local_corpus", "@/compare.py baseline swiglu_mlp --seeds 2"]
    assert call(checkout, "compare", "baseline", "--track", "short")[1] == ["-P -m data.cached_fineweb10B 12",
                                                                            "@/compare.py baseline --track short"]


def test_with_fineweb_and_a_gpu_it_takes_a_real_track(checkout):
    (checkout / "data/fineweb10B").mkdir(parents=True)
    (checkout / "data/fineweb10B/fineweb_train_000001.bin").write_text("")
    assert call(checkout, "--seed", "2", GPUS="1")[1][-1] == "@/train_gpt.py --seed 2 --track small"
    assert call(checkout, GPUS="1")[1][-1] == "@/train_gpt.py --track small"
    assert call(checkout, GPUS="0")[1] == ["-P -m data.local_corpus", "@/train_gpt.py"]


def test_the_callers_data_folder_comes_first_as_in_the_trainer(checkout, tmp_path):
    give_corpus(tmp_path / "caller")
    assert call(checkout, folder=tmp_path / "caller")[1] == ["@/train_gpt.py"]
    give_corpus(checkout)
    for name in ("meta.json", "python_train_000000.bin"):  # without either of them the corpus is made again
        (checkout / "data/python_bytes" / name).rename(checkout / "kept")
        # the checkout's own folder is no folder of the caller's
        assert call(checkout, folder=checkout)[1] == ["-P -m data.local_corpus", "@/train_gpt.py"]
        (checkout / "kept").rename(checkout / "data/python_bytes" / name)


@pytest.mark.parametrize("arguments", ["", "compare baseline", "--track short"])
def test_without_its_data_nothing_is_trained(checkout, arguments):
    code, calls, errors = call(checkout, *arguments.split(), EXIT="3")
    assert (code, len(calls)) == (3, 1) and calls[0].startswith("-P -m data.")


def test_the_exit_code_is_the_trainers(checkout):
    assert call(checkout, "--data", "x", EXIT="0")[0] == 0
    assert call(checkout, "--data", "x", EXIT="7")[0] == 7
    assert call(checkout, "python", "-m", "variants", EXIT="7")[:2] == (7, ["-m variants"])


# ---- verbs ------------------------------------------------------------------


@pytest.mark.parametrize("arguments, expected", {
    "generate --checkpoint a.pt": "@/generate.py --checkpoint a.pt",
    "visualize stream a.json": "@/visualize.py stream a.json",
    "check swiglu_mlp:layers=0": "-P -m variants.check swiglu_mlp:layers=0",
    "skills baseline --full": "-P -m tasks.skills baseline --full",
    "variants": "-P -m variants",
    "runs --json": "-P -m records.runs --json",
    "clean --yes": "-P -m records.clean --yes",
    "board check": "-P -m records.leaderboard check",
    "data tokenize_text book.txt -o book": "-P -m data.tokenize_text book.txt -o book",
    "data local_corpus": "-P -m data.local_corpus",
    "task recall make -o a": "-P -m tasks.recall make -o a",
    "study ngram_loss a": "-P -m studies.ngram_loss a",
    "bench gpu_suite --list": "-P -m benchmarks.gpu_suite --list",
    "python": "",
    "python -c pass": "-c pass",
}.items())
def test_a_verb_is_a_script_or_a_module(checkout, arguments, expected):
    assert call(checkout, *arguments.split()) == (0, [expected], "")


def test_words_stay_whole(checkout):
    calls = call(checkout, "board", "add", "a b", "--what", "in one line; $HOME *")[1]
    assert calls == ["-P -m records.leaderboard add a b --what in one line; $HOME *"]
    (checkout / ".venv/bin/python").write_text(STAND_IN.replace('echo "$*"', 'printf "<%s>" "$@"'))
    calls = call(checkout, "compare", "a --steps 3", "", "--data", "b  c")[1]
    assert calls == ["<@/compare.py><a --steps 3><><--data><b  c>"]


def test_help_shows_every_verb_without_an_environment(checkout):
    shutil.rmtree(checkout / ".venv")
    texts = []
    for word in ("help", "-h", "--help"):
        result = execute(checkout, word)
        assert result.returncode == 0 and not result.stderr and not (checkout / ".venv").exists()
        texts.append(result.stdout)
    assert len(set(texts)) == 1 and [*re.findall(r"^  ([a-z]+) ", texts[0], re.M)] == VERBS


@pytest.mark.parametrize("arguments, message", {
    "compar baseline": "there is no verb 'compar', the nearest is compare; choose from: " + " ".join(VERBS),
    "zzz": "there is no verb 'zzz'; choose from: " + " ".join(VERBS),
    "train_gpt.py": "there is no verb 'train_gpt.py', the nearest is train; choose from: " + " ".join(VERBS),
    "data": "there is no data script ''; choose from: ",
    "data local_corpse": "there is no data script 'local_corpse', the nearest is local_corpus; choose from: ",
    "data recall": "there is no data script 'recall'; choose from: cached_fineweb10B local_corpus manifold",
    "task": "there is no task script ''; choose from: recall skills symbolic_language",
    "study ngram": "there is no study script 'ngram', the nearest is ngram_loss; choose from: ",
    "bench timing": "there is no bench script 'timing'",  # a module that is no script
    "data shards": "there is no data script 'shards'; choose from: ",  # a module that is no script
    "data ../train_gpt": "there is no data script '../train_gpt'; choose from: ",
}.items())
def test_an_unknown_verb_is_one_line_before_anything_is_set_up(checkout, arguments, message):
    shutil.rmtree(checkout / ".venv")
    code, calls, errors = call(checkout, *arguments.split())
    assert (code, calls) == (1, []) and errors.startswith(f"run.sh: error: {message}") and errors.count("\n") == 1
    assert not (checkout / ".venv").exists()


# ---- the linter and the tests -----------------------------------------------


# a process for each core, which takes file after file: fixtures of a file are made and its loops compiled once
WORKERS = "-n auto --dist loadfile --no-loadscope-reorder"


def test_test_runs_linter_and_tests(checkout):
    ruff, pytest = "-m ruff check @", f"-m pytest {WORKERS}"
    assert call(checkout, "test", "-k", "loader", folder=checkout)[1] == [ruff, f"{pytest} -k loader"]
    assert call(checkout, "test", folder=checkout)[1] == [ruff, pytest]
    for given in ("-n 2", "-n4", "--numprocesses 3", "--numprocesses=3", "-p no:xdist", "--pdb"):
        assert call(checkout, "test", *given.split(), folder=checkout)[1] == [ruff, f"-m pytest {given}"]


def test_a_fault_of_the_linter_does_not_keep_the_tests_from_running(checkout):
    note = "run.sh: the linter found faults; its list stands above the tests\n"
    for ruff, tests, code, errors in (("0", "0", 0, ""), ("1", "0", 1, note), ("0", "5", 5, ""), ("1", "5", 5, note)):
        result = call(checkout, "test", "tests/variants", folder=checkout, RUFF=ruff, EXIT=tests)
        assert result == (code, ["-m ruff check @", f"-m pytest {WORKERS} tests/variants"], errors)


def test_tests_from_another_folder_are_the_checkouts_or_those_named(checkout, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/test_a.py").touch()
    here = f"-m pytest {WORKERS} -c @/pyproject.toml"
    for arguments, expected in (("", "@/tests"), ("-k loader", "-k loader @/tests"), ("test_a.py::b", "test_a.py::b")):
        assert call(checkout, "test", *arguments.split(), folder=tmp_path / "mine")[1][-1] == f"{here} {expected}"


# ---- folders and links ------------------------------------------------------


@pytest.mark.parametrize("form", ["absolute", "relative", "chain", "folder"])
def test_a_link_leads_to_the_checkout(checkout, tmp_path, form):
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    script = elsewhere / "knot"
    if form == "absolute":
        script.symlink_to(checkout / "run.sh")
    elif form == "relative":
        script.symlink_to("../checkout/run.sh")
    elif form == "chain":
        (tmp_path / "first").symlink_to("checkout/run.sh")
        script.symlink_to("../first")
    else:
        (elsewhere / "linked").symlink_to(checkout)
        script = elsewhere / "linked/run.sh"
    give_corpus(checkout)
    assert call(checkout, script=script, folder=elsewhere) == (0, ["@/train_gpt.py"], "")
    assert not [path for path in elsewhere.iterdir() if path.name not in ("knot", "linked")]


def test_a_checkout_with_a_space_in_its_name(checkout, tmp_path):
    moved = checkout.rename(tmp_path / "a checkout")
    give_corpus(moved)
    assert call(moved, "--steps", "1", GPUS="2")[1] == [
        "-P -m torch.distributed.run --standalone --nproc_per_node=2 @/train_gpt.py --steps 1"]
    (moved / "requirements.txt").write_text("torch==0\n")
    assert call(moved, "variants")[1] == [PIP, "-P -m variants"]


def test_a_colon_is_refused_in_one_line(checkout, tmp_path):
    code, calls, errors = call(checkout.rename(tmp_path / "a:b"))
    assert (code, calls) == (1, []) and re.fullmatch(r"run.sh: error: .*/a:b has a colon in its name.*\n", errors)


def test_the_work_is_done_in_the_callers_folder(checkout, tmp_path):
    (tmp_path / "caller").mkdir()
    for arguments in ([], ["compare", "baseline"], ["data", "local_corpus"], ["python"], ["test"]):
        result = execute(checkout, *arguments, folder=tmp_path / "caller", SHOW="PWD", CDPATH="/")
        assert set(result.stdout.splitlines()) == {str(tmp_path / "caller")}


def test_a_relative_venv_is_the_callers(checkout, tmp_path):
    (tmp_path / "caller").mkdir()
    shutil.move(checkout / ".venv", tmp_path / "caller/mine")
    assert call(checkout, "variants", folder=tmp_path / "caller", VENV="mine") == (0, ["-P -m variants"], "")
    assert call(checkout, "variants", folder=tmp_path / "caller", VENV="new/one")[1][0] == "venv"
    assert (tmp_path / "caller/new/one/bin/python").exists() and not (checkout / ".venv").exists()


def shown(checkout, name, **environment):
    """An environment variable as the stand-in sees it."""
    return execute(checkout, "python", "x", SHOW=name, **environment).stdout.strip()


def test_the_checkouts_modules_are_found_from_everywhere(checkout):
    assert shown(checkout, "PYTHONPATH") == str(checkout)
    assert shown(checkout, "PYTHONPATH", PYTHONPATH="/a:/b") == f"{checkout}:/a:/b"


def test_waiting_threads_spin_for_a_bounded_time_unless_the_user_says_otherwise(checkout):
    assert [shown(checkout, name) for name in SPIN] == ["20000", "unset", "1"]
    for name, value in zip(SPIN, ("7", "ACTIVE", "5")):
        expected = [value if other == name else "unset" for other in SPIN]
        assert [shown(checkout, other, **{name: value}) for other in SPIN] == expected


# ---- the environment --------------------------------------------------------


def test_changed_requirements_are_installed_once(checkout):
    (checkout / "requirements.txt").write_text("torch==0\n")
    code, calls, errors = call(checkout, "--data", "x")
    assert calls == [PIP, "@/train_gpt.py --data x"]
    assert errors == f"run.sh: installing the requirements into {checkout}/.venv (once)\n"
    assert call(checkout, "--data", "x") == (0, ["@/train_gpt.py --data x"], "")


def test_a_fresh_checkout_is_set_up_once(checkout):
    shutil.rmtree(checkout / ".venv")
    code, calls, errors = call(checkout, "--data", "x")
    assert (code, [line[:14] for line in calls]) == (0, ["venv", "-m pip install", "@/train_gpt.py"])
    assert errors == f"run.sh: installing the requirements into {checkout}/.venv (once)\n"
    assert call(checkout, "--data", "x")[1:] == (["@/train_gpt.py --data x"], "")


def test_a_wrong_python_is_one_line(checkout):
    (checkout / "requirements.txt").write_text("torch==0\n")
    for python in ("/bin/false", "no-such-python"):
        code, calls, errors = call(checkout, PYTHON=python)
        assert (code, calls) == (1, []) and errors.count("\n") == 1
        assert errors.startswith(f"run.sh: error: {python} is not Python 3.11 or newer; install one")


def damage_pip(venv):
    shutil.rmtree(venv)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)


def damage_link(venv):
    (venv / "bin/python").unlink()
    (venv / "bin/python").symlink_to("/nowhere/python3")


def damage_machine(venv):
    (venv / "bin/python").write_bytes(b"\x7fELF\x02\x01\x01" + bytes(57))


def damage_torch(venv):
    (venv / "bin/no_torch").touch()


def damage_real_torch(venv):
    damage_pip(venv)
    shutil.copy(ROOT / "requirements.txt", venv / "requirements.installed.txt")


def damage_lock(venv):
    (venv / "run.sh.lock").write_text("123\n")
    (venv / "requirements.installed.txt").unlink()


@pytest.mark.parametrize("damage, words", {
    damage_pip: "it has no pip",
    damage_link: "it has no interpreter that runs here",
    damage_machine: "it has no interpreter that runs here",
    damage_torch: "PyTorch does not load from it",
    damage_real_torch: "PyTorch does not load from it",
    damage_lock: "an earlier installation was cut off",
}.items())
def test_a_broken_environment_is_made_anew_with_one_line(checkout, damage, words):
    damage(checkout / ".venv")
    (checkout / ".venv/old").touch()
    code, calls, errors = call(checkout, "--data", "x")
    assert (code, [line[:14] for line in calls]) == (0, ["venv", "-m pip install", "@/train_gpt.py"])
    assert errors == f"run.sh: {checkout}/.venv: {words}; it is made anew, with the requirements\n"
    assert not (checkout / ".venv/old").exists()
    assert call(checkout, "--data", "x") == (0, ["@/train_gpt.py --data x"], "")


def test_a_folder_that_was_not_made_here_is_never_cleared(checkout, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").touch()
    for damage in (lambda venv: None, lambda venv: (venv / "pyvenv.cfg").touch()):
        damage(mine)
        code, calls, errors = call(checkout, VENV=mine)
        assert (code, calls, errors.count("\n")) == (1, [], 1)
        assert "it was not made here; delete it, or name another folder" in errors
        assert (mine / "thesis.txt").exists() and not (mine / "run.sh.lock").exists()
    # an environment of another kind may be filled, but is not cleared either, though it was filled from here
    shutil.copytree(checkout / ".venv", mine, dirs_exist_ok=True)
    (mine / "pyvenv.cfg").unlink()
    (mine / "bin/no_torch").touch()
    code, calls, errors = call(checkout, VENV=mine)
    assert (code, calls) == (1, []) and "it is no virtual environment; repair it" in errors
    assert (mine / "thesis.txt").exists()


def test_what_pip_and_venv_cannot_do_is_one_line_and_tried_again(checkout):
    shutil.rmtree(checkout / ".venv")
    for fault, words in dict(NO_VENV="cannot make a virtual environment; install its venv package",
                             PIP="pip could not install requirements.txt (its message is above)").items():
        code, calls, errors = call(checkout, "--data", "x", **{fault: "1"})
        assert code == 1 and words in errors.splitlines()[-1] and errors.count("\n") == 2
    assert call(checkout, "--data", "x")[:2] == (0, [PIP, "@/train_gpt.py --data x"])


def test_a_pytorch_that_cannot_load_here_is_one_line_and_not_installed_for_ever(checkout):
    shutil.rmtree(checkout / ".venv")
    for installed in (["venv", "-m pip"], ["-m pip"]):
        code, calls, errors = call(checkout, "--data", "x", NO_TORCH="1")
        assert (code, [line[:6] for line in calls]) == (1, installed)
        assert "PyTorch does not load though it is installed (ImportError: no such library)" in errors.splitlines()[-1]
    assert call(checkout, "--data", "x")[0] == 0


def test_a_folder_that_cannot_be_written_is_one_line(checkout, tmp_path):
    (tmp_path / "file").touch()
    code, calls, errors = call(checkout, VENV=tmp_path / "file/venv")
    assert (code, calls, errors.count("\n")) == (1, [], 1) and errors.startswith("run.sh: error: cannot write to ")


def begin(checkout, **environment):
    """run.sh under way in a process group of its own."""
    return subprocess.Popen([BASH, checkout / "run.sh", "--data", "x"], stderr=subprocess.PIPE, text=True,
                            start_new_session=True, env=settings_of(checkout, environment))


def wait_for_pip(checkout):
    while not any("pip install" in line for line in (checkout.parent / "calls").read_text().splitlines()):
        time.sleep(0.01)


def test_two_calls_at_once_make_one_environment(checkout, tmp_path):
    shutil.rmtree(checkout / ".venv")
    (tmp_path / "calls").touch()
    (tmp_path / "hold").touch()
    first = begin(checkout, HOLD=tmp_path / "hold")
    wait_for_pip(checkout)
    second = begin(checkout, HOLD=tmp_path / "hold")
    assert second.stderr.readline() == "run.sh: waiting for another call that makes the same environment\n"
    (tmp_path / "hold").unlink()
    assert [process.wait() for process in (first, second)] == [0, 0]
    assert sorted(read_calls(checkout)) == [PIP, "@/train_gpt.py --data x", "@/train_gpt.py --data x", "venv"]
    assert first.stderr.read() == f"run.sh: installing the requirements into {checkout}/.venv (once)\n"
    assert second.stderr.read() == ""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_an_installation_that_was_cut_off_is_made_anew(checkout, tmp_path, number):
    shutil.rmtree(checkout / ".venv")
    (tmp_path / "calls").touch()
    (tmp_path / "hold").touch()
    process = begin(checkout, HOLD=tmp_path / "hold")
    wait_for_pip(checkout)
    os.killpg(process.pid, number)
    assert process.wait() != 0
    read_calls(checkout)
    code, calls, errors = call(checkout, "--data", "x")
    assert (code, [line[:14] for line in calls]) == (0, ["venv", "-m pip install", "@/train_gpt.py"])
    assert errors.startswith(f"run.sh: {checkout}/.venv: an earlier installation was cut off; it is made anew")


def test_the_lock_is_not_held_while_the_work_goes_on(checkout, tmp_path):
    shutil.rmtree(checkout / ".venv")
    (tmp_path / "stand-in").write_text(STAND_IN.replace('exit "${EXIT:-0}"', 'ls -l /dev/fd/ >&2\nexit'))
    errors = call(checkout, "--data", "x")[2]
    assert "run.sh.lock" not in errors.split("(once)")[1]


# ---- the shell --------------------------------------------------------------

NEWER_THAN_3_2 = (r"declare -A|local -A|typeset -A|mapfile|readarray|coproc|\$\{!|&>>|\|&|;;&|;&|\$\{\w+[,^@]"
                  r"|\[\[? -v|wait -n|local -n|declare -n|exec \{|\{\d+\.\.\d+\.\.|printf '%\(|\bEPOCH|\*\*/")
NOT_ON_EVERY_SYSTEM = (r"readlink -f|realpath|sed -i|grep -\w*P|mktemp --|stat -c|date -d|\bnproc\b|\btimeout\b"
                       r"|\bflock \b|cp --|rm --\w")
ARRAY = r"(?<!\+)\"\$\{\w+\[@\]\}\""  # under set -u an empty one is an error to 3.2


def code_of(script):
    return "\n".join(line for line in script.read_text().splitlines() if not line.lstrip().startswith("#"))


@pytest.mark.parametrize("pattern", [NEWER_THAN_3_2, NOT_ON_EVERY_SYSTEM, ARRAY])
def test_it_needs_no_newer_shell_and_no_gnu_tools(pattern):
    for script in ("run.sh", ".ci/run"):
        assert not re.findall(pattern, code_of(ROOT / script))


@pytest.mark.parametrize("pattern, faults", [
    (NEWER_THAN_3_2, ["declare -A a", "mapfile -t a", 'echo "${!#}"', "a &>> b", "a |& b", 'echo "${a,,}"',
                      'echo "${a^}"', "[[ -v a ]]", "exec {lock}>a", 'echo "${a@Q}"']),
    (NOT_ON_EVERY_SYSTEM, ['readlink -f "$0"', "sed -i s/a/b/ c", "grep -oP a", "timeout 3 a", "flock 9"]),
    (ARRAY, ['exec a "${arguments[@]}"'])])
def test_the_patterns_find_what_they_look_for(pattern, faults):
    assert [fault for fault in faults if not re.search(pattern, fault)] == []


def test_ci_says_what_it_runs_and_runs_the_readmes_command(tmp_path):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci")
    (tmp_path / "run.sh").write_text('#!/usr/bin/env bash\necho "called: $* in $PWD"\nexit 3\n')
    (tmp_path / "run.sh").chmod(0o755)
    result = subprocess.run([BASH, tmp_path / ".ci/run"], capture_output=True, text=True, cwd="/")
    assert (result.returncode, result.stdout) == (3, f"./run.sh test\ncalled: test in {tmp_path}\n")


# ---- in earnest -------------------------------------------------------------


@pytest.fixture
def real(tmp_path):
    """Settings of subprocess.run for a folder with a link to this checkout's run.sh; its Python is this one."""
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "venv/bin/python").chmod(0o755)
    shutil.copy(ROOT / "requirements.txt", tmp_path / "venv/requirements.installed.txt")
    (tmp_path / "caller").mkdir()
    (tmp_path / "caller/knot").symlink_to(ROOT / "run.sh")
    return dict(cwd=tmp_path / "caller", capture_output=True, text=True, env={**os.environ, "VENV": "../venv"})


def test_training_from_another_folder_through_a_link(real):
    caller = real["cwd"]
    tokens = np.random.default_rng(1).integers(97, 123, 4000)
    tokens[::50] = 256
    (caller / "mine").mkdir()
    write_shard(caller / "mine/a_train_000000.bin", tokens)
    write_shard(caller / "mine/a_val_000000.bin", tokens[:2000])
    write_meta(caller / "mine", vocab_size=257, tokenizer="bytes")
    model = "--layers 1 --model_dim 32 --heads 1 --mlp_hidden 32 --value_embeddings 0 --device cpu"
    command = f"knot --data mine --run_id one {model} --steps 2 --val_tokens 512 --val_every 0"
    result = subprocess.run([BASH, *command.split()], **real)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (caller / "logs").iterdir()} >= {"one.txt", "one.json", "one.pt"}
    assert not (ROOT / "logs/one.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("verb", [
    "train", "compare", "generate", "visualize", "board", "data local_corpus", "data tokenize_text",
    "data cached_fineweb10B", "task recall", "task symbolic_language", "study ngram_loss", "bench decode"])
def test_every_verb_works_from_another_folder(real, verb):
    (real["cwd"] / "data").mkdir()  # neither the caller's modules nor folders stand in the way
    (real["cwd"] / "data/__init__.py").write_text("raise SystemExit('the wrong data')")
    (real["cwd"] / "records.py").write_text("raise SystemExit('the wrong records')")
    result = subprocess.run([BASH, "knot", *verb.split(), "--help"], **real)
    assert (result.returncode, result.stderr) == (0, "") and result.stdout.startswith("usage: ")


@pytest.mark.slow
def test_variants_and_python_work_from_another_folder(real):
    (real["cwd"] / "variants.py").write_text("raise SystemExit('the wrong variants')")
    assert "swiglu_mlp" in subprocess.run([BASH, "knot", "variants"], **real).stdout
    (real["cwd"] / "variants.py").unlink()
    code = "import train_gpt, os; print(train_gpt.__file__, os.getcwd())"
    result = subprocess.run([BASH, "knot", "python", "-c", code], **real)
    assert result.stdout.split() == [str(ROOT / "train_gpt.py"), str(real["cwd"])]


def write_wheel(path):
    """A wheel of a package torch that has no GPU."""
    files = {"torch/__init__.py": "class cuda:\n    device_count = staticmethod(lambda: 0)\n",
             "torch-0.dist-info/METADATA": "Metadata-Version: 2.1\nName: torch\nVersion: 0\n",
             "torch-0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        record = "torch-0.dist-info/RECORD"
        archive.writestr(record, "".join(f"{name},,\n" for name in [*files, record]))


@pytest.mark.slow
def test_real_environments_by_real_pip(checkout, tmp_path):
    """Made, found again, and made anew where pip, PyTorch, the interpreter or half of the installation is missing."""
    shutil.rmtree(checkout / ".venv")
    write_wheel(tmp_path / "torch-0-py3-none-any.whl")
    requirements = f"torch @ file://{tmp_path}/torch-0-py3-none-any.whl\n"
    (checkout / "requirements.txt").write_text(requirements)

    def say_where():
        result = execute(checkout, "python", "-c", "import torch; print(torch.__file__)", PYTHON=sys.executable)
        assert result.returncode == 0 and result.stdout.startswith(f"{checkout}/.venv/"), result.stderr
        return result.stderr.removeprefix("run.sh: ").replace(str(checkout), "@")

    def packages(name):
        return next((checkout / ".venv").glob("lib*/python*/site-packages")) / name

    assert say_where() == "installing the requirements into @/.venv (once)\n"
    assert say_where() == ""
    anew = "it is made anew, with the requirements\n"
    shutil.rmtree(packages("torch"))
    assert say_where() == f"@/.venv: PyTorch does not load from it; {anew}"
    (checkout / "requirements.txt").write_text(f"# changed\n{requirements}")
    shutil.rmtree(packages("pip"))
    assert say_where() == f"@/.venv: it has no pip; {anew}"
    (checkout / ".venv/bin/python").unlink()
    assert say_where() == f"@/.venv: it has no interpreter that runs here; {anew}"
    (checkout / ".venv/run.sh.lock").write_text("1\n")
    assert say_where() == ""  # what is complete is used
    (checkout / ".venv/requirements.installed.txt").unlink()
    assert say_where() == f"@/.venv: an earlier installation was cut off; {anew}"
    assert say_where() == ""
