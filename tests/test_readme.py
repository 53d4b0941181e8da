"""
Every command of the documents runs as it stands: bash takes it, run.sh starts a program, and that program's own parser
takes its arguments. Every link leads somewhere. README.md comes to its first command soon. The slow test runs the
commands of README.md and docs/usage.md in their order, with tiny settings behind them.
"""

import argparse
import dataclasses
import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import compare
import train_gpt
import variants
from data import manifold

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ("README.md", "docs/usage.md")  # what shows a user everything that run.sh has
# Not those of single records, which are as they were written when the record was set.
DOCUMENTS = sorted(path for pattern in ("*.md", "[!.]*/*.md") for path in ROOT.glob(pattern))
COMMAND = re.compile(r"(\./run\.sh|python3?|torchrun|pip|bash|git)(\s|$)")
FIRST_COMMAND = 25  # README.md comes to it within so many lines ...
WORDS_BEFORE = 150  # ... and so many words

# The environment's Python: writes down the last call's words, the program and its arguments.
STAND_IN = """#!/usr/bin/env bash
case "$*" in *device_count* | *TRACKS*) echo 0; exit ;; esac
printf '%s\\0' "$@" >"$CALLS"
"""


def without_fences(text):
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)


def blocks_of(text):
    """(kind, lines) of a text's code blocks; kind is the language of a fenced block, "indented" for an indented one."""
    blocks = []
    for kind, body in re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, re.M | re.S):
        blocks.append((kind, body.splitlines()))
    for body in re.findall(r"(?:(?<=\n\n)|\A)(?: {4}\S.*\n(?: {4}.*\n)*)", without_fences(text)):
        blocks.append(("indented", body.splitlines()))
    return blocks


def commands_of(text):
    """
    The commands of a text, comments included: all lines of its shell blocks and of indented blocks whose first line is
    a command, a line that ends in a backslash with the next one, and inline code that begins with ./run.sh.
    """
    commands = []
    for kind, lines in blocks_of(text):
        if kind in ("bash", "sh", "shell", "console") or kind == "indented" and COMMAND.match(lines[0].strip()):
            joined = "\n".join(line.strip() for line in lines).replace("\\\n", " ")
            commands += [line for line in joined.splitlines() if line and not line.startswith("#")]
    prose = re.sub(r"^ {4}.*$", "", without_fences(text), flags=re.M)
    return commands + [code for code in re.findall(r"`(\./run\.sh[^`]*)`", prose) if "..." not in code]


def code_of(command):
    """A command without its comment."""
    match = re.fullmatch(r"""((?:'[^']*'|"[^"]*"|[^'"])*?)(\s+#.*)?""", command)
    return match[1] if match else command


# The many commands of docs/claims.md are tests/records/test_claims.py's, which starts no shell for each.
CASES = [(str(document.relative_to(ROOT)), command) for document in DOCUMENTS if document.name != "claims.md"
         for command in dict.fromkeys(commands_of(document.read_text()))]


def example_variant(document="README.md"):
    """The name and the text of the variant that a document shows."""
    text = (ROOT / document).read_text()
    code = next(lines for kind, lines in blocks_of(text) if kind == "python")
    return re.search(r"`variants/(\w+)\.py`", text)[1], "\n".join(code) + "\n"


