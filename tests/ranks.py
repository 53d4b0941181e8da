"""
Runs the trainer's command line in several processes on one machine, and watches when gradients are reduced and
parameters updated.

    python tests/ranks.py '{"1": [...], "4": [...]}'      number of ranks -> command line

Started by torchrun it is one of that many ranks; else it forks the ranks, so that Python and PyTorch start once for all
of them. The exit code is the largest of the ranks'; 99 for one that broke a rule of updates under the backward pass:
every reduction begins inside it, every update but one a step too, where nothing has to treat the gradients between.
"""

import json
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import train_gpt
import variants


def run_ranks(commands: dict[int, list[str]], *launcher: str) -> subprocess.CompletedProcess:
    """Run this file in a process of its own; launcher: what python starts in its place, such as torchrun's words."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(train_gpt.__file__).parent)}
    return subprocess.run([sys.executable, *launcher, __file__, json.dumps(commands)],
                          capture_output=True, text=True, env=environment, timeout=200)


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
    watch = Watch()
    code = train_gpt.main(words, loader=variants)
    if code == 0:
        watch.check(world)
    return code


def fork(words: list[str], rank: int, world: int, port: int) -> int:
    """Start one rank; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                           MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        code = run(words, world)
    except BaseException:
        traceback.print_exc()
    train_gpt.leave(code, alone=False)


def main() -> int:
    commands = {int(world): words for world, words in json.loads(sys.argv[1]).items()}
    if "WORLD_SIZE" in os.environ:
        world = int(os.environ["WORLD_SIZE"])
        return run(commands[world], world)
    codes = []
    for world, words in commands.items():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = [fork(words, rank, world, port) for rank in range(world)]
        codes += [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return max(codes, key=abs)


if __name__ == "__main__":
    train_gpt.leave(main(), alone=False)
