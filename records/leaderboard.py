"""
The leaderboard: runs that count, checked from their logs.

    ./run.sh board add DIR --name NAME --track TRACK --what "one line" [--arm ARM] [--negative]
    ./run.sh board check    every record again from its logs, a line each; exit code 1 if one fails
    ./run.sh board render   the tables of records/README.md, docs/results.md and docs/claims.md from the records'
                            stats.json, the claims from claims.toml besides
    ./run.sh board stats DIR [--target LOSS]
                            n, mean, sd, min, max and p of each arm in any folder of logs, modded-nanogpt's too

add takes a folder of compare.py, or one whose subfolders (baseline/ and others, or one alone) each hold the logs of an
arm. It checks what is to be added, writes the record's folder, records/TRACK/DATE_NAME/ or, with --negative,
records/negative/DATE_NAME/, and renders the tables. The arm that sets a record is the one beside the baseline, or the
baseline alone; of several, --arm says which.

    README.md, stats.json            what was measured; both say which arm A0 (the baseline), A1, ... is
    source-0123456789ab.txt          the modules of the runs' source, once for all runs that have it; their texts, which
                                     all records share, are in records/sources/
    A1/A1-seed3.txt.gz               each run's log, which names its source by hash; compressed, read it with zcat
    A1/A1-seed3.json                 its JSON without the training losses, which the log has

records/README.md has the rules. Exit code 1 and one line for a fault. ./run.sh board is python -m records.leaderboard.
"""

import argparse
import datetime
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

from records.arms import (
    FORMAT,
    log_folders,
    read_arms,
    read_results,
    read_stats,
    rule_settings,
    runs_of,
    stored_arms,
)
from records.manifest import SOURCES, find_unused, make_manifest, share_texts
from records.pages import (
    check_pages,
    is_comparable,
    is_current,
    pages_of,
    record_path,
    render,
    select,
    winner,
)
from records.report import sentence
from records.results import differing, settled, summarize
from records.runs import Run, compressed, file_beside, log_files, prepare_console, read_usable, stored_text
from records.statistics import ALPHA, one_sample, summary, test_welch
from records.verdicts import MACHINE
from records.words import equals, escaped, markdown_table, number, plain
from train_gpt import TRACKS, RunError, json_text, make_config, require

CHOSEN = (  # fields of stats.json that do not come from the logs
    "format", "name", "date", "track", "what", "kind", "arm", "rules", "settings", "reread")
RECORDS = Path(__file__).resolve().parent


# ---- A record's statistics and rules

def make_stats(chosen: dict, arms: list[dict]) -> dict:
    """What stats.json says: `chosen` and all that follows from the logs. RunError where the runs cannot be compared."""
    for run in runs_of(arms):
        require(run.val_sha256,
                f"{run.path}: does not say which validation data it used; only logs of this trainer can be added")
        require(run.track == chosen["track"],
                f"{run.path}: a run of track {run.track}, not {chosen['track']}; name its own with --track")
        require(run.seed is not None, f"{run.path}: does not say its seed; only logs of this trainer can be added")
    names = [plain(arm["name"]) for arm in arms]
    require(len(set(names)) == len(names),
            f"two arms have the same name among {', '.join(names)}; give them names of their own")
    results = summarize(chosen["settings"], arms)

    # the machine, which is one in all runs of a record
    environment = results["environment"]
    machine = {}
    for name in MACHINE:
        values = results["environment_differs"].get(name, [environment[name]])
        machine[name] = ", ".join(map(str, values))
        require(chosen["kind"] != "record" or len(values) == 1,
                f"{chosen['name']}: {name} is not one in all runs ({machine[name]}), so their times cannot be "
                "compared; run all of them on one machine")

    # the arms
    target = chosen["rules"]["target"]
    rows = []
    for index, row in enumerate(results["arms"]):
        losses = [run["val_loss"] for run in row["runs"]]
        seconds = [run["train_seconds"] for run in row["runs"]]
        rows.append(dict(
            name=row["name"], folder=f"A{index}", variant=row["variant"], options=row["options"],
            parameters=row["parameters"], seeds=[run["seed"] for run in row["runs"]], losses=losses,
            train_seconds=seconds, loss=summary(losses), time=summary(seconds),
            p_target=one_sample(losses, target) if target else None, vs_baseline=row["vs_baseline"]))
    return chosen | dict(
        hardware=f"{machine['world_size']} x {machine['device']}", val_sha256=environment["val_sha256"],
        versions={name: environment[name] for name in ("python", "torch", "cuda", "triton")}, arms=rows)


