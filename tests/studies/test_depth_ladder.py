"""
The depth ladder: the widths' arithmetic, what it reads from logs, its claims on made-up results, and that it goes on
where it was stopped. A stand-in writes the logs of runs; the slow test trains every arm for two steps.
"""

import argparse
import json
import math

import numpy as np
import pytest
import torch

import compare
import train_gpt
import variants
from data.shards import write_meta, write_shard
from studies import depth_ladder as study
from tests.studies.conftest import call_with_stops
from tests.studies.test_comparisons import row
from train_gpt import RunError, adopt_vocabulary

SEEDS = range(1, 6)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for split, tokens in (("train", 20_000), ("val", 3_000)):
        write_shard(folder / f"x_{split}_000000.bin", np.append(256, random.integers(97, 105, tokens)))
    write_meta(folder, vocab_size=257, tokenizer="bytes")
    return folder


# ---- Equal parameters -------------------------------------------------------


@pytest.mark.parametrize("layers", study.DEPTHS)
def test_every_depth_has_as_many_parameters(layers):
    sizes = study.sizes_of(layers)
    assert abs(study.count_blocks(**sizes) / study.count_blocks() - 1) <= study.TOLERANCE
    assert sizes["heads"] * sizes["head_dim"] == sizes["model_dim"] and sizes["head_dim"] % 4 == 0
    assert sizes["model_dim"] % study.WIDTH_STEP == 0 and sizes["layers"] == layers
    # thinner with depth: sqrt(parameters / (12 layers)) to the next multiple of 8
    assert abs(sizes["model_dim"] - math.sqrt(study.count_blocks() / 12 / layers)) <= study.WIDTH_STEP / 2


def test_the_first_depth_is_the_tracks_own_model():
    config = train_gpt.make_config(dict(track="cpu"))
    assert study.sizes_of(4) == {name: getattr(config, name) for name in study.sizes_of(4)}


def test_a_depth_without_a_width_is_refused(monkeypatch):
    monkeypatch.setattr(study, "TOLERANCE", 1e-6)
    with pytest.raises(RunError, match="12 layers of width 72 have .* parameters in blocks, wanted 786,655 within"):
        study.sizes_of.__wrapped__(12)  # not from the cache


@pytest.mark.parametrize("width, head", [(128, 32), (72, 36), (56, 28), (40, 40), (8, 8), (176, 44)])
def test_heads(width, head):
    assert study.choose_head(width) == head


def make_options(corpus, **changes):
    return argparse.Namespace(**dict(seeds=5, jobs=1, margin=0.01, steps=12, sweep="1,2",
                                     settings=["--data", str(corpus)]) | changes)


@pytest.mark.parametrize("layers", [4, 12])
def test_command_lines_are_taken_and_arms_build(layers, corpus):
    argv = study.command_of(make_options(corpus), layers, study.ARMS)
    given, settings = compare.parse_arguments(argv)
    assert given.sweep == [1, 2] and given.seeds == 5
    shared = ["--track", given.track, *settings]
    for arm, name in zip(compare.parse_arms(given.arms, given.seeds, shared), study.ARMS):
        config = compare.parse_options(compare.trainer_options(arm, shared))
        assert config.layers == layers and config.steps == 12 and config.val_every == 2
        assert config.variant[0].startswith("stream_statistics")
        adopt_vocabulary(config)
        with variants.applied(config.variant, config), torch.device("meta"):
            count = train_gpt.count_parameters(train_gpt.GPT(config))[1]
        assert abs(count / study.count_blocks() - 1) < 0.06, name
    assert "--sweep" not in study.command_of(make_options(corpus, sweep=""), layers, study.ARMS)


# ---- What the logs say ------------------------------------------------------


def test_spikes():
    calm = list(3 + 0.01 * np.sin(np.arange(40)))
    assert study.count_spikes(calm) == 0 and study.count_spikes(calm[:10]) == 0
    for places, count in (({20}, 1), ({20, 21, 22}, 1), ({20, 30}, 2), ({10}, 1), ({39}, 1)):
        losses = [loss + 0.5 * (step in places) for step, loss in enumerate(calm)]
        assert study.count_spikes(losses) == count
    falling = [5 - 0.1 * step for step in range(30)]
    assert study.count_spikes(falling) == 0


def test_slope_of_norms():
    stream = [dict(x_norm=2.0 * math.exp(0.3 * depth)) for depth in range(8)]
    assert study.slope_of(stream) == pytest.approx(0.3)


