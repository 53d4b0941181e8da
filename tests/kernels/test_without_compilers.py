"""Where Triton or Numba is missing, every module of kernels/ that does without can be imported and is right."""

import pytest

from tests.kernels.processes import run_process

SCRIPT = """
import importlib
import pkgutil
import sys


class NoNumba:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("numba", "llvmlite"):
            raise ImportError("No module named 'numba'", name="numba")


sys.modules["triton"] = None
sys.meta_path.insert(0, NoNumba())
import torch

import kernels


def import_all():
    for module in pkgutil.walk_packages(kernels.__path__, "kernels."):
        try:
            importlib.import_module(module.name)
            print("imported", module.name)
        except ImportError as error:
            assert error.name in ("numba", "llvmlite"), error


def refuse_triton(function, *arguments):
    try:
        function(*arguments, backend="triton")
    except ValueError as error:
        if "'triton' needs CUDA tensors and Triton" in str(error):
            print("refused", function.__name__)


# Neither is there.
import_all()
from kernels.gated_linear_attention import gated_linear_attention
from kernels.splanifold import SplanifoldControls, splanifold
from kernels.topological_attention import loglinear_triton, topological_attention_tiled
from kernels.topological_attention.reference import Arguments
from tests.errors import relative_rms
from tests.kernels.topological_attention.test_topological_attention import check, inputs

x = torch.ones(1, 3, 1, 2, requires_grad=True)
gated_linear_attention(x, x, x).sum().backward()
assert x.grad.isfinite().all()
refuse_triton(gated_linear_attention, x, x, x)

r = torch.rand(100, 2, 3, requires_grad=True)
controls = SplanifoldControls(torch.ones(2, 2, 5), *(torch.ones(2, 2, 5, 3) for _ in range(3)))
splanifold(r, controls).sum().backward()
assert r.grad.isfinite().all()
refuse_triton(splanifold, r, controls)

a = torch.ones(1, 3, 1, requires_grad=True)
assert topological_attention_tiled(a, a, torch.ones(1, 3, 1, 2)).tolist() == [[[[1.0, 1.0]]] * 3]
assert not loglinear_triton.serves(Arguments(None, None, torch.zeros(1, 2, 1, 4)))
for options in ({}, dict(decay=0.1, bias=1.0, docs=0.02), dict(coordinates=False)):
    for dtype in (torch.float32, torch.float64):
        check(relative_rms, *inputs(70, dtype=dtype, **options), window=30)
assert "numba" not in sys.modules
print("no Numba so far")

# Only Triton is missing, as on a Mac.
sys.meta_path.pop(0)
import_all()
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("without_compilers")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    return run_process(script, cache=folder)


def imported(lines):
    return {line.removeprefix("imported kernels.") for line in lines}


def test_other_backends_serve(result):
    without_both = result.stdout.split("no Numba so far")[0].splitlines()
    assert {"embedding_lookup", "norm_rotary", "short_convolution", "symmetric_product", "low_rank_pair",
            "sign_projection", "lane_scan.chunked_triton", "splanifold.fused",
            "topological_attention.tiled"} <= imported(without_both)
    assert {"refused gated_linear_attention", "refused splanifold"} <= set(without_both)


def test_stderr_says_once_why_loops_are_slow(result):
    assert result.stderr.count("the CPU's compiled loops need Numba") == 1
    assert result.stderr.count("pip install numba") == 1


def test_loops_import_without_triton(result):
    pytest.importorskip("numba")
    without_triton = result.stdout.split("no Numba so far")[1].splitlines()
    assert {"loops", "simd", "sign_projection.cpu", "splanifold.cpu",
            "topological_attention.loglinear_cpu"} <= imported(without_triton)
