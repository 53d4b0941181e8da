"""The comparison of renderings: its corpora, one run, the rule of its verdict, its tables."""
import json
from dataclasses import replace

import pytest

from studies import symbolic_language as study
from tasks import symbolic_language as language
from tasks import symbolic_proofs as proofs
from train_gpt import RunError, open_shard

TINY = language.Task(families=("add", "order"), digits=2, depth=3, sequence_length=512)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    return folder, study.corpora(folder, TINY, 150, 20, quick=True)


def documents(folder, task) -> list[str]:
    """The normalised problems of a corpus, in its order."""
    file, = folder.glob("*train*.bin")
    words = [proofs.VOCABULARY[token] if token < len(proofs.VOCABULARY) else "|" for token in open_shard(file)]
    texts = [text.split() for text in " ".join(word for word in words if word != proofs.PAD).split("|") if text.strip()]
    return [proofs.normalise(proofs.Parser(proofs.to_symbolic(text, task.rendering), task.digit_order).program()[0])
            for text in texts]


def test_equal_problems_and_equal_tokens(made):
    folder, facts = made
    found = {rendering: documents(folder / f"{rendering}-problems", replace(TINY, rendering=rendering))
             for rendering in ("symbolic", "english", "lean_like")}
    assert len(found["symbolic"]) == 150 and found["symbolic"] == found["english"] == found["lean_like"]
    tokens = facts["symbolic", "problems"]["tokens"]
    assert facts["english", "problems"]["tokens"] > facts["lean_like", "problems"]["tokens"] > tokens > facts[
        "answer_only", "problems"]["tokens"]
    for rendering, more in (("english", False), ("lean_like", False), ("answer_only", True)):
        arm = facts[rendering, "tokens"]
        assert arm["tokens"] == tokens and (arm["problems"] > 150) is more
        own = documents(folder / f"{rendering}-tokens",
                        replace(TINY, rendering=rendering)) if rendering != "answer_only" else None
        assert own is None or own == found["symbolic"][:len(own)]
        assert sum(len(open_shard(file))
                   for file in (folder / f"{rendering}-tokens").glob("*train*.bin")) >= tokens - 512


@pytest.mark.parametrize("rendering", [pytest.param("symbolic", marks=pytest.mark.slow), "answer_only"])
def test_one_run_is_trained_and_marked(made, rendering):
    folder, facts = made
    settings = ["--layers", "1", "--model_dim", "16", "--heads", "1", "--head_dim", "16", "--mlp_hidden", "16",
                "--value_embeddings", "0", "--sequence_length", "512"]
    run = study.train_and_mark(folder, (rendering, "problems"), facts[rendering, "problems"]["tokens"], 3, (4, 2),
                               settings, 1)
    assert run["seed"] == 3 and run["tokens"] == 2048 * run["steps"] <= facts[rendering, "problems"]["tokens"]
    assert 0 < run["val_loss"] < 6
    marks = run["marks"]["add"]
    assert marks["test"]["count"] == 4 and marks["x2"]["count"] == 2 and run["marks"]["all"]["test"]["count"] == 8
    assert (marks["test"]["joint"] is None) is (rendering == "answer_only") and 0 <= marks["test"]["exact"] <= 4
    assert 0 < marks["test"]["majority"] < 1
    assert not list(folder.glob("*.pt"))
    with pytest.raises(RunError, match="-problems-3 failed: .*--layers must be from 1 to 1,024"):
        study.train_and_mark(folder, (rendering, "problems"), 4096, 3, (4, 2), ["--layers", "0"], 1)


def runs_of(table: dict) -> list[dict]:
    """Runs from {(rendering, budget): {mark: right answers of 100 by seed}}."""
    return [dict(rendering=rendering, budget=budget, seed=seed + 1, tokens=2048,
                 marks={
        family: {part: {mark: right.get(mark, [None] * 3)[seed]
                        for mark in study.MARKS} | dict(count=100, majority=0.1, random=0.2, tokens=30)
                 for part in ("test", *study.LONGER)} for family in ("all", "add")})
            for (rendering, budget), right in table.items() for seed in range(3)]


def table(english=(40, 41, 42), lean_like=(42, 43, 44), answer_only=(20, 21, 22)) -> dict:
    def joint(values):
        return dict(joint=values, exact=values, valid=values, identical=values)

    others = dict(english=joint(english), lean_like=joint(lean_like),
                  answer_only=dict(exact=answer_only, identical=answer_only))
    return {("symbolic", "problems"): joint((50, 51, 52)), ("shuffled_trace", "problems"): joint((5, 6, 7))} | {
        (name, budget): values for name, values in others.items() for budget in ("problems", "tokens")}


@pytest.mark.parametrize("changes,verdict", [
    ({}, "supported"),
    (dict(english=(51, 50, 52)), "refuted"),
    (dict(answer_only=(60, 61, 62)), "refuted"),
    (dict(lean_like=(30, 51, 60)), "undecided"),
])
def test_the_rule(changes, verdict):
    leads = study.leads_of(runs_of(table(**changes)))
    assert [(lead["over"], lead["mark"], lead["equal"]) for lead in leads[:3]] == [("english", "joint", "problems"),
                                                                                   ("lean_like", "joint", "problems"),
                                                                                   ("answer_only", "exact", "problems")]
    assert study.verdict_of(leads) == verdict
    if not changes:
        assert [round(lead["difference"], 3) for lead in leads] == [0.1, 0.08, 0.3] * 2


def test_one_seed_decides_nothing():
    assert study.verdict_of(study.leads_of([run for run in runs_of(table()) if run["seed"] == 1])) == "undecided"


def test_tables():
    runs = runs_of(table())
    results = dict(runs=runs, seeds=[1, 2, 3],
                   corpora={"-".join(arm): dict(problems=1234, tokens=2048) for arm in study.ARMS},
                   leads=study.leads_of(runs), verdict="supported")
    text = study.tables(json.loads(json.dumps(results)))
    assert "| symbolic | both | 1,234 | 2,048 | 51.0 (50.0 to 52.0) |" in text
    assert "| answer_only | tokens | 1,234 | 2,048 | 21.0 (20.0 to 22.0) | - | - |" in text
    assert "45.4 to 56.6" in text  # Wilson's interval of 153 right out of 300
    assert "| english | joint | problems | +10.0 | +10.0 to +10.0 |" in text
    assert text.rstrip().endswith("Verdict: supported.")


def test_faults_are_one_line(capsys):
    assert study.main(["--seeds", "0"]) == 1
    assert capsys.readouterr().err == "symbolic_language.py: error: --seeds must be at least 1, got 0\n"
    assert study.main(["--quick", "--digits", "0"]) == 1
    assert "--digits and --depth must be at least 1" in capsys.readouterr().err
