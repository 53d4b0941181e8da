"""
The study of two corpora: its plans, its folders, rank correlations against SciPy's, and that it goes on where it was
stopped. A stand-in writes the logs of runs; the slow test trains every arm for two steps.
"""

import argparse
import json

import numpy as np
import pytest
import torch
from scipy import stats

import compare
import train_gpt
import variants
from data.shards import write_meta, write_shard
from data.tokenizer import write_merges
from studies import corpora as study
from tests.studies.conftest import call_with_stops
from tests.studies.test_comparisons import row
from train_gpt import Config, RunError, adopt_vocabulary, open_shard

MIXED = ("english25", "english50", "english75")
OPTIONS = dict(seeds=3, jobs=1, margin=0.01, steps=4, token_steps=3, settings=[], python="data/python",
               english="data/e", english_bytes="data/eb", mixtures="data/m")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Words of the study's command line: a corpus of bytes for Python, tokens of a tiny tokenizer for English."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    words = []
    for name, vocabulary in (("python", 257), ("english", 261)):
        (folder / name).mkdir()
        for split, tokens in (("train", 20_000), ("val", 16_000)):
            documents = random.integers(97, 105, tokens)
            documents[::500] = vocabulary - 1
            write_shard(folder / name / f"x_{split}_000000.bin", documents)
        write_meta(folder / name, vocab_size=vocabulary, tokenizer=name)
        words += [f"--{name}", str(folder / name)]
    merges = {bytes([b]): b for b in range(256)} | {b"th": 256, b"the": 257, b" the": 258, b"in": 259}
    write_merges(folder / "english" / "x.tiktoken", merges)
    return [*words, "--english-bytes", str(folder / "english_bytes"), "--mixtures", str(folder / "mixtures")]


def options_of(words, **changes):
    parsed = dict(zip((word[2:].replace("-", "_") for word in words[::2]), words[1::2]))
    return argparse.Namespace(**OPTIONS | parsed | changes)


# ---- Plans ------------------------------------------------------------------


def test_a_mixture_mixes_in_every_arm():
    arms = study.arms_on("english25", study.ARMS)
    assert list(arms.values()) == list(study.ARMS) and len(arms) == len(study.ARMS) == 10
    assert list(arms)[:2] == ["data_order:rows=shuffled,take=6,2",
                              "data_order:rows=shuffled,take=6,2+topological_attention:preset=fast"]
    for corpus in ("python", "english", "english_tokens"):
        assert study.arms_on(corpus, study.ARMS) == {line: name for name, line in study.ARMS.items()}
    assert [sum(study.CORPORA[corpus]) for corpus in MIXED] == [8, 8, 8]
    assert [study.CORPORA[corpus][1] / 8 for corpus in MIXED] == [0.25, 0.5, 0.75]


@pytest.mark.parametrize("corpus", study.CORPORA)
def test_command_lines_are_taken(corpus):
    argv = study.command_of(options_of([]), corpus, study.ARMS)
    given, settings = compare.parse_arguments(argv)
    tokens = corpus == "english_tokens"
    assert given.track == ("english_cpu" if tokens else "cpu") and given.seeds == 3 and given.margin == 0.01
    arms = compare.parse_arms(given.arms, given.seeds, ["--track", given.track, *settings])
    configs = [compare.parse_options(compare.trainer_options(arm, ["--track", given.track, *settings])) for arm in arms]
    assert {config.steps for config in configs} == {3 if tokens else 4}
    folder = dict(python="data/python", english="data/eb", english_tokens="data/e").get(corpus, f"data/m/{corpus}")
    assert {config.data for config in configs} == {folder}


@pytest.mark.parametrize("name", study.ARMS)
@pytest.mark.parametrize("track, vocabulary", [("cpu", 257), ("english_cpu", 50257)])
def test_every_arm_builds(name, track, vocabulary):
    variant = [] if name == "baseline" else ["--variant", study.ARMS[name]]
    config = compare.parse_options(["--track", track, "--vocab_size", str(vocabulary), *variant])
    with variants.applied(config.variant, config), torch.device("meta"):
        blocks = train_gpt.count_parameters(train_gpt.GPT(config))[1]
    assert 250_000 < blocks < 900_000


