"""
Runs the trainer's command line in several processes on one machine, and watches when gradients are reduced and
parameters updated.

    torchrun --nproc_per_node=2 tests/ranks.py '{"2": [...]}'      number of ranks -> command line

Started by torchrun it is one of that many ranks; else the calling process is forked once a rank, so that no rank has to
start Python and PyTorch. The exit code is the largest of the ranks'; 99 for one that broke a rule of updates under the
backward pass: every reduction begins inside it, every update but one a step too, where nothing has to treat the
gradients between.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import train_gpt
import variants
from tests.children import TIMEOUT, exit_code_of, start_child


def run_ranks(commands: dict[int, list[str]], *launcher: str) -> subprocess.CompletedProcess:
    """
    Run every command line by as many ranks as stand before it. launcher: what python starts for them, torchrun's words;
    without it the ranks are forks of this process, and their messages are in stderr, the output of all in stdout.
    """
    if launcher:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(train_gpt.__file__).parent)}
        return subprocess.run([sys.executable, *launcher, __file__, json.dumps(commands)],
                              capture_output=True, text=True, env=environment, timeout=TIMEOUT)

    codes = []
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        for world, words in commands.items():
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            children = [start_rank(words, rank, world, port, out.fileno(), errors.fileno()) for rank in range(world)]
            codes += [exit_code_of(child) for child in children]

        # what they wrote, each at the end that the others had reached
        texts = []
        for file in (out, errors):
            file.seek(0)
            texts.append(file.read())
    return subprocess.CompletedProcess(commands, max(codes, key=abs), *texts)


class Watch:
    """What happened in a run's backward passes, and outside them."""

    def __init__(self):
        self.inside = False     # whether a backward pass is under way
        self.reductions = []    # whether each reduction began inside, with all gradients there
        self.updates = []       # (bucket, whether it was updated inside) of each update
        self.treated = False    # whether gradients are treated before an update
        self._wrap(train_gpt.Bucket, "_reduce", self._reducing)
        self._wrap(train_gpt.ShardedOptimizer, "update_bucket", self._updating)
        self._wrap(train_gpt.Tensor, "backward", self._entering, self._leaving)
        self._wrap(train_gpt.WeightSource, "release", self._entering, self._leaving)

    def _wrap(self, owner, name: str, before, after=lambda: None):
        original = getattr(owner, name)

        def wrapped(subject, *arguments):
            before(subject, *arguments)
            original(subject, *arguments)
            after()

        setattr(owner, name, wrapped)

    def _reducing(self, bucket):
        self.reductions.append(bucket.missing == 0 and self.inside)

    def _updating(self, optimizer, bucket, *progress):
        self.updates.append((id(bucket), self.inside))
        self.treated = train_gpt.treat_gradients is not None

    def _entering(self, loss_or_source):
        self.inside = True

    def _leaving(self):
        self.inside = False

    def check(self, world: int):
        """AssertionError where the rule was broken."""
        buckets, late = len({bucket for bucket, _ in self.updates}), sum(not inside for _, inside in self.updates)
        if world == 1:
            assert not self.reductions and late == len(self.updates)
            return
        assert self.reductions and all(self.reductions), "a reduction began after the backward pass"
        allowed = len(self.updates) if self.treated else len(self.updates) // buckets
        assert late == allowed, f"{late} of {len(self.updates)} updates of {buckets} buckets came after the pass"


def run(words: list[str], world: int) -> int:
    """Train as one of the ranks; the speed of the processor, which a run measures for its record, does not matter."""
    watch = Watch()
    train_gpt.measured_peak = lambda ranks: 1e11
    code = train_gpt.main(words, loader=variants)
    if code == 0:
        watch.check(world)
    return code


def start_rank(words: list[str], rank: int, world: int, port: int, out: int, errors: int) -> int:
    """Fork one rank, which writes to these open files; returns its process id."""
    def start():
        os.dup2(out, 1)
        os.dup2(errors, 2)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                           MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        return run(words, world)

    return start_child(start)


if __name__ == "__main__":
    ranks = int(os.environ["WORLD_SIZE"])
    train_gpt.leave(run(json.loads(sys.argv[1])[str(ranks)], ranks), alone=False)
