"""
What every file in variants/ has to satisfy, whoever wrote it: on a tiny model of 4 layers, 32 channels, rows of 32
bytes, float32, CPU. What a variant must not see, and that it learns, is asked by variants/check.py; the last tests show
that good ideas pass and that each bad one is refused by its test.
"""

import inspect
import json
import math
import re
import typing
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path
from zlib import crc32

import pytest
import torch

import train_gpt
import variants
from tests.variants.conftest import HEAD
from variants import check
from variants.check import Probe, awake, random_rows

NAMES = variants.available()
WORDS = ("better", "worse", "equivalent", "undecided", "too few pairs")
SLOW_TO_TRAIN = {"cellular_automaton", "siren_weights", "seed_model"}
T = 32
TINY = train_gpt.make_config(dict(vocab_size=256, layers=4, model_dim=32, heads=2, head_dim=16, mlp_hidden=64,
                                  sequence_length=T, batch_tokens=4 * T))


def is_literal(kind) -> bool:
    return typing.get_origin(kind) is typing.Literal


def is_accepted(spec: str) -> bool:
    """Whether the loader takes it: an option may belong to another's value, and is refused in one line without it."""
    try:
        variants.plan((spec,), TINY)
    except train_gpt.RunError:
        return False
    return True


def specs_of(name: str) -> list[str]:
    """The variant as it is, and with every other choice of its on/off and Literal options that it takes alone."""
    try:
        options = variants.load(name).Options
        kinds, defaults = typing.get_type_hints(options), options()
    except Exception:  # the tests of the plain name show the fault
        return [name]
    choices = {key: typing.get_args(kind) for key, kind in kinds.items() if is_literal(kind)}
    choices |= {key: (True, False) for key, kind in kinds.items() if kind is bool}
    specs = [f"{name}:{key}={value}" for key, values in choices.items() for value in values
             if value != getattr(defaults, key)]
    return [name, *filter(is_accepted, specs)]


def changes(name: str, last: str) -> bool:
    """Whether a variant replaces one of train_gpt.SEAMS up to this one, which lists the model first."""
    seams = train_gpt.SEAMS[:train_gpt.SEAMS.index(last) + 1]
    try:
        changed = variants.plan((name,), TINY)[1][name]
    except Exception:  # the tests of the plain name show the fault
        return True
    return any(label.split(".")[0] in seams for label in changed)


# What a model must satisfy is asked where a variant changes the model, learning also where it changes the optimizer.
MODEL_NAMES = [name for name in NAMES if changes(name, "GPT")]


def slow_where(cases, is_slow) -> list:
    """The cases, and those of which is_slow(case) says so among the slow tests."""
    return [pytest.param(case, marks=pytest.mark.slow) if is_slow(case) else case for case in cases]


def sampled(cases, number: int) -> list:
    """The cases; one of so many is chosen by its name, the others are among the slow tests."""
    return slow_where(cases, lambda case: crc32(str(case).encode()) % number)


def options_slow(names: list[str], slow: set = frozenset()) -> list:
    """The variants as they are, and with each of their options among the slow tests: for all it takes minutes."""
    specs = (spec for name in names for spec in specs_of(name))
    return slow_where(specs, lambda spec: spec not in NAMES or spec in slow)


every_variant = pytest.mark.parametrize("spec", NAMES)
every_spec = pytest.mark.parametrize("spec", options_slow(MODEL_NAMES))


@pytest.fixture(autouse=True)
def declared(request):
    """A test fails if a variant's docstring declares that: "Declared: OPTIONS fails TEST, TEST"; and must, then."""
    spec = request.getfixturevalue("spec") if "spec" in request.fixturenames else ""
    name, _, options = spec.partition(":")
    text = inspect.getdoc(variants.load(name)) if options else ""
    for form, tests in re.findall("^Declared: (.*?) fails (.*)", text or "", re.M):
        if form == options and request.function.__name__ in tests.split(", "):
            request.applymarker(pytest.mark.xfail(strict=True, raises=AssertionError, reason="declared"))


@pytest.fixture
def model(spec):
    with variants.applied((spec,), TINY):
        yield check.build(TINY)


@cache
def probe_of(spec) -> Probe:
    return Probe(check.build(TINY))


@pytest.fixture
def probe(spec):
    with variants.applied((spec,), TINY):
        yield probe_of(spec)


@every_variant
def test_docstring_and_options(spec):
    module = variants.load(spec)
    text = inspect.getdoc(module).splitlines()
    assert text[0]
    for word in ("Source: ", "Status: "):
        assert sum(line.startswith(word) and len(line) > len(word) + 3 for line in text) == 1
    kinds = typing.get_type_hints(module.Options)
    assert "layers" not in kinds, "layers= is the loader's own option"
    assert all(kind in (int, float, bool, str, tuple[int, ...]) or is_literal(kind) for kind in kinds.values())
    assert isinstance(variants.describe_options(kinds, module.Options()), str)  # every option has a default


