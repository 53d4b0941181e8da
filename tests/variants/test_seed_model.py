"""seed_model: the signs' bits, products with them, the two kinds of random matrix, the frozen baseline."""

import pytest
import torch

import train_gpt
from tests.errors import float_bound, relative_rms
from tests.models import build, config_of, random_tokens, stream_of
from variants import seed_model
from variants.seed_model import multiply_signs, multiply_signs_transposed, normal_pieces, sign_bytes

CPU = torch.device("cpu")


def word(row: int, column: int, seed: int) -> int:
    """A word of the signs by plain integers."""
    def mix(x):
        x ^= x >> 16
        x = x * 0x21F0AAAD % 2 ** 32
        x ^= x >> 15
        x = x * 0x735A2D97 % 2 ** 32
        return x ^ x >> 15

    return mix((mix(row + seed) + column * (2 ** 32 - 1_640_531_527)) % 2 ** 32)


def signs(first: int, rows: int, dim: int, seed: int) -> torch.Tensor:
    """S (rows, dim) by plain integers."""
    bits = [[word(row, j // 32, seed) >> j % 32 & 1 for j in range(dim)] for row in range(first, first + rows)]
    return 2 * torch.tensor(bits, dtype=torch.float64) - 1


def test_bits_are_the_formulas():
    assert [f"{word(row, column, 1):08x}" for row, column in ((0, 0), (1, 0), (0, 1), (2 ** 24, 7))] == [
        "cafeba47", "cab8c8eb", "f53ae6cc", "fd53faa4"]
    for first, seed in ((0, 1), (1000, 2 ** 31 - 1)):
        got = sign_bytes(first, first + 5, 77, seed, CPU)
        expected = [[word(row, g // 4, seed % 2 ** 31) >> 8 * (g % 4) & 255 for g in range(10)]
                    for row in range(first, first + 5)]
        assert (got - 256 * torch.arange(10)).tolist() == expected


@pytest.mark.gpu
def test_bits_are_the_same_on_a_gpu():
    expected = sign_bytes(2 ** 20, 2 ** 20 + 1000, 500, 3, CPU)
    assert torch.equal(sign_bytes(2 ** 20, 2 ** 20 + 1000, 500, 3, torch.device("cuda")).cpu(), expected)


def test_signs_are_balanced_and_independent():
    rows, dim = 4096, 64
    s = seed_model.signs_of_bytes(torch.zeros(()))[sign_bytes(0, rows, dim, 1, CPU) % 256].flatten(1)
    assert s.shape == (rows, dim)
    # sums of so many independent signs pass six deviations in one case of 10^9
    assert s.mean(0).abs().max() < 6 / rows ** 0.5 and s.mean(1).abs().max() < 6 / dim ** 0.5
    gram = (s.T @ s / rows - torch.eye(dim)).abs().max()
    assert gram < 6 / rows ** 0.5


@pytest.mark.parametrize("dim", (1, 8, 13, 40))
def test_products_and_adjoint(dim, monkeypatch):
    monkeypatch.setattr(seed_model, "SIGNS_AT_ONCE", 7 * dim)  # several pieces
    generator = torch.Generator().manual_seed(1)
    phi, g = (torch.randn(n, dtype=torch.float64, generator=generator) for n in (dim, 23))
    s = signs(100, 23, dim, 5)
    assert relative_rms(multiply_signs(phi, 100, 23, 5), s @ phi) < 10 * float_bound(dim, torch.float64)
    back = multiply_signs_transposed(g, dim, 100, 23, 5)
    assert relative_rms(back, s.T @ g) < 10 * float_bound(23, torch.float64)
    phi.requires_grad_()
    assert torch.autograd.gradcheck(lambda phi: seed_model.SignProduct.apply(phi, 100, 23, 5), phi)


@pytest.mark.parametrize("scaled", (False, True))
def test_normal_products_and_adjoint(scaled, monkeypatch):
    monkeypatch.setattr(seed_model, "NORMAL_ROWS", 10)
    phi, g = torch.randn(6, dtype=torch.float64), torch.randn(23, dtype=torch.float64)
    pieces = [matrix for _, _, matrix in normal_pieces(6, 50, 23, 3, scaled, phi)]
    assert [len(piece) for piece in pieces] == [10, 10, 3]
    if scaled:
        assert all((piece.norm(dim=0) - 1).abs().max() < 1e-12 for piece in pieces)
    product = seed_model.NormalProduct.apply(phi.requires_grad_(), 50, 23, 3, scaled)
    assert product.detach() @ g == pytest.approx((phi @ (torch.cat(pieces).T @ g)).item(), rel=1e-12)
    assert torch.autograd.gradcheck(lambda phi: seed_model.NormalProduct.apply(phi, 50, 23, 3, scaled), phi)


def test_phi_of_zero_is_the_frozen_baseline():
    model, baseline = build("seed_model:dim=16", dtype=torch.float32), build(dtype=torch.float32)
    tokens = random_tokens()
    assert torch.equal(stream_of(model, tokens), stream_of(baseline, tokens))
    assert not model.source.phi.any() and sorted(model.source.shapes) == sorted(train_gpt.matrices_of(baseline))


@pytest.mark.parametrize("options, size", [("", 8 ** -0.5), ("normalize=rows", 32_768 ** -0.5),
                                           ("per=matrix", 8 ** -0.5)])
def test_matrices_move_as_the_formula_says(options, size):
    model = build(f"seed_model:dim=8,{options}".rstrip(","))
    source = model.source
    with torch.no_grad():
        source.phi.normal_(generator=torch.Generator().manual_seed(2))
    first = 0
    for number, (name, weight) in enumerate(source().items()):
        phi = source.phi[number if "matrix" in options else 0]
        rows = weight[:1].numel()
        start = train_gpt.draw_normal(name, weight.shape, source.stds[name], 1)[0].double()
        expected = start + size * signs(first, rows, 8, model.config.seed) @ phi
        assert relative_rms(weight[0], expected) < 10 * float_bound(8, torch.float64), name
        first += weight.numel()
    assert first == 32_768


def test_published_start():
    model = build("seed_model:dim=50,style=published", dtype=torch.float32)
    assert model.source.phi.std().item() == pytest.approx(0.01, rel=0.4)
    assert model.source.start.std().item() == pytest.approx(0.02, rel=0.05)


def test_seeds_have_their_own_subspaces():
    """Equal steps of phi move the matrices of another seed another way."""
    moves = []
    for seed in (1, 2):
        model = build("seed_model:dim=8", config=config_of(seed=seed))
        with torch.no_grad():
            model.source.phi.fill_(1.0)
        name = next(iter(model.source.shapes))
        moves.append(model.source()[name] - model.source.start[:1024].view(32, 32))
    assert relative_rms(*moves) > 0.5
