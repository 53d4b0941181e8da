"""Which device code a machine has beside PyTorch: the CPU's compiled loops, imported when they are first needed."""

import functools
import importlib
import sys
from types import ModuleType

import torch


@functools.cache
def cpu_loops(name: str) -> ModuleType | None:
    """
    The module kernels.<name>, whose loops Numba compiles; None where Numba is not installed, which is said once on stderr: the kernel's reference
    serves then. The import is late, as it takes half a second.
    """
    if not _has_numba():
        return None
    return importlib.import_module(f"kernels.{name}")


@torch.compiler.assume_constant_result
def has_cpu_loops() -> bool:
    """Whether cpu_loops() finds its modules; torch.compile takes the answer as a constant."""
    return _has_numba()


@functools.cache
def _has_numba() -> bool:
    try:
        import numba  # noqa: F401
    except ImportError as error:
        print(f"kernels: the CPU's compiled loops need Numba ({error}); slower plain PyTorch serves: pip install numba", file=sys.stderr)
        return False
    return True