def anchors_of(text):
    """The anchors of a text's headings, as GitHub makes them: a heading that occurs again has a number behind it."""
    anchors = []
    for heading in re.findall(r"^#+ +(.*)", without_fences(text), re.M):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        again = sum(re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", other) is not None for other in anchors)
        anchors.append(f"{anchor}-{again}" if again else anchor)
    return anchors


def broken_links(document):
    """The links of a document, pictures included, that lead to no file of the checkout or to no heading there."""
    text = re.sub(r"`[^`\n]*`", "", without_fences(document.read_text()))
    faults = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        if not target.exists() or anchor and anchor not in anchors_of(target.read_text()):
            faults.append(link)
    return faults


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """What the commands name and the reader would have: the variants, and in the current folder the Laplacian."""
    (tmp_path / "variants").mkdir()
    name, text = example_variant()
    for each in (name, "my_idea"):
        (tmp_path / f"variants/{each}.py").write_text(text)
    monkeypatch.setattr(variants, "__path__", [*variants.__path__, str(tmp_path / "variants")])
    importlib.invalidate_caches()
    monkeypatch.chdir(tmp_path)
    manifold.from_chain(32).save(tmp_path / "bytes.npz")
    yield name
    for each in (name, "my_idea"):
        sys.modules.pop(f"variants.{each}", None)
        vars(variants).pop(each, None)


@pytest.fixture(scope="session")
def scratch(tmp_path_factory):
    """A copy of what run.sh looks at, whose Python writes down its words; `python` is the same one."""
    folder = tmp_path_factory.mktemp("readme") / "checkout"
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / "data/python_bytes").mkdir(parents=True)
    for name in ("run.sh", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    for name in ("data", "tasks", "studies", "benchmarks"):
        (folder / name).mkdir(exist_ok=True)
        for file in (ROOT / name).glob("*.py"):
            shutil.copy(file, folder / name)
    (folder / "data/python_bytes/meta.json").write_text("{}")
    shutil.copy(ROOT / "requirements.txt", folder / ".venv/requirements.installed.txt")
    (folder / ".venv/bin/python").write_text(STAND_IN)
    (folder / ".venv/bin/python").chmod(0o755)
    return folder


def started(command, scratch):
    """The words that Python is called with when bash runs the command in a checkout; [] where no Python is called."""
    calls = scratch.parent / "calls"
    calls.unlink(missing_ok=True)
    environment = {**os.environ, "CALLS": str(calls), "PATH": f"{scratch}/.venv/bin:{os.environ['PATH']}"}
    environment.pop("VENV", None)
    result = subprocess.run(["bash", "-c", command], cwd=scratch, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stderr}"
    return calls.read_text().replace(str(scratch), str(ROOT)).split("\0")[:-1] if calls.exists() else []


class Parsed(BaseException):
    """Ends a program where it has parsed its arguments."""


def parse(words, monkeypatch):
    """Have the program that Python's words name parse its arguments, and no more."""
    program = words[0]
    arguments = words[1:]
    if "-m" in words[:2]:
        module = words.index("-m") + 1
        program = words[module]
        arguments = words[module + 1:]
    if Path(program).name == "train_gpt.py":
        config = train_gpt.parse_config(arguments)
        with variants.applied(config.variant, config), torch.device("meta"):
            train_gpt.GPT(dataclasses.replace(config, vocab_size=257))
    elif Path(program).name == "compare.py":
        plan, options = compare.parse_arguments(arguments)
        arms = ["baseline", plan.add_arm] if plan.add_arm else plan.arms
        are_folders = all(name == "FOLDER" or "/" in name for name in arms)
        assert are_folders or compare.parse_arms(arms, plan.seeds, ["--track", plan.track, *options])
    elif program == "pytest":
        for word in arguments:
            known = word.startswith("-") or word in ("auto", "loadfile", "slow") or (ROOT / word).exists()
            assert known, f"no such test: {word}"
    elif program == "variants":
        assert not arguments  # it takes none
    else:
        run_until_parsed(program, arguments, monkeypatch)


def run_until_parsed(program, arguments, monkeypatch):
    """Run a script or a module up to the point where its parser has taken the arguments."""
    under_way = []  # calls of a parser: the outermost one ends the program

    def ending(original):
        def parse_and_end(*positional, **named):
            under_way.append(positional)
            result = original(*positional, **named)
            under_way.pop()
            if under_way:
                return result
            raise Parsed
        return parse_and_end

    for method in ("parse_args", "parse_known_args"):
        monkeypatch.setattr(argparse.ArgumentParser, method, ending(getattr(argparse.ArgumentParser, method)))
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(Parsed):
        if program.endswith(".py"):
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__")


# ---- The tests --------------------------------------------------------------

@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("document, command", CASES)
def test_a_command_runs_as_it_stands(document, command, examples, scratch, monkeypatch):
    code = code_of(command)
    assert subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True).stderr == ""
    assert COMMAND.match(code), f"no command, and no comment: {command}"
    assert "  " not in re.sub(r"'[^']*'|\"[^\"]*\"", "_", code), f"words behind a command without a #: {command}"

    words = started(command, scratch)
    if not words:
        assert code == "./run.sh help"
        return
    try:
        parse(words, monkeypatch)
    except SystemExit as end:  # argparse's, after its message or its help
        assert end.code == 0 and "--help" in words


