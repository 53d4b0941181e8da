"""
The study of 30 presets: its table, the arithmetic of its protocols, what it makes of results, and that it goes on where
it was stopped. A stand-in writes the logs of runs; the slow test trains every preset for two steps.
"""
import json
import math

import numpy as np
import pytest
import torch

import train_gpt
import variants
from data.shards import write_meta, write_shard
from records.runs import Run
from studies import golf_claims as claims
from studies import golf_picture as picture
from studies import parameter_golf as study
from tests.models import random_tokens
from tests.studies.conftest import call_with_stops
from train_gpt import RunError
from variants import check

NAMES = list(study.ALL)
STEPS = 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "corpus"
    folder.mkdir()
    random = np.random.default_rng(0)
    for split, tokens in (("train", 40_000), ("val", 3_000)):
        write_shard(folder / f"x_{split}_000000.bin", np.append(256, random.integers(97, 105, tokens)))
    write_meta(folder, vocab_size=257, tokenizer="bytes")
    return folder


# ---- The table --------------------------------------------------------------


def test_the_table_has_the_thirty_runs():
    assert len(study.PUBLISHED) == 30 and len(study.ALL) == 30 + len(study.FURTHER)
    assert study.PUBLISHED[0].line == "baseline" and all(preset.parameters for preset in study.PUBLISHED)
    assert [preset.name for preset in study.PUBLISHED if preset.bits is None] == ["seed_2048"]
    for track in study.TRACKS:  # two equal arms would be one arm with twice the seeds
        arms = [preset.arm(track) for preset in study.ALL.values()]
        assert len(set(arms)) == len(arms) and not any("{" in arm or "|" in arm for arm in arms)
    assert study.ALL["mla_l64"].arm("golf") == "latent_attention:latent=64,style=published"
    assert study.ALL["mla_l64"].arm("golf_cpu") == "latent_attention:latent=12,style=published"


def numbers_of(name, track):
    return study.count_numbers(study.config_of(study.ALL[name].arm(track), ["--track", track, "--vocab_size", "1024"]))


@pytest.mark.parametrize("name", [preset.name for preset in study.PUBLISHED])
def test_published_parameters(name):
    numbers = numbers_of(name, "golf")
    assert numbers["stored"] == study.ALL[name].parameters and numbers["bytes"] == 4 * numbers["stored"]
    made = {"hyper_r32": 16_515_072, "seed_2048": 16_515_072, "siren_h256": 16_515_072, "nca_s50": 17_059_912}
    assert numbers["generated"] == made.get(name, 0)


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_is_an_arm_of_the_small_track(name):
    assert 2_000 < numbers_of(name, "golf_cpu")["stored"] < 1_100_000


@pytest.mark.parametrize("track", study.TRACKS)
@pytest.mark.parametrize("pair", [("mla_l128_repaired", "low_rank_r256"), ("low_rank_r90", "basis_r130"),
                                  ("rank_in_mlp", "rank_in_attention")])
def test_presets_that_claims_compare_are_equal_in_parameters(pair, track):
    one, other = (numbers_of(name, track)["stored"] for name in pair)
    assert one == other


def test_presets_are_chosen_by_name_and_by_style():
    def names(*words):
        return [preset.name for preset in study.choose_presets(list(words))]

    assert names("siren_h256", "mla_l64") == ["baseline", "mla_l64", "siren_h256"]
    assert names("published") == [preset.name for preset in study.PUBLISHED]
    assert names("repaired", "control") == ["baseline", *(preset.name for preset in study.FURTHER)]
    with pytest.raises(RunError, match="there is no preset 'mla'; choose from control, published, repaired, baseline"):
        names("mla")


@pytest.mark.parametrize("name, order", [
    ("recur_34x2", [0, 1, 2, 3, 3, 4, 4, 5, 6, 7, 8]),
    ("recur_34x3", [0, 1, 2, 3, 3, 3, 4, 4, 4, 5, 6, 7, 8]),
    ("recur_345x2", [0, 1, 2, 3, 3, 4, 4, 5, 5, 6, 7, 8]),
    ("eigen2_a96m48_rec34", [0, 1, 2, 3, 3, 4, 4, 5, 6, 7, 8])])
