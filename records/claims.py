"""
What the sources of this project claim, and what was measured of it here: docs/claims.md, made from claims.toml and the
records.

claims.toml lists the claims by source, with a verdict that a person gave by the claim's rule. A figure of a record
stands there as a reference in braces, and so does one of a result file. They are filled in from stats.json or the file,
so that no figure of these is typed:

    {ContextConvolution/A1:difference}   of a record's arm against the baseline: difference, interval, p (corrected), n,
                                         verdict, test (difference, interval and n together), time (change of the time
                                         of a step, interval, turns); of the arm alone: loss, seconds
    {ElevenResiduals/A8-A3:test}         of one arm against another over pairs of equal seeds: difference, interval, p
                                         (uncorrected), n, test
    {decode:rows[T=384;arm=softmax]/token/median:.2f}
                                         of a file that [files] names: a path of fields, entries of lists that have
                                         these values, and Python's format of a number. Where a path leads to several
                                         numbers the figure is their mean

A reference that leads nowhere is a fault, and so is a claim without a known verdict.
"""

import json
import re
import statistics
import tomllib
from dataclasses import dataclass
from pathlib import Path

from records.statistics import test_pairs
from records.words import escaped, interval, markdown_table, number, p_value, percent, plural
from train_gpt import RunError, require

FILE = "claims.toml"
# What a verdict may be. Only the first four rest on a measurement; "not testable here" says why beside it, and "not yet
# measured" names the command that measures it.
VERDICTS = ("confirmed", "refuted", "equivalent", "undecided", "not testable here", "not yet measured")
FIELDS = ("id", "claim", "figure", "obtained", "measured", "verdict", "commands", "evidence")
HEADS = ["id", "claimed: figure (how it was obtained)", "measured here", "verdict", "command that measures it",
         "evidence"]
REFERENCE = re.compile(r"\{([^{}]*)\}")
OF_A_TEST = ("difference", "interval", "p", "n", "test")


# ---- Figures ----------------------------------------------------------------

@dataclass
class Evidence:
    """What references lead to."""

    checkout: Path              # the folder that paths of files start from
    records: dict[str, dict]    # path below the folder of the records -> stats.json
    files: dict[str, str]       # name of a result file -> its path below the checkout

    def find_record(self, name: str) -> tuple[str, dict]:
        """(path below the folder of the records, stats.json) of a record by its name. RunError unless there is one."""
        paths = [path for path, stats in self.records.items() if stats["name"] == name]
        require(len(paths) == 1, f"{len(paths)} records have the name {name}; give the name of one that is there")
        return paths[0], self.records[paths[0]]

    def find_arm(self, stats: dict, folder: str) -> dict:
        """The arm of a record that has this folder, such as A1. RunError if there is none."""
        arms = {arm["folder"]: arm for arm in stats["arms"]}
        require(folder in arms, f"record {stats['name']} has no arm {folder}; choose from {', '.join(arms)}")
        return arms[folder]

    def fill(self, text: str) -> str:
        """The text with a figure in place of every reference. RunError for one that leads nowhere."""
        return REFERENCE.sub(lambda match: self.figure(match[1]), text)

    def figure(self, reference: str) -> str:
        """The figure that a reference without its braces names. RunError if there is none."""
        subject, _, quantity = reference.partition(":")
        if subject in self.files:
            path, _, form = quantity.partition(":")
            return self.number_in_file(subject, path, form)

        # the arms of a record
        name, _, arms = subject.partition("/")
        _, stats = self.find_record(name)
        chosen = [self.find_arm(stats, folder) for folder in arms.split("-")]
        require(len(chosen) <= 2, f"{{{reference}}} names {len(chosen)} arms; name one, or two with a - between them")

        # what is asked of them
        figure = figure_of_pair(*chosen, quantity) if len(chosen) == 2 else figure_of_arm(chosen[0], quantity)
        require(figure is not None, f"{{{reference}}}: there is no such quantity of this arm; records/claims.py has "
                "the list")
        return figure

    def number_in_file(self, name: str, path: str, form: str) -> str:
        """The mean of the numbers at a path in a result file, in Python's format. RunError where there is none."""
        # the numbers
        file = self.checkout / self.files[name]
        try:
            values = [json.loads(file.read_text(encoding="utf-8"))]
        except (OSError, ValueError) as error:
            raise RunError(f"{self.files[name]} cannot be read ({type(error).__name__}); put it back") from None
        for step in path.split("/"):
            values = take_step(values, step)
        numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
        require(numbers and len(numbers) == len(values),
                f"{self.files[name]} has no number at {path}; give the path of one")

        # in words
        try:
            return format(numbers[0] if len(numbers) == 1 else statistics.fmean(numbers), form)
        except ValueError:
            raise RunError(f"{path}: {form!r} is no format of a number; give one such as .2f") from None

    def link(self, evidence: str) -> str:
        """A link from docs/ to a record, by its name, or to a file of the checkout. RunError if it is not there."""
        if "/" not in evidence:
            path, _ = self.find_record(evidence)
            return f"[{escaped(evidence)}](../records/{path}/README.md)"
        require((self.checkout / evidence).exists(), f"there is no file {evidence}; name one that is there")
        return f"[{escaped(evidence)}](../{evidence})"