# ---- Corpora ----------------------------------------------------------------


def test_corpora_are_made_once(folders, capsys):
    options = options_of(folders)
    for corpus in study.CORPORA:
        study.prepare(options, corpus)
        config = Config(data=study.folder_of(options, corpus))
        adopt_vocabulary(config)
        assert config.vocab_size == (261 if corpus == "english_tokens" else 257)
    text = capsys.readouterr().out
    assert text.count("decoding ") == 1 and text.count("mixing ") == 3

    # a second call makes nothing; other sources are mixed anew
    for corpus in study.CORPORA:
        study.prepare(options, corpus)
    assert capsys.readouterr().out == ""
    options.python = options.english_bytes
    study.prepare(options, "english50")
    assert capsys.readouterr().out.startswith("mixing ")
    assert open_shard(train_gpt.find_shards(Config(data=f"{options.mixtures}/english50"), "train")[0])[1] < 256


def test_without_the_english_text(folders, tmp_path):
    options = options_of(folders, english=str(tmp_path), english_bytes=str(tmp_path / "bytes"))
    for corpus in ("english_tokens", "english", "english75"):
        with pytest.raises(RunError, match="no train shards"):
            study.prepare(options, corpus)


# ---- The order of the parts -------------------------------------------------


def test_rank_correlations_are_scipys():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 20, 7))
    x[3, 2] = x[3, 5]  # a tie
    tau, rho = study.correlate_ranks(x, y)
    for number in range(20):
        assert tau[number] == pytest.approx(stats.kendalltau(x[number], y[number]).statistic, abs=1e-12)
        assert rho[number] == pytest.approx(stats.spearmanr(x[number], y[number]).statistic, abs=1e-12)
    assert np.isnan(study.correlate_ranks(np.ones(4), y[0, :4])[0])


def made_up(means, noise=0.001, seeds=6, seed=0):
    """{arm: {seed: difference}} about these means."""
    random = np.random.default_rng(seed)
    return {f"a{n}": {s: mean + noise * random.normal() for s in range(1, seeds + 1)} for n, mean in enumerate(means)}


def test_orders_that_agree_and_orders_that_do_not():
    one = made_up([0.1, 0.2, 0.3, 0.4, 0.5])
    scaled, turned = made_up([1, 2, 3, 4, 5], seed=1), made_up([5, 4, 3, 2, 1], seed=2)
    same = study.compare_orders(one, scaled, False)
    assert same == dict(arms=5, seeds=6, tau=1, tau_low=1, tau_high=1, rho=1, rho_low=1, rho_high=1)
    assert study.word_of(same) == "alike"
    assert study.word_of(study.compare_orders(one, turned, False)) == "reversed"

    # without any difference the interval holds both signs, as it does of a corpus with itself
    noise = study.compare_orders(made_up([0] * 6, seed=3), made_up([0] * 6, seed=4), False)
    assert noise["tau_low"] < 0 < noise["tau_high"] and study.word_of(noise) == "undecided"
    itself = study.compare_orders(made_up([0] * 6, seed=3), made_up([0] * 6, seed=3), True)
    assert itself["tau_low"] < itself["tau"] < 1
    assert study.compare_orders(one, one, True)["tau_low"] == 1


def test_orders_need_arms_and_seeds():
    one = made_up([0.1, 0.2, 0.3], seeds=2)
    order = study.compare_orders(one, one, False)
    assert order["tau"] == 1 and order["tau_low"] is None and study.word_of(order) == "too few seeds"
    assert study.compare_orders(one, one, True) is None
    assert study.compare_orders(one, made_up([0.1, 0.2]), False) is None
    assert study.compare_orders(one, {}, False) is None


def test_differences_are_of_equal_seeds():
    rows = dict(baseline=row(losses=[[1, 2.0], [2, 2.5]]), a=row(losses=[[2, 2.0], [3, 9.0]]), b=row(losses=[]))
    assert study.differences_of(rows) == dict(a={2: -0.5})
    orders = study.orders_of(dict(python=rows, english=rows))
    assert orders == []


# ---- The study, by a stand-in -----------------------------------------------