def test_every_verb_is_shown():
    """Whatever run.sh has for a user stands in the guide, but for the way to everything else, python."""
    usage = subprocess.run(["bash", ROOT / "run.sh", "help"], capture_output=True, text=True, check=True).stdout
    verbs = set(re.findall(r"^  ([a-z]+) ", usage, re.M))
    commands = [shlex.split(code_of(command)) for document, command in CASES if document in GUIDE]
    assert verbs - {"python"} <= {words[1] for words in commands if len(words) > 1}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    assert broken_links(document) == []


def test_the_first_command_comes_soon():
    before, command, _ = (ROOT / "README.md").read_text().partition("    ./run.sh")
    assert command and before.count("\n") < FIRST_COMMAND and len(before.split()) <= WORDS_BEFORE


def test_one_example_is_shown():
    """README.md and variants/README.md show the same variant."""
    assert example_variant("README.md") == example_variant("variants/README.md")


def test_the_readmes_variant_is_a_variant(examples):
    """Its patch applies, its exponents stand in every layer and learn, and no token changes an earlier one's logits."""
    config = train_gpt.make_config(dict(vocab_size=257, layers=2, model_dim=32, heads=2, head_dim=16, mlp_hidden=64,
                                        sequence_length=16, batch_tokens=64, device="cpu"))
    with variants.applied((f"{examples}:start=1.5",), config) as changed:
        assert sum(changed.values(), []) == ["MLP"]
        model = train_gpt.build_model(config, train_gpt.Ranks(0, 1, torch.device("cpu"), torch.float32))
    exponents = [p for name, p in model.named_parameters() if name.endswith("exponent")]
    assert len(exponents) == 2 and all((p == 1.5).all() for p in exponents)

    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    model.set_windows(0.0)
    tokens = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    assert all(p.grad.any() for p in exponents)
    other = tokens.clone()
    other[:, 9:] = 7
    assert torch.equal(model(tokens[:, :-1])[:, :9], model(other[:, :-1])[:, :9])


def test_the_readmes_laplacian_fits_the_default_track():
    """As many features as a head of the track has channels; the run that is shown gives no --head_dim."""
    text = (ROOT / "docs/usage.md").read_text()
    features = re.search(r"run.sh data manifold corpus .* --features (\d+)", text)[1]
    assert int(features) == train_gpt.parse_config([]).head_dim


@pytest.mark.parametrize("text, expected", [
    ("Words.\n\n    ./run.sh a   # b\n    ./run.sh c\n\nMore `./run.sh d e` and `x`.\n",
     ["./run.sh a   # b", "./run.sh c", "./run.sh d e"]),
    ("Words.\n\n    train_gpt.py   the trainer\n    run.sh   sets up\n\n", []),
    ("Words.\n\n```bash\n# a comment\n./run.sh a \\\n   b\n```\n", ["./run.sh a  b"]),
    ("Words.\n\n```python\npython = 3\n```\n", []),
    ("Words.\n\n    ./run.sh a\n        prose\n\n", ["./run.sh a", "prose"]),
])
def test_commands_are_found(text, expected):
    assert commands_of(text) == expected


def test_broken_links_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# A `title`, twice\n\n## A title, twice\n")
    links = ("other.md", "other.md#a-title-twice", "other.md#a-title-twice-1", "#here", "https://example.org",
             "none.md", "other.md#a-title-twice-2", "#there")
    (tmp_path / "page.md").write_text("# Here\n\n" + " ".join(f"[x]({link})" for link in links) + " `[x](y)`\n")
    assert broken_links(tmp_path / "page.md") == list(links[-3:])


@pytest.mark.parametrize("command", [
    "./run.sh            sets up once (virtual environment, pinned packages)",
    "./run.sh compare baseline my_mlp --seeds 6        equal tokens",
    "./run.sh compare baseline my_mlp --seeds 6 equal tokens",
    "./run.sh compare --add-arm no_such_variant FOLDER",
    "./run.sh data tokenize_text book.txt -o data/book   your own text",
    "./run.sh task recall make --no-such-option 3",
    "./run.sh generate --checkpoint a.pt --top-k many",
    "./run.sh --variant no_such_variant",
    "./run.sh --variant topological_attention:laplacian=domain:bytes.npz --head_dim 64",
    "./run.sh tarin --steps 3",
    "./run.sh board stats",
    "./run.sh test tests/no_such_folder",
    "prose in a block of commands",
])
def test_a_command_that_does_not_run_is_found(command, examples, scratch, monkeypatch):
    with pytest.raises((AssertionError, SystemExit, train_gpt.RunError)):
        test_a_command_runs_as_it_stands("README.md", command, examples, scratch, monkeypatch)


