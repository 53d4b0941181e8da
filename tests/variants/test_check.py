"""What variants/check.py says of sound and unsound variants, at which size it tries them, and its command line."""

import json
import re
from dataclasses import replace

import pytest
import torch

import train_gpt
import variants
from tests.variants.conftest import HEAD
from train_gpt import make_config
from variants import check

SMALL = ("--layers 3 --model_dim 64 --heads 2 --head_dim 32 --mlp_hidden 64 --sequence_length 64 --batch_tokens 256 "
         "--vocab_size 256")
ONE_TOKEN_AHEAD = """
def run_blocks(self, x, contexts):
    x = original(self, x, contexts)
    return x + 0.05 * F.pad(x[:, 1:], (0, 0, 0, 1))
original = train_gpt.GPT.run_blocks
def patch(options):
    train_gpt.GPT.run_blocks = run_blocks
"""


def config_of(*names: str, **settings) -> train_gpt.Config:
    return make_config(dict(vocab_size=257, variant=names) | settings)


@pytest.mark.parametrize("track", ["cpu", "small", "benchmark"])
def test_the_baseline_is_sound(track):
    assert check.faults_of(config_of(track=track)) == []


@pytest.mark.slow
@pytest.mark.parametrize("track", train_gpt.TRACKS)
@pytest.mark.parametrize("name", ["", *variants.available()])
def test_everything_is_sound_on_every_track(name, track):
    assert check.faults_of(config_of(*filter(None, [name]), track=track)) == []


@pytest.mark.parametrize("track", train_gpt.TRACKS)
def test_tiny_configs_keep_the_structure(track):
    config = config_of(track=track)
    shallow, narrow, few_ids, all_ids = check.tiny_configs(config)
    assert shallow.layers == min(config.layers, check.LAYERS) and narrow.layers == all_ids.layers == config.layers
    for tiny in (shallow, narrow, few_ids, all_ids):
        train_gpt.check_settings(vars(tiny))
        assert tiny.heads == config.heads and tiny.heads * tiny.head_dim == tiny.model_dim
        assert tiny.window_pattern == config.window_pattern and len(tiny.window_short) == len(config.window_short)
        assert tiny.padded_vocabulary == tiny.vocab_size and tiny.end_of_text == tiny.vocab_size - 1
        assert all(0 < size < tiny.sequence_length for size in tiny.window_short if size)  # it still bites
    assert few_ids.model_dim == all_ids.model_dim == config.model_dim
    assert all_ids.vocab_size == config.padded_vocabulary


def test_look_ahead_in_words(write_file):
    write_file("ahead", HEAD + ONE_TOKEN_AHEAD)
    [fault] = check.faults_of(config_of("ahead"))
    match = re.fullmatch(r"LOOKS AHEAD: changing token (\d+) changes the prediction at token (\d+)", fault)
    assert int(match[2]) == int(match[1]) - 1


@pytest.mark.parametrize("distance", [2, 16, 100])
def test_look_ahead_at_every_distance(write_file, distance):
    far = ONE_TOKEN_AHEAD.replace("x[:, 1:], (0, 0, 0, 1)", f"x[:, {distance}:], (0, 0, 0, {distance})")
    write_file("far", HEAD + far)
    faults = check.faults_of(config_of("far", document_mask=False))
    assert [fault.partition(":")[0] for fault in faults] == ["LOOKS AHEAD"]


def test_look_ahead_of_some_layers_or_a_weak_one(write_file):
    one_layer = """
class Ahead(train_gpt.MLP):
    def forward(self, x):
        return super().forward(x + 0.01 * F.pad(x[:, 1:], (0, 0, 0, 1)))
def patch(options):
    train_gpt.MLP = Ahead
"""
    write_file("one_layer", HEAD + one_layer)
    assert check.faults_of(config_of("one_layer:layers=20", track="small", layers=21))[0].startswith("LOOKS AHEAD: ")


