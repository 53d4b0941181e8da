"""
The claims' page: every claim has one row with a known verdict, every figure is the record's or the file's, every
command is taken by its program, the second table is the study's, and every fault of the list is a line of the check.
"""

import json
import re
import shlex

import pytest

from records import claims, leaderboard
from records.claims import VERDICTS, Evidence, claim_row, claim_sections, read_claims
from records.leaderboard import RECORDS, read_records
from records.pages import BEGIN, END, is_current, pages_of, record_path
from records.statistics import test_pairs as pairs_test
from studies import golf_commands
from studies.parameter_golf import PUBLISHED, choose_presets
from tests.test_readme import broken_links, parse
from train_gpt import RunError

PAGE = RECORDS.parent / "docs" / "claims.md"
COUNTS = dict(S=5, L=14, T=10, W=10, P=14)  # claims of the sources
MODULES = dict(study="studies", bench="benchmarks", data="data")
CONTENT = read_claims(RECORDS / claims.FILE)
CLAIMS = [claim for source in CONTENT["source"] for claim in source["claim"]]
COMMANDS = [command for claim in CLAIMS for command in claim["commands"]]
TEMPLATE = """[files]
speeds = "results/speeds.json"

[[source]]
about = "Everything"
name = "somebody"

[[source.claim]]
id = "X1"
claim = "it is better"
figure = "1 %"
obtained = "one seed"
measured = "MEASURED"
verdict = "undecided"
commands = []
evidence = ["Wide", "results/speeds.json"]
"""


@pytest.fixture(scope="module")
def evidence():
    """This repository's records and result files."""
    records = {record_path(stats): stats for stats in read_records(RECORDS)}
    return Evidence(RECORDS.parent, records, CONTENT["files"])


# ---- The repository's own page ----------------------------------------------

def test_every_claim_has_one_row():
    expected = [f"{letter}{number}" for letter, count in COUNTS.items() for number in range(1, count + 1)]
    assert [claim["id"] for claim in CLAIMS] == expected
    assert re.findall(r"^\| ([SLTWP]\d+) \|", PAGE.read_text(), re.M) == expected


def test_every_verdict_is_known_and_fits():
    for claim in CLAIMS:
        assert claim["verdict"] in VERDICTS, claim["id"]
        assert claim["commands"] or claim["verdict"] == "not testable here", claim["id"]


def test_the_page_is_what_is_rendered_and_a_changed_figure_is_seen(tmp_path):
    """One digit after the other of a figure from a record, one from a file, and one of the second table."""
    paragraphs = pages_of(RECORDS)[PAGE](read_records(RECORDS))
    table = [golf_commands.make_table()]
    marks = golf_commands.BEGIN, golf_commands.END
    assert is_current(PAGE, paragraphs) and is_current(PAGE, table, *marks)
    text = PAGE.read_text()
    changed = tmp_path / "claims.md"
    for figure, other in (("+0.0406", "+0.0407"), ("95.89 %", "95.98 %"), ("2.089 nats", "2.088 nats")):
        assert figure in text
        changed.write_text(text.replace(figure, other))
        assert not is_current(changed, paragraphs) and is_current(changed, table, *marks)
    changed.write_text(text.replace("| 1.3223 |", "| 1.3222 |"))
    assert is_current(changed, paragraphs) and not is_current(changed, table, *marks)


def test_every_link_leads_somewhere():
    assert broken_links(PAGE) == []


def words_of(command):
    """The words that run.sh calls Python with."""
    program, verb, *words = shlex.split(command.removeprefix("time "))
    assert program == "./run.sh"
    if verb in MODULES:
        return ["-m", f"{MODULES[verb]}.{words[0]}", *words[1:]]
    if verb == "test":
        return ["pytest", *words]
    return ["compare.py", *words] if verb == "compare" else ["train_gpt.py", verb, *words]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_a_command_is_taken_by_its_program(command, monkeypatch):
    words = words_of(command)
    parse(words, monkeypatch)
    if "--presets" in words:
        presets = words[words.index("--presets") + 1:]
        assert len(choose_presets([word for word in presets if re.match(r"[a-z]", word)])) > 1