@pytest.fixture
def stand_in(made_up_runs, folders, tmp_path):
    """made_up_runs with call(*words) -> exit code and `output`, the results' file."""
    made_up_runs.output = tmp_path / "out.json"

    def loss(job):
        arm = job.arm.name.rpartition("+")[2].partition(":")[0]
        order = dict(forgetting_attention=-0.3, low_rank=0.2, latent_attention=0.1).get(arm, 0.0)
        return 2.0 + order + 0.001 * job.seed + 0.0001 * (job.seed * len(arm) % 7)

    def call(*words):
        fixed = ["--arms", "forgetting", "low_rank", "latent_attention", "--steps", "4", "--token-steps", "3",
                 "--jobs", "1", "--output", str(made_up_runs.output), *folders]
        return study.main([*fixed, *words, "--", "--val_tokens", "2048"])

    made_up_runs.loss, made_up_runs.call = loss, call
    return made_up_runs


def test_from_runs_to_results(stand_in, capsys):
    assert stand_in.call("--seeds", "3", "--corpora", "english_tokens", "english25") == 0
    results = json.loads(stand_in.output.read_text())
    assert list(results["corpora"]) == ["english25", "english_tokens"]
    assert len(stand_in.trained) == 2 * 4 * 3
    for rows in results["corpora"].values():
        assert list(rows) == ["baseline", "forgetting", "low_rank", "latent_attention"]
        assert {rows[name]["verdict"] for name in list(rows)[1:]} == {"too few pairs"}
        assert rows["forgetting"]["difference"] == pytest.approx(-0.3, abs=1e-3)
    assert [(order["first"], order["second"], order["tau"]) for order in results["orders"]] == [
        ("english25", "english25", 1), ("english25", "english_tokens", 1), ("english_tokens", "english_tokens", 1)]
    text = stand_in.output.with_suffix(".md").read_text()
    assert text.strip() in capsys.readouterr().out and stand_in.output.with_suffix(".png").stat().st_size > 10_000
    assert "| english25 | english_tokens | 3 | 3 | +1.00 | +1.00 to +1.00 | +1.00 | +1.00 to +1.00 | alike |" in text


def test_it_goes_on_where_it_was_stopped(stand_in, capsys):
    words = ["--seeds", "1", "--corpora", "python", "english75"]
    calls = call_with_stops(stand_in, words, 3, capsys)
    assert calls == 3 and len(stand_in.trained) == len(set(stand_in.trained)) == 8

    # the plan says so, and nothing is left to do
    assert stand_in.call(*words, "--dry-run") == 0
    text = capsys.readouterr().out
    assert "python: 4 runs, 4 of them done; expected time 0:00 h" in text and "all: expected time 0:00 h" in text
    assert stand_in.call(*words) == 0 and len(stand_in.trained) == 8


@pytest.mark.parametrize("words, message", [
    (["--corpora", "french"], "there is no corpus 'french'; choose from python, english25"),
    (["--arms", "none"], "there is no arm 'none'"),
    (["--steps", "0"], "--steps must be from 1 to"),
    (["--margin", "0"], "--margin must be greater than 0 nats")])
def test_faults_are_one_line(stand_in, words, message, capsys):
    assert stand_in.call(*words) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not stand_in.trained


@pytest.mark.slow
@pytest.mark.parametrize("name", study.ARMS)
@pytest.mark.parametrize("corpus", ["english50", "english_tokens"])
def test_every_arm_trains(name, corpus, folders, tmp_path):
    options = options_of(folders)
    study.prepare(options, corpus)
    line = next(line for line, short in study.arms_on(corpus, study.ARMS).items() if short == name)
    track = "english_cpu" if corpus == "english_tokens" else "cpu"
    variant = [] if line == "baseline" else ["--variant", line]
    config = compare.parse_options([
        "--track", track, "--data", study.folder_of(options, corpus), "--batch_tokens", "2048", "--val_tokens", "512",
        "--log_dir", str(tmp_path), "--run_id", "run", "--no-save", *study.length_options(2), *variant])
    adopt_vocabulary(config)
    with variants.applied(config.variant, config) as replaced:
        assert train_gpt.Trainer(config, replaced).run() == 0
    assert [point["step"] for point in json.loads((tmp_path / "run.json").read_text())["curve"]] == [0, 2]
