"""
Which device code a machine has beside PyTorch: the CPU's compiled loops, imported when they are first needed, and how
they become operations.
"""

import functools
import importlib
import sys
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@functools.cache
def cpu_loops(name: str) -> ModuleType | None:
    """
    The module kernels.<name>, whose loops Numba compiles; None where Numba is not installed, which is said once on
    stderr: the kernel's reference serves then. The import is late, as it takes half a second.
    """
    if not _has_numba():
        return None
    return importlib.import_module(f"kernels.{name}")


def parallel_loops(name: str) -> ModuleType:
    """cpu_loops(name), whose parallel loops then take as many threads as PyTorch does. Only where loops_serve."""
    cpu_loops("loops").use_threads()
    return cpu_loops(name)


@torch.compiler.assume_constant_result
def has_cpu_loops() -> bool:
    """Whether cpu_loops() finds its modules; torch.compile takes the answer as a constant."""
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
    """Whether the CPU's loops can take this tensor: it is on a CPU, and Numba is installed."""
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
    registered = torch.library.custom_op(name, body, mutates_args=(), schema=schema)
    registered.register_fake(fake)
    with_gradients = body
    if gradients is not None:
        registered.register_autograd(gradients, setup_context=save)
        with_gradients = _autograd_function(body, save, gradients)

    def operation(*inputs):
        if torch.compiler.is_compiling() or not all(_is_plain(x) for x in inputs if isinstance(x, Tensor)):
            return registered(*inputs)
        if torch._C._len_torch_dispatch_stack():  # a FLOP counter, for one, sees registered operations only
            return registered(*inputs)
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs if isinstance(x, Tensor)):
            return with_gradients(*inputs)
        return body(*inputs)
    return operation


def _is_plain(x: Tensor) -> bool:
    """Whether x is a tensor with numbers on a CPU, not a fake, functional or otherwise traced one."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu"


def _autograd_function(body: Callable, save: Callable, gradients: Callable) -> Callable:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = body(*inputs)
            save(ctx, inputs, output)
            return output

        backward = staticmethod(once_differentiable(gradients))
    return Function.apply


def wide(x: Tensor) -> Tensor:
    """x in the dtype that loops compute in: float32 for half precision, else its own."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def array(x: Tensor) -> np.ndarray:
    """x, contiguous and wide, as loops take it. It shares x's memory where x is both."""
    return wide(x).contiguous().numpy(force=True)


def strided_array(x: Tensor) -> tuple[np.ndarray, list[int]]:
    """
    x, wide, as a flat array from its first number to its last, and its strides but the last one's, which is 1: a last
    axis that is not contiguous is copied.
    """
    x = wide(x)
    x = x if x.stride(-1) == 1 else x.contiguous()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return x.as_strided((extent,), (1,)).numpy(force=True), list(x.stride()[:-1])