def test_recurrence_repeats_the_layers_of_its_name(name, order):
    config = study.config_of(study.ALL[name].arm("golf_cpu"), ["--track", "golf_cpu", "--vocab_size", "257"])
    with variants.applied(config.variant, config), torch.device("meta"):
        assert [layer for layer, _ in train_gpt.GPT(config).passes] == order


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_preset_trains(name, corpus, tmp_path):
    options = ["--track", "golf_cpu", "--data", str(corpus), "--batch_tokens", "256", "--val_tokens", "256",
               "--log_dir", str(tmp_path), "--run_id", "run", "--no-save", "--keep_losses", "0"]
    config = study.config_of(study.ALL[name].arm("golf_cpu"), options + study.length_options(2))
    with variants.applied(config.variant, config) as replaced:
        assert train_gpt.Trainer(config, replaced).run() == 0
    facts = json.loads((tmp_path / "run.json").read_text())
    numbers = study.count_numbers(config)
    assert facts["parameters"] == numbers["stored"] and [point["step"] for point in facts["curve"]] == [0, 2]
    if name != "mps_b64":  # it begins with random logits, as it was published
        assert facts["curve"][0]["val_loss"] == pytest.approx(math.log(257), abs=0.2)


# smaller generators that write matrices of the same deviations: the automaton's rule begins at zero
SMALLER = {
    "hyper_r32": "hypernetwork:z_dim=64,hidden=16,rank=32,style=published",
    "nca_s50": "cellular_automaton:steps=1,hidden=8,style=published",
    "siren_h256": "siren_weights:hidden=16,style=published --no-x0_skip --no-unet_skips --no-zero_init_projections",
    "seed_2048": "seed_model:dim=16,style=published",
}
# The automaton writes an embedding of deviation 0.02, the train of matrices logits of deviation 8. Where the head is
# the embedding a token's logit of itself begins at 0.005 model_dim: at 1,024 channels it is e^5.1 times as likely.
FAR_FROM_GUESSING = {"nca_s50": 0.05, "mps_b64": 5.0, "eigen2_d1024_r64": 0.05, "eigen2_d1024_r32": 0.05}


@pytest.mark.slow
@pytest.mark.parametrize("name", [preset.name for preset in study.PUBLISHED])
def test_loss_before_the_first_step(name):
    """At the published size; where a generator writes all matrices, with a smaller one."""
    arm = SMALLER.get(name, study.ALL[name].arm("golf"))
    config = study.config_of(arm, ["--track", "golf", "--vocab_size", "1024"])
    with variants.applied(config.variant, config):
        model = train_gpt.build_model(config, check.ALONE).eval()
        tokens = random_tokens(2, 129)
        with torch.no_grad():
            excess = model(tokens[:, :-1], tokens[:, 1:]).item() - math.log(1024)
    if name in FAR_FROM_GUESSING:
        assert excess > FAR_FROM_GUESSING[name]
    else:
        assert abs(excess) < 0.05


# ---- The protocols ----------------------------------------------------------


def timed(step_ms, status="finished"):
    return Run("run.txt", "", step_ms=list(np.cumsum(step_ms)), status=status)


def test_time_of_a_step_is_that_of_warm_ones():
    cold = [500.0] * 51 + [100.0] * 100
    assert study.measure_step([timed(cold)]) == pytest.approx(100)
    assert study.measure_step([timed(cold + [90_000.0] * 3)]) == pytest.approx(100)  # pauses
    assert study.measure_step([timed([9.0, 9.0, 4.0, 4.0, 4.0])]) == pytest.approx(4)  # half of a short run is warm
    runs = [timed([value] * 60) for value in (10.0, 20.0, 70.0)]
    assert study.measure_step(runs) == pytest.approx(20)
    assert study.measure_step([timed([5.0] * 60, "failed: no")]) is None
    assert study.measure_step([dict(seed=1, error="not finished")]) is None


