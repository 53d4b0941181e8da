"""pause_tokens: where pauses stand, what they see and are seen by, documents, and what stays the baseline's."""

import pytest
import torch

import train_gpt
from tests.errors import float_bound, relative_rms
from tests.models import build, config_of, random_tokens, scramble, stream_of
from variants.pause_tokens import lay_out

T = 16


def slots_of(layout, T: int) -> list[int]:
    """Where the tokens stand, by a layout's source."""
    return [(layout.source == t).nonzero().item() for t in range(T)]


def test_tokens_and_pauses_fill_the_slots_once():
    after = torch.tensor([0, 3, 0, 0, 2, 0])
    layout = lay_out(after, 3, 1, False)
    assert layout.source.tolist() == [0, 1, 6, 7, 8, 2, 3, 4, 6, 7, 5]
    assert layout.read.tolist() == slots_of(layout, 6) == [0, 1, 5, 6, 7, 10]
    assert lay_out(after, 3, 1, True).read.tolist() == [0, 4, 5, 6, 9, 10]
    assert lay_out(after, 3, 4, False).source.tolist() == [*layout.source.tolist(), 6]
    assert lay_out(after, 1, 1, False).source.tolist() == [0, 1, 6, 6, 6, 2, 3, 4, 6, 6, 5]


@pytest.mark.parametrize("options, slots", [
    ("num=2,every=4", [t + 2 * (t // 4) for t in range(T)]),
    ("num=3,every=5", [t + 3 * (t // 5) for t in range(T)])])
def test_formula_of_slots(options, slots):
    model = build(f"pause_tokens:{options}")
    layout = model.lay_out(T, torch.device("cpu"))
    assert slots_of(layout, T) == slots
    count = int(options[4]) * ((T - 1) // int(options[-1]))
    assert len(layout.source) == T + count
    published = build(f"pause_tokens:{options},style=published").lay_out(T, torch.device("cpu"))
    assert len(published.source) == T + int(options[4]) * (T // int(options[-1]))


def test_goyal_is_random_in_training_alone():
    model = build("pause_tokens:style=goyal,fraction=0.25")
    def draw():
        return model.lay_out(T, torch.device("cpu"))

    model.train()
    layouts = [draw() for _ in range(8)]
    assert {len(layout.source) for layout in layouts} == {T + 4}
    assert len({tuple(layout.source.tolist()) for layout in layouts}) > 1
    model.eval()
    assert torch.equal(draw().source, draw().source)
    assert all(int(layout.source[read]) in (t, T) for layout in layouts for t, read in enumerate(layout.read.tolist()))


def test_a_row_by_hand():
    """The stream of tokens is that of a row in which the pauses stand as tokens of a table would."""
    model = build("pause_tokens:num=2,every=4", config=config_of(smear=False, value_embeddings=0))
    tokens = random_tokens()
    layout = model.lay_out(T, tokens.device)
    masks = train_gpt.GPT.masks(model, torch.zeros(2, len(layout.source), dtype=torch.int64))
    rows = torch.cat((model.embedding.weight, model.pauses))
    ids = torch.cat((tokens, torch.full((2, 2), 0)), 1)[:, layout.source.clamp_max(T)]
    is_pause = layout.source >= T
    ids[:, is_pause] = len(model.embedding.weight) + (layout.source[is_pause] - T)
    x = model.embedding_norm(rows[ids])
    angles = torch.arange(len(layout.source))[:, None] * model.frequencies
    contexts = [train_gpt.AttentionContext(mask, (angles.cos(), angles.sin()), x, None) for mask in masks]
    expected = model.run_blocks(x, contexts)[:, ~is_pause]
    assert relative_rms(stream_of(model, tokens), expected) < float_bound(64, torch.float64)


def test_pauses_reach_later_tokens_only():
    model = scramble(build("pause_tokens:num=2,every=4"), 0.1)
    tokens = random_tokens()
    before = stream_of(model, tokens)
    with torch.no_grad():
        model.pauses.add_(1)
    changed = (stream_of(model, tokens) - before).abs().amax((0, 2)) > 1e-9
    assert changed.tolist() == [t >= 4 for t in range(T)]


def test_a_pause_is_of_the_document_before_it():
    """With a document that begins right behind a pause, the second document does not see the pause."""
    model = scramble(build("pause_tokens:num=2,every=4"), 0.1)
    tokens = random_tokens()
    tokens[:, 4] = 256
    before = stream_of(model, tokens)
    with torch.no_grad():
        model.pauses.add_(1)
    changed = (stream_of(model, tokens) - before).abs().amax((0, 2)) > 1e-9
    assert changed.tolist() == [t >= 8 for t in range(T)]
    positions = model.masks(tokens)[0].positions[0].tolist()
    assert positions == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15][:len(positions)]


def test_the_loss_is_of_tokens_alone():
    model = scramble(build("pause_tokens:num=2,every=4", config=config_of(vocab_size=256)), 0.05).eval()
    tokens, targets = random_tokens(), random_tokens(seed=2)
    logits = model(tokens)
    assert logits.shape == (2, T, 256)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(tokens, targets), expected, rtol=1e-5, atol=1e-5)


def test_value_embeddings_and_documents_of_id_zero():
    """A pause adds no value; where the id 0 begins documents, pauses do not."""
    model = build("pause_tokens:num=2,every=4", config=config_of(document_token=0))
    tokens = random_tokens() + 1
    _, contexts = model.embed(tokens, model.masks(tokens))
    is_pause = model.layout.source >= T
    assert not contexts[0].value[:, is_pause].any() and contexts[0].value[:, ~is_pause].all(-1).any()
    assert contexts[0].mask.positions[0].tolist() == list(range(len(is_pause)))
