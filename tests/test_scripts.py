"""What all scripts have in common: options without a meaning are one line; any folder, locale and console."""
import json
import os
import runpy
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest

from data import cached_fineweb10B, local_corpus, manifold, tokenize_text
from data.command_line import run_script
from data.shards import check_folder, write_folder
from studies import ngram_loss
from tasks import recall, skills, symbolic_language
from train_gpt import RunError, open_shard

ROOT = Path(manifold.__file__).parents[1]
SCRIPTS = {module.__name__.rpartition(".")[2]: module for module in (
    cached_fineweb10B, local_corpus, manifold, ngram_loss, recall, skills, symbolic_language, tokenize_text)}
HUGE = str(10 ** 30)
LONG = "x" * 300  # longer than a file's name may be
TOKENIZE = "tokenize_text text.txt -o out --tokenizer bytes"
CORPUS = "manifold corpus shards -o a.npz --min_count 1 --features 4"
MAKE = "symbolic_language make -o out --count 5 --val_count 5 --test_count 2"


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder to work in, with a text and shards of it."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("some text\n" * 100, encoding="utf-8")
    tokens = np.random.default_rng(0).integers(0, 20, 2000)
    documents = [(split, tokens, len(tokens), True) for split in ("train", "val")]
    write_folder(tmp_path / "shards", "a", documents, end_of_text=256, tokenizer="bytes")
    return tmp_path