def take_step(values: list, step: str) -> list:
    """
    The values of a field of each of `values`, lists among them entry by entry. step: the field's name, and perhaps
    conditions [field=value;...] that an entry of it must fulfil.
    """
    # the field
    field, _, conditions = step.removesuffix("]").partition("[")
    taken = [value[field] for value in values if isinstance(value, dict) and field in value]

    # the entries of lists
    entries = []
    for value in taken:
        entries += value if isinstance(value, list) else [value]
    for condition in conditions.split(";") if conditions else ():
        key, _, wanted = condition.partition("=")
        entries = [entry for entry in entries if isinstance(entry, dict) and str(entry.get(key)) == wanted]
    return entries


def figure_of_arm(arm: dict, quantity: str) -> str | None:
    """A quantity of an arm in words; None for one that there is not."""
    if quantity == "loss":
        return number(arm["loss"], 4)
    if quantity == "seconds":
        return f"{number(arm['time'], 2)} s"
    if not arm["vs_baseline"]:
        return None
    if quantity == "time":
        return change_of_time(arm["vs_baseline"]["time"])
    test = arm["vs_baseline"]["loss"]
    return test["verdict"] if quantity == "verdict" else figure_of_test(test, quantity, "p_holm")


def figure_of_pair(arm: dict, other: dict, quantity: str) -> str | None:
    """A quantity of the test of an arm against another over their equal seeds; None for one that there is not."""
    losses = dict(zip(other["seeds"], other["losses"]))
    differences = [loss - losses[seed] for seed, loss in zip(arm["seeds"], arm["losses"]) if seed in losses]
    return figure_of_test(test_pairs(differences), quantity, "p") if differences else None


def figure_of_test(test: dict, quantity: str, p: str) -> str | None:
    """A quantity of a test of losses in nats, as test_pairs gives it. p: the field with the p value that is shown."""
    if quantity not in OF_A_TEST:
        return None
    words = dict(difference=number(test["difference"], 4, signed=True), interval=interval(test, 4),
                 p=p_value(test[p]), n=str(test["n"]))
    words["test"] = f"{words['difference']} nats (95 % {words['interval']}, n = {words['n']})"
    return words[quantity]


def change_of_time(test: dict) -> str | None:
    """By how much an arm's step takes longer than the baseline's, with its interval; None where no turn counts."""
    if test["ratio"] is None:
        return None
    ends = "no interval"
    if test["low"] is not None:
        ends = f"95 % {percent(test['low'] - 1)} to {percent(test['high'] - 1)}"
    return f"{percent(test['ratio'] - 1)} ({ends}, {plural(test['n'], 'turn')})"


# ---- The page ---------------------------------------------------------------

def read_claims(path: Path) -> dict:
    """claims.toml: dict(files, source), its form checked. RunError for a file that cannot be read or has another."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}; mend it") from None
    for source in content.get("source", []):
        for claim in source["claim"]:
            where = f"{path.name}: {claim.get('id', 'a claim without id')}"
            require(set(claim) == set(FIELDS),
                    f"{where}: a claim has {', '.join(FIELDS)} and nothing else; got {', '.join(claim)}")
    return dict(files=content.get("files", {}), source=content.get("source", []))


def claim_row(claim: dict, evidence: Evidence) -> list[str]:
    """The cells of a claim's row. RunError for the first fault."""
    # the verdict
    verdict = claim["verdict"]
    require(verdict in VERDICTS, f"its verdict is {verdict!r:.40}; choose from {', '.join(VERDICTS)}")
    require(verdict != "not yet measured" or claim["commands"], "it is not yet measured, and no command is named that "
            "measures it; name one, or say why it is not testable here")

    # the cells
    cells = [
        claim["id"], f"{claim['claim']}: {claim['figure']} ({claim['obtained']})", evidence.fill(claim["measured"]),
        verdict, "<br>".join(f"`{command}`" for command in claim["commands"]) or "-",
        ", ".join(evidence.link(each) for each in claim["evidence"]) or "-"]
    for cell in cells:
        require(not re.search(r"[|\n]", cell), f"a cell of a table has no | and no line break; change {cell!r:.60}")
    return cells


def claim_sections(root: Path, records: dict[str, dict]) -> list[str]:
    """
    The paragraphs of docs/claims.md: a heading and a table for each source. root: the folder of the records, with
    claims.toml; records: {path below root: stats.json}. RunError with a line for every fault.
    """
    # a table for each source
    content = read_claims(root / FILE)
    evidence = Evidence(root.parent, records, content["files"])
    faults = []
    verdicts = []
    paragraphs = []
    for source in content["source"]:
        rows = []
        for claim in source["claim"]:
            verdicts.append(claim["verdict"])
            try:
                rows.append(claim_row(claim, evidence))
            except RunError as error:
                faults.append(f"{FILE}: {claim['id']}: {error}")
        paragraphs += [f"## {source['about']}", f"Source: {source['name']}.", markdown_table(HEADS, rows)]
    require(not faults, "\n".join(faults))

    # how many of which verdict
    counts = [f"{verdicts.count(word)} {word}" for word in VERDICTS if word in verdicts]
    return [f"Of {len(verdicts)} claims: {', '.join(counts)}.", *paragraphs]