def test_steps_within_a_budget():
    assert study.steps_within(1000.0, 250.0) == 4 and study.steps_within(999.0, 250.0) == 3
    assert study.steps_within(292 * 0.1, 0.1) == 292  # in spite of rounding
    assert study.steps_within(10.0, 250.0) == 1


def test_protocol_b_gives_each_arm_its_steps():
    times = dict(baseline=50.0, mla=40.0, siren=200.0, failed=None)
    lines, budget = study.arms_in_time(times, 100, None)
    assert budget == pytest.approx(5)
    assert lines == {"baseline": "baseline --steps 100 --val_every 100", "mla": "mla --steps 125 --val_every 125",
                     "siren": "siren --steps 25 --val_every 25"}
    lines, budget = study.arms_in_time(times, 100, 2.0)
    assert budget == 2 and lines["baseline"].endswith("--steps 40 --val_every 40")
    with pytest.raises(RunError, match="no run of the baseline is finished"):
        study.arms_in_time(dict(baseline=None, mla=40.0), 100, None)


def test_the_decay_of_protocol_b_is_fractional():
    configs = [study.config_of(f"baseline --steps {steps}", ["--track", "golf_cpu", "--vocab_size", "257"])
               for steps in (40, 100)]
    for share in (0.0, 0.3, 0.5, 0.9):
        one, other = (train_gpt.schedule_learning_rate(config, share) for config in configs)
        assert one == other


def test_near_the_baseline():
    def arm(name, difference):
        return dict(name=name, vs_baseline=None if difference is None else dict(loss=dict(difference=difference)))

    arms = [arm("baseline", None), arm("a", 0.019), arm("b", -0.02), arm("c", 0.021), arm("failed", None)]
    assert study.find_near(dict(arms=arms)) == ["a", "b"]


# ---- Runs, by a stand-in ----------------------------------------------------


LOSSES = {"baseline": 2.0, "latent_attention": 2.01, "low_rank": 2.3}


@pytest.fixture
def stand_in(made_up_runs, monkeypatch, tmp_path, corpus):
    """
    made_up_runs with call(*words) -> exit code, trained: [(variant, seed, steps)], bad: variants whose runs fail,
    drawn: paths of the pictures that were not drawn. Baseline takes 100 ms a step, low_rank 250, others 50.
    """
    stand = made_up_runs
    stand.output, stand.drawn = tmp_path / "out.json", []
    stand.describe = lambda job, config: (name_of(job), job.seed, config.steps)
    stand.loss = lambda job: LOSSES[name_of(job)] + 0.001 * job.seed + 0.0001 * (job.seed * len(name_of(job)) % 7)
    stand.ms = lambda job: {"baseline": 100.0, "low_rank": 250.0}.get(name_of(job), 50.0)
    stand.fails = lambda job: name_of(job) in stand.bad

    def call(*words):
        settings = ["--data", str(corpus), "--val_tokens", "2048"]
        options = ["--steps", str(STEPS), "--jobs", "1", "--output", str(stand.output)]
        return study.main([*words, *options, "--", *settings])

    monkeypatch.setattr(study, "draw", lambda path, protocols: stand.drawn.append((path, list(protocols))))
    stand.call = call
    return stand


def name_of(job):
    return (job.arm.variant or ["baseline"])[0].partition(":")[0]