@pytest.mark.parametrize("preset", PUBLISHED, ids=lambda preset: preset.name)
def test_a_run_of_parameter_golf_is_taken_by_the_trainer(preset, monkeypatch):
    command = golf_commands.train_command(preset)
    assert f"| `{command}` |" in PAGE.read_text()
    parse(words_of(command), monkeypatch)


# ---- Figures ----------------------------------------------------------------

def test_figures_of_a_record(evidence):
    _, stats = evidence.find_record("EnglishRowsOf1024AtEqualTime")
    arm = stats["arms"][1]
    loss, time = arm["vs_baseline"]["loss"], arm["vs_baseline"]["time"]
    start = "{EnglishRowsOf1024AtEqualTime/A1:"
    assert evidence.fill(f"{start}difference}} of {start}n}}") == f"{loss['difference']:+.4f} of {loss['n']}"
    assert evidence.fill(f"{start}interval}}") == f"{loss['low']:+.4f} to {loss['high']:+.4f}"
    assert evidence.fill(f"{start}verdict}}") == loss["verdict"] == "better"
    assert evidence.fill(f"{start}loss}}") == f"{arm['loss']['mean']:.4f} ± {arm['loss']['sd']:.4f}"
    assert evidence.fill(f"{start}seconds}}") == f"{arm['time']['mean']:.2f} ± {arm['time']['sd']:.2f} s"
    assert evidence.fill(f"{start}time}}").startswith(f"{100 * (time['ratio'] - 1):+.1f} % (95 % ")
    assert evidence.fill(f"{start}p}}") == "< 0.0001"


def test_figures_of_two_arms_are_paired_over_seeds(evidence):
    _, stats = evidence.find_record("ElevenResiduals")
    losses = {arm["folder"]: arm["losses"] for arm in stats["arms"]}
    test = pairs_test([a - b for a, b in zip(losses["A8"], losses["A3"])])
    text = evidence.fill("{ElevenResiduals/A8-A3:test}")
    assert text == f"{test['difference']:+.4f} nats (95 % {test['low']:+.4f} to {test['high']:+.4f}, n = 4)"


def test_figures_of_a_file(evidence):
    rows = json.loads((RECORDS.parent / CONTENT["files"]["decode"]).read_text())["rows"]
    (row,) = [row for row in rows if row["T"] == 1024 and row["arm"] == "topological, faithful"]
    text = evidence.fill("{decode:rows[T=1024;arm=topological, faithful]/token/median:.3f}")
    assert text == f"{row['token']['median']:.3f}"
    flat = json.loads((RECORDS.parent / CONTENT["files"]["gradient"]).read_text())["flatness"]["table"]
    mean = sum(run["trace"] for run in flat) / len(flat)
    assert evidence.fill("{gradient:flatness/table/trace:.4f}") == f"{mean:.4f}"


@pytest.mark.parametrize("reference, message", [
    ("{Nothing/A1:difference}", "0 records have the name Nothing"),
    ("{ContextConvolution/A7:difference}", "record ContextConvolution has no arm A7; choose from A0, A1"),
    ("{ContextConvolution/A1:gain}", "there is no such quantity"),
    ("{ContextConvolution/A0:difference}", "there is no such quantity"),
    ("{ElevenResiduals/A8-A3:verdict}", "there is no such quantity"),
    ("{ElevenResiduals/A8-A3-A1:test}", "names 3 arms"),
    ("{decode:rows[T=3]/token/median:.2f}", "has no number at"),
    ("{decode:rows/arm:.2f}", "has no number at"),
    ("{decode:layers:.2q}", "is no format of a number"),
])
def test_a_reference_that_leads_nowhere_is_a_fault(evidence, reference, message):
    with pytest.raises(RunError, match=re.escape(message)):
        evidence.fill(f"before {reference} behind")


