"""
Damaged files of runs and records, many of them and each made from a seed. Every one is refused in one line that names a
file, or it is read; then what the log and the JSON both say of the run is what the run had.
"""

import collections
import gzip
import json
import random
import re
import shutil

import pytest

from records.leaderboard import main
from records.pages import BEGIN, END, pages_of
from records.runs import list_runs, read_run, read_usable
from tests.records.conftest import log_lines
from train_gpt import RunError, make_config

TARGET = make_config(dict(track="cpu")).target
LOSSES = (0.80, 0.81, 0.805)
NUMBERS = [
    "9" * 5000, "9" * 400, "1e999", "-1e999", "NaN", "-1", "0", "1e-300", "99999999999999999999", "0.1.2", "1e5", "٣",
]
VALUES = [
    None, True, -1, 10 ** 30, 1e999, float("nan"), "", "text", "a\nb\x1b[2J", "9" * 5000, "\ud800", "\u2028",
    [], [[]], [1, "a"], [None] * 3, {}, {"a": 1}, {"a\nb": {}},
]
DEPTHS = (20, 400, 100_000)
NESTED = ["[" * depth + "]" * depth for depth in DEPTHS] + ['{"a":' * depth + "1" + "}" * depth for depth in DEPTHS]


# ---- mutations: each takes bytes and a generator of random numbers, and gives other bytes

def flip_bit(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1:]


def truncate(content: bytes, rng: random.Random) -> bytes:
    return content[:rng.randrange(len(content))]


def change_lines(content: bytes, rng: random.Random) -> bytes:
    """One line, or a few in a row, deleted, doubled or moved."""
    lines = content.splitlines(keepends=True)
    start = rng.randrange(len(lines))
    end = start + rng.choice([1, 1, 3])
    block, rest = lines[start:end], lines[:start] + lines[end:]
    kind = rng.choice(["delete", "double", "move"])
    if kind == "double":
        return b"".join(lines[:end] + block + lines[end:])
    if kind == "move":
        place = rng.randrange(len(rest) + 1)
        rest[place:place] = block
    return b"".join(rest)


def change_number(content: bytes, rng: random.Random) -> bytes:
    numbers = list(re.finditer(rb"\d+(?:\.\d+)?", content))
    number = rng.choice(numbers)
    return content[:number.start()] + rng.choice(NUMBERS).encode() + content[number.end():]


def change_field(content: bytes, rng: random.Random) -> bytes:
    """A field of the JSON object in a file, or of the facts in a log, gets another value, or goes, or nests deeply."""
    text = content.decode()
    facts = re.search(r"^facts: (.*)$", text, re.M)
    start, end = facts.span(1) if facts else (0, len(text))
    before, tree, after = text[:start], json.loads(text[start:end]), text[end:]
    parents = [tree]
    places = []
    while parents:
        parent = parents.pop()
        for key, value in parent.items() if isinstance(parent, dict) else enumerate(parent):
            places.append((parent, key))
            parents += [value] if isinstance(value, dict | list) else []
    parent, key = rng.choice(places)
    if rng.random() < 0.1:
        del parent[key]
        return (before + json.dumps(tree) + after).encode()
    if rng.random() < 0.2:
        parent[key] = "here"
        return (before + json.dumps(tree).replace('"here"', rng.choice(NESTED), 1) + after).encode()
    parent[key] = rng.choice(VALUES)
    return (before + json.dumps(tree) + after).encode()


def unpacked(kind):
    """What changes a compressed file as this kind changes its text."""
    return lambda content, rng: gzip.compress(kind(gzip.decompress(content), rng), mtime=0)


TEXTS = [flip_bit, truncate, change_lines, change_number]
FIELDS = [change_field, change_field, change_field]


# ---- the files