def test_both_protocols_and_more_seeds_of_what_is_near(stand_in, capsys):
    assert stand_in.call("--presets", "mla_l128", "eigen_r64", "--seeds", "3", "6") == 0
    results = json.loads(stand_in.output.read_text())

    # A: three seeds of all, six of the baseline and of what is near it; B: its steps by its time, the baseline's runs
    # are A's
    of_a = [(name, seed) for name, seed, steps in stand_in.trained if steps == STEPS]
    assert sorted(of_a) == [*(("baseline", n) for n in range(1, 7)), *(("latent_attention", n) for n in range(1, 7)),
                            *(("low_rank", n) for n in (1, 2, 3))]
    of_b = sorted((name, steps, seed) for name, seed, steps in stand_in.trained if steps != STEPS)
    assert of_b == [*(("latent_attention", 2 * STEPS, n) for n in range(1, 7)),
                    *(("low_rank", math.floor(STEPS / 2.5), n) for n in (1, 2, 3))]
    assert results["budget"] == pytest.approx(0.1 * STEPS) and list(results["protocols"]) == ["A", "B"]

    # the rows
    rows = results["protocols"]["A"]
    assert list(rows) == ["baseline", "mla_l128", "eigen_r64"]
    near, far = rows["mla_l128"], rows["eigen_r64"]
    assert near["n"] == 6 and far["n"] == 3 and rows["baseline"]["loss"]["n"] == 6
    assert near["difference"] == pytest.approx(0.01, abs=1e-3) and near["verdict"] == "worse"
    assert far["verdict"] == "too few pairs" and far["difference"] == pytest.approx(0.3, abs=1e-3)
    assert 0 < near["p"] <= near["p_holm"] < 0.01
    assert near["times_baseline"] == pytest.approx(0.5) == results["protocols"]["B"]["mla_l128"]["times_baseline"]
    assert results["protocols"]["B"]["baseline"]["seconds"] == near["seconds"] * 2 == pytest.approx(0.1 * STEPS)
    assert near["start_loss"] == 5.5 and near["steps"] == STEPS
    assert near["bits_per_byte"] == pytest.approx(near["loss"]["mean"] / 0.6931, rel=1e-3)
    assert near["published_bits"] == 1.3223 and near["stored"] == 568_356 and near["generated"] == 0

    # the claims and the files
    words = {claim["claim"]: claim["verdict"] for claim in results["claims"]}
    assert list(words) == [f"P{number}" for number in range(1, 15)]
    assert words["P2"] == words["P13"] == "not run" and words["P1"] in ("confirmed", "undecided", "refuted")
    assert stand_in.drawn[-1] == (stand_in.output.with_suffix(".png"), ["A", "B"]) and len(stand_in.drawn) == 4
    tables = stand_in.output.with_suffix(".md").read_text()
    assert tables.strip() in capsys.readouterr().out and "| eigen_r64 | published | 164,652 |" in tables


def test_it_goes_on_where_it_was_stopped(stand_in, capsys):
    words = ["--presets", "mla_l128", "eigen_r64", "--seeds", "1", "2"]
    calls = call_with_stops(stand_in, words, 2, capsys)
    assert calls > 3 and len(stand_in.trained) == len(set(stand_in.trained))
    stopped = json.loads(stand_in.output.read_text())

    # nothing is left to do, and it is what one call gives
    count = len(stand_in.trained)
    assert stand_in.call(*words) == 0 and len(stand_in.trained) == count
    again = json.loads(stand_in.output.read_text())
    assert again["protocols"] == stopped["protocols"] and again["claims"] == stopped["claims"]


def test_fewer_presets_take_over_finished_runs(stand_in):
    assert stand_in.call("--presets", "mla_l128", "eigen_r64", "--seeds", "2", "--protocol", "A") == 0
    count = len(stand_in.trained)
    assert stand_in.call("--presets", "mla_l128", "--seeds", "2", "--protocol", "A") == 0
    assert len(stand_in.trained) == count == 6


def test_protocol_b_alone_measures_the_times_once(stand_in):
    assert stand_in.call("--presets", "mla_l128", "--seeds", "2", "--protocol", "B", "--budget", "0.8") == 0
    results = json.loads(stand_in.output.read_text())
    assert list(results["protocols"]) == ["B"] and results["budget"] == 0.8
    assert sorted(stand_in.trained) == [("baseline", 1, STEPS), ("baseline", 1, 8), ("baseline", 2, 8),
                                        ("latent_attention", 1, STEPS), ("latent_attention", 1, 16),
                                        ("latent_attention", 2, 16)]