def track_rules(track: str) -> dict:
    """
    A track's target and val_tokens, which a record keeps: it is checked against those it was set under. RunError for an
    unknown track.
    """
    require(track in TRACKS, f"unknown track {track!r}; the tracks are {', '.join(TRACKS)}")
    config = make_config(dict(track=track))
    return dict(target=config.target, val_tokens=config.val_tokens)


def find_fastest(records: list[dict], like: dict) -> dict | None:
    """The fastest of those records that are comparable with `like`; None if there is none."""
    alike = [stats for stats in select(records, "record") if is_comparable(stats, like)]
    return min(alike, key=lambda stats: winner(stats)["time"]["mean"], default=None)


def check_rules(stats: dict, arms: list[dict], standing: dict | None):
    """
    RunError unless a record (faster than `standing`, the one before it, if there is one) or a comparison that sets none
    keeps the rules of records/README.md.
    """
    where = record_path(stats)
    if stats["kind"] == "negative":
        require(len(arms) > 1,
                f"{where}: one arm alone is no comparison; add the baseline's logs under baseline/")
        return
    check_settings(stats, arms)

    # the target is reached
    target = stats["rules"]["target"]
    arm = winner(stats)
    n = arm["loss"]["n"]
    require(n > 1, f"{where}: one run alone, and no test can be made of it; train more seeds")
    require(arm["p_target"] < ALPHA,
            f"{where}: target {target} not shown to be reached: mean loss {arm['loss']['mean']:.4f}, n = {n}, "
            f"{equals(arm['p_target'])}, and p < {ALPHA} is asked for; train more seeds or longer, or add it with "
            "--negative")

    # in less time than before
    if standing:
        before = winner(standing)
        p = test_welch(arm["train_seconds"], before["train_seconds"])["p_less"]
        require(p < ALPHA,
                f"{where}: not faster than {record_path(standing)}: {arm['time']['mean']:.2f} s (n = {n}) against "
                f"{before['time']['mean']:.2f} s (n = {before['time']['n']}), {equals(p)}, and p < {ALPHA} is asked "
                "for; add it with --negative")


def check_settings(stats: dict, arms: list[dict]):
    """RunError unless all runs of a record have the settings and the data of their track and took turns."""
    where = record_path(stats)
    rules = stats["rules"]
    require(rules["target"],
            f"{where}: track {stats['track']} has no target, so no record; the comparison can be added with --negative")
    for name, value in rules.items():
        for run in runs_of(arms):
            require(run.config.get(name) == value,
                    f"{where}: {run.path.name} has {name} {run.config.get(name)}, the track {value}; run it with the "
                    "track's own")
    require(not stats["settings"].get("reused"),
            f"{where}: some of its runs were taken over from earlier comparisons, so their times were not measured in "
            "turn; compare again with --no-reuse, or add it with --negative")
    for run in runs_of(arms):
        require(run.target == rules["target"],
                f"{where}: {run.path.name} was validated on data for which the track's target is not known; use the "
                "track's own data")


# ---- The records that stand

def record_folders(root: Path) -> list[Path]:
    folders = [path for path in root.glob("*/*/") if path.parent.name in (*TRACKS, "negative")]
    return sorted(path for path in folders if not path.name.startswith("."))


def read_records(root: Path) -> list[dict]:
    """stats.json of every record. RunError for one that is damaged or stands in another record's folder."""
    records = []
    for folder in record_folders(root):
        stats = read_stats(folder)
        check_path(stats, folder)
        records.append(stats)
    return records