@pytest.mark.parametrize("command, message", [
    (f"{TOKENIZE} --val_fraction nan", "--val_fraction must lie between 0 and 1, got nan"),
    (f"{TOKENIZE} --val_fraction=-inf", "--val_fraction must lie between 0 and 1, got -inf"),
    (f"{TOKENIZE} --val_fraction 1e400", "--val_fraction must lie between 0 and 1, got inf"),
    (f"{TOKENIZE} --shard_tokens {HUGE}", "less than 2^31, as its header counts them"),
    (f"{TOKENIZE} --shard_tokens -1", "a shard holds at least 1 token"),
    (f"{TOKENIZE} --name {LONG}", "use up to 200 letters"),
    (f"{TOKENIZE} --name ../escape", "use up to 200 letters"),
    (f"{TOKENIZE} --name val", "the words train and val name the splits"),
    (f"{TOKENIZE} -o {LONG}", "File name too long"),
    (f"{TOKENIZE} -o text.txt", "cannot write to text.txt"),
    (f"{TOKENIZE} -o /dev/null/x", "cannot write to /dev/null/x"),
    (f"{TOKENIZE} --tokenizer {LONG}", "File name too long"),
    (f"{TOKENIZE} --tokenizer shards", "cannot read shards: Is a directory"),
    (f"{TOKENIZE} --tokenizer /dev/zero", "more than 67,108,864 bytes"),
    (f"tokenize_text {LONG} -o out --tokenizer bytes", "File name too long"),
    (f"tokenize_text {LONG}/{LONG} -o out --tokenizer bytes", "File name too long"),
    (f"cached_fineweb10B {HUGE} -o out", "1 to 103 training shards"),
    ("cached_fineweb10B 0 -o out", "1 to 103 training shards"),
    (f"cached_fineweb10B 1 -o {LONG}", "File name too long"),
    ("ngram_loss shards --train_tokens -1", "--train_tokens must be from 1 to"),
    (f"ngram_loss shards --val_tokens {HUGE}", "--val_tokens must be from 1 to"),
    (f"ngram_loss {LONG}", "File name too long"),
    (f"{CORPUS} --features {HUGE}", "--features must be from 2 to 4,096"),
    (f"{CORPUS} --window {HUGE}", "--window must be from 1 to 10,000"),
    (f"{CORPUS} --vocabulary {HUGE}", "--vocabulary must be from 1 to 65,536"),
    (f"{CORPUS} --min_count {HUGE}", "--min_count must be from 1 to"),
    (f"{CORPUS} --tokens 0", "--tokens must be at least 1, got 0"),
    (f"{CORPUS} --seed -1", "--seed must be from 0 to"),
    (f"{CORPUS} --eps nan", "--eps must be above 0, got nan"),
    (f"{CORPUS} --eps inf", "--eps must be from 0 to"),
    (f"{CORPUS} --k {HUGE}", "--k must be from 0 to"),
    (f"{CORPUS} --topk 0", "--topk must be above 0, got 0"),
    (f"{CORPUS} --p 1e308", "--p must be from 0 to 100"),
    (f"{CORPUS} --sigma 1e-300", "has the weight 0; raise --sigma or lower --p"),
    (f"{CORPUS} --tau percentile --percentile nan", "--percentile must lie between 0 and 100, got nan"),
    (f"{CORPUS} -o {LONG}", "a file of up to 200 letters"),
    (f"{CORPUS} -o shards", "cannot write shards"),
    ("manifold chain -o a.npz --features 100000", "--features must be from 2 to 4,096"),
    ("manifold chain -o a.npz --features -1", "--features must be at least 2, got -1"),
    ("manifold random text.txt -o a.npz", "text.txt cannot be read"),
    ("manifold random text.txt -o a.npz --seed -1", "--seed must be from 0 to"),
    ("manifold checkpoint text.txt -o a.npz", "text.txt is not a whole checkpoint"),
    (f"manifold checkpoint text.txt -o a.npz --tokens {HUGE}", "--tokens must be from 1 to"),
    (f"recall make -o out --pairs {HUGE}", "--pairs must lie between 1 and --keys 64"),
    (f"recall make -o out --values {HUGE}", "shards hold at most 65536"),
    (f"recall make -o out --keys {HUGE}", "shards hold at most 65536"),
    (f"recall make -o out --sequence_length {HUGE}", "--sequence_length must be from 2 to"),
    (f"recall make -o out --count {HUGE}", "these sequences need"),
    ("recall make -o out --count -1", "the number of sequences must be at least 1, got -1"),
    ("recall make -o out --count 5 --val_count -1", "the number of sequences must be at least 1, got -1"),
    ("recall make -o out --seed -1", "--seed must be from 0 to"),
    (f"recall make -o {LONG}", "File name too long"),
    ("recall evaluate --checkpoint text.txt", "text.txt is not a whole checkpoint"),
    (f"skills baseline --jobs {HUGE}", "--jobs must be from 1 to"),
    ("skills baseline --jobs 0", "--jobs must be from 1 to"),
    ("skills baseline -o text.txt", "cannot use text.txt"),
    (f"skills baseline -o {LONG}", "File name too long"),
    ("skills no_such_variant", "unknown variant 'no_such_variant'"),
    ("skills text.txt", "text.txt is not a whole checkpoint"),
    (f"{MAKE} --digits {HUGE}", "--digits must be from 1 to 500"),
    (f"{MAKE} --digits 500", "raise --sequence_length, or lower --digits"),
    (f"{MAKE} --depth {HUGE}", "leaves too few names for chain"),
    (f"{MAKE} --depth -1", "--digits and --depth must be at least 1"),
    (f"{MAKE} --sequence_length {HUGE}", "--sequence_length must be from 2 to"),
    (f"{MAKE} --count {HUGE}", "--count must be from 1 to"),
    (f"{MAKE} --count 1000000000000", "these problems, the shortest there are, need"),
    (f"{MAKE} --val_count 0", "--val_count must be at least 1, got 0"),
    (f"{MAKE} --test_count {HUGE}", "--test_count must be from 1 to 1,000,000"),
    (f"{MAKE} --seed -1", "--seed must be from 0 to"),
    (f"{MAKE} --families add,add", "each once; got 'add,add'"),
    (f"{MAKE} -o {LONG}", "File name too long"),
    ("symbolic_language show --count -1", "--count must be from 1 to"),
    (f"symbolic_language show --digits {HUGE}", "--digits must be from 1 to 500"),
    (f"symbolic_language check {LONG}", "cannot read"),
    ("symbolic_language check shards/a_train_000000.bin", "cannot read shards/a_train_000000.bin (UnicodeDecodeError)"),
    ("symbolic_language evaluate --checkpoint text.txt", "text.txt is not a whole checkpoint"),
], ids=lambda value: value.replace(LONG, "LONG").replace(HUGE, "HUGE"))
def test_options_without_a_meaning(files, capsys, command, message):
    """One line, quickly enough to have allocated nothing, and nothing written."""
    name, *argv = command.split()
    before = sorted(files.rglob("*"))
    tracemalloc.start()
    try:
        assert SCRIPTS[name].main(argv) == 1
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    error = capsys.readouterr().err
    assert error.startswith(f"{name}.py: error: ") and error.count("\n") == 1 and message in error
    assert most < 2 ** 28
    assert set(sorted(files.rglob("*"))) - set(before) <= {files / "out"}  # an empty folder


