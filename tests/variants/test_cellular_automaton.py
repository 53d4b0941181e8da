"""cellular_automaton: a step by its formula, lines, what begins where, masks."""

import pytest
import torch
import torch.nn.functional as F

import train_gpt
from tests.errors import float_bound, relative_rms
from tests.models import build, config_of, random_tokens, scramble, stream_of
from variants.cellular_automaton import positions_of


def test_a_step_by_hand():
    source = scramble(build("cellular_automaton:steps=3,channels=5,hidden=7,positions=off").source, 0.2)
    cells = source.cells
    assert cells[0] == -(-1024 // 5)
    state = torch.randn(sum(cells), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = source.step(state, 1.0, state.new_zeros(len(state), 0))
    begins = {sum(cells[:n]) for n in range(len(cells) + 1)}
    for i in (0, 1, cells[0] - 1, cells[0], cells[0] + 1, len(state) - 1):
        before = state[i] if i in begins else state[i - 1]
        after = state[i] if i + 1 in begins else state[i + 1]
        x = torch.cat((state[i], state[i] - before, state[i] - after))
        x = F.relu(source.first.weight @ x + source.first.bias)
        x = source.last @ F.relu(source.second.weight @ x + source.second.bias)
        assert relative_rms(got[i], state[i] + x) < 10 * float_bound(30, torch.float64)


def test_a_rule_of_zero_gives_the_first_matrices():
    model, baseline = build("cellular_automaton", dtype=torch.float32), build(dtype=torch.float32)
    with torch.no_grad():
        model.source.last.zero_()
        for gain in model.source.gains:
            gain.fill_(3.0)
    tokens = random_tokens()
    assert torch.equal(stream_of(model, tokens), stream_of(baseline, tokens))


def test_gains_of_zero_begin_as_the_baseline_and_learn():
    model, baseline = build("cellular_automaton", dtype=torch.float32), build(dtype=torch.float32)
    tokens = random_tokens()
    y = stream_of(model, tokens)
    assert torch.equal(y, stream_of(baseline, tokens))
    y.square().sum().backward()
    assert all(gain.grad.any() for gain in model.source.gains)


def test_a_matrix_grows_from_its_cells():
    source = scramble(build("cellular_automaton:steps=2,channels=6,hidden=7").source, 0.2)
    states = source.grow().split(source.cells)
    for number, (name, weight) in enumerate(source().items()):
        start = train_gpt.draw_normal(name, weight.shape, source.stds[name], 1).double()
        grown = states[number].flatten()[:weight.numel()].view(weight.shape)
        assert relative_rms(weight, start + source.gains[number] * grown) < 1e-12


def test_positions():
    features = positions_of(torch.Size((4, 8)), 0.25, 8, 4)
    assert features.shape == (8, 17) and (features[:, 0] == 0.25).all()
    angle = 3.14159265 * torch.tensor([1.0, 2, 4, 8])
    row, column = 1 / 4, 4 / 8  # where the fourth cell begins
    expected = torch.cat((torch.tensor([0.25]), *(f(torch.cat((row * angle, column * angle))) for f in (torch.sin,
                                                                                                       torch.cos))))
    torch.testing.assert_close(features[3], expected, rtol=0, atol=1e-5)


def test_masks():
    """Random in training, the same with the same seed, and without chance elsewhere."""
    source = scramble(build("cellular_automaton:p=0.5,steps=3").source, 0.2)
    name = next(iter(source.shapes))

    def grow(seed):
        torch.manual_seed(seed)
        return source()[name]

    source.train()
    assert torch.equal(grow(1), grow(1)) and not torch.equal(grow(1), grow(2))
    source.eval()
    assert torch.equal(grow(1), grow(2))
    # elsewhere a step goes half as far
    whole = source.step(source.grow(), 1.0, torch.cat((source.features, source.kinds[source.kind_of_cell]), -1))
    half = source.step(source.grow(), 0.5, torch.cat((source.features, source.kinds[source.kind_of_cell]), -1))
    torch.testing.assert_close(2 * (half - source.grow()), whole - source.grow())


def test_published_makes_everything():
    config = config_of(channel_scales=True, tied_embedding=True, value_embeddings=0, smear=False, attention_gate=False)
    model = build("cellular_automaton:style=published,hidden=128,steps=2", config=config, dtype=torch.float32)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"source"}
    assert sum(p.numel() for p in model.parameters()) == 24_832
    made, size = model.source(), sum(p.numel() for p in build(config=config).parameters())
    assert sum(tensor.numel() for tensor in made.values()) == size
    # the rule begins without effect, scales near zero
    assert torch.equal(torch.cat([t.flatten() for t in made.values()]), model.source.start.flatten()[:size])
    assert made["blocks.0.stream_mix"].abs().max() < 0.2
    model.source.provide()
    assert model.head.projection.weight is model.embedding.weight
    assert model.blocks[0].attention.query_gain.std().item() == pytest.approx(0.02, rel=3)
