"""Forked processes, which need no start of Python and PyTorch: ranks, and runs of the trainer that a test kills."""

import os
import signal
import traceback
from collections.abc import Callable

import train_gpt
from train_gpt import main, parse_config

TIMEOUT = 600   # seconds after which a process that still waits for another one is ended


def start_child(action: Callable[[], int]) -> int:
    """
    Fork a process that ends with the action's exit code, 99 if it raises, and without Python's own end; returns its
    process id.
    """
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        signal.alarm(TIMEOUT)
        code = action()
    except BaseException:
        traceback.print_exc()
    finally:
        train_gpt.leave(code, alone=False)


def in_a_child(words: list[str], arm: Callable = lambda: None) -> int:
    """
    Fork a process that runs a command line, without waiting for another start of Python. Returns its process id. Two
    things that take long and do not matter here are left out: the wait for the disk, and the measurement of the
    processor. arm: called there first.
    """
    train_gpt.measure_model(parse_config(words))  # every child then has it, and what it imports

    def run():
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        os.fsync, train_gpt.measured_peak = (lambda descriptor: None), (lambda ranks: 1e11)
        arm()
        return main(words)

    return start_child(run)


def exit_code_of(child: int) -> int:
    """Wait for a forked process; returns its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
