"""
Exported folders with faults, drawn from a seed: 60 by default, 300 with -m slow. Each is given to generate.py, which
answers with one line and exit code 1; a traceback, a hang or a text from a changed folder fails. Counts are printed.

Kinds: a flipped bit or a cut in either file; a field of config.json of a wrong type, of an extreme or of another valid
value, without the checksum, with the checksum renewed (as a stranger's program would), and in an older export, which
has none; deep nesting; files that are missing, renamed, empty, folders, pipes or another export's.
"""
import json
import os
import random
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch

import generate
import train_gpt
from train_gpt import Config

TINY = dict(vocab_size=257, layers=2, model_dim=16, heads=2, head_dim=8, mlp_hidden=16, sequence_length=16,
            batch_tokens=64)
ALONE = train_gpt.Ranks(0, 1, torch.device("cpu"), torch.float32)
VALUES = (None, True, "x", "", "[]", [], {}, [[1]], -1, 0, 1, 3, 2 ** 31, 2 ** 63, 10 ** 400, 0.5, -1e308, 1e-320, [0],
          [-5], [3, 4], ["x"], ["swiglu_mlp"], ["swiglu_mlp:layers=0-9"], "x" * 5000, "\ud800", "\0", [2 ** 40], 4096)
LIMIT = 20  # seconds of processor time, of one command


def write_export(folder: Path, seed: int):
    config = Config(**TINY, seed=seed)
    saved = dict(model=train_gpt.build_model(config, ALONE).state_dict(), sources={"train_gpt": "0" * 64})
    generate.export(saved, config, folder, Path("run.pt"), folder.parent)


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> Path:
    """Two exports, whole and other, and the first as it was written before there were checksums: old."""
    root = tmp_path_factory.mktemp("exports")
    for seed, name in enumerate(("whole", "other")):
        write_export(root / name, seed)
    shutil.copytree(root / "whole", root / "old")
    settings = json.loads((root / "whole/config.json").read_text())
    (root / "old/config.json").write_text(json.dumps({name: settings[name] for name in ("format", "config")}))
    return root


def flip_bit(path: Path, rng: random.Random):
    """One bit of a file, in its first 1,500 bytes as often as anywhere."""
    content = bytearray(path.read_bytes())
    end = rng.choice([len(content), min(len(content), 1500)])
    content[rng.randrange(end)] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random):
    content = path.read_bytes()
    path.write_bytes(content[:rng.randrange(len(content))])


def nest(path: Path, rng: random.Random):
    """The whole file, a field more or a field's value, nested deeply."""
    depth, text = rng.choice([300, 900, 3000, 100_000]), path.read_text()
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}")])
    nested = opening * depth + "1" + closing * depth
    more = text.replace('"config":', f'"more": {nested}, "config":')
    path.write_text(rng.choice([nested, more, text.replace("false", nested, 1)]))


def change_field(path: Path, rng: random.Random, renew: bool = False):
    """Another value for one field, or no such field, or one more; renew: with a checksum in order."""
    settings = json.loads(path.read_text())
    owner = settings["config"] if rng.random() < 0.7 else settings
    name, value = rng.choice([*owner, "wings"]), rng.choice(VALUES)
    if name in owner and rng.random() < 0.1:
        del owner[name]
    else:
        owner[name] = "another" if name in owner and owner[name] == value else value
    if renew:
        contents = {key: value for key, value in settings.items() if key != "sha256"}
        settings["sha256"] = train_gpt.digest_of(contents)
    path.write_text(json.dumps(settings))


def replace_file(path: Path, rng: random.Random):
    """Another thing under a file's name."""
    kind = rng.choice(["missing", "renamed", "empty", "folder", "pipe", "other", "endless", "broken link"])
    if kind == "renamed":
        path.rename(path.with_name("x" + path.name))
    elif kind == "other":
        shutil.copy(path.parent.parent / "other" / path.name, path)
    else:
        path.unlink()
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "broken link":
        path.symlink_to("nowhere")


