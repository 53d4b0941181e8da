"""
What the CPU's compiled loops share: how Numba compiles and caches them, how many threads they take, and an exponential
that the compiler can vectorise.

Numba turns a loop over arrays into machine code for the processor it runs on; the user needs no compiler. Files named
kernels/<op>/cpu.py or *_cpu.py hold such loops and import Numba, which takes half a second. kernels.backend imports
these files when their loops are first called.

Threads: a parallel loop takes as many as PyTorch does (torch.get_num_threads()), through Numba's OpenMP layer where
there is one. A parallel call then costs 2 microseconds on two cores; it costs 54 to 94 through Numba's own queue of
work, and 26 to 70 through a pool of Python's threads (AMD EPYC, medians of 300 calls). OpenMP's waiting threads spin as
shortly as the trainer tells PyTorch's to. Where there is no OpenMP, Numba uses its own queue.

Numbers: the compiler may reorder sums and contract products, but it may not assume that numbers are finite. NaN and
infinity stay what they are.
"""

import hashlib
import os
import tempfile
from pathlib import Path

import numba
import numpy as np
import torch
from numba import njit, prange
from numba.core import cgutils, types
from numba.extending import intrinsic

FASTMATH = {"reassoc", "nsz", "arcp", "contract", "afn"}
LOG2_E = np.float32(1.4426950408889634)


def _cache_folder() -> Path | None:
    """
    Returns the folder of compiled loops. Each state of their sources has its own folder, because Numba compares only
    the file of a function, while a loop calls functions of other files. Returns None where no folder can be written;
    loops are then compiled in every process.
    """
    # the state of the sources, and of the files whose constants they take
    endings = ("cpu", "loops", "simd", "reference")
    files = sorted(file for file in Path(__file__).parent.rglob("*.py") if file.stem.endswith(endings))
    sources = b"".join(file.read_bytes() for file in files)
    settings = repr((numba.__version__, numba.config.BOUNDSCHECK)).encode()
    digest = hashlib.sha256(sources + settings)

    # its folder, if that can be written
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "knotgpt" / f"loops-{digest.hexdigest()[:12]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):
        return None


_folder = _cache_folder()
if _folder is not None:
    numba.config.CACHE_DIR = str(_folder)
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]

# Numba starts its threads, and tells OpenMP to take so many, in PyTorch's loops too: these get their own number back
_threads = torch.get_num_threads()
numba.set_num_threads(numba.get_num_threads())
torch.set_num_threads(_threads)

BOUNDSCHECK = bool(numba.config.BOUNDSCHECK)  # NUMBA_BOUNDSCHECK=1: every index is checked, for tests
_options = dict(cache=_folder is not None, fastmath=FASTMATH, error_model="numpy")
_inner = dict(no_cpython_wrapper=True, no_cfunc_wrapper=True, **_options)

# a loop of one thread, which Python calls
loop = njit(nogil=True, **_options)
# a loop that only loops call, which is quicker to compile
called_loop = njit(**_inner)
# the same, but it becomes part of their machine code, because tuples of arrays are slow to pass
inner_loop = njit(forceinline=True, **_inner)
# a loop whose source is copied into the loop that calls it
inline_loop = njit(inline="always", **_options)
# a loop of several threads: prange over independent tasks
parallel_loop = njit(nogil=True, parallel=True, **_options)


@intrinsic
def _call(typing, address, stage, task, thread, state):
    """Calls the compiled function of (stage, task, thread, state) at an address, in the way Numba calls functions."""
    def generate(context, builder, signature, arguments):
        kinds = signature.args[1:]
        function = context.call_conv.get_function_type(types.none, kinds).as_pointer()
        pointer = builder.inttoptr(arguments[0], function)
        status, _ = context.call_conv.call_function(builder, pointer, types.none, kinds, arguments[1:])
        with cgutils.if_unlikely(builder, status.is_error):
            context.call_conv.return_status_propagate(builder, status)
        return context.get_dummy_value()
    return types.none(types.intp, types.int64, types.int64, types.int64, state), generate


@parallel_loop
def _run_in_threads(address, counts, state):
    for stage in range(counts.shape[0]):
        for task in prange(counts[stage]):
            _call(address, np.int64(stage), np.int64(task), np.int64(numba.get_thread_id()), state)


@loop
def _run_alone(address, counts, state):
    for stage in range(counts.shape[0]):
        for task in range(counts[stage]):
            _call(address, np.int64(stage), np.int64(task), np.int64(0), state)


def run_stages(function, counts: list[int], state, threads: bool = True, kind=None):
    """
    Calls function(stage, task, thread, state) for every stage, one stage after another, and for all counts[stage] tasks
    of a stage side by side, or, with one thread or not `threads`, one after another. The function is a called_loop or
    an inner_loop without a result, `thread` is the number of the thread that runs it, and `state` is a named tuple of
    contiguous arrays. `kind` may tell the types of these arrays by one value: to look at each takes microseconds. The
    function is called by its address: inside the parallel loop Numba would optimise its code three times more.
    """
    address, tasks = _address(function, state, kind), np.array(counts, np.int64)
    alone = not threads or min(thread_count(), max(counts)) == 1
    if alone or BOUNDSCHECK:  # an error in a parallel loop would go unseen
        _run_alone(address, tasks, state)
    else:
        use_threads(max(counts))
        _run_in_threads(address, tasks, state)


_addresses = {}     # of the functions that run_stages has compiled, by the types of their arrays


def _address(function, state, kind) -> int:
    """Returns the address of the function, which is compiled when it is first asked for with arrays of these types."""
    # the types that Numba finds for so many arrays take 0.2 ms, this key less
    key = (function, kind or tuple((array.dtype.char, array.ndim) for array in state))
    if key not in _addresses:
        kinds = (types.int64, types.int64, types.int64, numba.typeof(state))
        function.compile(kinds)
        result = function.overloads[kinds]
        _addresses[key] = result.library.get_pointer_to_function(result.fndesc.llvm_func_name)
    return _addresses[key]


def thread_count() -> int:
    """Returns how many threads parallel loops take."""
    return max(1, min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


def use_threads(tasks: int = 1 << 31):
    """
    Lets the parallel loops that this thread calls next take as many threads as PyTorch does, but no more than there are
    tasks: for one task, no other thread is woken.
    """
    numba.set_num_threads(max(1, min(thread_count(), tasks)))


@inline_loop
def exp2_f32(x):
    """
    Returns 2^x for a float32 x, with a relative error below 2e-7. It takes a polynomial on [-1/2, 1/2] and the
    exponent's bits, so that the compiler vectorises a loop of it, but not one of math.exp (0.18 against 8 ns a number
    on an AMD EPYC). The result is 0 below -126.5, infinity from 127.5 up, and NaN for NaN.
    """
    # x is whole + f
    bounded = min(max(x, np.float32(-127.0)), np.float32(128.0))
    whole = np.floor(bounded + np.float32(0.5))
    f = x - whole if x == bounded else np.float32(0.0)

    # 2^f
    p = np.float32(1.5403530393381609e-4)
    p = p * f + np.float32(1.3333558146428443e-3)
    p = p * f + np.float32(9.618129107628477e-3)
    p = p * f + np.float32(5.550410866482158e-2)
    p = p * f + np.float32(2.402265069591007e-1)
    p = p * f + np.float32(6.931471805599453e-1)
    p = p * f + np.float32(1.0)

    # times 2^whole
    scale = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)
    return p * scale if x == x else x