@pytest.mark.parametrize("change, message", [
    (dict(verdict="true"), "its verdict is 'true'"),
    (dict(verdict="not yet measured", commands=[]), "no command is named"),
    (dict(measured="a | b"), "a cell of a table has no |"),
    (dict(evidence=["records/none.md"]), "there is no file records/none.md"),
])
def test_a_row_that_will_not_do(evidence, change, message):
    claim_row(CLAIMS[0], evidence)
    with pytest.raises(RunError, match=re.escape(message)):
        claim_row(CLAIMS[0] | change, evidence)


# ---- The check --------------------------------------------------------------

@pytest.fixture
def root(tmp_path, write_log, capsys):
    """A folder of records that has one comparison, with claims about it and the three pages beside it."""
    folder = tmp_path / "records"
    folder.mkdir()
    (tmp_path / "docs").mkdir()
    for arm, loss in (("baseline", 0.80), ("wide", 0.79)):
        for seed in range(1, 7):
            write_log({0: 5.5, 8: loss + seed / 1000}, f"source/{arm}", f"{arm}_{seed}", seed=seed)
    (tmp_path / "results").mkdir()
    (tmp_path / "results/speeds.json").write_text('{"rows": [{"T": 8, "ms": 1.5}, {"T": 8, "ms": 2.5}]}')
    write_claims(folder, "{Wide/A1:difference} and {speeds:rows[T=8]/ms:.1f}", about_nothing=True)
    for page in pages_of(folder):
        page.write_text(f"{BEGIN}\n{END}\n")
    words = ["add", str(tmp_path / "source"), "--name", "Wide", "--track", "cpu", "--what", "wide", "--negative"]
    assert leaderboard.main(["--records", str(folder), *words]) == 0, capsys.readouterr()
    write_claims(folder, "{Wide/A1:difference} and {speeds:rows[T=8]/ms:.1f}")
    return folder


def write_claims(folder, measured, about_nothing=False):
    """claims.toml with one claim; about_nothing: with none, as before the record is there."""
    text = TEMPLATE.replace("MEASURED", measured)
    (folder / claims.FILE).write_text("" if about_nothing else text)


def test_render_and_check(root, capsys):
    page = root.parent / "docs/claims.md"
    run = ["--records", str(root)]
    assert leaderboard.main([*run, "check"]) == 1
    assert "claims.md: the tables are not those of the records; run ./run.sh board render" in capsys.readouterr().out
    assert leaderboard.main([*run, "render"]) == 0 and leaderboard.main([*run, "check"]) == 0
    assert "| -0.0100 and 2.0 | undecided | - | [Wide](../records/negative/" in page.read_text()
    page.write_text(page.read_text().replace("-0.0100", "-0.0200"))
    assert leaderboard.main([*run, "check"]) == 1


def test_every_fault_is_a_line_and_nothing_is_rendered(root, capsys):
    one = TEMPLATE.replace("MEASURED", "{Narrow/A1:difference}")
    other = one[one.index("[[source.claim]]"):].replace("Narrow/A1", "Wide/A2").replace("X1", "X2")
    (root / claims.FILE).write_text(one + other)
    before = {page: page.read_text() for page in pages_of(root)}
    assert leaderboard.main(["--records", str(root), "check"]) == 1
    faults = [line for line in capsys.readouterr().out.splitlines() if "claims.toml" in line]
    assert len(faults) == 2 and all(line.startswith("error: claims.toml: X") for line in faults)
    assert "0 records have the name Narrow" in faults[0] and "has no arm A2" in faults[1]
    assert leaderboard.main(["--records", str(root), "render"]) == 1
    assert before == {page: page.read_text() for page in pages_of(root)}


def test_a_claim_with_other_fields_is_a_fault(root):
    (root / claims.FILE).write_text(TEMPLATE.replace("figure =", "figures ="))
    with pytest.raises(RunError, match="claims.toml: X1: a claim has id, claim, figure"):
        claim_sections(root, {})