def test_a_preset_that_fails_is_reported(stand_in, capsys):
    stand_in.bad = {"low_rank"}
    assert stand_in.call("--presets", "mla_l128", "eigen_r64", "--seeds", "2") == 0
    rows = json.loads(stand_in.output.read_text())["protocols"]
    assert "eigen_r64" not in rows["B"] and rows["A"]["eigen_r64"]["loss"] is None
    assert rows["A"]["eigen_r64"]["errors"] == ["seed 1: made up", "seed 2: made up"]
    assert "- eigen_r64: seed 1: made up; seed 2: made up" in capsys.readouterr().out


def test_a_dry_run_runs_nothing(stand_in, capsys):
    words = ["--presets", "mla_l128", "--seeds", "2", "3"]
    assert stand_in.call(*words, "--dry-run") == 0
    text = capsys.readouterr().out
    assert not stand_in.trained and not stand_in.output.exists()
    assert "| mla_l128 | latent_attention:latent=24,style=published | 568,356 | 0 |" in text
    assert "protocol A: 4 runs, 0 of them done; expected time not known" in text
    assert stand_in.call(*words, "--protocol", "A") == 0
    assert stand_in.call(*words, "--dry-run") == 0
    text = capsys.readouterr().out
    assert "protocol A: 4 runs, 4 of them done; expected time 0:00 h, by" in text
    assert "protocol B: 4 runs, 0:00 h of training, " in text


@pytest.mark.parametrize("words, message", [
    (["--seeds", "0"], "--seeds takes one number, or two that do not fall, from 1 on; got [0]"),
    (["--seeds", "6", "3"], "--seeds takes one number, or two"),
    (["--seeds", "1", "2", "3"], "--seeds takes one number, or two"),
    (["--budget", "0"], "--budget must be greater than 0 seconds, got 0.0"),
    (["--margin", "-1"], "--margin must be greater than 0 nats, got -1.0"),
    (["--presets", "none"], "there is no preset 'none'")])
def test_faults_are_one_line(stand_in, words, message, capsys):
    assert stand_in.call(*words) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not stand_in.trained


# ---- Claims -----------------------------------------------------------------


def make_row(losses, ms=100.0, stored=1000, times=1.0, bits=None):
    summary = dict(mean=float(np.mean(losses)), n=len(losses))
    return dict(losses=[[seed, loss] for seed, loss in enumerate(losses, 1)], loss=summary, ms_per_step=ms,
                times_baseline=times, stored=stored, published_bits=bits)


def evidence(margin=0.01, unigram=3.0, **protocols):
    return claims.Evidence(protocols, margin, unigram)


NOISE = np.array([0.001, -0.001, 0.0005])


def near(loss, shift=0.0):
    """Losses of three seeds about a mean; shift turns the noise, so that differences have some."""
    return list(loss + NOISE + shift * NOISE[::-1])


def test_a_difference_is_judged_by_its_interval():
    test = dict(low=0.001, high=0.003)
    assert claims.is_below(test) is False and claims.is_below(test, 0.01) is True
    assert claims.is_below(test, 0.002) is None
    assert claims.is_below(dict(low=None, high=None)) is None
    assert claims.is_within(test, 0.01) is True and claims.is_within(test, 0.0005) is False
    assert claims.is_within(dict(low=-0.02, high=0.02), 0.01) is None
    assert claims.word_of(True, True) == "confirmed" and claims.word_of(True, None) == "undecided"
    assert claims.word_of(None, False) == "refuted"


@pytest.mark.parametrize("loss, times, word", [
    (2.0, 1.0, "confirmed"), (2.0, 1.1, "refuted"), (2.1, 1.0, "refuted"), (2.01, 1.0, "undecided")])
def test_latent_attention_is_free_within_the_margin_at_no_more_time(loss, times, word):
    rows = dict(baseline=make_row(near(2.0)), mla_l128=make_row(near(loss, 0.5), times=times))
    assert claims.latent_is_free(evidence(A=rows))[1] == word