def check_path(stats: dict, folder: Path):
    require(record_path(stats) == f"{folder.parent.name}/{folder.name}",
            f"{folder / 'stats.json'}: belongs to {record_path(stats)}; give the folder its name back")


def find_disagreement(ours, theirs, name: str = "") -> str | None:
    """Where two JSON values differ by more than rounding, None if nowhere."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        pairs = [(ours.get(key), theirs.get(key), f"{name}.{key}".lstrip(".")) for key in {**ours, **theirs}]
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = [(a, b, f"{name}[{i}]") for i, (a, b) in enumerate(zip(ours, theirs))]
    elif all(isinstance(value, int | float) and not isinstance(value, bool) for value in (ours, theirs)):
        return None if math.isclose(ours, theirs, rel_tol=1e-6, abs_tol=1e-9) else name
    else:
        return None if ours == theirs else name
    differences = (find_disagreement(*pair) for pair in pairs)
    return next((difference for difference in differences if difference), None)


def check_folder(folder: Path, records: list[dict]) -> dict:
    """Check everything about one record again from its logs; returns its stats. RunError for the first fault."""
    stats = read_stats(folder)
    check_path(stats, folder)
    require((folder / "README.md").exists(),
            f"{folder}: no README.md; delete the folder and add the runs again with ./run.sh board add")
    arms = stored_arms(folder, stats)
    sources = {run.source_file for run in runs_of(arms)}
    unused = sorted({path.name for path in folder.glob("source-*.txt")} - sources)
    require(not unused, f"{folder}: {', '.join(unused)} is no run's source; delete it")

    # its numbers
    fresh = json.loads(json.dumps(make_stats({name: stats[name] for name in CHOSEN if name in stats}, arms)))
    name = find_disagreement(fresh, stats)
    require(not name, f"{folder / 'stats.json'}: {name} is not what the logs say; put the right one back, or add the "
            "runs again")

    # the rules, against the record that was the fastest before it
    slower = []
    if stats["kind"] == "record":
        seconds = winner(fresh)["time"]["mean"]
        slower = [other for other in select(records, "record")
                  if record_path(other) != record_path(stats) and winner(other)["time"]["mean"] >= seconds]
    check_rules(fresh, arms, find_fastest(slower, fresh))
    return fresh


def check(root: Path) -> int:
    """Print a line for each record and each page; returns the number of faults."""
    records = []
    for folder in record_folders(root):
        try:
            records.append(read_stats(folder))
        except RunError:
            pass  # said below

    faults = 0
    for folder in record_folders(root):
        try:
            print(describe_sound(check_folder(folder, records)))
        except RunError as error:
            print(f"error: {error}")
            faults += 1
    if not faults:  # a damaged record does not say which texts it uses
        print_unused(root)

    for path, make in pages_of(root).items():
        try:
            require(is_current(path, make(records)),
                    f"{path}: the tables are not those of the records; run ./run.sh board render")
            print(f"{path}: ok")
        except RunError as error:  # a line for each fault of a page
            lines = str(error).splitlines()
            print("\n".join(f"error: {line}" for line in lines))
            faults += len(lines)
    return faults


def print_unused(root: Path):
    """Print a line where there are texts of modules that no record uses, which is no fault."""
    unused = find_unused(root, record_folders(root))
    if unused:
        print(f"{root / SOURCES}: no record uses {', '.join(unused)}; delete what no other branch needs")


def describe_sound(stats: dict) -> str:
    """The line that check prints of a record without a fault."""
    line = f"{record_path(stats)}: ok"
    if stats["kind"] == "record":
        arm = winner(stats)
        line += (f", {arm['time']['mean']:.2f} s, loss {arm['loss']['mean']:.4f}, n = {arm['loss']['n']}, "
                 f"{equals(arm['p_target'])}")
    return line


# ---- Adding

def record_readme(stats: dict, arms: list[dict], standing: dict | None) -> str:
    """README.md of a record's folder."""
    results = summarize(stats["settings"], arms)
    paragraphs = [f"# {escaped(stats['name'])}", escaped(stats["what"])]
    if stats["kind"] == "record":
        paragraphs.append(escaped(record_sentence(stats, standing)))
    paragraphs += [f"- {escaped(sentence(arm, results['arms'][0]))}" for arm in results["arms"][1:]]
    if "reread" in stats:
        paragraphs.append(escaped(reread_sentence(stats["reread"])))

    # a row a run
    rows = []
    for arm in stats["arms"]:
        for seed, loss, seconds in zip(arm["seeds"], arm["losses"], arm["train_seconds"]):
            link = f"[{seed}]({arm['folder']}/{log_name(arm, seed)}.txt.gz)"
            rows.append([arm["folder"], escaped(plain(arm["name"])), link, number(loss, 4), number(seconds, 2)])
    paragraphs.append(markdown_table(["id", "arm", "seed", "final loss", "time s"], rows))

    # where it was measured
    versions = ", ".join(f"{name} {version}" for name, version in stats["versions"].items())
    paragraphs.append(
        escaped(f"Track {stats['track']} on {stats['hardware']}; {versions}. ") + "A seed's link is its log, "
        "compressed (zcat shows it): the configuration and every step; it names its source, a file here, by hash. "
        "stats.json has these numbers and the tests.")
    if stats["settings"].get("command"):
        paragraphs.append(f"Command:\n\n    {plain(stats['settings']['command'])}")
    return "\n\n".join(paragraphs) + "\n"


