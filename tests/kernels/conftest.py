"""
What the tests of all kernels share: the error measure of tests/errors.py, NaN-filled buffers, ahead-of-time compilation
for cards that are not here, and Triton's interpreter.
"""
import importlib
import os
import pickle
import re
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def serve():
    """
    The interpreter's process: answers (module, function, args, kwargs) with (result, None) or (None, error), pickled,
    until its input ends.
    """
    sys.path.insert(0, str(ROOT))
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a kernel prints must not land among the answers
    import torch
    torch.set_num_threads(1)
    while True:
        try:
            module, function, args, kwargs = pickle.load(requests)
        except EOFError:
            return
        try:
            answer = (getattr(importlib.import_module(module), function)(*args, **kwargs), None)
        except Exception as error:
            error.add_note("in the interpreter's process:\n" + traceback.format_exc())
            answer = (None, error)
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    serve()
    sys.exit()

import pytest
import torch

from tests.errors import relative_rms as _relative_rms

# bytes a block can use, by compute capability
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORE = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    """
    Fills a tensor with NaN (integers with the smallest value) in place, so that what a kernel does not write is seen;
    returns it.
    """
    return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)


@dataclass
class Compiled:
    registers: int          # per thread
    spills: int             # bytes of stack and local memory per thread: 0 where nothing spills
    shared: int             # bytes of shared memory a launch asks for
    ptx: str
    shared_limit: int       # bytes a block can use on this card

    @property
    def has_tensor_cores(self) -> bool:
        return bool(TENSOR_CORE.search(self.ptx))


def _aot(kernel, signature: dict, constexprs: dict, capability: int, num_warps: int, num_stages: int,
         aligned=None) -> Compiled:
    """
    Compiles a @triton.jit kernel for a card of this compute capability (80, 86, 89, 90, 100); needs no card. signature:
    {argument: "*bf16", "*fp32", "i32", "fp32" ...} for what is not in constexprs. aligned: names of the arguments that
    a launch would find divisible by 16, which decides about wide loads and asynchronous copies; every pointer if not
    given. A constexpr of 1 is passed as such by a launch for each integer equal to 1: give such strides in constexprs.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    names = kernel.arg_names
    unknown = (set(signature) | set(constexprs)) - set(names)
    absent = set(names) - set(signature) - set(constexprs)
    assert not unknown, f"{kernel.__name__} has no arguments {sorted(unknown)}"
    assert not absent, f"{kernel.__name__} needs the arguments {sorted(absent)}"
    if aligned is None:
        aligned = [name for name, kind in signature.items() if kind.startswith("*")]

    # the machine code, and what it uses
    source = ASTSource(kernel, {name: signature.get(name, "constexpr") for name in names},
                       {(names.index(name),): value for name, value in constexprs.items()},
                       {(names.index(name),): [["tt.divisibility", 16]] for name in aligned})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                              options=dict(num_warps=num_warps, num_stages=num_stages))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name], capture_output=True,
                               text=True, check=True).stdout
    figures = {name: int(figure) for name, figure in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    spills = figures["STACK"] + figures["LOCAL"]
    return Compiled(figures["REG"], spills, compiled.metadata.shared, compiled.asm["ptx"], SHARED_LIMIT[capability])


class Interpreter:
    """
    Runs functions where Triton's kernels are interpreted on the CPU: in a process of its own, since TRITON_INTERPRET
    counts when Triton is imported.
    """

    def __init__(self):
        environment = os.environ | dict(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        env=environment)

    def __call__(self, module: str, function: str, *args, **kwargs):
        """
        module.function(*args, **kwargs) there. Arguments and result are pickled (tensors without their graph); its
        exception is raised here.
        """
        pickle.dump((module, function, args, kwargs), self.process.stdin)
        self.process.stdin.flush()
        result, error = pickle.load(self.process.stdout)
        if error is not None:
            raise error
        return result

    def close(self):
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="session")
def relative_rms():
    return _relative_rms


@pytest.fixture(scope="session")
def poison():
    return _poison


@pytest.fixture(scope="session")
def aot():
    return _aot


@pytest.fixture(scope="session")
def interpreter():
    """interpreter("kernels.some_op", "host_function", *args): see Interpreter."""
    worker = Interpreter()
    yield worker
    worker.close()


@pytest.fixture
def torch_threads():
    """torch_threads(n) lets PyTorch, and the loops with it, take n threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def chunks_in_float64(monkeypatch):
    """gated_linear_attention takes PyTorch's chunks in float64: its loops would be compiled for a comparison alone."""
    module = importlib.import_module("kernels.gated_linear_attention")
    serve = module.loops_serve
    monkeypatch.setattr(module, "loops_serve", lambda x: x.dtype != torch.float64 and serve(x))
