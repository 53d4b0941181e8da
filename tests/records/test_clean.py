"""Deleting the files of unfinished runs: what goes, what stays, and who is asked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from records import clean
from records.clean import main

fcntl = pytest.importorskip("fcntl")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(write_log, tmp_path):
    """A log folder with a finished run, a stopped one with checkpoints, a failed one and one that was cut off."""
    write_log({0: 5.0, 8: 0.9}, run_id="done")
    write_log({0: 5.0, 4: 3.0}, run_id="stopped", steps=8, last_step=5, end="SIGTERM")
    write_log({0: 5.0}, run_id="failed", steps=8, last_step=2, end="the training loss is nan")
    cut = write_log({0: 5.0}, run_id="cut", steps=8, last_step=2, end="SIGTERM")
    cut.write_text(cut.read_text()[:-90])
    edit_json(cut, status="running")
    logs = tmp_path / "logs"
    names = ("done.pt", "stopped.pt", "stopped-step000004.pt", "stopped.losses.npz", ".cut.pt.123", "other.pt")
    for name in names:
        (logs / name).write_bytes(b"x" * 1000)
    return logs


UNFINISHED = [
    "cut.json", "cut.txt", ".cut.pt.123", "failed.json", "failed.txt", "stopped-step000004.pt", "stopped.json",
    "stopped.losses.npz", "stopped.pt", "stopped.txt",
]


def edit_json(log, **fields):
    path = log.with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def names_in(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_unfinished_runs_go_and_all_else_stays(folder, capsys):
    before = names_in(folder)
    size = sum((folder / name).stat().st_size for name in UNFINISHED)
    assert main(["--log_dir", str(folder), "--yes"]) == 0
    assert before - names_in(folder) == set(UNFINISHED)
    out, err = capsys.readouterr()
    assert err == ""
    *rows, last = out.splitlines()
    assert [row.split()[0] for row in rows] == ["cut", "failed", "stopped"]
    assert "cut off: .cut.pt.123, cut.json, cut.txt, " in rows[0]
    assert "failed: the training loss is nan: failed.json, failed.txt, " in rows[1]
    files = "stopped-step000004.pt, stopped.json, stopped.losses.npz, stopped.pt, stopped.txt, "
    assert f"stopped by SIGTERM: {files}" in rows[2]
    assert last == f"deleted 10 files of 3 unfinished runs, {size:,} bytes"
    assert main(["--log_dir", str(folder)]) == 0 and capsys.readouterr().out == f"{folder}: no unfinished runs\n"


@pytest.mark.parametrize("answer, deleted", [("y", True), ("Yes ", True), ("", False), ("n", False), (None, False)])
def test_a_person_is_asked(folder, capsys, monkeypatch, answer, deleted):
    asked = []

    def reply(question):
        asked.append(question)
        if answer is None:
            raise EOFError
        return answer

    monkeypatch.setattr("builtins.input", reply)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    before = names_in(folder)
    assert main(["--log_dir", str(folder)]) == 0
    assert len(asked) == 1 and asked[0].startswith("delete 10 files of 3 unfinished runs, ")
    assert asked[0].endswith(f" bytes, from {folder}? [y/N] ")
    assert (names_in(folder) == before) != deleted
    assert capsys.readouterr().out.splitlines()[-1].startswith("deleted" if deleted else "nothing was deleted")


def test_without_a_terminal_nothing_is_deleted(folder):
    before = names_in(folder)
    done = subprocess.run([sys.executable, "-m", "records.clean", "--log_dir", str(folder)], cwd=ROOT, text=True,
                          stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode == 1 and names_in(folder) == before
    assert done.stderr == ("records.clean: error: no terminal to ask at; add --yes to delete these files, nothing was "
                           "deleted\n")
    assert len(done.stdout.splitlines()) == 3


@pytest.mark.parametrize("name", ["stopped", "failed", "cut"])
def test_a_run_that_is_under_way_stays(folder, capsys, name):
    """Whatever its JSON says: a run that goes on has the status that it stopped with until it saves again."""
    with open(folder / f"{name}.txt", "rb") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert main(["--log_dir", str(folder), "--yes"]) == 0
    assert f"left alone: {name}: the run is under way\n" == capsys.readouterr().err
    assert (folder / f"{name}.txt").exists() and (folder / f"{name}.json").exists()
    assert len([path for path in folder.glob("*.json")]) == 2


def test_a_run_that_goes_on_while_a_person_thinks_stays(folder, capsys, monkeypatch):
    held = []

    def go_on(question):
        held.append(open(folder / "cut.txt", "rb"))
        fcntl.flock(held[0], fcntl.LOCK_EX)
        return True

    monkeypatch.setattr(clean, "ask", go_on)
    before = names_in(folder)
    assert main(["--log_dir", str(folder)]) == 1 and names_in(folder) == before
    held[0].close()
    assert capsys.readouterr().err == "records.clean: error: cut: the run is under way\n"


@pytest.mark.parametrize("spoil, reason", [
    (lambda logs: (logs / "cut.json").write_text("{"), "cut.json is damaged, not a JSON object"),
    (lambda logs: (logs / "cut.json").write_text("{}"), "cut.json: no run's: it has no config and status"),
    (lambda logs: edit_json(logs / "cut.txt", run_id="another"), "cut.json: it is of the run another, so"),
    (lambda logs: (logs / "cut.txt").write_text("a diary"), "no log of this trainer lies beside cut.json"),
    (lambda logs: (logs / "cut.txt").write_text((logs / "done.txt").read_text()), "the log says that the run finished"),
    (lambda logs: ((logs / "cut.txt").unlink(), (logs / "cut.txt").mkdir()), "cannot be read: Is a directory"),
])
def test_damaged_and_foreign_files_stay(folder, capsys, spoil, reason):
    spoil(folder)
    assert main(["--log_dir", str(folder), "--yes"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("left alone: ") and err.count("\n") == 1 and reason in err
    assert {"cut.json", "cut.txt", ".cut.pt.123"} <= names_in(folder)
    assert "deleted 7 files of 2 unfinished runs" in out


def test_links_and_other_runs_files_stay(folder, tmp_path):
    """A link leads elsewhere, and a name that begins as a run's may be another's."""
    for name in ("elsewhere.pt", "b.txt"):
        (tmp_path / name).write_text("mine")
    (folder / "cut.pt").symlink_to(tmp_path / "elsewhere.pt")
    for kind in ("txt", "json", "pt"):
        (folder / f"stopped-step000005.{kind}").write_bytes((folder / f"done.{kind}").read_bytes())
    edit_json(folder / "stopped-step000005.txt", run_id="stopped-step000005")
    before = names_in(folder)
    assert main(["--log_dir", str(folder), "--yes"]) == 0
    assert before - names_in(folder) == set(UNFINISHED)
    assert (tmp_path / "elsewhere.pt").read_text() == "mine"


def test_a_run_without_a_log(folder):
    (folder / "cut.txt").unlink()
    assert main(["--log_dir", str(folder), "--yes"]) == 0
    assert not [name for name in names_in(folder) if "cut" in name]


def test_no_folder_and_a_disk_that_refuses(folder, tmp_path, capsys, monkeypatch):
    assert main(["--log_dir", str(tmp_path / "none")]) == 1
    message = f"{tmp_path / 'none'}: no such folder; give the trainer's log folder with --log_dir"
    assert capsys.readouterr().err == f"records.clean: error: {message}\n"

    def refuse(path, missing_ok):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    assert main(["--log_dir", str(folder), "--yes"]) == 1
    assert os.path.basename(capsys.readouterr().err) == ".cut.pt.123: Permission denied\n"