def test_rank_curve():
    shares = claims.RANKS.values()
    slope, r2, parity = claims.fit_ranks({share: 2.0 - 0.1 * math.log(share) for share in shares}, 2.02)
    assert slope == pytest.approx(-0.1) and r2 == pytest.approx(1) and parity == pytest.approx(math.exp(-0.2))
    rows = {name: make_row(near(2.0 - 0.1 * math.log(share))) for name, share in claims.RANKS.items()}
    assert claims.rank_curve_is_smooth(evidence(A=rows | dict(baseline=make_row(near(2.02)))))[1] == "confirmed"
    assert claims.rank_curve_is_smooth(evidence(A=rows | dict(baseline=make_row(near(1.9)))))[1] == "refuted"
    rows["eigen_r256"] = make_row(near(3.0))
    assert claims.rank_curve_is_smooth(evidence(A=rows | dict(baseline=make_row(near(2.02)))))[1] == "refuted"


def test_interaction_of_rank_and_recurrence():
    rows = dict(baseline=make_row(near(2.0)), eigen_r128=make_row(near(2.1, 0.3)), recur_34x2=make_row(near(1.95, 0.6)))
    for both, word in ((2.1, "confirmed"), (2.05, "undecided"), (2.0, "refuted")):
        text, verdict = claims.rank_and_recurrence(evidence(A=rows | dict(eigen2_r128_rec34=make_row(near(both, 1.5)))))
        lost = both - 2.05 + 0.6 * NOISE.mean()  # shifts: 1.5 - 0.3 - 0.6
        assert verdict == word and f"gain that is lost together {lost:+.4f} (" in text


def test_throughput_is_a_rank_correlation_without_exceptions():
    def rows(losses, slow_loss):
        made = {f"p{n}": make_row(near(loss, 0.1 * n), ms=100 + n, times=1 + n / 100) for n, loss in enumerate(losses)}
        slow = make_row(near(slow_loss, 0.4), ms=300.0, times=3.0)
        return made | dict(baseline=make_row(near(2.0), ms=100.0), slow=slow)

    rising = [2.05 + 0.01 * n for n in range(20)]
    assert claims.throughput_decides(evidence(B=rows(rising, 2.5)))[1] == "confirmed"
    assert claims.throughput_decides(evidence(B=rows(rising, 1.9)))[1] == "refuted"
    assert claims.throughput_decides(evidence(B=rows(rising[::-1], 2.01)))[1] == "refuted"
    with pytest.raises(claims.NotRun):
        claims.throughput_decides(evidence(B=rows([], 2.5)))


def test_exotic_forms_fail_where_none_beats_a_unigram():
    for learnt, word in ((0, "confirmed"), (3, "undecided"), (7, "refuted")):
        rows = {f"{name}_repaired": make_row([2.9 if number < learnt else 3.1])
                for number, name in enumerate(claims.EXOTIC)}
        text, verdict = claims.exotic_fail(evidence(A=rows))
        assert verdict == word and f"{learnt} of 7 below a unigram's 3.000" in text


def test_claims_of_one_difference():
    def judge(function, **means):
        rows = {}
        for number, (name, loss) in enumerate(means.items()):
            rows[name] = make_row(near(loss, 0.2 * number), stored=100)
        return function(evidence(A=rows, B=rows))[1]

    assert judge(claims.pauses_help, pause_4x64=1.98, baseline=2.0) == "confirmed"
    assert judge(claims.pauses_help, pause_4x64=2.0, baseline=2.0) == "undecided"
    assert judge(claims.light_pauses_win, pause_4x64=2.1, pause_8x32=2.0) == "refuted"
    assert judge(claims.rank_belongs_in_mlp, rank_in_mlp=2.0, rank_in_attention=2.03) == "confirmed"
    assert judge(claims.rank_belongs_in_mlp, rank_in_mlp=2.0, rank_in_attention=2.001) == "refuted"
    assert judge(claims.rank_not_width, eigen2_d1024_r64=2.0, eigen_r64=2.001) == "confirmed"
    assert judge(claims.rank_not_width, eigen2_d1024_r64=2.0, eigen_r64=2.1) == "refuted"
    assert judge(claims.order_of_compression, mla_l128_repaired=2, low_rank_r256=2.1, low_rank_r90=2.2,
                 basis_r130=2.3) == "confirmed"
    assert judge(claims.order_of_compression, mla_l128_repaired=2, low_rank_r256=1.9, low_rank_r90=2.2,
                 basis_r130=2.3) == "refuted"
    assert judge(claims.keys_need_little_rank, mla_l64=1.99, mla_l128=1.98, baseline=2.0) == "confirmed"
    assert judge(claims.fewer_passes_win, recur_34x2=1.9, recur_34x3=2.0) == "confirmed"
    assert judge(claims.universal_fails, ut_act12=2.3, ut_act20=2.4, ut_act12_repaired=2.2, baseline=2.0) == "confirmed"
    assert judge(claims.universal_fails, ut_act12=2.3, ut_act20=2.4, ut_act12_repaired=1.9, baseline=2.0) == "refuted"


