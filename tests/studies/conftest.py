"""A stand-in for runs: it writes the logs that the trainer would have left, so that a study is tried in seconds."""

import json
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

import compare
import records.report
from records.identity import source_of
from tests.records.conftest import log_lines
from train_gpt import adopt_vocabulary


@pytest.fixture
def made_up_runs(monkeypatch, tmp_path):
    """
    From here on compare.py trains nothing, tries no arm for causality and draws no picture, in a folder of its own. A
    test may set loss(job): the run's last loss, ms(job): its milliseconds a step, fails(job), facts(job): what else its
    JSON holds, describe(job, config): what `trained`, a list, gets for a run; most: after so many runs comes a signal.
    """
    stand = SimpleNamespace(
        trained=[], most=None, bad=set(), loss=lambda job: 2.0, ms=lambda job: 100.0, fails=lambda job: False,
        facts=lambda job: {}, describe=lambda job, config: (job.arm.name, job.seed, config.data))

    def run(self, missing, total):
        for _, job in missing:
            if stand.most is not None and len(stand.trained) >= stand.most:
                self.interrupt.receive(15, None)
                self.interrupt.check()
            if stand.fails(job):
                self.state["failed"][job.name] = "made up"
            else:
                stand.trained.append(stand.describe(job, self.config(job)))
                write_log(self, job, stand)
            self.state["order"].append(dict(run=job.name, arm=job.arm.name, seed=job.seed))
            self.state["company"][job.name] = len(missing)
        self.save_state()

    monkeypatch.setattr(compare.Comparison, "run", run)
    monkeypatch.setitem(sys.modules, "variants.check", SimpleNamespace(faults_of=lambda config: []))
    monkeypatch.setattr(records.report, "draw", lambda *arguments: None)
    monkeypatch.chdir(tmp_path)
    return stand


def call_with_stops(stand, words: list[str], every: int, capsys) -> int:
    """Call the study again and again, each time with a signal after so many more runs, until it ends; returns calls."""
    stand.most = 0
    for calls in range(1, 20):
        stand.most += every
        code = stand.call(*words)
        if code == 0:
            return calls
        assert code == 130 and "finished runs are kept" in capsys.readouterr().err
    raise AssertionError("the study does not end")


def write_log(comparison, job, stand):
    """Write the log and the JSON of a finished run."""
    # its facts
    config = replace(comparison.config(job), seed=job.seed, run_id=job.name, log_dir=str(comparison.logs))
    adopt_vocabulary(config)
    texts = {}
    for file in source_of(job.arm.variant):
        texts[file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")] = (compare.ROOT / file).read_text()
    facts = comparison.machine(config) | dict(
        seed=config.seed, target=0.0, val_tokens=64, val_sha256=comparison.plan["data"][config.data]["val"],
        config=json.loads(json.dumps(asdict(config))))

    # its lines
    losses = {0: 5.5, config.steps: stand.loss(job)}
    lines, saved = log_lines(losses, run_id=job.name, ms_per_step=stand.ms(job), source=texts.pop("train_gpt"),
                             modules=texts.items())
    at = next(number for number, line in enumerate(lines) if line.startswith("facts: "))
    lines[at] = f"facts: {json.dumps(json.loads(lines[at][7:]) | facts)}"
    log = comparison.logs / f"{job.name}.txt"
    log.write_text("\n".join(lines) + "\n", encoding="utf-8")
    saved = saved | facts
    for name, value in stand.facts(job).items():  # of the JSON or of its last validation
        if name == "stream":
            saved["curve"][-1]["stream"] = value
        else:
            saved[name] = value
    log.with_suffix(".json").write_text(json.dumps(saved))
