"""
Exported folders with faults, drawn from a seed: 60 by default, 300 with -m slow. Each is given to generate.py, which answers with
one line and exit code 1; a traceback, a hang or a text from a changed folder fails. Counts are printed (pytest -s).

Kinds: a flipped bit or a cut in either file; a field of config.json of a wrong type, of an extreme or of another valid value,
without the checksum, with the checksum renewed (as a stranger's program would), and in an older export, which has none; deep
nesting; files that are missing, renamed, empty, folders, pipes or another export's.
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

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = dict(vocab_size=257, layers=2, model_dim=16, heads=2, head_dim=8, mlp_hidden=16, sequence_length=16, batch_tokens=64)
ALONE = train_gpt.Ranks(0, 1, torch.device("cpu"), torch.float32)
VALUES = (None, True, "x", "", "[]", [], {}, [[1]], -1, 0, 1, 3, 2 ** 31, 2 ** 63, 10 ** 400, 0.5, -1e308, 1e-320, [0], [-5], [3, 4], ["x"],
          ["swiglu_mlp"], ["swiglu_mlp:layers=0-9"], "x" * 5000, "\ud800", "\0", [2 ** 40], 4096)
LIMIT = 20  # seconds of processor time, of one command


def write_export(folder: Path, seed: int):
    config = Config(**TINY, seed=seed)
    model = train_gpt.build_model(config, ALONE)
    generate.export(dict(model=model.state_dict(), sources={"train_gpt": "0" * 64}), config, folder, Path("run.pt"), folder.parent)


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
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content)) if rng.random() < 0.5 else rng.randrange(min(len(content), 1500))  # the head as often as all
    content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random):
    content = path.read_bytes()
    path.write_bytes(content[:rng.randrange(len(content))])


def nest(path: Path, rng: random.Random):
    depth = rng.choice([300, 900, 3000, 100_000])
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}")])
    nested = opening * depth + "1" + closing * depth
    text = path.read_text()
    path.write_text(rng.choice([nested, text.replace('"config":', f'"more": {nested}, "config":'), text.replace("false", nested, 1)]))


def change_field(path: Path, rng: random.Random, renew: bool = False):
    """Another value for one field, or no such field, or one more; renew: with a checksum in order."""
    settings = json.loads(path.read_text())
    owner = settings["config"] if rng.random() < 0.7 else settings
    name = rng.choice([*owner, "wings"])
    if name in owner and rng.random() < 0.1:
        del owner[name]
    else:
        value = rng.choice(VALUES)
        owner[name] = value if owner.get(name) is not value or name not in owner else "another"
    if renew:
        settings["sha256"] = generate.digest_of({key: value for key, value in settings.items() if key != "sha256"})
    path.write_text(json.dumps(settings))


def replace_file(path: Path, rng: random.Random):
    kind = rng.choice(["missing", "renamed", "empty", "folder", "pipe", "other", "link", "none"])
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
    elif kind == "link":
        path.symlink_to("/dev/zero")
    elif kind == "none":
        path.symlink_to("nowhere")


def add_tokenizer(path: Path, rng: random.Random):
    path.with_name(rng.choice(["a.tiktoken", "meta.json"])).write_text(rng.choice(["", "{}", "YQ== 0\n"]))


KINDS = dict(flip_bit=flip_bit, cut=cut, nest=nest, change_field=change_field, replace_file=replace_file, add_tokenizer=add_tokenizer,
             change_field_and_checksum=lambda path, rng: change_field(path, rng, renew=True))
OLD = ("flip_bit", "cut", "nest", "change_field", "replace_file")  # tried on the export without checksums too


class Hang(BaseException):
    """A command took too long; no handler of it takes this for a fault of the input."""


def stop(*_):
    raise Hang


def try_mutation(root: Path, number: int, capsys) -> tuple[str, str, bool]:
    """(kind, outcome, whether the folder's contents are still those that were exported) of one seeded mutation."""
    rng = random.Random(number)
    kinds = [*KINDS, *(f"old_{kind}" for kind in OLD)]
    kind = kinds[number % len(kinds)]
    source, folder = root / ("old" if kind.startswith("old_") else "whole"), root / f"mutated{number}"
    shutil.copytree(source, folder)
    in_settings = kind.removeprefix("old_") in ("nest", "change_field", "change_field_and_checksum") or rng.random() < 0.5
    KINDS[kind.removeprefix("old_")](folder / ("config.json" if in_settings else "model.safetensors"), rng)
    before = dict(vars(train_gpt))
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    try:
        code = generate.main(["--checkpoint", str(folder), "--prompt", "a", "--tokens", "2", "--temperature", "0", "--data", str(source)])
        out, error = capsys.readouterr()
        lines = error.splitlines()
        if code == 1:
            outcome = "refused" if not out and len(lines) == 1 and lines[0].startswith("generate.py: error: ") else f"said {error[:300]!r}"
        elif kind.startswith("old_"):
            outcome = "accepted, noted" if "an older export" in lines[0] else f"accepted: {error[:300]!r}"
        else:
            outcome = "accepted"
    except Hang:
        outcome = "hung"
    except Exception as error:
        outcome = f"traceback {type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        for name, value in before.items():
            setattr(train_gpt, name, value)
    same = outcome == "accepted" and all((folder / name).is_file() and (folder / name).read_bytes() == (source / name).read_bytes()
                                         for name in ("config.json", "model.safetensors"))
    shutil.rmtree(folder)
    return kind, outcome, same


@pytest.mark.parametrize("count, first", [(60, 0), pytest.param(300, 1000, marks=pytest.mark.slow)])
def test_mutated_exports(exports, capsys, count, first):
    before = signal.signal(signal.SIGPROF, stop)
    outcomes = Counter()
    try:
        for number in range(first, first + count):
            kind, outcome, same = try_mutation(exports, number, capsys)
            outcomes[kind, "unchanged" if same else outcome] += 1
    finally:
        signal.signal(signal.SIGPROF, before)
    # with its checksum renewed, or in an older export, another valid value makes another valid export; the older one is noted
    valid = {("change_field_and_checksum", "accepted"), *((f"old_{kind}", "accepted, noted") for kind in OLD)}
    faults = {key: n for key, n in outcomes.items() if key[1] not in ("refused", "unchanged") and key not in valid}
    numbers = {word: sum(n for (_, outcome), n in outcomes.items() if outcome == word) for word in ("refused", "unchanged")}
    numbers["other valid exports"] = sum(n for key, n in outcomes.items() if key in valid)
    for title, start in {"tracebacks": "traceback", "hung": "hung", "silently accepted": "accepted", "not one line": "said"}.items():
        numbers[title] = sum(n for (_, outcome), n in faults.items() if outcome.startswith(start))
    with capsys.disabled():
        print(f"\n{count} mutated exports: {', '.join(f'{n} {title}' for title, n in numbers.items())}")
    assert not faults
    assert sum(numbers.values()) == count and numbers["refused"] >= 0.8 * count


def test_the_unchanged_exports_load(exports, capsys):
    """What is refused above is refused for its change."""
    for name, lines in (("whole", 2), ("other", 2), ("old", 2)):  # a warning or a note, and the time
        assert generate.main(["--checkpoint", str(exports / name), "--prompt", "a", "--tokens", "2"]) == 0
        assert capsys.readouterr().err.count("\n") == lines