@every_variant
def test_status_is_what_its_records_say(spec):
    """Status: WORD in RECORD, RECORD; WORD in RECORD: each has an arm of the variant with that verdict."""
    text, = re.findall("^Status: (.*)", inspect.getdoc(variants.load(spec)), re.M)
    for clause in text.split(";"):
        word, records = clause.strip().partition(" in ")[0], re.findall(r"\d{4}-\d\d-\d\d_\w+", clause)
        assert word in WORDS and records or text.startswith("unmeasured")
        for record in records:
            file, = (Path(train_gpt.__file__).parent / "records").glob(f"*/{record}/stats.json")
            arms = json.loads(file.read_text())["arms"]
            verdicts = {arm["vs_baseline"]["loss"]["verdict"] for arm in arms
                        if arm["vs_baseline"] and any(name.split(":")[0] == spec for name in arm["variant"])}
            assert word in verdicts


@every_spec
def test_loss_at_start(model):
    assert check.start_faults(model) == []


@every_spec
def test_numbers(probe):
    assert check.number_faults(probe) == []


@every_spec
def test_causal(probe):
    assert check.causality_faults(probe) == []


@every_spec
def test_documents_do_not_see_each_other(probe):
    assert check.document_faults(probe) == []


@every_spec
def test_rows_do_not_see_each_other(probe):
    assert check.row_faults(probe) == []


@every_spec
def test_every_parameter_learns(probe):
    assert check.gradient_faults(probe) == []


@every_spec
def test_counts(model):
    assert sum(p.numel() for p in model.parameters()) > 0 and all(p.dtype == torch.float32 for p in model.parameters())
    assert 0 < train_gpt.flops_per_token(replace(TINY, layers=3)) < math.inf  # builds the model on the meta device


@pytest.mark.parametrize("spec", options_slow([name for name in NAMES if changes(name, "symmetric_product")],
                                              SLOW_TO_TRAIN))
def test_trains(model):
    assert check.learning_faults(check.train(model)) == []


@pytest.mark.parametrize("spec", sampled(MODEL_NAMES, 4))
def test_compiles_to_one_graph(spec):
    config = replace(TINY, layers=3)
    with variants.applied((spec,), config):
        assert check.compile_fault(awake(check.build(config))) is None


@every_variant
def test_some_layers_only(spec):
    def shapes_of(model):
        return {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}  # layers may share one

    def kept(shapes):
        return {name: shape for name, shape in shapes.items() if not name.startswith("blocks.1.")}

    baseline = shapes_of(check.build(TINY))
    with variants.applied((spec,), TINY) as changed:
        whole = shapes_of(check.build(TINY))
    per_layer = [name for name in changed[spec] if variants.is_per_layer(getattr(train_gpt, name, None))]
    if per_layer != changed[spec]:
        with pytest.raises(train_gpt.RunError, match="no layers= here"):
            variants.apply((f"{spec}:layers=1",), TINY)
        return
    with variants.applied((f"{spec}:layers=1",), TINY):
        shapes = shapes_of(check.build(TINY))
        rows = random_rows(TINY, 2)
        assert awake(check.build(TINY))(rows[:, :-1], rows[:, 1:]).isfinite()
    assert kept(shapes) == kept(baseline)
    assert shapes.items() - kept(shapes).items() == whole.items() - kept(whole).items()


@every_variant
def test_leaves_the_trainer_as_it_was(spec):
    rows, before = random_rows(TINY, 2), dict(vars(train_gpt))
    baseline = awake(check.build(TINY))
    expected = baseline(rows[:, :-1], rows[:, 1:])
    with variants.applied((spec,), TINY) as changed:
        assert changed[spec]
        awake(check.build(TINY))(rows[:, :-1], rows[:, 1:]).backward()
    after = {name: value for name, value in vars(train_gpt).items() if not name.startswith("__")}
    assert all(before[name] is value for name, value in after.items())
    again = awake(check.build(TINY))
    assert list(again.state_dict()) == list(baseline.state_dict())
    assert all(map(torch.equal, again.state_dict().values(), baseline.state_dict().values()))
    assert torch.equal(again(rows[:, :-1], rows[:, 1:]), expected)


@pytest.mark.parametrize("pair", sampled(combinations(NAMES, 2), 6), ids="+".join)
def test_two_compose_or_say_why_not(pair):
    try:
        with variants.applied(pair, TINY):
            rows = random_rows(TINY, 2)
            loss = awake(check.build(replace(TINY, variant=pair)))(rows[:, :-1], rows[:, 1:])
            loss.backward()
            assert loss.isfinite()
    except train_gpt.RunError as error:
        assert all(name in str(error) for name in pair) and "\n" not in str(error)

# Ideas written for the tests of the contract. All of it accepts the GOOD; each of the BAD is refused by the tests that
# are named with it, and by no other.