def add_tokenizer(path: Path, rng: random.Random):
    path.with_name(rng.choice(["a.tiktoken", "meta.json"])).write_text(rng.choice(["", "{}", "YQ== 0\n"]))


KINDS = dict(flip_bit=flip_bit, cut=cut, nest=nest, change_field=change_field, replace_file=replace_file,
             add_tokenizer=add_tokenizer, renew_checksum=lambda path, rng: change_field(path, rng, renew=True))
OLD = ("flip_bit", "cut", "nest", "change_field", "replace_file")  # tried on the export without checksums too
IN_SETTINGS = ("nest", "change_field", "renew_checksum")           # for config.json only


class Hang(BaseException):
    """A command took too long; no handler of it takes this for a fault of the input."""


def stop(*_):
    raise Hang


def outcome_of(folder: Path, data: Path, old: bool, capsys) -> str:
    """What generate.py makes of a folder."""
    command = ["--checkpoint", folder, "--prompt", "a", "--tokens", 2, "--temperature", 0, "--data", data]
    before = dict(vars(train_gpt))
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    try:
        code = generate.main([str(word) for word in command])
    except Hang:
        return "hung"
    except Exception as error:
        return f"traceback {type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        for name, value in before.items():
            setattr(train_gpt, name, value)
    out, error = capsys.readouterr()
    if code == 1 and not out and error.startswith("generate.py: error: ") and error.count("\n") == 1:
        return "refused"
    noted = old and code == 0 and error.startswith(f"warning: {folder} is an older export")
    return "accepted, noted" if noted else f"accepted with {code}: {error[:300]!r}"


def try_mutation(root: Path, number: int, capsys) -> tuple[str, str]:
    """(kind, outcome) of one seeded mutation."""
    rng, kinds = random.Random(number), [*KINDS, *(f"old {kind}" for kind in OLD)]
    kind = kinds[number % len(kinds)]
    old, name = kind.startswith("old "), kind.removeprefix("old ")
    source, folder = root / ("old" if old else "whole"), root / f"mutated{number}"
    shutil.copytree(source, folder)
    file = "config.json" if name in IN_SETTINGS else rng.choice(["config.json", "model.safetensors"])
    KINDS[name](folder / file, rng)
    outcome = outcome_of(folder, source, old, capsys)
    shutil.rmtree(folder)
    return kind, outcome


@pytest.mark.parametrize("count, first", [(60, 0), pytest.param(300, 1000, marks=pytest.mark.slow)])
def test_mutated_exports(exports, capsys, count, first):
    before = signal.signal(signal.SIGPROF, stop)
    try:
        outcomes = Counter(try_mutation(exports, number, capsys) for number in range(first, first + count))
    finally:
        signal.signal(signal.SIGPROF, before)

    # with its checksum renewed, or in an older export (which is noted), another valid value makes another valid export
    numbers = dict.fromkeys(("refused", "other valid exports", "tracebacks", "hung", "silently accepted"), 0)
    faults = []
    for (kind, outcome), n in outcomes.items():
        if outcome == "refused":
            numbers["refused"] += n
        elif outcome == "accepted, noted" or kind == "renew_checksum" and outcome.startswith("accepted with 0"):
            numbers["other valid exports"] += n
        else:
            faults.append((kind, outcome))
            title = {"traceback": "tracebacks", "hung": "hung"}.get(outcome.split()[0], "silently accepted")
            numbers[title] += n
    with capsys.disabled():
        print(f"\n{count} mutated exports: {', '.join(f'{n} {title}' for title, n in numbers.items())}")
    assert not faults and numbers["refused"] >= 0.8 * count


def test_the_unchanged_exports_load(exports, capsys):
    """What is refused above is refused for its change."""
    for name in ("whole", "other", "old"):
        assert generate.main(["--checkpoint", str(exports / name), "--prompt", "a", "--tokens", "2"]) == 0
        assert capsys.readouterr().err.count("\n") == 2  # a warning and the time