def test_the_largest_stable_factor():
    def tries(**losses):
        return dict(tries=[dict(factor=float(name[1:]), losses=value) for name, value in losses.items()], chosen=1)

    assert study.largest_stable(None) is None
    assert study.largest_stable(tries(x1=[2.0], x2=[2.09], x4=[2.2])) == 2
    assert study.largest_stable(tries(x1=[2.0], x2=[1.9], x4=[None])) == 2
    assert study.largest_stable(tries(x1=[2.5], x2=[1.9, 1.7], x4=[1.85, 1.85])) == 4
    assert study.largest_stable(tries(x1=[None])) is None


# ---- Claims -----------------------------------------------------------------


NOISE = np.array([0.001, -0.001, 0.0005, -0.0004, 0.0001])


def made(loss, shift=0.0, slope=0.1, stable=1.0, last=False, **more):
    """A row of five seeds; shift turns the noise, so that differences have some."""
    losses = loss + NOISE + shift * NOISE[::-1]
    return row(losses=[[seed, value] for seed, value in zip(SEEDS, losses.tolist())],
               slopes=[[seed, slope + 0.1 * noise] for seed, noise in zip(SEEDS, NOISE.tolist())],
               spikes=[[seed, 0] for seed in SEEDS], stable=stable, last=last, **more)


def words_of(lines):
    return [(line["where"], line["verdict"]) for line in lines]


def test_s2_does_the_gap_grow():
    def judge(*gaps, **more):
        depths = {}
        for layers, gap in zip((4, 12, 24, 48), gaps):
            depths[layers] = dict(baseline=made(2.0), splanifold=made(2.0 + gap, 0.3, **more))
        return words_of(study.judge_s2(depths))

    flat = judge(0.3, 0.04, 0.04, 0.0)
    assert flat == [("24 against 12 layers", "confirmed"), ("48 against 12 layers", "confirmed")]
    assert judge(0.0, 0.04, 0.06, 0.042)[0][1] == "refuted" and judge(0.0, 0.04, 0.06, 0.042)[1][1] == "confirmed"
    assert judge(0.0, 0.04) == []
    assert judge(0.0, 0.04, 0.04, errors=["seed 1: diverged"]) == [("24 layers", "refuted")]


def test_l1_is_the_split_better_than_tied_gains():
    def judge(split, tied, **more):
        rows = dict(baseline=made(2.0), split_published=made(split, 0.3), tied_published=made(tied))
        return study.judge_l1(4, rows | more)["verdict"]

    assert judge(2.0, 2.05) == "confirmed" and judge(2.05, 2.0) == "refuted"
    assert judge(1.9999, 2.0) == "undecided"
    assert judge(2.0, 2.1, tied_published=row(losses=[[1, 2.1], [2, 2.1]])) == "too few seeds"
    assert judge(2.0, 2.1, tied_published=row(losses=[])) == "not run"
    assert study.judge_l1(4, dict(baseline=made(2.0))) is None


def test_l2_are_norms_balanced():
    rows = dict(baseline=made(2.0, slope=0.1), tied=made(2.0, slope=0.05), split=made(2.0, slope=0.06))
    lines = study.judge_l2(12, rows)
    assert words_of(lines) == [("12 layers", "confirmed"), ("12 layers", "refuted")]
    assert "slope minus 0.8 times that of baseline -0.0200" in lines[0]["measured"]


@pytest.mark.parametrize("stable, base, last, word", [
    (4, 2, False, "confirmed"), (2, 2, False, "refuted"), (8, 8, True, "undecided"), (2, 8, False, "refuted")])
def test_l3_is_it_more_stable(stable, base, last, word):
    rows = dict(baseline=made(2.0, stable=base), split=made(2.0, stable=stable, last=last))
    assert words_of(study.judge_l3(24, rows)) == [("24 layers", word)]
    assert study.judge_l3(12, rows) == [] == study.judge_l3(24, rows | dict(baseline=made(2.0, stable=None)))


# ---- The study, by a stand-in -----------------------------------------------


