"""The short convolution against its formula in plain loops, and continued from earlier tokens."""
import torch

from kernels import short_convolution
from tests.errors import float_bound


def rows(B=2, T=11, C=3, n=4):
    generator = torch.Generator().manual_seed(0)
    x, taps = (torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in ((B, T, C), (n, C)))
    doc_start = torch.tensor([[0] * 5 + [5] * 6, [0] + [1] * 10])
    return x, taps, torch.arange(T) - doc_start


def test_it_is_the_formula_and_stays_in_the_document():
    x, taps, positions = rows()
    expected = torch.zeros_like(x)
    for b in range(2):
        for t in range(11):
            for shift in range(min(4, int(positions[b, t]) + 1)):
                expected[b, t] += taps[3 - shift] * x[b, t - shift]
    largest = 4 * (x.abs().max() * taps.abs().max()).item()
    torch.testing.assert_close(short_convolution(x, taps, positions), expected, rtol=0,
                               atol=float_bound(4, torch.float64) * largest)


def test_gradients():
    x, taps, positions = rows()
    assert torch.autograd.gradcheck(lambda x, taps: short_convolution(x, taps, positions), (x, taps))


def test_a_row_goes_on():
    x, taps, positions = rows()
    whole, padded = short_convolution(x, taps, positions), torch.cat((x.new_zeros(2, 3, 3), x), 1)
    for t in range(11):
        assert torch.equal(short_convolution(x[:, t:t + 1], taps, positions[:, t:t + 1], padded[:, t:t + 4]), whole[:, t:t + 1])
