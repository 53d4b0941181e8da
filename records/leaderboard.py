"""
The leaderboard: runs that count, checked from their logs.

    python records/leaderboard.py add DIR --name NAME --track TRACK --what "one line" [--arm ARM] [--negative]
    python records/leaderboard.py check           every record again from its logs, a line each; exit code 1 if one fails
    python records/leaderboard.py render          the tables of records/README.md from the records' stats.json
    python records/leaderboard.py stats DIR [--target LOSS]
                                                  n, mean, sd, min, max and p of each arm in any folder of logs,
                                                  modded-nanogpt's too

add takes a folder of compare.py, or one whose subfolders (baseline/ and others, or one alone) each hold the logs of an arm. It checks what is to be
added, writes the record's folder, records/TRACK/DATE_NAME/ or, with --negative, records/negative/DATE_NAME/, and
renders the tables. The arm that sets a record is the one beside the baseline, or the baseline alone; of several, --arm
says which.

    README.md, stats.json            what was found; both say which arm A0 (the baseline), A1, ... is
    source-0123456789ab.txt          the source of the runs, once for all runs that have it
    A1/A1-seed3.txt, A1-seed3.json   each run's log, which names its source by hash, and its JSON as it was written

records/README.md has the rules. Exit code 1 and one line for a fault.
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

RECORDS = Path(__file__).resolve().parent
sys.path = [str(RECORDS.parent)] + [path for path in sys.path if Path(path).resolve() != RECORDS]  # so that nobody takes statistics.py for Python's own
from records.fields import RESULTS, STATS, read_fields
from records.report import FORMAT as COMPARISON
from records.report import (
    MACHINE, differing, equals, escaped, interval, markdown_table, number, p_value, plain, sentence, settled, summarize,
)
from records.runs import Run, log_files, prepare_console, read_folder, read_run, read_usable, stored_text
from records.statistics import ALPHA, one_sample, summary, welch
from train_gpt import TRACKS, RunError, make_config, require, write_atomically

FORMAT = "knotgpt-record-2"
CHOSEN = ("format", "name", "date", "track", "what", "kind", "arm", "rules", "settings")  # of stats.json, what does not come from the logs
BEGIN, END = "<!-- tables: written by leaderboard.py render -->", "<!-- end of tables -->"

# ---------------------------------------------------------------------------------------------------------------------------------------------------
# Folders of logs


def log_folders(folder: Path) -> list[Path]:
    """The subfolders that hold logs, baseline first. RunError if there is none."""
    found = sorted(
        (path for path in folder.glob("*/") if log_files(path)), key=lambda path: (path.name != "baseline", path.name)
    )
    if not found:
        raise RunError(f"{folder}: {'no subfolder with logs' if folder.is_dir() else 'no such folder'}; give one with a subfolder of logs for every arm")
    return found


def read_arms(folder: Path) -> tuple[dict, list[dict]]:
    """
    (settings, arms) as report.summarize takes them, from a folder of compare.py, a record's, or one with a subfolder of
    logs for every arm.
    """
    if (folder / "results.json").exists():
        return read_comparison(folder)
    if (folder / "stats.json").exists():
        stats = read_stats(folder)
        return stats["settings"], stored_arms(folder, stats)
    folders = log_folders(folder)
    if len(folders) > 1 and folders[0].name != "baseline":
        raise RunError(f"{folder}: no baseline among {', '.join(path.name for path in folders)}; call the baseline's subfolder baseline")
    arms = [arm_of(path.name, read_folder(path, strict=True)) for path in folders]
    first = arms[0]["runs"][0]
    budget = first.config.get("time_budget", 0)
    settings = dict(
        track=first.track, seeds=sorted({run.seed for arm in arms for run in arm["runs"] if run.seed is not None}),
        budget="time" if budget else "tokens", budget_seconds=budget, target=first.target,
        command=first.facts.get("command", ""), order=[], sweep=None, tried=len(arms) - 1, overhead=None,
    )
    return settings, arms


def arm_of(name: str, runs: list[Run], options: list[str] | None = None) -> dict:
    runs = sorted(runs, key=lambda run: run.seed or 0)  # one order, whether they come from a comparison or from a folder
    return dict(name=name, variant=list(runs[0].variant), options=options or [], runs=runs)


def read_comparison(folder: Path) -> tuple[dict, list[dict]]:
    """(settings, arms) of a folder of compare.py, runs from its logs. RunError if a run is missing or unfinished."""
    results = read_results(folder)
    arms = []
    for arm in results["arms"]:
        runs = []
        for run in arm["runs"]:
            found = [path for path in folder.rglob("*.txt") if path.name == run.get("log")]
            require(len(found) == 1,
                    f"{folder}: {len(found)} logs of {plain(arm['name'])}, seed {run['seed']}, where one is expected; "
                    "run compare.py again, which does what is missing")
            runs.append(read_run(found[0], strict=True))
        require(runs, f"{folder}: no run of {plain(arm['name'])}; run compare.py again, which does what is missing")
        arms.append(arm_of(arm["name"], runs, arm["options"]))
    return results["settings"], arms


def read_results(folder: Path) -> dict:
    """results.json of a comparison. RunError if it is none."""
    path, remedy = folder / "results.json", "give compare.py's folder, or one with a subfolder of logs for every arm"
    results = read_fields(path, remedy, RESULTS)
    require(results["format"] == COMPARISON,
            f"{path}: no results of compare.py, but of format {plain(results['format'])}; {remedy}")
    require(results["arms"], f"{path}: damaged: it has no arms; {remedy}")
    return results

# ---------------------------------------------------------------------------------------------------------------------------------------------------
# A record's statistics and rules


def statistics_of(chosen: dict, arms: list[dict]) -> dict:
    """What stats.json says: `chosen` and all that follows from the logs. RunError where the runs cannot be compared."""
    for arm in arms:
        for run in arm["runs"]:
            if not run.val_sha256:
                raise RunError(f"{run.path}: does not say which validation data it used; only logs of this trainer can be added")
            if run.track != chosen["track"]:
                raise RunError(f"{run.path}: a run of track {run.track}, not {chosen['track']}; name its own with --track")
    check_alike(arms)
    results = summarize(chosen["settings"], arms)
    found = {name: ", ".join(map(str, results["environment_differs"].get(name, [results["environment"][name]]))) for name in MACHINE}
    for name in MACHINE:
        if chosen["kind"] == "record" and name in results["environment_differs"]:
            raise RunError(f"{chosen['name']}: {name} is not one in all runs ({found[name]}), so their times cannot be compared; run all of them on one machine")
    environment, target = results["environment"], chosen["rules"]["target"]
    rows = []
    for i, row in enumerate(results["arms"]):
        losses, seconds = ([run[key] for run in row["runs"]] for key in ("val_loss", "train_seconds"))
        rows.append(dict(name=row["name"], folder=f"A{i}", variant=row["variant"], options=row["options"],
                         parameters=row["parameters"], seeds=[run["seed"] for run in row["runs"]],
                         losses=losses, train_seconds=seconds, loss=summary(losses), time=summary(seconds),
                         p_target=one_sample(losses, target) if target else None, vs_baseline=row["vs_baseline"]))
    return chosen | dict(hardware=f"{found['world_size']} x {found['device']}", val_sha256=environment["val_sha256"],
                         versions={name: environment[name] for name in ("python", "torch", "cuda", "triton")}, arms=rows)


def check_alike(arms: list[dict]):
    """RunError unless runs have seeds, arms have names of their own, and all were scored on equally many tokens."""
    names = [plain(arm["name"]) for arm in arms]
    require(len(set(names)) == len(names),
            f"two arms have the same name among {', '.join(names)}; give them names of their own")
    runs = [run for arm in arms for run in arm["runs"]]
    for run in runs:
        require(run.seed is not None, f"{run.path}: does not say its seed; only logs of this trainer can be added")
        scored = [each.facts.get("val_tokens") for each in (runs[0], run)]
        require(scored[0] == scored[1],
                f"{runs[0].path} and {run.path} were scored on {scored[0]} and {scored[1]} tokens of the validation "
                "data, so their losses cannot be compared; run one of them again with the other's settings")


def track_rules(track: str) -> dict:
    """A track's target and val_tokens, which a record keeps: it is checked against those it was set under. RunError for an unknown track."""
    if track not in TRACKS:
        raise RunError(f"unknown track {track!r}; the tracks are {', '.join(TRACKS)}")
    config = make_config(dict(track=track))
    return dict(target=config.target, val_tokens=config.val_tokens)


