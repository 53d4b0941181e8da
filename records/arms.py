"""
The arms of a folder of logs: a comparison's, a record's, or one with a subfolder of logs for every arm.
"""

from pathlib import Path

from records.fields import RESULTS, STATS, read_fields
from records.results import FORMATS
from records.runs import Run, log_files, read_folder, read_run
from records.statistics import ALPHA, default_margin
from records.verdicts import RULE
from records.words import plain
from train_gpt import TRACKS, make_config, require

FORMAT = "knotgpt-record-2"


def log_folders(folder: Path) -> list[Path]:
    """The subfolders that hold logs, baseline first. RunError if there is none."""
    folders = [path for path in folder.glob("*/") if log_files(path)]
    fault = "no subfolder with logs" if folder.is_dir() else "no such folder"
    require(folders, f"{folder}: {fault}; give one with a subfolder of logs for every arm")
    return sorted(folders, key=lambda path: (path.name != "baseline", path.name))


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
    require(len(folders) == 1 or folders[0].name == "baseline",
            f"{folder}: no baseline among {', '.join(path.name for path in folders)}; "
            "call the baseline's subfolder baseline")
    arms = [make_arm(path.name, read_folder(path, strict=True)) for path in folders]
    first = arms[0]["runs"][0]
    seconds = first.config.get("time_budget", 0)
    settings = dict(
        track=first.track, seeds=sorted({run.seed for run in runs_of(arms) if run.seed is not None}),
        budget="time" if seconds else "tokens", budget_seconds=seconds, target=first.target,
        command=first.facts.get("command", ""), order=[], sweep=None, tried=len(arms), overhead=None)
    return rule_settings(first.track) | settings, arms


def rule_settings(track: str | None, margin: float | None = None) -> dict:
    """The settings of today's rule, with the margin that is asked for or the one of the track."""
    if margin is None and track in TRACKS:
        margin = default_margin(make_config(dict(track=track)).target)
    return dict(rule=RULE, alpha=ALPHA, margin=margin, design=None)


def merge_arms(folders: list[Path]) -> tuple[dict, list[dict]]:
    """
    (settings, arms) of one or several folders, each as read_arms takes it or, of several, the logs of one arm, which is
    called by the folder's name. The first folder has the baseline. Arms of one name in several folders are one arm; a
    run that lies in two of them counts once.
    """
    if len(folders) == 1:
        return read_arms(folders[0])
    settings = None
    merged = {}     # name: arm
    for folder in folders:
        if log_files(folder):
            described = {}
            arms = [make_arm(folder.name, read_folder(folder, strict=True))]
        else:
            described, arms = read_arms(folder)
        settings = described if settings is None else settings
        for arm in arms:
            known = merged.setdefault(arm["name"], arm)
            results = {(run.seed, run.val_loss, run.train_ms) for run in known["runs"]}
            more = [run for run in arm["runs"] if (run.seed, run.val_loss, run.train_ms) not in results]
            known["runs"] = sorted(known["runs"] + more, key=lambda run: run.seed or 0)
    arms = list(merged.values())
    require(len(arms) > 1, f"{', '.join(map(str, folders))} hold one arm, {plain(arms[0]['name'])}, which has nothing "
            "to be compared with; name the folder of another")
    first = arms[0]["runs"][0]
    seeds = sorted({run.seed for run in runs_of(arms) if run.seed is not None})
    described = dict(track=first.track, target=first.target, budget="time" if first.config.get("time_budget") else
                     "tokens", command="", order=[], sweep=None, overhead=None)
    return rule_settings(first.track) | described | settings | dict(seeds=seeds, tried=len(arms)), arms


def make_arm(name: str, runs: list[Run], options: list[str] | None = None) -> dict:
    """An arm as report.summarize takes it. Its runs have one order, whatever folder they come from."""
    runs = sorted(runs, key=lambda run: run.seed or 0)
    return dict(name=name, variant=list(runs[0].variant), options=options or [], runs=runs)


def runs_of(arms: list[dict]) -> list[Run]:
    return [run for arm in arms for run in arm["runs"]]


def read_comparison(folder: Path) -> tuple[dict, list[dict]]:
    """(settings, arms) of a folder of compare.py, runs from its logs. RunError if a run is missing or unfinished."""
    results = read_results(folder)
    arms = []
    for arm in results["arms"]:
        runs = []
        for run in arm["runs"]:
            logs = [path for path in folder.rglob("*.txt") if path.name == run.get("log")]
            require(len(logs) == 1,
                    f"{folder}: {len(logs)} logs of {plain(arm['name'])}, seed {run['seed']}, where one is expected; "
                    "run compare.py again, which does what is missing")
            runs.append(read_run(logs[0], strict=True))
        require(runs, f"{folder}: no run of {plain(arm['name'])}; run compare.py again, which does what is missing")
        arms.append(make_arm(arm["name"], runs, arm["options"]))
    return results["settings"], arms


def read_results(folder: Path) -> dict:
    """results.json of a comparison. RunError if it is none."""
    path = folder / "results.json"
    remedy = "give compare.py's folder, or one with a subfolder of logs for every arm"
    results = read_fields(path, remedy, RESULTS)
    require(results["format"] in FORMATS,
            f"{path}: no results of compare.py, but of format {plain(results['format'])}; {remedy}")
    require(results["arms"], f"{path}: damaged: it has no arms; {remedy}")
    return results


def read_stats(folder: Path) -> dict:
    """stats.json of a record. RunError if it is damaged."""
    path = folder / "stats.json"
    remedy = "delete the folder and add the runs again with ./run.sh board add"
    require(path.exists(), f"{folder}: no stats.json; add the runs again with ./run.sh board add")
    stats = read_fields(path, remedy, STATS)
    require(stats["format"] == FORMAT,
            f"{path}: damaged: its format is {plain(stats['format'])}, not {FORMAT}; {remedy}")
    require(has_its_arms(stats), f"{path}: damaged: its arms are not those of a {plain(stats['kind'])}; {remedy}")
    require(stats["track"] in TRACKS, f"{path}: damaged: there is no track {plain(stats['track'])}; {remedy}")
    require(all(len(arm["seeds"]) == len(arm["losses"]) == len(arm["train_seconds"]) for arm in stats["arms"]),
            f"{path}: damaged: an arm has not as many losses and times as seeds; {remedy}")
    return stats


def has_its_arms(stats: dict) -> bool:
    """Whether a record has the arm that sets it, and a comparison a baseline and arms that were compared with it."""
    if stats["kind"] == "record":
        return stats["arm"] in [arm["name"] for arm in stats["arms"]]
    others = stats["arms"][1:]
    return stats["kind"] == "negative" and bool(others) and all(arm["vs_baseline"] for arm in others)


def stored_arms(folder: Path, stats: dict) -> list[dict]:
    """The arms of a record from its logs. RunError unless the folder holds those of stats.json and no others."""
    names = [arm["folder"] for arm in stats["arms"]]
    folders = {path.name: path for path in log_folders(folder)}
    require(set(names) == folders.keys(),
            f"{folder}: stats.json has the arms {', '.join(sorted(names))}, the folder {', '.join(sorted(folders))}")
    return [make_arm(arm["name"], read_folder(folders[arm["folder"]], strict=True), arm["options"])
            for arm in stats["arms"]]
