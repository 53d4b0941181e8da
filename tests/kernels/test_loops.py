"""What the CPU's loops share: their exponential, stages of tasks, threads, and the cache of compiled loops."""

from typing import NamedTuple

import numpy as np
import pytest

numba = pytest.importorskip("numba")

from kernels import loops as shared
from kernels.loops import exp2_f32, inner_loop, loop, run_stages, thread_count
from tests.kernels.processes import run_process
from tests.kernels.test_simd import check_exp2
from tests.loading import load_file


@loop
def _exp2(x, y):
    for i in range(x.size):
        y[i] = exp2_f32(x[i])


def test_exp2_f32():
    check_exp2(_exp2, np.float32, -126.5, 127.5)


class Marks(NamedTuple):
    """What tasks note, by stage and task."""
    runs: np.ndarray        # how often it has run
    before: np.ndarray      # how many tasks of earlier stages had run when it began
    after: np.ndarray       # how many of later ones
    thread: np.ndarray      # the number of its thread


@inner_loop
def _note(stage, task, thread, marks):
    before = after = 0
    for s in range(marks.runs.shape[0]):
        for t in range(marks.runs.shape[1]):
            if s < stage:
                before += marks.runs[s, t]
            if s > stage:
                after += marks.runs[s, t]
    marks.before[stage, task] = before
    marks.after[stage, task] = after
    marks.thread[stage, task] = thread
    marks.runs[stage, task] += 1


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_stages_run_in_order_and_every_task_once(threads, torch_threads):
    torch_threads(threads)
    counts = [1, 7, 200, 0, 3, 64]
    for _ in range(20):
        marks = Marks(*(np.zeros((len(counts), max(counts)), np.int64) for _ in Marks._fields))
        run_stages(_note, counts, marks)
        assert (marks.runs == (np.arange(max(counts)) < np.array(counts)[:, None])).all()
        for stage, count in enumerate(counts):
            assert (marks.before[stage, :count] == sum(counts[:stage])).all()
        assert not marks.after.any()
        assert marks.thread.max() < thread_count()


def test_loops_take_as_many_threads_as_pytorch_and_there_are(torch_threads):
    for threads in (1, 2, 1000):
        torch_threads(threads)
        assert thread_count() == min(threads, numba.config.NUMBA_NUM_THREADS)


CACHED = """
from typing import NamedTuple
import numpy as np
import torch
torch.set_num_threads(1)
from kernels import loops

@loops.loop
def add(x):
    for i in range(x.size):
        x[i] += 1

class State(NamedTuple):
    x: np.ndarray

@loops.inner_loop
def add_in_a_stage(stage, task, thread, state):
    state.x[task] += 1

x = np.zeros(3)
add(x)
loops.run_stages(add_in_a_stage, [3, 2], State(x), threads=False)
assert x.tolist() == [3, 3, 2]
functions = (add, add_in_a_stage, loops._run_alone)
loops.use_threads()
assert torch.get_num_threads() == 1
print(*(sum(f.stats.cache_hits.values()) for f in functions), *(sum(f.stats.cache_misses.values()) for f in functions))
"""


def hits_and_misses(folder, cache) -> list[str]:
    """
    CACHED as a module, as a file of loops is one: Numba knows a class of the program that runs, state's, for no other
    process's.
    """
    folder.joinpath("cached.py").write_text(CACHED)
    program = folder / "program.py"
    program.write_text("import cached")
    return run_process(program, cache=cache).stdout.split()


def test_compiled_loops_are_kept_and_pytorch_keeps_its_threads(tmp_path):
    """
    The second process compiles nothing and adds no file. Numba's OpenMP layer is PyTorch's: without care a run of one
    thread had all cores after its first loop.
    """
    cache = tmp_path / "cache"
    assert hits_and_misses(tmp_path, cache) == ["0", "0", "0", "1", "1", "1"]
    files = sorted(cache.rglob("*.nb?"))
    assert len(files) == 6 and all(file.is_relative_to(cache / "knotgpt") for file in files)
    assert hits_and_misses(tmp_path, cache) == ["1", "1", "1", "0", "0", "0"]
    assert sorted(cache.rglob("*.nb?")) == files


def test_without_a_folder_for_the_cache(tmp_path, monkeypatch):
    """Where no folder can be made, as a file has its name, loops are compiled in every process."""
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "other"))
    loops = load_file(shared.__file__, monkeypatch)

    @loops.loop
    def add(x):
        for i in range(x.size):
            x[i] += 1

    x = np.zeros(3)
    add(x)
    assert x.tolist() == [1, 1, 1] and not add.stats.cache_hits and sum(add.stats.cache_misses.values()) == 1
    assert not list(tmp_path.rglob("*.nb?"))