@pytest.fixture
def stand_in(made_up_runs, corpus, tmp_path):
    """made_up_runs with call(*words) -> exit code and `output`, the results' file."""
    made_up_runs.output = tmp_path / "out.json"

    def facts(job):
        growth = 0.05 if "split" in job.arm.name else 0.1
        stream = [dict(x_norm=math.exp((growth + 0.001 * job.seed % 0.003) * depth)) for depth in range(8)]
        curve = [[step, 4.0 + (step == 25)] for step in range(40)]
        return dict(stream=stream, train_curve=curve)

    def loss(job):
        rate = float(job.options[job.options.index("--lr_matrix") + 1]) / 0.03 if "--lr_matrix" in job.options else 1.0
        split = "split" in job.arm.name
        return 2.0 - 0.1 * split + 0.06 * abs(math.log2(rate) - split) + 0.001 * (job.seed * (1 + split) % 7)

    def call(*words):
        fixed = ["--arms", "split", "--steps", "12", "--jobs", "1", "--output", str(made_up_runs.output)]
        return study.main([*fixed, *words, "--", "--data", str(corpus), "--val_tokens", "2048"])

    made_up_runs.describe = lambda job, config: (job.name, config.layers)
    made_up_runs.facts, made_up_runs.loss, made_up_runs.call = facts, loss, call
    return made_up_runs


def test_from_runs_to_results(stand_in, capsys):
    assert stand_in.call("--depths", "24", "4", "--seeds", "3", "--sweep", "1,2,4") == 0
    results = json.loads(stand_in.output.read_text())
    assert list(results["depths"]) == ["4", "24"] and len(stand_in.trained) == 2 * 2 * (3 + 3)
    rows = results["depths"]["24"]
    assert list(rows) == ["baseline", "split"] and rows["split"]["high"] < 0
    assert rows["split"]["sweep"]["chosen"] == 2 and rows["baseline"]["sweep"]["chosen"] == 1
    assert rows["split"]["stable"] == 4 and rows["split"]["last"] and rows["baseline"]["stable"] == 2
    assert [count for _, count in rows["split"]["spikes"]] == [1] * 3
    assert np.mean([slope for _, slope in rows["baseline"]["slopes"]]) == pytest.approx(0.1, abs=0.004)
    claims = [(claim["claim"], claim["where"], claim["verdict"]) for claim in results["claims"]]
    assert claims == [("L2", "4 layers", "confirmed"), ("L2", "24 layers", "confirmed"),
                      ("L3", "24 layers", "confirmed")]
    text = stand_in.output.with_suffix(".md").read_text()
    assert text.strip() in capsys.readouterr().out and stand_in.output.with_suffix(".png").stat().st_size > 8_000
    assert "| 24 layers | split | x 2 | x 4 or more | 1.0 | +0.05" in text


def test_it_goes_on_where_it_was_stopped(stand_in, capsys):
    words = ["--depths", "4", "12", "--seeds", "1", "--sweep", "1,2"]
    calls = call_with_stops(stand_in, words, 5, capsys)
    assert calls == 3 and len(stand_in.trained) == len(set(stand_in.trained)) == 12

    # the plan says so, and nothing is left to do
    assert stand_in.call(*words, "--dry-run") == 0
    text = capsys.readouterr().out
    assert "12 layers: 6 runs, 6 of them done; expected time 0:00 h" in text and "| 12 | 72 | 2 | 36 | 311 |" in text
    assert stand_in.call(*words) == 0 and len(stand_in.trained) == 12


@pytest.mark.parametrize("words, message", [
    (["--depths", "0"], "--depths are numbers of layers from 1 to 1,024, got [0]"),
    (["--arms", "none"], "there is no arm 'none'"),
    (["--margin", "-1"], "--margin must be greater than 0 nats, got -1.0")])
def test_faults_are_one_line(stand_in, words, message, capsys):
    assert stand_in.call(*words) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not stand_in.trained


@pytest.mark.slow
@pytest.mark.parametrize("name", study.ARMS)
@pytest.mark.parametrize("layers", [12, 48])
def test_every_arm_trains(name, layers, corpus, tmp_path):
    line = next(line for line, short in study.arms_at(study.ARMS).items() if short == name)
    sizes = [word for key, value in study.sizes_of(layers).items() for word in (f"--{key}", str(value))]
    config = compare.parse_options([
        "--track", "cpu", "--data", str(corpus), "--batch_tokens", "512", "--val_tokens", "512", "--log_dir",
        str(tmp_path), "--run_id", "run", "--no-save", *sizes, *study.length_options(2), "--variant", line])
    adopt_vocabulary(config)
    with variants.applied(config.variant, config) as replaced:
        assert train_gpt.Trainer(config, replaced).run() == 0
    last = json.loads((tmp_path / "run.json").read_text())["curve"][-1]
    assert last["step"] == 2 and len(last["stream"]) == 2 * layers and math.isfinite(study.slope_of(last["stream"]))