@pytest.fixture
def files(tmp_path):
    """A board with a record of two arms of three runs each, and the comparison's folder that it was added from."""
    root = tmp_path / "board"
    source = tmp_path / "source"
    for page in pages_of(root):
        page.parent.mkdir()
        page.write_text(f"# Records\n\n{BEGIN}\n{END}\n", encoding="utf-8")
    (source / "logs").mkdir(parents=True)
    arms = []
    for arm, shift in (("baseline", 0.0), ("wide", -0.01)):
        arms.append(dict(name=arm, options=[], runs=[]))
        for seed, loss in enumerate(LOSSES, 1):
            name = f"{arm}-seed{seed}"
            losses = {0: 5.5, 2: 2.5, 4: loss + shift}
            lines, saved = log_lines(losses, run_id=name, seed=seed, variant=["wide"] if shift else [])
            (source / "logs" / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            (source / "logs" / f"{name}.json").write_text(json.dumps(saved, indent=1), encoding="utf-8")
            arms[-1]["runs"].append(dict(seed=seed, log=f"{name}.txt"))
    settings = dict(track="cpu", target=TARGET, command="compare.py baseline wide")
    results = dict(format="knotgpt-comparison-1", settings=settings, arms=arms)
    (source / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    assert add(root, source, "First") == 0
    return root, source


def add(root, source, name) -> int:
    words = ["add", str(source), "--name", name, "--track", "cpu", "--what", "what is tried", "--negative"]
    return main(["--records", str(root), *words])


def told(run) -> tuple:
    """What log and JSON both say of a run."""
    return [(point.step, point.val_loss) for point in run.points], run.train_ms, run.seed, run.config, run.val_sha256


def one_line(message: str, *names: str):
    """A fault's line: one, printable, and with a file's name."""
    assert message.isprintable() and len(message) < 2000, message[:300]
    assert any(name in message for name in names), message


def commands(capsys, *lines) -> bool:
    """Whether all commands of the board take it; each fault is one line."""
    taken = True
    for line in lines:
        code = main([str(word) for word in line])
        out, err = capsys.readouterr()
        faults = [text for text in out.splitlines() if text.startswith("error: ")] + err.splitlines()
        assert code == (1 if faults else 0), (out, err)
        assert len(err.splitlines()) <= 1
        for fault in faults:
            one_line(fault, ".txt", ".json", "README.md", "results.md", str(line[1]), str(line[-1]))
        taken = taken and not faults
    return taken


def mutate(path, kinds, rng):
    original = path.read_bytes()
    content = original
    while content == original:
        content = rng.choice(kinds)(original, rng)
    path.write_bytes(content)
    return original


def report(capsys, title: str, outcomes: collections.Counter):
    counted = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    with capsys.disabled():
        print(f"\n{title}: {sum(outcomes.values())} mutations, {counted}")


COUNTS = pytest.mark.parametrize("count", [15, pytest.param(900, marks=pytest.mark.slow)])


@COUNTS
@pytest.mark.parametrize("kind, kinds", [("txt", TEXTS + FIELDS), ("json", TEXTS + 2 * FIELDS)])
def test_a_log_and_its_json(files, capsys, count, kind, kinds):
    """Of a pair of which one is damaged, no reader gives other numbers: the other one would not agree."""
    _, source = files
    path = source / "logs" / f"wide-seed2.{kind}"
    log = path.with_suffix(".txt")
    rng = random.Random(f"{kind} {count}")
    outcomes = collections.Counter()
    whole = told(read_run(log, strict=True))
    for _ in range(count):
        original = mutate(path, kinds, rng)
        try:
            assert told(read_run(log, strict=True)) == whole
            outcomes["read"] += 1
        except RunError as error:
            one_line(str(error), "wide-seed2")
            outcomes["refused"] += 1
        runs, left_out = read_usable(log.parent)
        assert len(runs) in (5, 6) and all(run.finished for run in runs) and len(runs) + len(left_out) >= 6
        listed, unlisted = list_runs(log.parent)
        assert len(listed) + len(unlisted) == 6
        for line in unlisted:
            one_line(line, "wide-seed2.json")
        json.dumps(listed)
        path.write_bytes(original)
    assert outcomes["refused"] > count / 3
    report(capsys, path.name, outcomes)


@COUNTS
@pytest.mark.parametrize("name, kinds", [
    ("results.json", TEXTS + 2 * FIELDS),
    ("logs/wide-seed2.txt", TEXTS + 2 * FIELDS),
    ("logs/wide-seed2.json", TEXTS + 2 * FIELDS),
])
def test_what_is_added(files, capsys, count, name, kinds):
    """A comparison's folder with one damaged file: statistics of it, and whether the board takes it."""
    root, source = files
    capsys.readouterr()
    rng = random.Random(f"{name} {count}")
    outcomes = collections.Counter()
    for _ in range(count // 3):
        original = mutate(source / name, kinds, rng)
        commands(capsys, ["--records", root, "stats", source])
        code = add(root, source, "Second")
        err = capsys.readouterr().err
        assert code == (1 if err else 0) and err.count("\n") <= 1
        if err:
            one_line(err.rstrip("\n"), "wide", "results.json", str(source), "_Second")
        outcomes["refused" if err else "added"] += 1
        for folder in root.glob("negative/*_Second"):
            shutil.rmtree(folder)
        assert not list(root.glob("negative/.*"))
        (source / name).write_bytes(original)
    report(capsys, name, outcomes)


@COUNTS
@pytest.mark.parametrize("pattern, kinds", [
    ("stats.json", TEXTS + 3 * FIELDS),
    ("A1/A1-seed2.txt.gz", [flip_bit, truncate, *map(unpacked, TEXTS + FIELDS)]),
    ("A1/A1-seed2.json", TEXTS + FIELDS),
    ("source-*.txt", [flip_bit, truncate, change_lines]),
    ("../../sources/*.txt", [flip_bit, truncate, change_lines]),
])
def test_a_record(files, capsys, count, pattern, kinds):
    """A record with one damaged file: check and render, and check finds every change of a source."""
    root, _ = files
    capsys.readouterr()
    folder, = root.glob("negative/*_First")
    path, = folder.glob(pattern)
    pages = {page: page.read_bytes() for page in pages_of(root)}
    rng = random.Random(f"{pattern} {count}")
    outcomes = collections.Counter()
    for _ in range(count // 3):
        original = mutate(path, kinds, rng)
        taken = commands(capsys, ["--records", root, "check"])
        assert not (taken and "source" in pattern)
        commands(capsys, ["--records", root, "render"], ["--records", root, "stats", folder])
        outcomes["check passes" if taken else "check fails"] += 1
        path.write_bytes(original)
        for page, content in pages.items():
            page.write_bytes(content)
    report(capsys, pattern, outcomes)