def reread_sentence(reread: dict) -> str:
    """Which verdicts became other words when an old record was read again, and why."""
    words = [f"{plain(arm)}: {before}, now {now}" for arm, (before, now) in reread["words"].items()]
    return (f"Read again on {reread['date']} by the rule of that day, which was written before: a t test over pairs of "
            "equal seeds decides instead of Welch's test between runs, from five pairs on, and what was not "
            f"distinguishable is equivalent or undecided. Words that changed: {'; '.join(words) or 'none'}.")


def record_sentence(stats: dict, standing: dict | None) -> str:
    """The time and the loss of a record, and what it was compared with."""
    arm = winner(stats)
    text = (f"{plain(arm['name'])} trains in {number(arm['time'], 2)} s to a validation loss of "
            f"{number(arm['loss'], 4)}, n = {arm['loss']['n']}; {equals(arm['p_target'])} for a mean that is not below "
            f"{stats['rules']['target']}.")
    if standing:
        before = winner(standing)
        p = test_welch(arm["train_seconds"], before["train_seconds"])["p_less"]
        text += (f" The record before it, {record_path(standing)}, took {number(before['time'], 2)} s: {equals(p)} for "
                 "one that is not faster.")
    return text


def add(root: Path, source: Path, name: str, track: str, what: str, arm: str | None, negative: bool) -> Path:
    """
    Check the runs in `source` and copy them to where they belong; returns that folder. RunError for any fault, and then
    no record has changed.
    """
    require(re.fullmatch(r"[A-Za-z0-9][\w-]*", name) and plain(what),
            f"--name takes letters, digits, _ and -, and --what a line of text; got {name!r} and {what!r}")
    rules = track_rules(track)
    records = read_records(root)
    check_pages(root, records)
    settings, arms = read_arms(source)
    names = [entry["name"] for entry in arms]
    known = arm in names if arm else len(arms) <= 2
    require(negative or known,
            f"{source}: which arm sets the record? give --arm and one of {', '.join(map(plain, names))}")

    # its statistics
    chosen = dict(format=FORMAT, name=name, date=f"{datetime.date.today()}", track=track, what=plain(what),
                  kind="negative" if negative else "record", arm=None if negative else arm or names[-1], rules=rules,
                  settings=rule_settings(track) | settings)
    stats = make_stats(chosen, arms)
    folder = root / record_path(stats)
    require(not folder.exists(), f"{folder}: there is a record of this name and date; choose another --name")
    standing = find_fastest(records, stats)
    check_rules(stats, arms, standing)

    write_record(folder, stats, arms, record_readme(stats, arms, standing))
    render(root, records + [stats])
    return folder


