"""
Deletes the files of runs that did not finish: log, JSON and checkpoints.

    ./run.sh clean [--log_dir DIR] [--yes]

It lists the runs of a log folder that stopped, failed or were cut off, with their files and bytes, and asks before it
deletes them; --yes is for scripts. A stopped run could still go on from its checkpoint (--resume): it is listed as
such, and gone after a yes. These are left alone:

- runs that finished, and runs that are under way: the trainer locks a run's log as long as it runs
- files that are damaged, that are no run's, or that lie beside a run without being its log or checkpoint, and links

Exit code 0, or 1 and one line for a fault, such as no answer.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from records.fields import SAVED, read_fields
from records.runs import MEASURED, describe_run, fcntl, prepare_console
from train_gpt import RunError, require

TAIL = 2 ** 16  # bytes at the end of a log in which its last lines stand


@dataclass
class Leftover:
    """A run that did not finish."""

    id: str
    status: str                 # as the list of runs has it
    files: list[Path]           # that are its own
    size: int                   # of all of them, bytes


def find_leftovers(folder: Path) -> tuple[list[Leftover], list[str]]:
    """(the runs of a log folder that did not finish, a line for each JSON file that is left alone, with the reason)."""
    require(folder.is_dir(), f"{folder}: no such folder; give the trainer's log folder with --log_dir")
    leftovers = []
    left_alone = []
    for path in sorted(folder.glob("*.json")):
        try:
            run = describe_run(path)
            if run["status"] == "finished":
                continue
            with locked_log(path):
                files = files_of(path)
            leftovers.append(Leftover(path.stem, run["status"], files, sum(file.stat().st_size for file in files)))
        except RunError as error:
            left_alone.append(str(error))
        except OSError as error:
            left_alone.append(f"{path}: cannot be read: {error.strerror}")
    return leftovers, left_alone


@contextmanager
def locked_log(path: Path) -> Iterator[None]:
    """
    While this holds, no trainer begins to write the log of the run with this JSON. RunError where the run is under way,
    where that cannot be told, or where the log says otherwise than that the run did not finish.
    """
    log = path.with_suffix(".txt")
    if not log.exists():
        yield
        return
    require(fcntl is not None, f"{log}: whether the run is under way cannot be told on this system; delete it by hand")
    with open(log, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{path.stem}: the run is under way") from None
        check_log(path, file)
        yield


def check_log(path: Path, log: BinaryIO):
    """RunError unless this is the log of an unfinished run of the trainer, of the run with this JSON."""
    run_id = read_fields(path, "", SAVED).get("run_id")
    require(run_id == path.stem, f"{path}: it is of the run {run_id}, so another's files may lie beside it")
    start = log.read(7)
    require(start == b"# ---- ", f"{log.name}: no log of this trainer lies beside {path.name}")
    log.seek(max(log.seek(0, 2) - TAIL, 0))
    lines = log.read().decode("utf-8", "replace").split("\n")
    ended = any(MEASURED["peak_memory_mib"].fullmatch(line) for line in lines)
    require(not ended, f"{log.name}: the log says that the run finished, {path.name} that it did not")


def files_of(path: Path) -> list[Path]:
    """
    The files of the run with this JSON: log, JSON, checkpoint, checkpoints on its way, losses of single tokens, what a
    killed one left.
    """
    name = re.escape(path.stem)
    kinds = r"(txt|json|pt|losses\.npz)"
    pattern = re.compile(rf"{name}\.{kinds}|{name}-step\d{{6,}}\.pt|\.{name}\.{kinds}\.\d+")
    files = [file for file in path.parent.iterdir() if pattern.fullmatch(file.name)]
    others = {file.stem for file in path.parent.glob("*.json")} - {path.stem}
    return sorted(file for file in files if file.is_file() and not file.is_symlink() and file.stem not in others)


def delete(folder: Path, leftover: Leftover):
    """Delete the run's files, its JSON last. RunError if it went on in the meantime or the disk refuses."""
    path = folder / f"{leftover.id}.json"
    try:
        with locked_log(path):
            for file in sorted(leftover.files, key=lambda file: file == path):
                file.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"cannot delete {error.filename}: {error.strerror}") from None


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def ask(question: str) -> bool:
    """Whether a person says yes. RunError where there is none to ask."""
    require(sys.stdin.isatty(), "no terminal to ask at; add --yes to delete these files, nothing was deleted")
    try:
        answer = input(f"{question} [y/N] ")
    except EOFError:
        answer = ""
    return answer.strip().lower() in ("y", "yes")


def clean(folder: Path, sure: bool):
    """List the leftovers, ask unless `sure`, and delete them. RunError where nobody can be asked, or for a failure."""
    leftovers, left_alone = find_leftovers(folder)
    for line in left_alone:
        print(f"left alone: {line}", file=sys.stderr)
    if not leftovers:
        print(f"{folder}: no unfinished runs")
        return
    width = max(len(leftover.id) for leftover in leftovers)
    for leftover in leftovers:
        names = ", ".join(file.name for file in leftover.files)
        print(f"{leftover.id:{width}}  {leftover.status}: {names}, {count(leftover.size, 'byte')}")

    files = count(sum(len(leftover.files) for leftover in leftovers), "file")
    size = count(sum(leftover.size for leftover in leftovers), "byte")
    runs = count(len(leftovers), "unfinished run")
    if not sure and not ask(f"delete {files} of {runs}, {size}, from {folder}?"):
        print("nothing was deleted")
        return
    for leftover in leftovers:
        delete(folder, leftover)
    print(f"deleted {files} of {runs}, {size}")


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, or 1 and one line on stderr for a fault."""
    parser = argparse.ArgumentParser(prog="./run.sh clean", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log_dir", type=Path, default=Path("logs"), help="the trainer's log folder (default: logs)")
    parser.add_argument("--yes", action="store_true", help="delete without asking (default: ask)")
    options = parser.parse_args(argv)
    try:
        clean(options.log_dir, options.yes)
    except RunError as error:
        print(f"records.clean: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nrecords.clean: stopped", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    prepare_console()
    sys.exit(main())
