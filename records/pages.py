"""
The pages that show all records, made from their stats.json: records/README.md, docs/results.md and docs/claims.md.

records/README.md has the history of every track and a heading for each comparison. docs/results.md has the standing
records and every comparison by variant. docs/claims.md has the claims of the sources (claims.py). A page has two marks:
this module writes what stands between them, and what stands outside was written by hand and is kept.
"""

import re
from collections.abc import Callable
from pathlib import Path

from records.claims import FILE, claim_sections
from records.words import escaped, interval, markdown_table, number, p_value, plain
from train_gpt import TRACKS, RunError, require, write_atomically

BEGIN = "<!-- tables: written by ./run.sh board render -->"
END = "<!-- end of tables -->"


# ---- Records

def record_path(stats: dict) -> str:
    """Where a record lies below the folder of the records: TRACK/DATE_NAME, or negative/DATE_NAME."""
    folder = stats["track"] if stats["kind"] == "record" else "negative"
    return f"{folder}/{stats['date']}_{stats['name']}"


def winner(stats: dict) -> dict:
    """The arm that sets the record."""
    return next(arm for arm in stats["arms"] if arm["name"] == stats["arm"])


def is_comparable(a: dict, b: dict) -> bool:
    """Whether two records stand in one table: track, its target, hardware and validation data are the same."""
    return all(a[key] == b[key] for key in ("track", "rules", "hardware", "val_sha256"))


def histories(records: list[dict]) -> list[list[dict]]:
    """The records that set one, in lists of those that are comparable; the last of a list is the standing record."""
    groups = []
    for stats in sorted(select(records, "record"), key=lambda s: (list(TRACKS).index(s["track"]), s["hardware"])):
        group = next((group for group in groups if is_comparable(group[0], stats)), None)
        if group is None:
            groups.append([stats])
        else:
            group.append(stats)
    for group in groups:
        group.sort(key=lambda stats: (-winner(stats)["time"]["mean"], stats["date"]))
    return groups


def select(records: list[dict], kind: str) -> list[dict]:
    return [stats for stats in records if stats["kind"] == kind]


def comparisons(records: list[dict]) -> list[dict]:
    """The records that set none, in the order of their dates and names."""
    return sorted(select(records, "negative"), key=record_path)


# ---- What the pages say

def history_section(group: list[dict]) -> list[str]:
    """The paragraphs of records/README.md for comparable records: a heading, a table, and what each record is."""
    first = group[0]
    best = winner(group[-1])["time"]["mean"]
    data = ", ".join(f"{name} {digest[:12]}" for name, digest in first["val_sha256"].items())
    rows = []
    lines = []
    for stats in group:
        arm = winner(stats)
        link = f"[{escaped(stats['name'])}]({record_path(stats)})"
        rows.append([f"{number(arm['time'], 2)} s", number(arm["loss"], 4), str(arm["loss"]["n"]),
                     p_value(arm["p_target"]), link])
        lines.append(f"- {escaped(stats['name'])}, {stats['date']}, arm {escaped(plain(arm['name']))}: "
                     f"{escaped(plain(stats['what']))}")
    return [
        f"### {first['track']}, {escaped(first['hardware'])}: {best:.2f} s",
        f"To a validation loss of {first['rules']['target']}; validation data {escaped(data)}. "
        "The last row is the standing record.",
        markdown_table(["time", "loss", "n", "p", "record"], rows),
        "\n".join(lines)]


def comparison_section(stats: dict) -> list[str]:
    """The paragraphs of records/README.md for one comparison: a heading, its sentence, how it was run, a table."""
    rows = []
    for arm in stats["arms"]:
        cells = [escaped(plain(arm["name"])), number(arm["loss"], 4)]
        if arm["vs_baseline"]:
            test = arm["vs_baseline"]["loss"]
            cells += [f"{difference_of(test)} ({interval(test, 4)})", p_value(test["p_holm"]), test["verdict"]]
        else:
            cells += ["", "", ""]
        rows.append(cells)
    how = f"track {stats['track']}, {runs_of(stats)}, {escaped(stats['hardware'])}."
    return [
        f"#### {escaped(stats['name'])}",
        escaped(plain(stats["what"])),
        f"[{stats['date']}]({record_path(stats)}), {how}",
        markdown_table(["arm", "loss", "difference (95 %)", "p corrected", "verdict"], rows)]


def difference_of(test: dict) -> str:
    return number(test["difference"], 4, signed=True)


def runs_of(stats: dict) -> str:
    """How many runs the arms have, in words."""
    counts = [arm["loss"]["n"] for arm in stats["arms"]]
    if len(set(counts)) == 1:
        return f"{counts[0]} runs an arm"
    return f"{', '.join(map(str, counts))} runs of the arms"