def test_rounding_is_no_look_ahead(write_file):
    """
    A causal convolution by FFT, whose sums mix all positions of the row: rounding reaches earlier predictions, and no
    more.
    """
    fft = """
class LongConvolution(train_gpt.MLP):
    def forward(self, x):
        y = super().forward(x)
        T = y.shape[1]
        kernel = torch.fft.rfft(torch.exp(-torch.arange(T) / 10.0), 2 * T)[:, None]
        return torch.fft.irfft(torch.fft.rfft(y, 2 * T, dim=1) * kernel, dim=1)[:, :T]
def patch(options):
    train_gpt.MLP = LongConvolution
"""
    write_file("fft", HEAD + fft)
    config = config_of("fft", document_mask=False)
    tiny = check.tiny_configs(config)[0]
    with variants.applied(tiny.variant, tiny):
        probe = check.Probe(check.build(tiny))
        other = torch.cat((probe.tokens[:, :64], probe.other[:, 64:]), 1)
        difference = (probe.logits(other) - probe.logits(probe.tokens))[:, :64].abs().max().item()
    assert 0 < difference < probe.answers[False][1] / 10
    assert check.faults_of(config) == []


def test_one_that_works_at_its_own_size_only(write_file):
    wide = """
class Wide(train_gpt.MLP):
    def __init__(self, config, layer):
        if config.model_dim != 128:
            raise train_gpt.RunError("variant wide: model_dim must be 128")
        super().__init__(config, layer)
def patch(options):
    train_gpt.MLP = Wide
"""
    write_file("wide", HEAD + wide)
    assert check.faults_of(config_of("wide")) == []
    assert check.faults_of(config_of("wide", model_dim=64, head_dim=16)) == ["variant wide: model_dim must be 128"]


def test_errors_and_numbers_that_are_none(write_file):
    write_file("raising", HEAD + "def patch(options):\n    train_gpt.MLP.forward = lambda self, x: x + undefined\n")
    line = HEAD.count("\n") + 2
    expected = f"variant raising: NameError: name 'undefined' is not defined (raising.py, line {line})"
    assert check.faults_of(config_of("raising")) == [expected]
    write_file("nan", HEAD + "def patch(options):\n    train_gpt.MLP.forward = lambda self, x: x / 0 - x / 0\n")
    assert check.faults_of(config_of("nan"))[0] == "NaN or infinite logits"
    noisy = """
noise = torch.Generator()
def patch(options):
    train_gpt.MLP.forward = lambda self, x: x * torch.rand(x.shape, generator=noise)
"""
    write_file("noisy", HEAD + noisy)
    assert check.faults_of(config_of("noisy"))[0].startswith("RANDOM in evaluation: ")
    expected = f"unknown variant 'no_such_variant'; there are {', '.join(variants.available())}"
    assert check.faults_of(config_of("no_such_variant")) == [expected]


def test_a_change_of_the_referee_while_it_runs(write_file):
    sly = """
class Sly(train_gpt.GPT):
    def __init__(self, config):
        super().__init__(config)
        train_gpt.Trainer.validate = lambda self, batches: 0.1
def patch(options):
    train_gpt.GPT = Sly
"""
    write_file("sly", HEAD + sly)
    validate = train_gpt.Trainer.validate
    expected = "changes the trainer while it runs: Trainer.validate; assign in patch(options) only"
    assert check.faults_of(config_of("sly")) == [expected]
    assert train_gpt.Trainer.validate is validate


def test_it_leaves_everything_as_it_was():
    threads, random, before = torch.get_num_threads(), torch.get_rng_state(), dict(vars(train_gpt))
    assert check.faults_of(config_of("topological_attention", "swiglu_mlp")) == []
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), random)
    assert all(before[name] is value for name, value in vars(train_gpt).items() if not name.startswith("__"))