def test_the_published_order():
    rows = {f"p{n}": make_row(near(2 + n / 10), bits=1.3 + n / 7) for n in range(6)}
    assert claims.order_is_the_same(evidence(A=rows))[1] == "confirmed"
    for n in range(6):
        rows[f"p{n}"]["published_bits"] = 2 - n / 7
    assert claims.order_is_the_same(evidence(A=rows))[1] == "refuted"


def test_a_claim_without_its_presets_is_not_run():
    assert {claim["verdict"] for claim in claims.judge_claims(evidence())} == {"not run"}
    rows = dict(baseline=make_row(near(2.0)), mla_l128=make_row(near(2.0, 0.5)) | dict(losses=[]))
    assert {claim["verdict"] for claim in claims.judge_claims(evidence(A=rows))} == {"not run"}


# ---- The picture ------------------------------------------------------------


def test_pareto_front():
    points = dict(a=(1, 5), b=(2, 3), c=(3, 4), d=(4, 1), e=(4, 2), f=(2, 3.5), g=(9, 1))
    assert picture.pareto_front(points) == ["a", "b", "d"]
    assert picture.pareto_front({}) == [] and picture.pareto_front(dict(a=(1, 1), b=(1, 0.5))) == ["b"]


def test_names_cover_nothing():
    taken, frame, size = [], (0, 0, 600, 400), (60, 10)
    for number in range(40):  # forty dots within a few pixels
        point = (300 + number % 5, 200 + number / 10)
        offset = picture.choose_offset(point, size, taken, frame)
        box = picture.box_at(point, offset, size)
        assert not any(picture.overlap(box, other) for other in taken)
        assert frame[0] <= box[0] and box[2] <= frame[2] and frame[1] <= box[1] and box[3] <= frame[3]
        taken.append(box)
    assert picture.choose_offset((590, 200), size, [], frame)[0] < -size[0]  # on the left at the right edge


def test_picture_of_made_up_results(tmp_path):
    random = np.random.default_rng(0)
    rows = {}
    for name, preset in study.ALL.items():
        bits = 2.0 + random.exponential(0.3)
        rows[name] = dict(stored=int(10 ** random.uniform(3, 6)), ms_per_step=100 * random.uniform(0.5, 20), style=
                          preset.style, bits_per_byte=bits, loss=dict(mean=bits * math.log(2)))
    rows["mps_b64"]["bits_per_byte"] = 37.5
    rows["nca_s50"] |= dict(bits_per_byte=None, loss=None)
    picture.draw(tmp_path / "two.png", dict(A=rows, B=rows))
    assert (tmp_path / "two.png").stat().st_size > 50_000
    assert "nca_s50" not in picture.points_of(rows, "stored") and len(picture.points_of(rows, "stored")) == 48


def test_losses_without_bytes_are_drawn_in_nats():
    rows = dict(a=dict(stored=10, bits_per_byte=None, loss=dict(mean=3.0)))
    assert picture.points_of(rows, "stored") == dict(a=(10, 3.0))


def test_unigram_loss(corpus):
    config = study.config_of("baseline", ["--track", "golf_cpu", "--data", str(corpus), "--val_tokens", "2048"])
    assert study.unigram_loss(config) == pytest.approx(math.log(8), abs=0.02)