def record_sections(records: list[dict]) -> list[str]:
    """The paragraphs of records/README.md: the history of each track, hardware and validation data; comparisons."""
    paragraphs = [text for group in histories(records) for text in history_section(group)] or ["No record yet."]
    paragraphs += [
        "### Comparisons that set no record",
        "Each arm against the first arm of its own comparison, whatever came of it: the difference of the mean final "
        "losses in nats a token, its 95 % interval, and a verdict by a t test over pairs of equal seeds (Welch's "
        "between runs where no seed is common), for which five pairs are needed. A date links to the logs."]
    for stats in comparisons(records):
        paragraphs += comparison_section(stats)
    if not comparisons(records):
        paragraphs.append("None yet.")
    return paragraphs


def standing_table(records: list[dict]) -> str:
    """The standing record of each track, hardware and validation data."""
    rows = []
    for group in histories(records):
        stats = group[-1]
        arm = winner(stats)
        rows.append([stats["track"], str(stats["rules"]["target"]), f"{number(arm['time'], 2)} s",
                     number(arm["loss"], 4), str(arm["loss"]["n"]), machine_of(stats), result_link(stats)])
    if not rows:
        return "No record yet."
    return markdown_table(["track", "target", "time", "loss", "n", "machine", "record"], rows)


def machine_of(stats: dict) -> str:
    """The hardware without a maker's marks."""
    return escaped(re.sub(r"\((R|TM)\)", "", stats["hardware"]))


def result_link(stats: dict) -> str:
    """A link to a record from docs/."""
    return f"[{escaped(stats['name'])}](../records/{record_path(stats)}/README.md)"


def variant_of(arm: dict) -> str:
    """The name of an arm's first variant, or "baseline"."""
    names = [re.match(r"\w*", spec.strip())[0] for spec in arm["variant"]]
    return escaped(names[0]) if any(names[:1]) else "baseline"


def result_sections(records: list[dict]) -> list[str]:
    """The paragraphs of docs/results.md: the standing records, and the arms of all comparisons by variant."""
    rows = {}  # variant: the cells of each of its arms
    for stats in comparisons(records):
        baseline = stats["arms"][0]
        for arm in stats["arms"][1:]:
            test = arm["vs_baseline"]["loss"]
            n = str(arm["loss"]["n"])
            if arm["loss"]["n"] != baseline["loss"]["n"]:
                n += f", baseline {baseline['loss']['n']}"
            rows.setdefault(variant_of(arm), []).append(
                [escaped(plain(arm["name"])), number(arm["loss"], 4), difference_of(test), test["verdict"], n,
                 machine_of(stats), result_link(stats)])

    paragraphs = [
        "## Leaderboard",
        "The least training time to a track's target loss; [records/README.md](../records/README.md) has the rules and "
        "the history.",
        standing_table(records),
        "## Comparisons by variant",
        "Final validation losses in nats a token, mean ± standard deviation over n runs; the difference is arm minus "
        "the baseline of the same comparison. What was compared, intervals and p values stand in the record."]
    for variant in sorted(rows, key=lambda name: (name == "baseline", name)):
        heads = ["arm", "loss", "difference", "verdict", "n", "machine", "record"]
        paragraphs += [f"### {variant}", markdown_table(heads, rows[variant])]
    return paragraphs


# ---- Reading and writing

def pages_of(root: Path) -> dict[Path, Callable]:
    """{page: the function that makes its paragraphs} for the records below root; claims only where root lists some."""
    pages = {root / "README.md": record_sections, root.parent / "docs" / "results.md": result_sections}
    if (root / FILE).exists():
        def sections(records: list[dict]) -> list[str]:
            return claim_sections(root, {record_path(stats): stats for stats in records})
        pages[root.parent / "docs" / "claims.md"] = sections
    return pages


def split_page(path: Path, begin: str = BEGIN, end: str = END) -> tuple[str, str, str]:
    """(the text before the first mark and the mark, between the marks, the second mark and after). RunError without."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}; put it back") from None
    match = re.fullmatch(f"(.*{re.escape(begin)})(.*)({re.escape(end)}.*)", text, re.S)
    require(match and text.count(begin) == text.count(end) == 1,
            f"{path}: needs the lines {begin} and {end}, once each and in this order, around the place of the tables")
    return match.groups()


def check_pages(root: Path, records: list[dict]):
    """RunError unless every page can be rendered."""
    for path, make in pages_of(root).items():
        split_page(path)
        make(records)


def is_current(path: Path, paragraphs: list[str], begin: str = BEGIN, end: str = END) -> bool:
    """Whether the page says what these paragraphs say. RunError for one that cannot be read or has no marks."""
    return split_page(path, begin, end)[1] == between_marks(paragraphs)


def between_marks(paragraphs: list[str]) -> str:
    return "\n\n" + "\n\n".join(paragraphs) + "\n\n"


def render(root: Path, records: list[dict]):
    """Write the tables of every page. RunError before anything is written if a page cannot be."""
    check_pages(root, records)
    for path, make in pages_of(root).items():
        write_page(path, make(records))


def write_page(path: Path, paragraphs: list[str], begin: str = BEGIN, end: str = END):
    """Write paragraphs between the marks of a page. RunError for one that cannot be read or has no marks."""
    before, _, after = split_page(path, begin, end)
    content = (before + between_marks(paragraphs) + after).encode()
    write_atomically(path, lambda file: file.write(content))
