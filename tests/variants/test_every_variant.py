"""What every file in variants/ has to satisfy, whoever wrote it: on a tiny model of 4 layers, 32 channels, rows of 32 bytes, float32, CPU."""

import inspect, math, typing
from itertools import combinations

import pytest
import torch

import train_gpt, variants

NAMES = variants.available()
T, VOCABULARY, END_OF_TEXT = 32, 257, 256
TINY = train_gpt.make_config(dict(vocab_size=VOCABULARY, layers=4, model_dim=32, heads=2, head_dim=16, mlp_hidden=64, sequence_length=T,
                                  batch_tokens=4 * T))
ALONE = train_gpt.Ranks(0, 1, torch.device("cpu"), torch.float32)

def is_literal(kind) -> bool:
    return typing.get_origin(kind) is typing.Literal

def specs_of(name: str) -> list[str]:
    """The variant as it is, and with every other choice of its on/off and Literal options."""
    try:
        options = variants.load(name).Options
        kinds, defaults = typing.get_type_hints(options), options()
    except Exception:  # the tests of the plain name show the fault
        return [name]
    choices = {key: (True, False) if kind is bool else typing.get_args(kind) for key, kind in kinds.items() if kind is bool or is_literal(kind)}
    return [name] + [f"{name}:{key}={value}" for key, values in choices.items() for value in values if value != getattr(defaults, key)]

SPECS = [spec for name in NAMES for spec in specs_of(name)]
every_variant, every_spec = pytest.mark.parametrize("spec", NAMES), pytest.mark.parametrize("spec", SPECS)

def build() -> train_gpt.GPT:
    model = train_gpt.build_model(TINY, ALONE)
    model.set_windows(0.0)
    return model

def awake(model: train_gpt.GPT) -> train_gpt.GPT:
    """With random numbers for the parameters that begin at zero, so that every part has its say."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.1, generator=generator)
    return model

def random_rows(rows: int, seed: int = 0) -> torch.Tensor:
    """(rows, T + 1) tokens, three documents in each row: from 0, 11 and 22 on."""
    tokens = torch.randint(END_OF_TEXT, (rows, T + 1), generator=torch.Generator().manual_seed(seed))
    tokens[:, [0, 11, 22]] = END_OF_TEXT
    return tokens

@pytest.fixture
def model(spec):
    with variants.applied((spec,), TINY):
        yield build()

@every_variant
def test_docstring_and_options(spec):
    module = variants.load(spec)
    text = inspect.getdoc(module).splitlines()
    assert text[0] and [sum(line.startswith(word) and len(line) > len(word) + 3 for line in text) for word in ("Source: ", "Status: ")] == [1, 1]
    kinds = typing.get_type_hints(module.Options)
    assert "layers" not in kinds, "layers= is the loader's own option"
    assert all(kind in (int, float, bool, str, tuple[int, ...]) or is_literal(kind) for kind in kinds.values())
    assert isinstance(variants.describe_options(kinds, module.Options()), str)  # every option has a default

@every_spec
def test_loss_at_start(model):
    rows = random_rows(4)
    assert model(rows[:, :-1], rows[:, 1:]).item() == pytest.approx(math.log(VOCABULARY), rel=0.02)

@every_spec
def test_causal(model):
    tokens = random_rows(2)[:, :-1]
    with torch.no_grad():
        before = awake(model)(tokens)
        for position in (5, 16, T - 1):
            changed = tokens.clone()
            changed[:, position] = (changed[:, position] + 1) % END_OF_TEXT
            difference = (model(changed) - before).abs().amax((0, 2))
            assert difference[:position].max() < 1e-5 and difference[position] > 1e-5

@every_spec
def test_documents_do_not_see_each_other(model):
    tokens = random_rows(2)[:, :-1]
    other = tokens.clone()
    other[:, 12:22] = (other[:, 12:22] + 1) % END_OF_TEXT
    with torch.no_grad():
        difference = (awake(model)(tokens) - model(other)).abs().amax((0, 2))
    assert difference[:12].max() < 1e-5 and difference[22:].max() < 1e-5 and difference[12:22].min() > 1e-5

@every_spec
def test_every_parameter_learns(model):
    rows = random_rows(4)
    awake(model)(rows[:, :-1], rows[:, 1:]).backward()
    wrong = {name: p.grad for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()}
    assert not wrong

@every_spec
def test_counts(model):
    assert sum(p.numel() for p in model.parameters()) > 0 and all(p.dtype == torch.float32 for p in model.parameters())
    assert 0 < train_gpt.flops_per_token(TINY) < math.inf  # builds the model on the meta device

@every_spec
def test_trains(model):
    optimizers, rows = train_gpt.build_optimizers(model, TINY, ALONE), random_rows(4)
    losses = []
    for step in range(21):
        losses.append(model(rows[:, :-1], rows[:, 1:]))
        losses[-1].backward()
        for optimizer in optimizers:
            optimizer.step(1.0, step / 21)
    assert losses[-1].item() < 0.9 * losses[0].item()

@every_variant
def test_compiles_to_one_graph(model):
    torch._dynamo.reset()
    rows = random_rows(2)
    expected = awake(model)(rows[:, :-1], rows[:, 1:]).item()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    loss = compiled(rows[:, :-1], rows[:, 1:])
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)

@every_variant
def test_some_layers_only(spec):
    shapes_of = lambda model: {name: p.shape for name, p in model.named_parameters()}
    kept = lambda shapes: {name: shape for name, shape in shapes.items() if not name.startswith("blocks.1.")}
    baseline = shapes_of(build())
    with variants.applied((spec,), TINY) as changed:
        whole = shapes_of(build())
    per_layer = [name for name in changed[spec] if variants.is_per_layer(getattr(train_gpt, name, None))]
    if per_layer != changed[spec]:
        with pytest.raises(train_gpt.RunError, match="no layers= here"):
            variants.apply((f"{spec}:layers=1",), TINY)
        return
    with variants.applied((f"{spec}:layers=1",), TINY):
        shapes = shapes_of(build())
        rows = random_rows(2)
        assert awake(build())(rows[:, :-1], rows[:, 1:]).isfinite()
    assert kept(shapes) == kept(baseline)
    assert shapes.items() - kept(shapes).items() == whole.items() - kept(whole).items()

@every_variant
def test_leaves_the_trainer_as_it_was(spec):
    rows, before = random_rows(2), dict(vars(train_gpt))
    baseline = awake(build())
    expected = baseline(rows[:, :-1], rows[:, 1:])
    with variants.applied((spec,), TINY) as changed:
        assert changed[spec]
        awake(build())(rows[:, :-1], rows[:, 1:]).backward()
    after = {name: value for name, value in vars(train_gpt).items() if not name.startswith("__")}
    assert all(before[name] is value for name, value in after.items())
    again = awake(build())
    assert list(again.state_dict()) == list(baseline.state_dict())
    assert all(map(torch.equal, again.state_dict().values(), baseline.state_dict().values()))
    assert torch.equal(again(rows[:, :-1], rows[:, 1:]), expected)

@pytest.mark.parametrize("pair", combinations(NAMES, 2), ids="+".join)
def test_two_compose_or_say_why_not(pair):
    try:
        with variants.applied(pair, TINY):
            rows = random_rows(2)
            loss = awake(build())(rows[:, :-1], rows[:, 1:])
            loss.backward()
            assert loss.isfinite()
    except train_gpt.RunError as error:
        assert all(name in str(error) for name in pair) and "\n" not in str(error)