GOOD = dict(
    dropout_mlp="""
class DropoutMLP(train_gpt.MLP):
    def forward(self, x):
        return self.proj(F.dropout(F.relu(self.fc(x)).square(), 0.2, self.training))
def patch(options):
    train_gpt.MLP = DropoutMLP
""",
    two_tokens_ahead="""
class TwoTokensAhead(train_gpt.GPT):
    def __init__(self, config):
        super().__init__(config)
        self.second_norm = train_gpt.Norm(config, config.model_dim)
        self.second = train_gpt.Linear(config, None, "gate", config.model_dim, config.model_dim)
    def predict(self, tokens, masks, targets):
        x = self.run_blocks(*self.embed(tokens, masks))
        loss = self.head(self.final_norm(x), targets)
        if targets is None or not self.training:
            return loss
        return loss + 0.3 * self.head(self.second_norm(x + self.second(x))[:, :-1], targets[:, 1:])
def patch(options):
    train_gpt.GPT = TwoTokensAhead
""",
    hardest_half="""
class HardestHalf(train_gpt.LanguageModelHead):
    def forward(self, x, targets=None):
        if targets is None or not self.training:
            return super().forward(x, targets)
        losses = F.cross_entropy(super().forward(x).flatten(0, 1), targets.flatten().long(), reduction="none")
        return losses.topk(len(losses) // 2).values.mean()
def patch(options):
    train_gpt.LanguageModelHead = HardestHalf
""")
BAD = dict(
    looks_ahead=({"test_causal"}, """
def forward(self, x):
    y = self.proj(train_gpt.ReLUSquared.apply(self.fc(x)))
    return y + 0.05 * F.pad(y[:, 1:], (0, 0, 0, 1))
def patch(options):
    train_gpt.MLP.forward = forward
"""),
    looks_ahead_in_training=({"test_causal"}, """
def predict(self, tokens, masks, targets):
    x = self.run_blocks(*self.embed(tokens, masks))
    if self.training and targets is not None:
        x = x + 0.1 * F.pad(x[:, 1:], (0, 0, 0, 1))
    return self.head(self.final_norm(x), targets)
def patch(options):
    train_gpt.GPT.predict = predict
"""),
    ignores_borders=({"test_documents_do_not_see_each_other"}, """
def attend(q, k, v, ctx, scale):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
def patch(options):
    train_gpt.attend = attend
"""),
    mixes_rows=({"test_rows_do_not_see_each_other", "test_documents_do_not_see_each_other"}, """
class BatchCentred(train_gpt.MLP):
    def forward(self, x):
        y = super().forward(x)
        return y - y.mean(0, keepdim=True) if self.training else y
def patch(options):
    train_gpt.MLP = BatchCentred
"""),
    unused_parameter=({"test_every_parameter_learns"}, """
class Unused(train_gpt.MLP):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.unused = nn.Parameter(torch.ones(3))
def patch(options):
    train_gpt.MLP = Unused
"""),
    wrong_loss=({"test_loss_at_start", "test_numbers"}, """
class Less(train_gpt.LanguageModelHead):
    def forward(self, x, targets=None):
        return super().forward(x, targets) * (1.0 if targets is None or self.training else 0.9)
def patch(options):
    train_gpt.LanguageModelHead = Less
"""),
    told_the_answer=({"test_numbers"}, """
def predict(self, tokens, masks, targets):
    x = self.run_blocks(*self.embed(tokens, masks))
    return self.head(self.final_norm(x if targets is None else x + 0.1 * self.embedding(targets)), targets)
def patch(options):
    train_gpt.GPT.predict = predict
"""),
    forgetful=({"test_trains"}, """
def patch(options):
    train_gpt.Muon.update = train_gpt.Adam.update = staticmethod(lambda data, gradient, *state: None)
"""))
OF_MODEL = (test_loss_at_start, test_counts, test_trains)
OF_PROBE = (test_numbers, test_causal, test_documents_do_not_see_each_other, test_rows_do_not_see_each_other,
            test_every_parameter_learns)
OF_NAME = (test_docstring_and_options, test_compiles_to_one_graph, test_some_layers_only,
           test_leaves_the_trainer_as_it_was)


def refusing(name: str, compiled: bool) -> set[str]:
    """
    Names of the contract's tests that refuse a variant; compiled: with the trial of the compiler, which takes two
    seconds.
    """
    refused = set()
    for test in (*OF_MODEL, *OF_PROBE, *OF_NAME):
        if test is test_compiles_to_one_graph and not compiled:
            continue
        try:
            if test in OF_NAME:
                test(name)
                continue
            with variants.applied((name,), TINY):
                model = check.build(TINY)
                test(Probe(model) if test in OF_PROBE else model)
        except AssertionError:
            refused.add(test.__name__)
    return refused


@pytest.mark.parametrize("name", GOOD)
def test_the_contract_accepts(write_file, name):
    write_file(name, HEAD + GOOD[name])
    assert refusing(name, compiled=name == "two_tokens_ahead") == set()
    test_two_compose_or_say_why_not((name, "swiglu_mlp"))


@pytest.mark.parametrize("name", BAD)
def test_the_contract_refuses(write_file, name):
    tests, text = BAD[name]
    write_file(name, HEAD + text)
    assert refusing(name, compiled=False) == tests
