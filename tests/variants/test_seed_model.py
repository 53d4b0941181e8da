"""seed_model: the two kinds of random matrix, the frozen baseline, what a move of phi does."""

import pytest
import torch

import train_gpt
from kernels import sign_projection
from tests.errors import float_bound, relative_rms
from tests.kernels.test_sign_projection import signs
from tests.models import build, config_of, random_tokens, stream_of
from variants import seed_model
from variants.seed_model import normal_pieces


@pytest.fixture(autouse=True)
def tables_in_float64(monkeypatch):
    """sign_projection takes PyTorch's tables in float64: its loops would be compiled for a comparison alone."""
    serve = sign_projection.loops_serve
    monkeypatch.setattr(sign_projection, "loops_serve", lambda x: x.dtype != torch.float64 and serve(x))


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
