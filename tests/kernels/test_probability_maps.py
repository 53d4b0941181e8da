"""
Probability maps: what makes them probabilities, their formulas in float64, gradients, ties, masks and extreme scores.
"""

import math

import pytest
import torch

from kernels.probability_maps import MAPS, probability_map
from tests.errors import float_bound, rounding_bound

SHIFTED = {"softmax", "max_shift_rational", "min_shift_linear", "sparsemax", "entmax15"}
MONOTONE = set(MAPS) - {"taylor"}
every_map = pytest.mark.parametrize("name", MAPS)


def random_scores(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every_map
@pytest.mark.parametrize("n", [1, 2, 7, 300])
def test_a_probability(name, n):
    x = random_scores(5, n)
    p = probability_map(x, name)
    torch.testing.assert_close(p.sum(-1), torch.ones(5, dtype=torch.float64))
    assert (p >= 0).all() and (n > 1 or torch.equal(p, torch.ones_like(p)))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(probability_map(x[:, order], name), p[:, order])
    shifted = probability_map(x + 3, name)
    assert torch.allclose(shifted, p, atol=1e-12) == (name in SHIFTED or n == 1)
    torch.testing.assert_close(probability_map(x.float(), name), p.float(), rtol=float_bound(n, torch.float32),
                               atol=float_bound(n, torch.float32))


@pytest.mark.parametrize("name", sorted(MONOTONE))
def test_a_higher_score_has_no_lower_share(name):
    x = random_scores(50, 6)
    p = probability_map(x, name)
    x[:, 2] += 0.5
    assert (probability_map(x, name)[:, 2] >= p[:, 2]).all()


@pytest.mark.parametrize("name,confidence",
                         [("softmax", (0.9996, 1.0)), ("max_shift_rational", (0.931, 0.980)),
                          ("stablemax", (0.550, 0.700)), ("squareplus", (0.529, 0.690)),
                          ("min_shift_linear", (0.9991, 0.9996)), ("taylor", (61 / 70, 221 / 230)),
                          ("sparsemax", (1.0, 1.0)), ("entmax15", (1.0, 1.0))])
def test_confidence_in_a_leading_score(name, confidence):
    assert set(MAPS) == {"softmax", "max_shift_rational", "stablemax", "squareplus", "min_shift_linear", "taylor",
                         "sparsemax", "entmax15"}
    for lead, expected in zip((10.0, 20.0), confidence):
        x = torch.zeros(10, dtype=torch.float64)
        x[3] = lead
        assert probability_map(x, name, scaled=False)[3].item() == pytest.approx(expected, abs=6e-4)


def test_projections_are_the_optima():
    """sparsemax minimises |p - x|^2; entmax15 has p = max(x / 2 - tau, 0)^2: both checked against bisection."""
    x = random_scores(20, 9)
    for name, shape in (("sparsemax", lambda tau: (x - tau).clamp_min(0)),
                        ("entmax15", lambda tau: (x / 2 - tau).clamp_min(0).square())):
        low, high = x.amin(-1, keepdim=True) - 2, x.amax(-1, keepdim=True)
        for _ in range(80):
            middle = (low + high) / 2
            above = shape(middle).sum(-1, keepdim=True) > 1
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        torch.testing.assert_close(probability_map(x, name), shape(low), rtol=1e-9, atol=1e-9)


@every_map
@pytest.mark.parametrize("masked", [False, True])
def test_gradients(name, masked):
    x = random_scores(4, 5, seed=2).requires_grad_()
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(3)) < 0.7 if masked else None
    assert torch.autograd.gradcheck(lambda x: probability_map(x, name, mask), x)


@pytest.mark.parametrize("name", ["softmax", "max_shift_rational", "stablemax", "squareplus", "taylor"])
def test_all_start_with_the_slope_of_softmax(name):
    small = 1e-5 * random_scores(5)
    torch.testing.assert_close(probability_map(small, name), torch.softmax(small, -1), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name,scores", [("max_shift_rational", [1.0, 3.0, 3.0, 0.0]),
                                         ("min_shift_linear", [2.0, 0.0, 0.0, 3.0])])
def test_ties(name, scores):
    """The two that share the extreme differ by the whole correction, or by nothing."""
    grad, gaps = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64), {}
    for ties in ("first", "split"):
        x = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
        probability_map(x, name, ties=ties).backward(grad)
        assert x.grad.sum().item() == pytest.approx(0, abs=1e-12)
        gaps[ties] = (x.grad[1] - x.grad[2]).abs().item()
    assert gaps["first"] > 0.02 and gaps["split"] < 1e-12


def test_a_row_of_equal_scores_needs_no_correction():
    x, grad = torch.zeros(4, dtype=torch.float64, requires_grad=True), torch.tensor([1.0, 0.0, 0.0, 0.0],
                                                                                    dtype=torch.float64)
    probability_map(x, "max_shift_rational").backward(grad)
    torch.testing.assert_close(x.grad, (grad - 0.25) / 4)


@every_map
def test_masked_scores_do_not_count(name):
    x, mask = random_scores(6, 7), torch.rand(6, 7, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[0], mask[1] = False, torch.arange(7) == 3
    x[~mask] = 1e9
    p = probability_map(x, name, mask)
    assert not p[~mask].any() and not p[0].any() and p[1, 3] == 1
    for row in range(1, 6):
        torch.testing.assert_close(p[row, mask[row]], probability_map(x[row, mask[row]], name))


@every_map
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_extreme_scores_in_half_precision(name, dtype):
    x = torch.tensor([[1e4, -1e4, 0.0, 1.0], [-1e4] * 4, [1e4] * 4], dtype=dtype, requires_grad=True)
    p = probability_map(x, name)
    p[:, 0].sum().backward()
    assert p.dtype == dtype and p.isfinite().all() and x.grad.isfinite().all()
    assert (p.float().sum(-1) - 1).abs().max() < rounding_bound(1, dtype) + float_bound(4, torch.float32)


def test_squareplus_keeps_its_digits_far_below_zero():
    x = torch.tensor([-3000.0, -3000.0, -6000.0])
    expected = torch.tensor([2 / 5, 2 / 5, 1 / 5])  # phi(x) is about 1 / |x|
    torch.testing.assert_close(probability_map(x, "squareplus", scaled=False), expected,
                               rtol=float_bound(3, torch.float32), atol=0)


@pytest.mark.parametrize("options,message",
                         [(dict(name="shift"), "unknown probability map 'shift'; there are softmax"),
                          (dict(ties="last"), "ties must be first or split, got 'last'"),
                          (dict(power=0.0), "power and eps must lie above 0"),
                          (dict(eps=math.nan), "power and eps must lie above 0")])
def test_faults(options, message):
    with pytest.raises(ValueError, match=message):
        probability_map(torch.zeros(3), **options)
