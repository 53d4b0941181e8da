"""
The shape of every command of this checkout: a strict parser, faults in one line, exit codes. It imports the trainer's
checks and nothing else of the checkout, so that anything above the trainer may use it.
"""

import argparse
import io
import os
import re
import sys
from collections.abc import Callable

from train_gpt import RunError, check_value, require


class Parser(argparse.ArgumentParser):
    """A parser that shows its description as it is written and turns every fault into a RunError of one line."""

    def __init__(self, *arguments, formatter_class=argparse.RawDescriptionHelpFormatter, **settings):
        super().__init__(*arguments, formatter_class=formatter_class, allow_abbrev=False, **settings)

    def parse_args(self, words: list[str] | None = None, namespace=None) -> argparse.Namespace:
        words = sys.argv[1:] if words is None else words
        for word in words:  # argparse makes an empty list of such a value
            require(not re.fullmatch("--?[a-z-]+=--", word), f"{word} is no option with a value; see --help")
        return super().parse_args(words, namespace)

    def error(self, message: str):
        raise RunError(f"{message[:200]}; see --help")


def check_option(options, name: str, least: int, most: int):
    """Raise RunError, which names the option, unless the whole number options.NAME lies between least and most."""
    check_value(int, getattr(options, name), f"--{name}", (least, most))


def check_limits(options: argparse.Namespace, limits: dict[str, tuple]):
    """
    Raise RunError, which names the option, unless every number of options.NAME, one or a list of them, lies within
    limits[NAME], (least, most): whole numbers where these are whole.
    """
    for name, (least, most) in limits.items():
        value = getattr(options, name)
        for number in value if isinstance(value, list) else [value]:
            check_value(type(least), number, f"--{name.replace('_', '-')}", (least, most))


def run_script(name: str, work: Callable[[], int | None], interrupted: str = "interrupted",
               explain: Callable[[Exception], str | None] = lambda error: None) -> int:
    """
    Run a script's work and return its exit code: what `work` returns (None is 0); 1 for a fault, which becomes one line
    on stderr; 130 for an interrupt; 141, as of a program that SIGPIPE ends, when nobody reads the output any more.
    Characters that a console cannot show are replaced. explain: the line for an error of another kind, None where it
    is a defect, which is raised.
    """
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream is not None]  # a closed one is None
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = exit_code(name, work, interrupted, explain)
        for stream in streams:
            stream.flush()
        return code
    except OSError as error:
        for stream in streams:  # what is left unwritten must not be tried again when Python ends
            try:
                stream.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if isinstance(error, BrokenPipeError):
            return 141
        file = f"{error.filename}"[:300] if error.filename else "the output"
        fault = f"{file} cannot be used: {error.strerror or error}; check its name and its rights, or give another"
        print(f"{name}: error: {fault}", file=sys.stderr)
        return 1


def exit_code(name: str, work: Callable[[], int | None], interrupted: str, explain: Callable) -> int:
    """run_script without its care for consoles that are gone."""
    try:
        return work() or 0
    except KeyboardInterrupt:
        print(f"{name}: {interrupted}", file=sys.stderr)
        return 130
    except SystemExit as end:  # argparse's, after --help
        return end.code
    except OSError:
        raise
    except Exception as error:
        fault = str(error) if isinstance(error, RunError) else explain(error)
        if is_out_of_memory(error):
            fault = f"this machine has too little memory for that ({error!s:.200}); ask for less"
        if fault is None:
            raise
        print(f"{name}: error: {' '.join(fault.split())[:1000]}", file=sys.stderr)
        return 1


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: Python's, PyTorch's on a CPU, or a GPU's."""
    names_it = "can't allocate memory" in str(error) or "OutOfMemory" in type(error).__name__
    return isinstance(error, MemoryError) or names_it