# ---- In earnest -------------------------------------------------------------

STEPS = "--steps 3 --val_tokens 2048 --val_every 0 --device cpu"
TINY = {  # what is set behind a command: the longest beginning that fits decides; None: not run here
    "./run.sh": STEPS,
    "./run.sh test": None,                                   # this
    "./run.sh help": "",
    "./run.sh train --help": "",
    "./run.sh --track": None,                                # needs FineWeb from the Hub
    "./run.sh --dry-run": STEPS,
    "./run.sh --variant topological_attention:laplacian": f"{STEPS} --run_id RUN",
    "./run.sh compare": f"--seeds 2 -- {STEPS}",
    "./run.sh compare baseline my_mlp": f"--seeds 2 -o FOLDER -- {STEPS}",
    "./run.sh compare baseline my_mlp --until-decided": f"--max-seeds 5 -- {STEPS}",
    "./run.sh compare baseline my_mlp --seeds 6 --budget time": f"--seeds 2 -- {STEPS}",
    "./run.sh compare baseline my_mlp --dry-run": f"-- {STEPS}",
    "./run.sh compare baseline my_mlp --json": f"--seeds 2 -- {STEPS}",
    "./run.sh compare baseline my_mlp --ledger": f"--seeds 2 -- {STEPS}",
    "./run.sh compare --add-arm": "",
    "./run.sh compare FOLDER": "",
    "./run.sh compare logs/": None,                          # the reader's own folders
    './run.sh compare baseline "my_mlp': STEPS,              # has a -- already
    "./run.sh check": "",
    "./run.sh variants": "",
    "./run.sh skills": None,                                 # minutes
    "./run.sh runs": "",
    "./run.sh clean": "--yes",
    "./run.sh generate": "--tokens 8",
    "./run.sh visualize": "",
    "./run.sh board": "",
    './run.sh board add FOLDER --name MyIdea --track cpu --what "what is new': None,  # tiny runs set no record
    "./run.sh data local_corpus": "",
    "./run.sh data cached_fineweb10B": None,                 # from the Hub
    "./run.sh data tokenize_text": "--tokenizer bytes",      # GPT-2's is from the Hub
    "./run.sh data tokenize_text shards:": None,             # the reader's English text
    "./run.sh data mixed_corpus": None,
    "./run.sh study ngram_loss": "",
    "./run.sh study parameter_golf": "",
    "./run.sh study depth_ladder": "",
    "./run.sh study corpora": None,
    "./run.sh bench": None,                                  # runs a kernel's tests first; minutes
    "./run.sh task recall make": "--count 200 --val_count 50",
    "./run.sh task recall --help": "",
    "./run.sh task symbolic_language": "--count 200 --val_count 50 --test_count 10",
    "./run.sh data manifold": "--tokens 300000",
}


@pytest.mark.slow
def test_the_guide_from_beginning_to_end(tmp_path):
    """All commands of README.md and docs/usage.md in a copy of the checkout, in their order."""
    folder = tmp_path / "checkout"
    left_out = shutil.ignore_patterns(".*", "logs", "comparisons", "__pycache__", "*.bin")
    shutil.copytree(ROOT, folder, ignore=left_out)
    name, text = example_variant()
    (folder / f"variants/{name}.py").write_text(text)
    (folder / "book.txt").write_text((ROOT / "docs/usage.md").read_text() * 40)
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / ".venv/bin/python").chmod(0o755)
    shutil.copy(ROOT / "requirements.txt", folder / ".venv/requirements.installed.txt")

    environment = {name: value for name, value in os.environ.items() if name not in ("VENV", "PYTHONPATH")}
    faults, count = [], 0
    shown = [code_of(command) for page in GUIDE for document, command in CASES if document == page]
    for command in dict.fromkeys(shown):
        behind = TINY[max((start for start in TINY if command.startswith(start)), key=len)]
        if behind is None:
            continue
        tiny = f"{command} {behind}".strip()
        result = subprocess.run(["bash", "-c", tiny], cwd=folder, env=environment, capture_output=True, text=True)
        count += 1
        if result.returncode != 0 or "Traceback" in result.stderr:
            faults.append(f"{tiny}\n{result.stdout[-500:]}{result.stderr[-2000:]}")
    assert not faults, "\n\n".join(faults)
    assert count > 20