def winner(stats: dict) -> dict:
    """The arm that sets the record."""
    return next(arm for arm in stats["arms"] if arm["name"] == stats["arm"])


def place(stats: dict) -> str:
    return f"{stats['track'] if stats['kind'] == 'record' else 'negative'}/{stats['date']}_{stats['name']}"


def comparable(a: dict, b: dict) -> bool:
    """Whether two records stand in one table: track, its target, hardware and validation data."""
    return all(a[key] == b[key] for key in ("track", "rules", "hardware", "val_sha256"))


def fastest(records: list[dict], like: dict) -> dict | None:
    """The fastest of those records that are comparable with `like`."""
    found = [stats for stats in records if stats["kind"] == "record" and comparable(stats, like)]
    return min(found, key=lambda stats: winner(stats)["time"]["mean"], default=None)


def check_rules(stats: dict, arms: list[dict], standing: dict | None):
    """RunError unless a record (faster than `standing`, the one before it) or a negative result keeps the rules of records/README.md."""
    where = f"{place(stats)}: "
    if stats["kind"] == "negative":
        if len(arms) < 2:
            raise RunError(f"{where}one arm alone is no comparison; add the baseline's logs under baseline/")
        return
    rules, arm = stats["rules"], winner(stats)
    if not rules["target"]:
        raise RunError(f"{where}track {stats['track']} has no target, so no record; the comparison can be added with --negative")
    for name, value in rules.items():
        for run in (run for entry in arms for run in entry["runs"]):
            if run.config.get(name) != value:
                raise RunError(f"{where}{run.path.name} has {name} {run.config.get(name)}, the track {value}; run it with the track's own")
    require(not stats["settings"].get("reused"), f"{where}some of its runs were taken over from earlier comparisons, so their times were not measured in "
            "turn; compare again with --no-reuse, or add it with --negative")
    for run in (run for entry in arms for run in entry["runs"]):
        require(run.target == rules["target"], f"{where}{run.path.name} was validated on data for which the track's "
                                               "target is not known; use the track's own data")
    n, mean, p = arm["loss"]["n"], arm["loss"]["mean"], arm["p_target"]
    if n < 2:
        raise RunError(f"{where}one run alone, and no test can be made of it; train more seeds")
    if p >= ALPHA:
        raise RunError(f"{where}target {rules['target']} not shown to be reached: mean loss {mean:.4f}, n = {n}, {equals(p)}, and p < {ALPHA} is asked for; "
                       "train more seeds or longer, or add it with --negative")
    if standing:
        before = winner(standing)
        p = welch(arm["train_seconds"], before["train_seconds"])["p_less"]
        if p >= ALPHA:
            raise RunError(f"{where}not faster than {place(standing)}: {arm['time']['mean']:.2f} s (n = {n}) against {before['time']['mean']:.2f} s (n = {before['time']['n']}), "
                           f"{equals(p)}, and p < {ALPHA} is asked for; add it with --negative")

