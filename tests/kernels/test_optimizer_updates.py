"""
The optimizers' elementwise parts: the references against the trainer's own, and the CPU's loops against the references
in float64.
"""

import pytest
import torch

import train_gpt
from kernels import optimizer_updates as updates
from tests.errors import float_bound, relative_rms
from tests.kernels.marks import LOOP_FLOATS

SHAPES = [(1, 1, 1), (3, 5, 5), (2, 7, 33), (2, 33, 7), (4, 128, 128)]


def make_inputs(shape, seed=0):
    """
    (data, gradient, momentum, second) in float64; second as Muon's state, gradients and running squares of one size.
    """
    generator = torch.Generator().manual_seed(seed)
    data, gradient, momentum = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(3))
    second = torch.rand(shape, dtype=torch.float64, generator=generator).add_(0.5)
    second = second[..., :1] if shape[-2] >= shape[-1] else second[..., :1, :]
    return data, gradient, momentum, second.contiguous()


def muon(nesterov, step, tensors, beta2):
    """All that a step of Muon changes, with train_gpt's orthogonalisation left out."""
    data, gradient, momentum, second = tensors
    update = nesterov(gradient, momentum, 0.9)
    step(data, update, second, 0.1, 0.02, beta2)
    return [data, momentum, update, second]


def adam(step, tensors):
    data, gradient, mean, _ = tensors
    square = gradient.square() * 0.7 + 0.01
    step(data, gradient, mean, square, 0.1, 0.02, (0.8, 0.95), (0.9, 0.8))
    return [data, mean, square]


def copies(tensors, dtype):
    return [x.to(dtype, copy=True) for x in tensors]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("beta2", [0.95, 0.0])
def test_references_are_the_trainers(shape, beta2, monkeypatch):
    """
    With an orthogonalisation that returns its input. The trainer's rates are tensors of float32: that rounding is what
    may differ.
    """
    monkeypatch.setattr(train_gpt, "orthogonalize", lambda x: x)
    ours, theirs = (copies(make_inputs(shape), torch.float32) for _ in range(2))
    muon(updates.nesterov_reference, updates.normalised_step_reference, ours, beta2)
    data, gradient, momentum, second = theirs
    train_gpt.Muon.update(data, gradient, momentum, second, torch.tensor(0.1), torch.tensor(0.02), torch.tensor(0.9),
                          beta2)
    assert all(relative_rms(x, y) < float_bound(shape[-1] * shape[-2], torch.float32)
               for x, y in zip(ours, (data, gradient, momentum, second)))
    data, gradient, mean, _ = copies(make_inputs(shape), torch.float32)
    square = gradient.square() * 0.7 + 0.01
    train_gpt.Adam.update(data, gradient, mean, square, torch.tensor(0.1), torch.tensor(0.02), 0.8, 0.95,
                          torch.tensor(0.9), torch.tensor(0.8))
    expected = adam(updates.adam_step_reference, copies(make_inputs(shape), torch.float32))
    assert all(relative_rms(x, y) < float_bound(4, torch.float32) for x, y in zip((data, mean, square), expected))


@pytest.mark.parametrize("dtype", LOOP_FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("beta2", [0.95, 0.0])
def test_loops(shape, beta2, dtype):
    exact = copies(make_inputs(shape), dtype)
    results = muon(updates.nesterov, updates.normalised_step, copies(exact, dtype), beta2)
    expected = muon(updates.nesterov_reference, updates.normalised_step_reference, copies(exact, torch.float64), beta2)
    assert all(x.dtype == dtype and relative_rms(x, y) < float_bound(shape[-1] * shape[-2], dtype)
               for x, y in zip(results, expected))
    results = adam(updates.adam_step, copies(exact, dtype))
    expected = adam(updates.adam_step_reference, copies(exact, torch.float64))
    assert all(x.dtype == dtype and relative_rms(x, y) < float_bound(4, dtype) for x, y in zip(results, expected))


def test_a_matrix_of_zeros_stays_finite():
    data, gradient, momentum, second = (torch.zeros_like(x) for x in copies(make_inputs((2, 4, 4)), torch.float32))
    results = muon(updates.nesterov, updates.normalised_step, (data, gradient, momentum, second), 0.95)
    assert all(x.isfinite().all() for x in results)


def test_nan_stays_in_its_matrix():
    tensors = copies(make_inputs((3, 5, 5)), torch.float32)
    tensors[1][1, 2, 2] = float("nan")
    results, expected = (muon(*functions, copies(tensors, torch.float32), 0.95) for functions in (
        (updates.nesterov, updates.normalised_step), (updates.nesterov_reference, updates.normalised_step_reference)))
    assert all(torch.equal(x.isnan(), y.isnan())
               for x, y in zip(results, expected)) and results[0][1].isnan().any() and results[0][0].isfinite().all()


def test_what_is_not_contiguous_is_the_references():
    data, gradient, momentum, second = copies(make_inputs((2, 7, 33)), torch.float32)
    apart = torch.cat((data, data), 2)[..., :33]
    updates.normalised_step(apart, gradient, second.clone(), 0.1, 0.02, 0.95)
    updates.normalised_step_reference(data, gradient, second, 0.1, 0.02, 0.95)
    assert torch.equal(apart, data)
