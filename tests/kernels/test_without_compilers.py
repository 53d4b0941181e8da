"""Where Triton is missing, every module of kernels/ can be imported, and other backends serve."""

import pytest

from tests.kernels.processes import run_process

SCRIPT = """
import importlib
import pkgutil
import sys
from unittest import mock

sys.modules["triton"] = None
import torch

import kernels

for module in pkgutil.walk_packages(kernels.__path__, "kernels."):
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        assert error.name in ("numba", "llvmlite"), error  # Numba may be missing, too
    print("imports", module.name)

from kernels.gated_linear_attention import gated_linear_attention
from kernels.splanifold import SplanifoldControls, splanifold
from kernels.topological_attention import loglinear, loglinear_triton, topological_attention_tiled
from kernels.topological_attention.reference import Arguments


def refuse_triton(function, *arguments):
    try:
        function(*arguments, backend="triton")
    except ValueError as error:
        if "'triton' needs CUDA tensors and Triton" in str(error):
            print("refuses", function.__name__)


x = torch.ones(1, 3, 1, 2, requires_grad=True)
gated_linear_attention(x, x, x, backend="chunked").sum().backward()
assert x.grad.isfinite().all()
refuse_triton(gated_linear_attention, x, x, x)

r = torch.rand(100, 2, 3, requires_grad=True)
controls = SplanifoldControls(torch.ones(2, 2, 5), *(torch.ones(2, 2, 5, 3) for _ in range(3)))
splanifold(r, controls).sum().backward()
assert r.grad.isfinite().all()
refuse_triton(splanifold, r, controls)

a = torch.ones(1, 3, 1, requires_grad=True)
with mock.patch.object(loglinear, "cpu_loops", lambda name: None):  # they would be compiled
    assert topological_attention_tiled(a, a, torch.ones(1, 3, 1, 2)).tolist() == [[[[1.0, 1.0]]] * 3]
assert not loglinear_triton.serves(Arguments(None, None, torch.zeros(1, 2, 1, 4)))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("without_triton")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    return run_process(script, cache=folder).stdout.splitlines()


def test_every_module_imports_and_other_backends_serve(answers):
    names = {"backend", "embedding_lookup", "norm_rotary", "residual_norm", "short_convolution", "symmetric_product",
             "lane_scan", "splanifold.fused", "topological_attention.tiled", "gated_linear_attention.chunked_triton"}
    assert names <= {answer.removeprefix("imports kernels.") for answer in answers}


def test_triton_is_refused(answers):
    assert {"refuses gated_linear_attention", "refuses splanifold"} <= set(answers)
