"""
The training processes of a comparison: several at once, each watched for steps, and all stopped by one signal.
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from train_gpt import STOPPING

POLL = 0.1          # seconds between two looks at the processes
STARTUP = 15        # before its first step, while it compiles and validates, a run may be silent for so many patiences
STEPS = 10          # later it may be silent for so many times its usual step, or its longest silence between steps
TAIL = 4096         # bytes at the end of a log that tell its last step


class Interrupted(Exception):
    """A signal; its number is the argument."""


class Interrupt:
    """
    The first signal that asks this script to stop. It is passed on to the runs under way, which save and end; check()
    then leaves at a place where nothing is half done. With no run under way a second signal ends this process at once.
    """

    def __init__(self):
        self.number = None      # of the first signal
        self.children = set()   # the runs under way, Popen
        self.before = {}        # the handlers of whoever called main()

    def __enter__(self):
        for number in STOPPING:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup stays nohup
                self.before[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *_error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number, _frame):
        if self.number is None:
            self.number = number
            for child in list(self.children):
                self.pass_on(child)
        elif not self.children:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def pass_on(self, child: subprocess.Popen):
        """Ask a run to save and end; end it after two minutes."""
        child.send_signal(signal.SIGTERM)
        last = threading.Timer(120, child.kill)
        last.daemon = True
        last.start()

    def started(self, child: subprocess.Popen):
        """From now on signals are passed on to this run, too, and one that came while it was started."""
        self.children.add(child)
        if self.number is not None:
            self.pass_on(child)

    def check(self):
        if self.number is not None:
            raise Interrupted(self.number)


class Process:
    """One training process. Its output goes to a file, line by line to `show`, and the last line is kept."""

    def __init__(self, command: list[str], output: Path, log: Path, show: Callable[[str], None], *,
                 environment: dict[str, str], lock: int, patience: float):
        """
        lock: a file descriptor that the process inherits, so that its lock is held as long as the process lives.
        patience: seconds without a step after which it counts as hanging, at the least; 0: never. OSError where the
        file or the process cannot be had.
        """
        self.log = log              # the trainer's, which grows with every step
        self.show = show
        self.patience = patience
        self.last = ""              # the last line of output that is not empty
        self.fault = None           # why it was killed
        self.seconds = None         # how long it took, start included
        self.begun = time.perf_counter()
        self.grown = self.begun     # when its log last grew
        self.silence = 0.0          # the longest between two steps, seconds
        self.size = -1              # of its log, bytes
        self.stepped = False        # whether it has done a step
        self.file = open(output, "a", encoding="utf-8")
        try:
            self.child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
                errors="replace", env=environment, pass_fds=[lock], start_new_session=True,
                preexec_fn=die_with_parent)
        except OSError:
            self.file.close()
            raise
        self.broken = None          # what stopped the reading of its output, an OSError
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        try:
            for line in self.child.stdout:
                self.file.write(line)
                self.last = line.strip() or self.last
                self.show(self.last)
        except OSError as error:  # a full disk; what the process still says is read and dropped, so that it can end
            self.broken = error
            for _ in self.child.stdout:
                pass

    def poll(self) -> bool:
        """
        Whether it has ended; then its output is complete, and seconds is set. OSError where that could not be kept.
        """
        now = time.perf_counter()
        if self.child.poll() is None:
            self._watch(now)
            return False
        self.reader.join(10)  # a grandchild that outlives it may hold the pipe
        self.seconds = now - self.begun
        if self.broken:
            raise self.broken
        self.file.close()
        return True

    def _watch(self, now: float):
        """Kill it where it hangs."""
        size = self.log.stat().st_size if self.log.exists() else 0
        if size != self.size:
            if self.stepped:
                self.silence = max(self.silence, now - self.grown)
            self.size = size
            self.grown = now
            self.stepped = self.stepped or size > 0 and step_seconds(self.log) is not None
            return
        limit = STARTUP * self.patience
        if self.stepped:
            limit = max(self.patience, STEPS * (step_seconds(self.log) or 0.0), STEPS * self.silence)
        if self.patience and now - self.grown > limit and not self.fault:
            self.fault = f"it hung: no step for {now - self.grown:.0f} s, so it was stopped"
            try:
                os.killpg(self.child.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def step_seconds(log: Path) -> float | None:
    """The usual time of a step, seconds, by the last line of steps in a trainer's log; None before the first step."""
    with open(log, "rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - TAIL, 0))
        text = file.read().decode("utf-8", "replace")
    steps = re.findall(r"^step:([1-9]\d*)/\d+ .*step_avg:([\d.]+)ms", text, re.M)
    return float(steps[-1][1]) / 1000 if steps else None


def die_with_parent():
    """A run ends, with a checkpoint, when this process is killed (Linux: prctl's PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def wait_for(processes: list[Process], interrupt: Interrupt):
    """Wait until all have ended. OSError, after all have ended, where the output of one could not be kept."""
    waiting = list(processes)
    error = None
    while waiting:
        for process in list(waiting):
            try:
                ended = process.poll()
            except OSError as fault:
                ended = True
                error = error or fault
            if ended:
                waiting.remove(process)
                interrupt.children.discard(process.child)
        if waiting:
            time.sleep(POLL)
    if error:
        raise error