# ---------------------------------------------------------------------------------------------------------------------------------------------------
# The records that stand


def record_folders(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("*/*/") if path.parent.name in (*TRACKS, "negative") and not path.name.startswith("."))


def read_stats(folder: Path) -> dict:
    """stats.json of a record. RunError if it is damaged."""
    path, remedy = folder / "stats.json", "delete the folder and add the runs again with leaderboard.py add"
    require(path.exists(), f"{folder}: no stats.json; add the runs again with leaderboard.py add")
    stats = read_fields(path, remedy, STATS)
    names = [arm["name"] for arm in stats["arms"]]
    compared = len(names) > 1 and all(arm["vs_baseline"] for arm in stats["arms"][1:])
    whole = {"record": stats["arm"] in names, "negative": compared}
    require(stats["format"] == FORMAT,
            f"{path}: damaged: its format is {plain(stats['format'])}, not {FORMAT}; {remedy}")
    require(whole.get(stats["kind"]), f"{path}: damaged: its arms are not those of a {plain(stats['kind'])}; {remedy}")
    require(stats["track"] in TRACKS, f"{path}: damaged: there is no track {plain(stats['track'])}; {remedy}")
    require(all(len(arm["seeds"]) == len(arm["losses"]) == len(arm["train_seconds"]) for arm in stats["arms"]),
            f"{path}: damaged: an arm has not as many losses and times as seeds; {remedy}")
    return stats