def test_report(monkeypatch, capsys):
    monkeypatch.setattr(check, "TIMED_SECONDS", 0.0)
    assert check.main(["swiglu_mlp:hidden=64", SMALL]) == 0
    lines = dict(re.match(r"(\S+(?: \S+)?) +(.*)", line).groups() for line in capsys.readouterr().out.splitlines())
    expected = dict(
        variant="swiglu_mlp:hidden=64 on track cpu", replaces="MLP", causality="sound: no position sees a later one",
        compiles="to one graph", decodes="from a cache", verdict="sound")
    assert {name: lines[name] for name in expected} == expected

    # what it costs
    config = check.parse_run("swiglu_mlp:hidden=64", "cpu", SMALL.split())
    baseline = sum(p.numel() for p in train_gpt.GPT(config).parameters())
    with variants.applied(config.variant, config):
        parameters = sum(p.numel() for p in train_gpt.GPT(config).parameters())
    change = f"{100 * (parameters / baseline - 1):+.1f} %"
    assert parameters == baseline + 3 * 64 * 64
    assert lines["parameters"].startswith(f"{parameters:,} ({change}), without ")
    step = (r"[\d.]+ ms beside [\d.]+ \([-+][\d.]+ %, [-+][\d.]+ % to [-+][\d.]+ %\); medians of 1 in turn, .*; "
            r"256 tokens, eager, c.*")
    assert re.fullmatch(step, lines["step"])


def test_report_of_faults_as_json(write_file, monkeypatch, capsys):
    monkeypatch.setattr(check, "TIMED_SECONDS", 0.0)
    bad = """
def forward(self, x):
    torch._dynamo.graph_break()
    return x.mean(1, keepdim=True).expand_as(x)
def patch(options):
    train_gpt.MLP.forward = forward
"""
    write_file("bad", HEAD + bad)
    assert check.main(["bad", "--json", *SMALL.split()]) == 1
    facts = json.loads(capsys.readouterr().out)
    words = [fault.partition(":")[0] for fault in facts["faults"]]
    assert words == ["LOOKS AHEAD", "SEES ANOTHER DOCUMENT", "no gradient"]
    assert facts["not_compiled"] and not facts["decodes_from_cache"] and len(facts["notes"]) == 2
    assert facts["baseline"]["flops_per_token"] > facts["flops_per_token"] > 0 and len(facts["step"]["ms"]) == 2


def test_a_row_too_long_for_this_machine():
    config = replace(config_of(track="long"), device="cpu")
    said = check.time_steps([config, config], 2.6e9, 0.0)
    assert said == "not timed without a GPU: one row of 65,536 tokens takes 170.4 TFLOPs"


@pytest.mark.parametrize("argv, message", [
    (["nope"], "unknown variant 'nope'; there are "),
    (["swiglu_mlp:width=3"], "variant swiglu_mlp: it has no option 'width'"),
    (["swiglu_mlp", "--track", "nope"], "unknown track 'nope'; the tracks are "),
    (["swiglu_mlp", "--layers 0"], "--layers must be from 1 to "),
])
def test_refusals(argv, message, capsys):
    assert check.main(argv) == 1
    output = capsys.readouterr()
    text = output.err.removeprefix("variants.check: error: ") or output.out
    assert message in text


def test_all(write_file, monkeypatch, capsys):
    write_file("ahead", HEAD + ONE_TOKEN_AHEAD)
    write_file("broken", "raise TypeError('what\\never')\n")
    monkeypatch.setattr(check, "TIMED_SECONDS", 0.0)
    monkeypatch.setattr(variants, "available", lambda: ["ahead", "broken", "swiglu_mlp"])
    assert check.main(["all", SMALL]) == 1
    header, ahead, broken, sound = capsys.readouterr().out.splitlines()
    assert header.split() == ["variant", "parameters", "FLOPs", "ms", "verdict"]
    assert "LOOKS AHEAD" in ahead and re.match(r"broken +variant broken: TypeError: what ever", broken)
    assert re.fullmatch(r"swiglu_mlp +[-+][\d.]+ % +[-+][\d.]+ % +[-+][\d.]+ %, .* % +sound", sound)