def write_record(folder: Path, stats: dict, arms: list[dict], readme: str):
    """
    Write a record's folder, which appears under its name when it is complete, and before that the texts of modules that
    no record has yet. RunError where the disk refuses or where a text that is there was altered.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        for entry, row in zip(arms, stats["arms"]):
            (temporary / row["folder"]).mkdir(parents=True)
            for run in entry["runs"]:
                store(run, temporary, f"{row['folder']}/{log_name(row, run.seed)}")
        texts = store_sources(runs_of(arms), temporary)
        (temporary / "README.md").write_text(readme, encoding="utf-8")
        (temporary / "stats.json").write_text(json.dumps(stats, indent=1) + "\n", encoding="utf-8")
        share_texts(texts, folder.parent.parent / SOURCES)
        temporary.rename(folder)
    except OSError as error:
        raise RunError(f"cannot write {folder}: {error.strerror}; free some space or mend the folder's "
                       "permissions") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def log_name(arm: dict, seed: int) -> str:
    """The name of a stored log, without its ending."""
    return f"{arm['folder']}-seed{seed}"


def store(run: Run, folder: Path, name: str):
    """Write a run into a record's folder: its log and its JSON, without the training losses, which the log has."""
    (folder / f"{name}.txt.gz").write_bytes(compressed(stored_text(run)))
    saved = file_beside(run.path, ".json")
    if not saved.exists():
        return
    facts = json.loads(saved.read_text(encoding="utf-8"))
    facts.pop("train_curve", None)
    (folder / f"{name}.json").write_text(json_text(facts, indent=1), encoding="utf-8")


def store_sources(runs: list[Run], folder: Path) -> list[str]:
    """Write what names the sources of the runs into a record's folder. Returns the texts of all their modules."""
    texts = []
    for name, source in {run.source_file: run.source for run in runs}.items():
        manifest, modules = make_manifest(source)
        (folder / name).write_text(manifest, encoding="utf-8")
        texts += modules
    return texts


# ---- Statistics of any folder

def print_stats(folder: Path, target: float | None):
    """
    Print the statistics of each arm of a folder of logs, or of each of its subfolders where it has none itself, as far
    as the logs can be read, with what is left out and what must be known of the rest. RunError where nothing is left.
    """
    names = arm_names(folder)
    counted = 0
    reasons = []
    for path in [folder] if log_files(folder) else log_folders(folder):
        runs, left_out = read_usable(path)
        counted += len(runs)
        reasons += left_out
        for name, group in group_by_arm(runs, names):
            title = f"{path}, {plain(name)}" if name else path
            sources = len({run.source_sha256 for run in group})
            print(f"{title}: runs {len(group)}, different sources {sources}")
            print_summary(group, target or group[0].target)
        for reason in left_out:
            print(f"  left out: {plain(reason)}")
    first = reasons[0] if reasons else "there is none"
    require(counted, f"{folder}: no log gives a final loss: {first}")


def arm_names(folder: Path) -> dict[str, str]:
    """{log's or subfolder's name: arm's name}, from a comparison's results.json or a record's stats.json; else {}."""
    if (folder / "results.json").exists():
        arms = read_results(folder)["arms"]
        return {run["log"]: arm["name"] for arm in arms for run in arm["runs"] if "log" in run}
    if (folder / "stats.json").exists():
        return {arm["folder"]: arm["name"] for arm in read_stats(folder)["arms"]}
    return {}