def standing_records(root: Path) -> list[dict]:
    """stats.json of every record. RunError for one that is damaged or stands in another record's folder."""
    records = [read_stats(folder) for folder in record_folders(root)]
    for stats, folder in zip(records, record_folders(root)):
        check_place(stats, folder)
    return records


def check_place(stats: dict, folder: Path):
    if place(stats) != f"{folder.parent.name}/{folder.name}":
        raise RunError(f"{folder / 'stats.json'}: belongs to {place(stats)}; give the folder its name back")


def stored_arms(folder: Path, stats: dict) -> list[dict]:
    """The arms of a record from its logs. RunError unless the folder holds those of stats.json and no others."""
    names = [arm["folder"] for arm in stats["arms"]]
    folders = {path.name: path for path in log_folders(folder)}
    if set(names) != folders.keys():
        raise RunError(f"{folder}: stats.json has the arms {', '.join(sorted(names))}, "
                       f"the folder {', '.join(sorted(folders))}")
    return [
        arm_of(arm["name"], read_folder(folders[arm["folder"]], strict=True), arm["options"]) for arm in stats["arms"]
    ]


def disagreement(ours, theirs, name: str = "") -> str | None:
    """Where two JSON values differ by more than rounding, None if nowhere."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        pairs = [(ours.get(key), theirs.get(key), f"{name}.{key}".lstrip(".")) for key in {**ours, **theirs}]
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = [(a, b, f"{name}[{i}]") for i, (a, b) in enumerate(zip(ours, theirs))]
    else:
        floats = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (ours, theirs))
        return None if ours == theirs or floats and math.isclose(ours, theirs, rel_tol=1e-6, abs_tol=1e-9) else name
    return next((found for pair in pairs if (found := disagreement(*pair))), None)


def check_folder(folder: Path, records: list[dict]) -> dict:
    """Everything about one record again from its logs; returns its stats. RunError for the first fault."""
    stats = read_stats(folder)
    check_place(stats, folder)
    if not (folder / "README.md").exists():
        raise RunError(f"{folder}: no README.md; delete the folder and add the runs again with leaderboard.py add")
    arms = stored_arms(folder, stats)
    sources = {run.source_file for arm in arms for run in arm["runs"]}
    unused = sorted({path.name for path in folder.glob("source-*.txt")} - sources)
    require(not unused, f"{folder}: {', '.join(unused)} is no run's source; delete it")
    fresh = json.loads(json.dumps(statistics_of({name: stats[name] for name in CHOSEN}, arms)))
    if name := disagreement(fresh, stats):
        raise RunError(f"{folder / 'stats.json'}: {name} is not what the logs say; put the right one back, or add the runs again")
    slower = []
    if stats["kind"] == "record":
        slower = [other for other in records if other["kind"] == "record" and place(other) != place(stats) and winner(other)["time"]["mean"] >= winner(fresh)["time"]["mean"]]
    check_rules(fresh, arms, fastest(slower, fresh))
    return fresh


def check(root: Path) -> int:
    """A line for each record and one for the tables; returns the number of faults."""
    faults, records = 0, []
    for folder in record_folders(root):
        try:
            records.append(read_stats(folder))
        except RunError:
            pass  # said below
    for folder in record_folders(root):
        try:
            stats = check_folder(folder, records)
            arm = winner(stats) if stats["kind"] == "record" else None
            line = f"{place(stats)}: ok" + (f", {arm['time']['mean']:.2f} s, loss {arm['loss']['mean']:.4f}, n = {arm['loss']['n']}, {equals(arm['p_target'])}" if arm else "")
        except RunError as error:
            faults, line = faults + 1, f"error: {error}"
        print(line)
    try:
        line = f"{root / 'README.md'}: ok" if split_readme(root)[1] == rendered(records) else f"error: {root / 'README.md'}: the tables are not those of the records; run leaderboard.py render"
    except RunError as error:
        line = f"error: {error}"
    print(line)
    return faults + line.startswith("error: ")

# ---------------------------------------------------------------------------------------------------------------------------------------------------
# Tables


def split_readme(root: Path) -> tuple[str, str, str]:
    """records/README.md before, between and after the marks. RunError without them."""
    path = root / "README.md"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}; put it back") from None
    parts = re.fullmatch(f"(.*{re.escape(BEGIN)})(.*)({re.escape(END)}.*)", text, re.S)
    if not parts or text.count(BEGIN) != 1 or text.count(END) != 1:
        raise RunError(f"{path}: needs the lines {BEGIN} and {END}, once each and in this order, around the place of the tables")
    return parts.groups()


def rendered(records: list[dict]) -> str:
    """The tables of all records: the history of each track, hardware and validation data; then the comparisons."""
    parts, groups = [], []
    for stats in sorted((stats for stats in records if stats["kind"] == "record"), key=lambda stats: (list(TRACKS).index(stats["track"]), stats["hardware"])):
        group = next((group for group in groups if comparable(group[0], stats)), None)
        group.append(stats) if group else groups.append([stats])
    for group in groups:
        group.sort(key=lambda stats: (-winner(stats)["time"]["mean"], stats["date"]))
        best, first = winner(group[-1]), group[0]
        data = ", ".join(f"{name} {digest[:12]}" for name, digest in first["val_sha256"].items())
        rows = [[str(i), f"{number(arm['time'], 2)} s", number(arm["loss"], 4), str(arm["loss"]["n"]), p_value(arm["p_target"]), escaped(plain(arm["name"])), escaped(plain(stats["what"])),
                 stats["date"], f"[{escaped(stats['name'])}]({place(stats)})"] for i, stats in enumerate(group, 1) for arm in [winner(stats)]]
        parts += [f"### {first['track']}, {escaped(first['hardware'])}: {best['time']['mean']:.2f} s",
                  f"To a validation loss of {first['rules']['target']}; validation data {escaped(data)}. The last row is the standing record.",
                  markdown_table(["#", "time", "loss", "n", "p", "arm", "what", "date", "record"], rows)]
    parts += [] if groups else ["No record yet."]
    rows = [[stats["date"], stats["track"], escaped(plain(arm["name"])), escaped(plain(stats["what"])), number(test["difference"], 4, signed=True), interval(test, 4), p_value(test["p_holm"]),
             f"{arm['loss']['n']} and {stats['arms'][0]['loss']['n']}", test["verdict"], number(time["difference"], 2, signed=True), f"[{escaped(stats['name'])}]({place(stats)})"]
            for stats in sorted((stats for stats in records if stats["kind"] == "negative"), key=place)
            for arm in stats["arms"][1:] for test, time in [(arm["vs_baseline"]["loss"], arm["vs_baseline"]["time"])]]
    parts += ["### Comparisons that set no record",
              "Each arm against the baseline of its own comparison, whatever came of it; the verdict is on the loss.",
              markdown_table(["date", "track", "arm", "what", "loss difference", "95 %", "p after Holm", "n", "verdict", "ms/step difference", "logs"], rows) if rows else "None yet."]
    return "\n\n" + "\n\n".join(parts) + "\n\n"


def render(root: Path, records: list[dict]):
    before, _, after = split_readme(root)
    write_atomically(root / "README.md", lambda file: file.write((before + rendered(records) + after).encode()))

# ---------------------------------------------------------------------------------------------------------------------------------------------------
# Adding


def record_readme(stats: dict, arms: list[dict], standing: dict | None) -> str:
    results = summarize(stats["settings"], arms)
    parts = [f"# {escaped(stats['name'])}", escaped(stats["what"])]
    if stats["kind"] == "record":
        arm = winner(stats)
        text = (f"{plain(arm['name'])} trains in {number(arm['time'], 2)} s to a validation loss of {number(arm['loss'], 4)}, n = {arm['loss']['n']}; "
                f"{equals(arm['p_target'])} for a mean that is not below {stats['rules']['target']}.")
        if standing:
            p = welch(arm["train_seconds"], winner(standing)["train_seconds"])["p_less"]
            text += f" The record before it, {place(standing)}, took {number(winner(standing)['time'], 2)} s: {equals(p)} for one that is not faster."
        parts.append(escaped(text))
    parts += [f"- {escaped(sentence(arm, results['arms'][0]))}" for arm in results["arms"][1:]]
    rows = []
    for arm in stats["arms"]:
        for seed, loss, seconds in zip(arm["seeds"], arm["losses"], arm["train_seconds"]):
            link = f"[{seed}]({arm['folder']}/{log_name(arm, seed)}.txt)"
            rows.append([arm["folder"], escaped(plain(arm["name"])), link, number(loss, 4), number(seconds, 2)])
    parts += [markdown_table(["id", "arm", "seed", "final loss", "time s"], rows),
              escaped(f"Track {stats['track']} on {stats['hardware']}; " + ", ".join(f"{name} {version}" for name, version in stats["versions"].items()) + ". ")
              + "A seed's link is its log: the configuration and every step; it names its source, a file here, by "
                "hash. stats.json has these numbers and the tests."]
    parts += [f"Command:\n\n    {plain(stats['settings']['command'])}"] if stats["settings"].get("command") else []
    return "\n\n".join(parts) + "\n"


def add(root: Path, source: Path, name: str, track: str, what: str, arm: str | None, negative: bool) -> Path:
    """Check the runs in `source` and copy them to where they belong; returns that folder. RunError for any fault, and then nothing has changed."""
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name) or not plain(what):
        raise RunError(f"--name takes letters, digits, _ and -, and --what a line of text; got {name!r} and {what!r}")
    rules = track_rules(track)
    split_readme(root)
    records = standing_records(root)
    settings, arms = read_arms(source)
    names = [entry["name"] for entry in arms]
    if not negative and (arm not in names if arm else len(arms) > 2):
        raise RunError(f"{source}: which arm sets the record? give --arm and one of {', '.join(map(plain, names))}")
    chosen = dict(format=FORMAT, name=name, date=f"{datetime.date.today()}", track=track, what=plain(what), kind="negative" if negative else "record",
                  arm=None if negative else arm or names[-1], rules=rules, settings=settings)
    stats = statistics_of(chosen, arms)
    folder = root / place(stats)
    if folder.exists():
        raise RunError(f"{folder}: there is a record of this name and date; choose another --name")
    standing = fastest(records, stats)
    check_rules(stats, arms, standing)
    readme = record_readme(stats, arms, standing)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        for entry, row in zip(arms, stats["arms"]):
            (temporary / row["folder"]).mkdir(parents=True)
            for run in entry["runs"]:
                store(run, temporary, f"{row['folder']}/{log_name(row, run.seed)}")
        (temporary / "README.md").write_text(readme, encoding="utf-8")
        (temporary / "stats.json").write_text(json.dumps(stats, indent=1) + "\n", encoding="utf-8")
        temporary.rename(folder)
    except OSError as error:
        raise RunError(f"cannot write {folder}: {error.strerror}; free some space or mend the folder's permissions") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    render(root, records + [stats])
    return folder


def log_name(arm: dict, seed: int) -> str:
    """The name of a stored log, without its ending."""
    return f"{arm['folder']}-seed{seed}"


def store(run: Run, folder: Path, name: str):
    """Write a run into a record's folder: its source, which others may share, its log and, as it is, its JSON."""
    (folder / run.source_file).write_text(run.source, encoding="utf-8")
    (folder / f"{name}.txt").write_text(stored_text(run), encoding="utf-8")
    saved = run.path.with_suffix(".json")
    if saved.exists():
        shutil.copyfile(saved, folder / f"{name}.json")


