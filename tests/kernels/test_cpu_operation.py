"""
What the CPU's loops of all operations share: registered and eager form are the same, compilers see one node, and
nothing is read or written outside an array.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from kernels import backend
from kernels.norm_rotary import norm_rotary
from kernels.relu_squared_feed_forward import relu_squared_feed_forward
from kernels.residual_norm import scaled_sum_norm
from kernels.softcapped_cross_entropy import softcapped_cross_entropy
from tests.kernels.marks import slow

ROOT = Path(__file__).resolve().parents[2]
FILES = [f"tests/kernels/test_{name}.py" for name in (
    "norm_rotary", "relu_squared_feed_forward", "residual_norm", "softcapped_cross_entropy", "optimizer_updates")]
FILES.append("tests/kernels/splanifold/test_cpu.py")


def draw(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


TABLES = draw((5, 2), (5, 2), seed=1)
TARGETS = torch.tensor([0, 6, 3, 2])

# function of tensors with gradients -> tensors; their shapes
CASES = dict(
    norm_rotary=(lambda x: norm_rotary(x, *TABLES, backend="loops"), [(2, 5, 3, 8)]),
    relu_squared_feed_forward=(partial(relu_squared_feed_forward, backend="loops"), [(2, 3, 4), (6, 4), (5, 6)]),
    softcapped_cross_entropy=(partial(softcapped_cross_entropy, targets=TARGETS, backend="loops"), [(4, 5), (7, 5)]),
    plain_sum=(partial(scaled_sum_norm, backend="loops"), [(2, 3, 8), (2, 3, 8)]),
    scaled_sum=(partial(scaled_sum_norm, backend="loops"), [(2, 3, 8), (2, 3, 8), (2,)]),
)


def both_passes(function, tensors):
    tensors = [x.detach().requires_grad_() for x in tensors]
    results = function(*tensors)
    results = [results] if isinstance(results, torch.Tensor) else list(results)
    return [*results, *torch.autograd.grad(results, tensors, draw(*(x.shape for x in results), seed=2))]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dynamic", [True, *slow(False)])
def test_compiled_equals_eager(name, dynamic):
    """Whole graphs, of other sizes too, bit for bit: the same loops run."""
    function, shapes = CASES[name]
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    tensors = draw(*shapes)
    assert all(torch.equal(x, y) for x, y in zip(both_passes(compiled, tensors), both_passes(function, tensors),
                                                 strict=True))


@pytest.mark.parametrize("name", CASES)
def test_registered_equals_eager(name, monkeypatch):
    """Without plain tensors every call goes through the dispatcher."""
    function, shapes = CASES[name]
    tensors = draw(*shapes)
    expected = both_passes(function, tensors)
    monkeypatch.setattr(backend, "_is_plain", lambda x: False)
    assert all(torch.equal(x, y) for x, y in zip(both_passes(function, tensors), expected, strict=True))


def test_registrations():
    x, y, scales = (x.requires_grad_() for x in draw((2, 3, 8), (2, 3, 8), (2,)))
    ops = torch.ops.knotgpt
    rows = draw((2, 5, 3, 8))[0].requires_grad_()
    weights = [x.requires_grad_() for x in draw((6, 8), (5, 6))]
    calls = [(ops.scaled_sum_norm_loops, (x, y, scales, 1e-6)), (ops.scaled_sum_norm_loops, (x, y, None, 1e-6)),
             (ops.norm_rotary_loops, (rows, *TABLES, 1e-6)), (ops.relu_squared_feed_forward_loops, (x, *weights)),
             (ops.softcapped_cross_entropy_loops,
              (*(x.requires_grad_() for x in draw((4, 5), (7, 5))), TARGETS, 15.0, 3, [True, True]))]
    for operation, arguments in calls:
        assert set(torch.library.opcheck(operation.default, arguments).values()) == {"SUCCESS"}


def test_fake_tensors_are_not_read():
    with torch._subclasses.FakeTensorMode():
        results = both_passes(CASES["scaled_sum"][0], [torch.zeros(shape) for shape in CASES["scaled_sum"][1]])
    assert [x.shape for x in results] == [(2, 3, 8)] * 4 + [(2,)]


def test_loops_are_as_many_threads_as_pytorchs_and_repeat():
    for name, (function, shapes) in CASES.items():
        tensors = draw(*shapes)
        assert all(torch.equal(x, y)
                   for x, y in zip(both_passes(function, tensors), both_passes(function, tensors))), name


@pytest.mark.slow
def test_nothing_is_read_outside_an_array():
    environment = os.environ | dict(NUMBA_BOUNDSCHECK="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "slow or not slow",
               "-k", "loops", *FILES]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]