def group_by_arm(runs: list[Run], names: dict[str, str]) -> list[tuple[str, list[Run]]]:
    """
    The runs by arm, [(name, runs)], in the order of their first runs. A run's arm is the one that is named for it,
    else all runs of its variants and settings; these are its name where there are several. Runs of other trainers are
    one arm.
    """
    groups = {}
    for run in runs:
        name = names.get(run.path.name, names.get(run.path.parent.name))
        key = json.dumps([name, run.variant, settled(run)], sort_keys=True)
        groups.setdefault(key, (name, []))[1].append(run)

    # names for those that have none
    configs = [settled(group[0]) for _, group in groups.values()]
    settings = sorted({setting for config in configs for setting in differing(configs[0], config)} - {"variant"})
    arms = []
    for (name, group), config in zip(groups.values(), configs):
        if not name and len(groups) > 1:
            variants = "+".join(group[0].variant) or "baseline"
            name = " ".join([variants, *(f"--{setting} {config.get(setting)}" for setting in settings)])
        arms.append((name or "", group))
    return arms


def print_summary(runs: list[Run], goal: float | None):
    """Print three lines: losses, times, and what must be known of the runs."""
    losses = [run.val_loss for run in runs]
    seconds = [run.train_ms / 1000 for run in runs if run.train_ms is not None]
    p = one_sample(losses, goal) if goal else None
    tested = "" if p is None else f"  p {p:.3g} (one-sided t test, mean below {goal:g})"
    print_values("val_loss", losses, 5, tested)
    print_values("train_seconds", seconds, 3, "")

    notes = [re.sub(r"^trial \d+ of .*", "one of several runs in a file", note) for run in runs for note in run.notes]
    for note in dict.fromkeys(notes):
        print(f"  {notes.count(note)} of {len(runs)}: {note}")
    ends = sorted({run.last_step for run in runs})
    if len(ends) > 1 and not any(run.facts for run in runs):
        print(f"  their last steps differ: {ends[0]} to {ends[-1]}")


def print_values(title: str, values: list[float], digits: int, end: str):
    """Print one line: n, mean, sd, min and max of the values, to so many digits."""
    if not values:
        print(f"  {title:13}  not known")
        return
    numbers = summary(values)
    mean, least, most = (f"{numbers[name]:.{digits}f}" for name in ("mean", "min", "max"))
    sd = "-" if numbers["sd"] is None else f"{numbers['sd']:.{digits}f}"
    print(f"  {title:13}  n {numbers['n']}  mean {mean}  sd {sd}  min {least}  max {most}{end}")


# ---- Command line

def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command of a command line and its options."""
    parser = argparse.ArgumentParser(prog="./run.sh board", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RECORDS,
                        help="folder of the records, with docs/results.md beside it (default: this checkout's)")
    commands = parser.add_subparsers(dest="command", required=True)

    adding = commands.add_parser("add", help="check runs and add them to the records")
    adding.add_argument("folder", type=Path, metavar="DIR")
    adding.add_argument("--name", required=True, help="short name of the record")
    adding.add_argument("--track", required=True, help="track of the runs")
    adding.add_argument("--what", required=True, help="what is new, in one line")
    adding.add_argument("--arm", help="the arm that sets the record (default: the only one beside the baseline)")
    adding.add_argument("--negative", action="store_true",
                        help="a result that sets no record: worse, equivalent, undecided, or better but slower to the "
                        "target")

    commands.add_parser("check", help="check every record from its logs")
    commands.add_parser("render", help="write the tables of records/README.md, docs/results.md and docs/claims.md")
    stating = commands.add_parser("stats", help="statistics of any folder of logs")
    stating.add_argument("folder", type=Path, metavar="DIR")
    stating.add_argument("--target", type=float, help="validation loss to test against (default: the one in the logs)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """
    Run a command line. Returns the exit code: 0, or 1 for a fault (one line on stderr; of check, one line on stdout for
    each).
    """
    options = parse_arguments(argv)
    try:
        if options.command == "add":
            print(add(options.records, options.folder, options.name, options.track, options.what, options.arm,
                      options.negative))
        elif options.command == "check":
            return 1 if check(options.records) else 0
        elif options.command == "render":
            render(options.records, read_records(options.records))
        else:
            print_stats(options.folder, options.target)
    except RunError as error:
        print(f"records.leaderboard: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    prepare_console()
    sys.exit(main())