@pytest.mark.parametrize("command, end_of_text", [
    (TOKENIZE, 256), ("recall make -o out --count 3 --val_count 3", 129), (MAKE, 319)])
def test_documents_begin_with_the_token_that_meta_json_names(files, command, end_of_text):
    name, *argv = command.split()
    assert SCRIPTS[name].main(argv) == 0
    meta = json.loads((files / "out" / "meta.json").read_text(encoding="utf-8"))
    assert meta["end_of_text"] == end_of_text == meta["vocab_size"] - 1
    for split in ("train", "val"):
        shard, = (files / "out").glob(f"*_{split}_000000.bin")
        tokens = open_shard(shard)
        assert tokens[0] == end_of_text and np.count_nonzero(tokens == end_of_text) == meta[split]["documents"]
    check_folder(files / "out")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_as_modules(tmp_path, monkeypatch, capsys, name):
    """python -m data.NAME, or what folder it is in, from another folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(SCRIPTS[name].__name__, run_name="__main__", alter_sys=True)
    assert end.value.code == 0 and capsys.readouterr().out.startswith(f"usage: {name}.py")


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_without_docstrings(monkeypatch, capsys, name):
    """As under PYTHONOPTIMIZE=2: __doc__ is None."""
    path = Path(SCRIPTS[name].__file__)
    module = types.ModuleType(f"stripped_{name}")
    module.__file__ = str(path)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec", optimize=2), vars(module))
    assert module.__doc__ is None
    try:
        code = module.main(["--help"])
    except SystemExit as end:  # of a parser that stands before the script's work
        code = end.code
    assert code == 0 and capsys.readouterr().out.startswith(f"usage: {name}.py")


def test_a_locale_without_utf8(tmp_path):
    """Accents in names and texts, where the console knows ASCII only. As a module, from another folder."""
    folder = tmp_path / "na\u00efve"
    folder.mkdir()
    lines = [json.dumps(dict(text=text), ensure_ascii=False) + "\n" for text in ("caf\u00e9", "the")]
    (folder / "\u00e9.jsonl").write_text("".join(lines), encoding="utf-8")
    environment = os.environ | dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-m", "data.tokenize_text", folder, "-o", folder / "out", "--tokenizer", "bytes"]
    run = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0 and run.stdout.count(b"\n") == 1 and run.stderr == b""
    assert json.loads((folder / "out" / "meta.json").read_text(encoding="utf-8"))["vocab_size"] == 257


def test_a_console_that_is_closed():
    """As by head: the script ends without a word, with the exit code of a program that SIGPIPE ended."""
    program = ("from data.command_line import run_script\n"
               "raise SystemExit(run_script('a.py', lambda: [print('a line of many') for _ in range(100_000)] and 3))")
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert run.stdout.readline()
    run.stdout.close()
    assert run.stderr.read() == b"" and run.wait() == 141


@pytest.mark.parametrize("fault, code, line", [
    (None, 0, ""), (RunError("one\ntwo"), 1, "error: one two"), (KeyboardInterrupt(), 130, "interrupted"),
    (PermissionError(13, "Permission denied", "x.txt"), 1,
     "error: x.txt cannot be used: Permission denied; check its name and its rights, or give another"),
    (MemoryError("Unable to allocate 80 GiB"), 1,
     "error: this machine has too little memory for that (Unable to allocate 80 GiB); ask for less")])
def test_how_a_script_ends(capsys, fault, code, line):
    def work():
        if fault:
            raise fault
    assert run_script("a.py", work) == code
    assert capsys.readouterr().err == (f"a.py: {line}\n" if line else "")


def test_other_faults_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_script("a.py", lambda: 1 / 0)