def print_stats(folder: Path, target: float | None):
    """
    Print the statistics of each arm of a folder of logs, or of each of its subfolders where it has none itself, as far
    as the logs can be read, with what is left out and what must be known of the rest. RunError where nothing is left.
    """
    names = arm_names(folder)
    counted, reasons = 0, []
    for path in [folder] if log_files(folder) else log_folders(folder):
        runs, left_out = read_usable(path)
        counted += len(runs)
        reasons += left_out
        for name, group in arms_of(runs, names):
            title = f"{path}, {plain(name)}" if name else path
            sources = len({run.source_sha256 for run in group})
            print(f"{title}: runs {len(group)}, different sources {sources}")
            print_summary(group, target or group[0].target)
        for reason in left_out:
            print(f"  left out: {plain(reason)}")
    require(counted, f"{folder}: no log gives a final loss: {reasons[0] if reasons else 'there is none'}")


def arm_names(folder: Path) -> dict[str, str]:
    """{log's or subfolder's name: arm's name}, from a comparison's results.json or a record's stats.json; else {}."""
    if (folder / "results.json").exists():
        arms = read_results(folder)["arms"]
        return {run["log"]: arm["name"] for arm in arms for run in arm["runs"] if "log" in run}
    if (folder / "stats.json").exists():
        return {arm["folder"]: arm["name"] for arm in read_stats(folder)["arms"]}
    return {}


