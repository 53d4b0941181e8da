"""
What the CPU's compiled loops share: how Numba compiles and caches them, how many threads they take, an exponential that the compiler can vectorise.

Numba turns a loop over arrays into machine code for the processor it runs on; the user needs no compiler. Files named kernels/<op>_loops.py hold such loops
and import Numba, which takes half a second: kernels.backend imports them when they are first called.

Threads: a parallel loop takes as many as PyTorch does (torch.get_num_threads()), through Numba's OpenMP layer where there is one: a parallel call then costs
2 microseconds on two cores, 54 to 94 through its own queue of work and 26 to 70 through a pool of Python's threads (AMD EPYC, medians of 300 calls). OpenMP's
waiting threads spin as shortly as the trainer tells PyTorch's to. Elsewhere Numba chooses its own queue.

Numbers: NaN and infinity stay what they are, so the compiler may reorder sums and contract products, and may not assume that numbers are finite.
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
    The folder of compiled loops, one for each state of their sources: Numba compares a function's own file only, and a loop calls those of other files. None
    where no folder can be written, so that loops are compiled in every process.
    """
    names = ["simd.py", *sorted(file.name for file in Path(__file__).parent.glob("*loops.py"))]
    digest = hashlib.sha256(b"".join(Path(__file__).with_name(name).read_bytes() for name in names) + repr((numba.__version__, numba.config.BOUNDSCHECK)).encode())
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

BOUNDSCHECK = bool(numba.config.BOUNDSCHECK)  # NUMBA_BOUNDSCHECK=1: every index is checked, for tests
_options = dict(cache=_folder is not None, fastmath=FASTMATH, error_model="numpy")
loop = njit(nogil=True, **_options)                             # one thread
_inner = dict(no_cpython_wrapper=True, no_cfunc_wrapper=True, **_options)
called_loop = njit(**_inner)                                    # one that only loops call, which is quicker to compile
inner_loop = njit(forceinline=True, **_inner)                   # one that becomes part of their code: tuples of arrays are slow to pass
inline_loop = njit(inline="always", **_options)                 # copied into the loop that calls it
parallel_loop = njit(nogil=True, parallel=True, **_options)     # prange over independent tasks


@intrinsic
def _call(typing, address, stage, task, thread, state):
    """Calls the compiled function of (stage, task, thread, state) at an address, as Numba's functions are called."""
    def generate(context, builder, signature, arguments):
        kinds = signature.args[1:]
        function = context.call_conv.get_function_type(types.none, kinds).as_pointer()
        status, _ = context.call_conv.call_function(builder, builder.inttoptr(arguments[0], function), types.none, kinds, arguments[1:])
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


def run_stages(function, counts: list[int], state, threads: bool = True):
    """
    function(stage, task, thread, state), an inner_loop without a result, for every stage in order and all counts[stage] tasks of it, side by side or, with one
    thread or not `threads`, one after another; thread is the number of the thread that runs it, and state a named tuple of contiguous arrays. The function is
    called by its address: within the loop of threads Numba would optimise its code three times more.
    """
    if not threads or min(thread_count(), max(counts)) == 1 or BOUNDSCHECK:  # an error in a parallel loop would go unseen
        _run_alone(_address(function, state), np.array(counts, np.int64), state)
    else:
        use_threads(max(counts))
        _run_in_threads(_address(function, state), np.array(counts, np.int64), state)


_addresses = {}     # of the functions that run_stages has compiled, by the types of their arrays


def _address(function, state) -> int:
    key = (function, *((array.dtype.char, array.ndim) for array in state))  # Numba's own types of so many arrays take 0.2 ms
    if key not in _addresses:
        kinds = (types.int64, types.int64, types.int64, numba.typeof(state))
        function.compile(kinds)
        result = function.overloads[kinds]
        _addresses[key] = result.library.get_pointer_to_function(result.fndesc.llvm_func_name)
    return _addresses[key]


def thread_count() -> int:
    """How many threads parallel loops take."""
    return max(1, min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


def use_threads(tasks: int = 1 << 31):
    """Lets the parallel loops that this thread calls next take as many threads as PyTorch does, and no more than there are tasks: one needs no other."""
    numba.set_num_threads(max(1, min(thread_count(), tasks)))


@inline_loop
def exp2_f32(x):
    """
    2^x for a float32 x, relative error below 2e-7, by a polynomial on [-1/2, 1/2] and the exponent's bits: a loop of it is vectorised, which one of
    math.exp is not (0.18 against 8 ns a number on an AMD EPYC). 0 from -126.5 down, infinity from 127.5 up, NaN for NaN.
    """
    bounded = min(max(x, np.float32(-127.0)), np.float32(128.0))
    whole = np.floor(bounded + np.float32(0.5))
    f = x - whole if x == bounded else np.float32(0.0)
    p = np.float32(1.5403530393381609e-4)
    p = p * f + np.float32(1.3333558146428443e-3)
    p = p * f + np.float32(9.618129107628477e-3)
    p = p * f + np.float32(5.550410866482158e-2)
    p = p * f + np.float32(2.402265069591007e-1)
    p = p * f + np.float32(6.931471805599453e-1)
    p = p * f + np.float32(1.0)
    scale = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)
    return p * scale if x == x else x
