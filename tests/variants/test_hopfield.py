"""hopfield: retrieval against its formula and its energy, the published head against its own, sizes."""

import pytest
import torch
import torch.nn.functional as F

from tests.errors import float_bound, relative_rms
from tests.models import build, config_of, random_tokens, scramble, stream_of
from variants.hopfield import retrieve


def energy(h: torch.Tensor, patterns: torch.Tensor, beta: float) -> torch.Tensor:
    """E of states (N, D) but for a constant."""
    return -torch.logsumexp(beta * h @ patterns.T, -1) / beta + h.square().sum(-1) / 2


@pytest.mark.parametrize("gate", (0.1, 0.5, 1.0))
def test_energy_never_rises(gate):
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randn(40, 8, dtype=torch.float64, generator=generator)
    h = 3 * torch.randn(50, 8, dtype=torch.float64, generator=generator)
    beta, g = (torch.tensor([number], dtype=torch.float64) for number in (0.7, gate))
    before = energy(h, patterns, 0.7)
    for _ in range(6):
        h = retrieve(h, patterns, None, beta, g)
        after = energy(h, patterns, 0.7)
        assert (after <= before + 1e-12).all()
        before = after


@pytest.mark.parametrize("options, n", [("steps=2", 257), ("steps=3,patterns=9", 9)])
def test_retrieval_formula(options, n):
    model = scramble(build(f"hopfield:{options}"), 0.2)
    head, x = model.head, torch.randn(2, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    patterns = head.projection.weight[:257] if head.patterns is None else head.patterns
    h = x
    for _ in range(head.steps):
        p = torch.softmax(head.beta * (h @ head.mix.T) @ patterns.T, -1)
        h = (1 - head.gate) * h + head.gate * (p @ patterns)
    assert patterns.shape[0] == n
    got, weight = head.operands(x)
    assert relative_rms(got, h) < 10 * float_bound(n + 32, torch.float64)
    assert weight is head.projection.weight


def test_gate_of_zero_is_the_baseline():
    model, baseline = build("hopfield:gate=0", dtype=torch.float32), build(dtype=torch.float32)
    tokens, targets = random_tokens(), random_tokens(seed=2)
    assert torch.equal(model(tokens, targets), baseline(tokens, targets))
    with torch.no_grad():
        model.head.gate.fill_(0.5)
        for head in (model.head, baseline.head):
            head.projection.weight.normal_(generator=torch.Generator().manual_seed(1))
    assert not torch.equal(model(tokens, targets), baseline(tokens, targets))


def test_published_head():
    config = config_of(zero_init_projections=True)
    model = build("hopfield:style=published,alpha=0.2", config=config)
    head = model.head
    assert relative_rms(head.mix @ head.mix.T, torch.eye(32)) < 10 * float_bound(32, torch.float32)
    assert not head.second.any() and head.alpha.item() == pytest.approx(0.2)

    # the score by its formula, and the gradient that c does not take
    scramble(model, 0.1)
    x = torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    h, c = x, x.detach()
    for _ in range(3):
        h = h - head.alpha * F.gelu(torch.cat((h, c), -1) @ head.first.T) @ head.second.T
    e = head.projection.weight
    score = head.scale * (h @ head.mix.T @ e.T - e.square().sum(-1))
    got, weight = head.operands(x)
    assert relative_rms(got @ weight.T, score) < 10 * float_bound(200, torch.float64)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (got @ weight.T, score)]
    assert relative_rms(*gradients) < 10 * float_bound(300, torch.float64)


def test_published_feed_forward_has_gelu():
    mlp = build("hopfield:style=published").blocks[0].mlp
    x = torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    expected = F.gelu(x @ mlp.fc.weight.T) @ mlp.proj.weight.T
    assert relative_rms(mlp(x), expected) < float_bound(96, torch.float64)


def test_counts():
    def extra(options):
        sizes = [sum(p.numel() for p in model.parameters()) for model in (build(f"hopfield:{options}"), build())]
        return sizes[0] - sizes[1]

    assert extra("steps=1") == 32 ** 2 + 2
    assert extra("steps=1,patterns=10") == 32 ** 2 + 2 + 320


def test_the_stream_is_untouched():
    tokens = random_tokens()
    assert torch.equal(stream_of(build("hopfield"), tokens), stream_of(build(), tokens))