def arms_of(runs: list[Run], names: dict[str, str]) -> list[tuple[str, list[Run]]]:
    """
    The runs by arm, [(name, runs)], in the order of their first runs. A run's arm is the one that is named for it,
    else all runs of its variants and settings; these are its name where there are several. Runs of other trainers are
    one arm.
    """
    groups, given = {}, {}
    for run in runs:
        name = names.get(run.path.name, names.get(run.path.parent.name))
        key = json.dumps([name, run.variant, settled(run)], sort_keys=True)
        groups.setdefault(key, []).append(run)
        given[key] = name
    configs = [settled(group[0]) for group in groups.values()]
    settings = sorted({setting for config in configs for setting in differing(configs[0], config)} - {"variant"})
    arms = []
    for (key, group), config in zip(groups.items(), configs):
        variants = "+".join(group[0].variant) or "baseline"
        described = " ".join([variants, *(f"--{setting} {config.get(setting)}" for setting in settings)])
        arms.append((given[key] or (described if len(groups) > 1 else ""), group))
    return arms


def print_summary(runs: list[Run], goal: float | None):
    """Three lines: losses, times, and what must be known of the runs."""
    losses = [run.val_loss for run in runs]
    seconds = [run.train_ms / 1000 for run in runs if run.train_ms is not None]
    p = one_sample(losses, goal) if goal else None
    tested = "" if p is None else f"  p {p:.3g} (one-sided t test, mean below {goal:g})"
    for title, values, digits, end in (("val_loss", losses, 5, tested), ("train_seconds", seconds, 3, "")):
        if not values:
            print(f"  {title:13}  not known")
            continue
        s = summary(values)
        sd = "-" if s["sd"] is None else f"{s['sd']:.{digits}f}"
        mean, least, most = (f"{s[name]:.{digits}f}" for name in ("mean", "min", "max"))
        print(f"  {title:13}  n {s['n']}  mean {mean}  sd {sd}  min {least}  max {most}{end}")
    notes = [re.sub(r"^trial \d+ of .*", "one of several runs in a file", note) for run in runs for note in run.notes]
    for note in dict.fromkeys(notes):
        print(f"  {notes.count(note)} of {len(runs)}: {note}")
    ends = sorted({run.last_step for run in runs})
    if len(ends) > 1 and not any(run.facts for run in runs):
        print(f"  their last steps differ: {ends[0]} to {ends[-1]}")


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, 1 for a fault (one line on stderr; of check, one line on stdout for each)."""
    parser = argparse.ArgumentParser(prog="leaderboard.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the records (default: the one of this script)")
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="check runs and add them to the records")
    adding.add_argument("folder", type=Path, metavar="DIR")
    for option, help_text in dict(name="short name of the record", track="track of the runs", what="what is new, in one line").items():
        adding.add_argument(f"--{option}", required=True, help=help_text)
    adding.add_argument("--arm", help="the arm that sets the record (default: the only one beside the baseline)")
    adding.add_argument("--negative", action="store_true", help="a result that sets no record: worse, not distinguishable, or better but slower to the target")
    commands.add_parser("check", help="check every record from its logs")
    commands.add_parser("render", help="write the tables of records/README.md")
    stating = commands.add_parser("stats", help="statistics of any folder of logs")
    stating.add_argument("folder", type=Path, metavar="DIR")
    stating.add_argument("--target", type=float, help="validation loss to test against (default: the one in the logs)")
    options = parser.parse_args(argv)
    try:
        if options.command == "add":
            print(add(options.records, options.folder, options.name, options.track, options.what, options.arm, options.negative))
        elif options.command == "check":
            return 1 if check(options.records) else 0
        elif options.command == "render":
            render(options.records, standing_records(options.records))
        else:
            print_stats(options.folder, options.target)
    except RunError as error:
        print(f"leaderboard.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    prepare_console()
    sys.exit(main())
