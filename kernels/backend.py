"""
What the operations of this folder share: how they find Triton and the CPU's compiled loops, how loops become
operations, and the checks of arguments that several public functions make.

Triton is imported here, once. A file with Triton kernels takes `jit`, `tl` and `triton` from here, decorates its
kernels with @jit, and registers operations that launch them with `triton_operation`, which torch.compile can look into.
Where Triton is missing, `triton` is None, the decorated functions are never called, and other backends serve.

Loops are imported when they are first needed, because Numba takes half a second.
"""

import functools
import importlib
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from types import EllipsisType, ModuleType, SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:  # no Triton for this platform
    triton = None
    tl = SimpleNamespace(constexpr=lambda value: value)

    def jit(function: Callable) -> Callable:
        return function


# ---- Triton -----------------------------------------------------------------

@jit
def _empty_kernel():
    """Does nothing. Its type says whether @jit compiles kernels or interprets them."""


INTERPRETED = triton is not None and not isinstance(_empty_kernel, triton.JITFunction)
COMPILED = triton is not None and not INTERPRETED

# torch.compile cannot look into an interpreted kernel
if COMPILED:
    triton_operation = torch.library.triton_op
    wrap_triton = torch.library.wrap_triton
else:
    triton_operation = torch.library.custom_op

    def wrap_triton(kernel: Callable) -> Callable:
        return kernel


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """
    Returns what numbers of a dtype are multiplied as in a chain of products, and states kept in: bfloat16 as itself,
    others as float32, because a sum of float16 numbers can leave their range.
    """
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def launch_entry(launches: dict[tuple[int, int], dict], x: Tensor) -> dict:
    """
    Returns the entry of a launch table for x's card and operands. Its keys are (major number of the compute capability,
    bytes of an operand); the major number 0 stands for any other card.
    """
    major = torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 0
    operand = operand_dtype(x.dtype).itemsize
    return launches.get((major, operand), launches[0, operand])


def with_unit_stride(x: Tensor | None) -> Tensor | None:
    """Returns x with a last stride of 1, for kernels that take any other strides; None for None."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def triton_serves(x: Tensor) -> bool:
    """Returns whether Triton kernels can take this tensor: it is on a GPU, or kernels are interpreted."""
    return triton is not None and (x.is_cuda or INTERPRETED)


# ---- The CPU's loops --------------------------------------------------------

@functools.cache
def cpu_loops(name: str) -> ModuleType | None:
    """
    Returns the module kernels.<name>, whose loops Numba compiles. Returns None where Numba is not installed, which is
    said once on stderr; the kernel's reference serves then.
    """
    if not _has_numba():
        return None
    return importlib.import_module(f"kernels.{name}")


def parallel_loops(name: str) -> ModuleType:
    """Returns cpu_loops(name), whose parallel loops take as many threads as PyTorch. Only where loops_serve."""
    cpu_loops("loops").use_threads()
    return cpu_loops(name)


@torch.compiler.assume_constant_result
def has_cpu_loops() -> bool:
    """Returns whether cpu_loops() finds its modules; torch.compile takes the answer as a constant."""
    return _has_numba()


@functools.cache
def _has_numba() -> bool:
    try:
        import numba  # noqa: F401
    except ImportError as error:
        print(f"kernels: the CPU's compiled loops need Numba ({error}); slower plain PyTorch serves: pip install numba",
              file=sys.stderr)
        return False
    return True


def loops_serve(x: Tensor) -> bool:
    """Returns whether the CPU's loops can take this tensor: it is on a CPU, and Numba is installed."""
    return x.device.type == "cpu" and has_cpu_loops()


def cpu_operation(name: str, body: Callable, fake: Callable, save: Callable | None = None,
                  gradients: Callable | None = None, schema: str | None = None) -> Callable:
    """
    Registers `body` with torch.library as `name`, and returns the function to call. fake, save(ctx, inputs, output) and
    gradients(ctx, *gradients) are what custom_op's register_fake and register_autograd take; without gradients it is an
    operation of a backward pass. The schema is custom_op's too; without one it follows from the annotations of `body`.

    The compiler sees the registered operation. Eagerly the function calls `body` itself, as an autograd function where
    an input wants a gradient: the dispatcher and its checks take longer than a small tensor's loop
    (benchmarks/README.md).
    """
    # the registered operation
    registered = torch.library.custom_op(name, body, mutates_args=(), schema=schema)
    registered.register_fake(fake)

    # its gradients, and the eager form with them
    with_gradients = body
    if gradients is not None:
        registered.register_autograd(gradients, setup_context=save)
        with_gradients = _autograd_function(body, save, gradients)

    def operation(*inputs):
        if torch.compiler.is_compiling() or not all(_is_plain(x) for x in inputs if isinstance(x, Tensor)):
            return registered(*inputs)
        if torch._C._len_torch_dispatch_stack():  # a FLOP counter, for one, sees registered operations only
            return registered(*inputs)
        return with_gradients(*inputs) if _wants_gradients(inputs) else body(*inputs)
    return operation


def _wants_gradients(inputs: Sequence) -> bool:
    """Returns whether an input wants a gradient, or may have a forward one, of which the autograd function says no."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs if isinstance(x, Tensor))


def _is_plain(x: Tensor) -> bool:
    """Returns whether x is a tensor with numbers on a CPU, not a fake, functional or otherwise traced one."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu"


def _autograd_function(body: Callable, save: Callable, gradients: Callable) -> Callable:
    """Returns the function of an autograd node with this forward and backward pass."""
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = body(*inputs)
            save(ctx, inputs, output)
            return output

        backward = staticmethod(once_differentiable(gradients))
    return Function.apply


def sum_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype of sums of x's numbers, which loops compute in: float32 for half precision, else x's own."""
    return torch.promote_types(x.dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    """Returns x in the dtype of its sums."""
    return x.to(sum_dtype(x))


def array(x: Tensor, dtype: torch.dtype | None = None) -> np.ndarray:
    """Returns x, contiguous, in a dtype (None: that of its sums), as loops take it: no copy where x is so."""
    return x.to(dtype or sum_dtype(x)).contiguous().numpy(force=True)


def strided_array(x: Tensor) -> tuple[np.ndarray, list[int]]:
    """
    Returns x, wide, as a flat array from its first number to its last, and its strides but the last one's, which is 1:
    a last axis that is not contiguous is copied.
    """
    x = wide(x)
    if x.stride(-1) != 1:
        x = x.contiguous()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return x.as_strided((extent,), (1,)).numpy(force=True), list(x.stride()[:-1])


# ---- Checks of arguments ----------------------------------------------------
# Each raises ValueError with what is wrong, what was got and, where there is a choice, what to do. The text is made
# only where it is needed: it would take longer than a small operation, and torch.compile cannot make it of symbols.

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def describe(x) -> str:
    """Returns a tensor's shape and dtype, and of anything else the name of its type."""
    return f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__


def check_shape(name: str, x, form: str, sizes: Sequence[int | None | EllipsisType]):
    """
    Checks that x is a tensor of these sizes: a number, None for any number above 0, and a leading ... for any axes
    before, none of them empty. form: the shape as the operation's documentation writes it, such as "(B, T, D)".
    """
    if isinstance(x, Tensor):
        open_ended = len(sizes) > 0 and sizes[0] is Ellipsis
        last = sizes[1:] if open_ended else sizes
        shape = x.shape
        rank_fits = len(shape) >= len(last) if open_ended else len(shape) == len(last)
        if rank_fits and 0 not in shape:
            if all(size is None or size == actual for size, actual in zip(last, shape[len(shape) - len(last):])):
                return
    known = ""
    if any(isinstance(size, int | torch.SymInt) for size in sizes):
        words = {None: "any", Ellipsis: "..."}
        known = f" of sizes ({', '.join(str(words.get(size, size)) for size in sizes)})"
    raise ValueError(f"{name} must be a tensor {form}{known}, not empty; got {describe(x)}")


def check_dtype(name: str, x: Tensor, dtypes: Iterable[torch.dtype] = FLOATS, like: str = ""):
    """Checks that x has one of these dtypes. like: the argument whose dtype the last one is, if that is the reason."""
    if x.dtype in dtypes:
        return
    *others, last = dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes)
    expected = f"{', '.join(others)} or {last}" if others else last
    reason = f", as {like} is" if like else ""
    raise ValueError(f"{name} must be {expected}{reason}; got {x.dtype}")


def check_device(name: str, x: Tensor, like_name: str, like: Tensor):
    """Checks that x is on the same device as another argument."""
    if x.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}; got {x.device}: move it there")


def check_positive(name: str, value: float):
    """Checks that a number is above 0 and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be above 0 and finite; got {value}")


def check_option(name: str, value, options: Iterable[str]):
    """Checks that value is one of these words."""
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}; got {value!r}")


def check_backend(backend: str, backends: Iterable[str], x: Tensor, instead: str = "'reference' or 'auto'"):
    """Checks that `backend` is one of backends, and that "triton" and "loops" can take x. instead: what else to use."""
    check_option("backend", backend, backends)
    if backend == "triton" and not triton_serves(x):
        raise ValueError(f"backend 'triton' needs CUDA tensors and Triton; got tensors on {x.device}: use {instead}")
    if backend == "loops" and not loops_serve(x):
        raise ValueError(f"backend 'loops' needs tensors on a CPU and Numba; got tensors on {x.device}: use {instead}")


def check_documents(doc_start: Tensor | None):
    """
    Checks that doc_start (B, T) int32 has for every token the index of its document's first token. None passes; so do
    tensors on a GPU, which would have to wait, and in a graph, which would break.
    """
    if doc_start is None or doc_start.device.type != "cpu" or torch.compiler.is_compiling():
        return
    index = torch.arange(doc_start.shape[1], dtype=torch.int32)
    if (doc_start < 0).any() or (doc_start > index).any() or (doc_start.diff(dim=1) < 0).any():
        raise ValueError(
            "doc_start must hold for every token the index of its document's first token: "
            "0 <= doc_start[b, t] <= t, never falling"
        )


def check_no_float64(backend: str, dtypes: Iterable[torch.dtype], instead: str = "'reference' or 'auto'"):
    """Refuses float64 for a backend that has none."""
    if torch.float64 in dtypes:
        raise ValueError(f"backend {backend!r} has no float64: use {instead}")
