"""Text in, the same text out of the shards; the split; every kind of input; every fault's one line."""
import gzip
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data import tokenize_text
from data.tokenize_text import main, pieces
from data.tokenizer import build_encoder, write_merges
from tests.loading import run_module
from train_gpt import Config, TokenLoader, open_shard, read_merges, token_bytes, validation_batches

ROOT = Path(tokenize_text.__file__).parent.parent
SCRIPT = [sys.executable, "-m", "data.tokenize_text"]
GPT2 = ROOT.parent / "shared" / "corpus" / "gpt2.tiktoken"
TEXTS = [f"The {word} of the inn.\n\nIt's line {i}, 中文 é 🙂 <|endoftext|>\r\n\tend " + "the " * (i % 9)
         for i, word in enumerate("sea sky sun rain wind".split() * 60)]


def jsonl(path: Path, texts, field="text") -> Path:
    path.write_text("".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)))
    return path


def decoded(folder: Path, split: str) -> list[bytes]:
    """The documents of a split as bytes, from the shards and the folder's own merges."""
    meta = json.loads((folder / "meta.json").read_text())
    tokens, end = np.concatenate([open_shard(path)
                                  for path in sorted(folder.glob(f"*_{split}_*.bin"))]), meta["vocab_size"] - 1
    assert tokens[0] == end and tokens.max() == end
    merges = {bytes([b]): b for b in range(256)} if end == 256 else read_merges(next(folder.glob("*.tiktoken")))
    text_of = {i: token for token, i in merges.items()}
    return [b"".join(text_of[i] for i in part[1:].tolist())
            for part in np.split(tokens, np.flatnonzero(tokens == end)[1:])]


def goes_to_val(text: str, val_fraction: float) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < val_fraction * 2 ** 64


def fault(capsys, *argv) -> str:
    """The one line of a command line that must fail."""
    assert main([str(part) for part in argv]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("tokenize_text.py: error: ")
    return error


@pytest.mark.parametrize("tokenizer", ["bytes", "tiny", "gpt2"])
def test_every_document_comes_back(tmp_path, tiny_tiktoken, tokenizer):
    if tokenizer == "gpt2" and not GPT2.exists():
        pytest.skip("GPT-2's merges are not here")
    source, out = jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out"
    tokenizer = {"bytes": "bytes", "tiny": tiny_tiktoken, "gpt2": GPT2}[tokenizer]
    assert main([str(source), "-o", str(out), "--tokenizer", str(tokenizer), "--val_fraction", "0.2", "--name", "a",
                 "--shard_tokens", "3000"]) == 0
    meta = json.loads((out / "meta.json").read_text())
    chosen = {split: [text for text in TEXTS if goes_to_val(text, 0.2) == (split == "val")]
              for split in ("train", "val")}
    for split, texts in chosen.items():
        assert sorted(decoded(out, split)) == sorted(text.encode() for text in texts)
        assert meta[split]["utf8_bytes"] == sum(len(text.encode()) for text in texts)
        assert meta[split]["documents"] == len(texts)
        sizes = token_bytes(Config(data=str(out), vocab_size=meta["vocab_size"]))
        tokens = np.concatenate([open_shard(path) for path in sorted(out.glob(f"*_{split}_*.bin"))])
        # the trainer's bits per byte rest on this
        assert len(tokens) == meta[split]["tokens"] and sizes[tokens].sum() == meta[split]["utf8_bytes"]
    assert 30 < len(chosen["val"]) < 90 and len(list(out.glob("a_train_*.bin"))) > 2
    assert meta["vocab_size"] == {"bytes": 257, "tiny.tiktoken": 262, "gpt2.tiktoken": 50257}[meta["tokenizer"]]
    assert meta["sources"] == [str(source)]


def test_gpt2_by_known_tokens(tmp_path):
    if not GPT2.exists():
        pytest.skip("GPT-2's merges are not here")
    jsonl(tmp_path / "a.jsonl", ["Hello world", "<|endoftext|>"])
    assert main([str(tmp_path / "a.jsonl"), "-o", str(tmp_path / "out"), "--tokenizer", str(GPT2)]) == 0
    documents = {tuple(open_shard(path).tolist()) for path in (tmp_path / "out").glob("*.bin")}
    # a special token in the text stays text
    assert documents == {(50256, 15496, 995), (50256, 27, 91, 437, 1659, 5239, 91, 29)}


def test_gpt2_by_tiktoken(tmp_path, tiny_merges, monkeypatch):
    import tiktoken
    asked = []
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: asked.append(name)
                        or type("Encoding", (), dict(_mergeable_ranks=tiny_merges)))
    assert main([str(jsonl(tmp_path / "a.jsonl", TEXTS)), "-o", str(tmp_path / "out")]) == 0
    assert asked == ["gpt2"] and json.loads((tmp_path / "out" / "meta.json").read_text())["tokenizer"] == "gpt2"
    assert sorted(decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val")) == sorted(
        text.encode() for text in TEXTS)


def test_the_trainer_opens_the_folder(tmp_path, tiny_tiktoken):
    jsonl(tmp_path / "a.jsonl", TEXTS)
    assert main([str(tmp_path / "a.jsonl"), "-o", str(tmp_path / "out"), "--tokenizer", str(tiny_tiktoken),
                 "--val_fraction", "0.2"]) == 0
    config = Config(data=str(tmp_path / "out"), vocab_size=262, sequence_length=64, batch_tokens=256, val_tokens=640)
    assert TokenLoader(config).next_batch()[0].shape == (4, 65) and validation_batches(config)[0].shape[-1] == 65


def test_the_split_depends_on_the_document_alone(tmp_path):
    def split_of(texts, folder):
        assert main([str(jsonl(tmp_path / "a.jsonl", texts)), "-o", str(tmp_path / folder), "--tokenizer", "bytes",
                     "--val_fraction", "0.1"]) == 0
        return set(decoded(tmp_path / folder, "train")), set(decoded(tmp_path / folder, "val"))
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    train, val = split_of(TEXTS, "one")
    assert split_of(shuffled, "two") == (train, val) and val and not train & val
    fewer = split_of(TEXTS[:100], "three")
    assert fewer[0] <= train and fewer[1] <= val


@pytest.mark.parametrize("texts", [["a", "b"], ["c", "b", "a"], ["x", "y", "x2", "y2", "z"]])
def test_few_documents_still_validate(tmp_path, texts):
    """
    With so small a fraction no hash is low enough: the document with the lowest goes to validation, whatever the order.
    """
    lowest = min(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    for order in (texts, texts[::-1]):
        assert main([str(jsonl(tmp_path / "a.jsonl", order)), "-o", str(tmp_path / "out"), "--tokenizer", "bytes",
                     "--val_fraction", "0.000001"]) == 0
        assert decoded(tmp_path / "out", "val") == [lowest.encode()]
        assert sorted(decoded(tmp_path / "out", "train")) == sorted(text.encode() for text in texts if text != lowest)


@pytest.mark.parametrize("fraction, size", [(0.1, 1_115_394), (0.01, 1000), (0.5, 3)])
def test_a_single_document_is_cut_by_bytes(tmp_path, fraction, size):
    text = np.random.default_rng(0).integers(32, 127, size, dtype=np.uint8).tobytes()
    (tmp_path / "a.txt").write_bytes(text)
    assert main([str(tmp_path / "a.txt"), "-o", str(tmp_path / "out"), "--tokenizer", "bytes", "--val_fraction",
                 str(fraction)]) == 0
    cut = int(size * (1 - fraction))
    assert decoded(tmp_path / "out", "train") == [text[:cut]] and decoded(tmp_path / "out", "val") == [text[cut:]]
    assert size != 1_115_394 or (cut, size - cut) == (1_003_854, 111_540)  # nanoGPT's split of Tiny Shakespeare


@pytest.mark.parametrize("tokenizer", ["bytes", "tiny"])
def test_a_single_document_of_wide_characters(tmp_path, tiny_tiktoken, tokenizer):
    text = ("中" * 5).encode()  # 15 bytes: the cut at 7 is inside the third character
    (tmp_path / "a.txt").write_bytes(text)
    name, cut = ("bytes", 7) if tokenizer == "bytes" else (str(tiny_tiktoken), 6)
    assert main([str(tmp_path / "a.txt"), "-o", str(tmp_path / "out"), "--tokenizer", name, "--val_fraction",
                 "0.5"]) == 0
    assert decoded(tmp_path / "out", "train") == [text[:cut]] and decoded(tmp_path / "out", "val") == [text[cut:]]


def test_kinds_of_files(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_bytes("\ufeffbom and\r\nline ends\r".encode())
    (folder / "deep" / "b.MD").write_text("# heading")
    (folder / "empty.txt").write_text(" \n")
    (folder / "left_out.py").write_text("not this one")
    jsonl(folder / "c.jsonl", ["one\nline", "", "two \ud83d half", "pair \ud83d\ude00"])
    parquet.write_table(pyarrow.table({"id": [1, 2, 3, 4, 5], "text": ["p1", None, "p2", "", "p3"]}),
                        folder / "d.parquet", row_group_size=2)
    (tmp_path / "code.py").write_text("x = 1")
    assert main([str(folder), str(tmp_path / "code.py"), str(folder / "a.txt"), "-o", str(tmp_path / "out"),
                 "--tokenizer", "bytes"]) == 0
    got = decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val")  # a.txt, given twice, only once
    expected = ["\ufeffbom and\r\nline ends\r", "# heading", "one\nline", "two \ufffd half", "pair 😀", "p1", "p2",
                "p3", "x = 1"]
    assert sorted(got) == sorted(text.encode() for text in expected)


def test_another_field(tmp_path, capsys):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    jsonl(tmp_path / "a.jsonl", ["a", "b"], field="body")
    parquet.write_table(pyarrow.table({"body": ["c"], "other": [1]}), tmp_path / "b.parquet")
    files = [tmp_path / "a.jsonl", tmp_path / "b.parquet", "-o", tmp_path / "out", "--tokenizer", "bytes"]
    assert main([str(part) for part in [*files, "--text_field", "body"]]) == 0
    assert sorted(decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val")) == [b"a", b"b", b"c"]
    assert "line 1 of" in (error := fault(capsys, *files)) and "has no field 'text' but the fields id, body" in error
    assert "has no column 'text' but body, other" in fault(capsys, *files[1:])
    assert "'other' in row group 0 of" in (error := fault(capsys, *files[1:], "--text_field", "other"))
    assert "is a int, not text" in error
    assert "'id' in line 1" in fault(capsys, *files, "--text_field", "id")


def lines_of(texts) -> bytes:
    return "".join(json.dumps(dict(text=text)) + "\n" for text in texts).encode()


def packed(content: bytes, compression: str) -> bytes:
    """Content as a compressed file, in two parts one after the other, as tools that work in parallel write it."""
    if compression == ".gz":
        return gzip.compress(content[:100]) + gzip.compress(content[100:])
    if compression:
        pyarrow = pytest.importorskip("pyarrow")
        return b"".join(pyarrow.compress(part, codec="zstd", asbytes=True) for part in (content[:100], content[100:]))
    return content


@pytest.mark.parametrize("compression", ["", ".gz", ".zst", ".zstd"])
@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".jsonlines", ".json", ".JSONL", ".txt"])
def test_every_ending_under_every_compression(tmp_path, ending, compression):
    source, out = tmp_path / f"a{ending}{compression}", tmp_path / "out"
    content = b"<|end|>\n".join(text.encode() for text in TEXTS) if ending == ".txt" else lines_of(TEXTS)
    source.write_bytes(packed(content, compression))
    cut = ["--separator", "<|end|>"] if ending == ".txt" else []
    assert main([str(source), "-o", str(out), "--tokenizer", "bytes", "--val_fraction", "0.1", *cut]) == 0
    assert sorted(decoded(out, "train") + decoded(out, "val")) == sorted(text.encode() for text in TEXTS)
    meta = json.loads((out / "meta.json").read_text())
    assert meta["end_of_text"] == 256 and meta["vocab_size"] == 257


def test_a_folder_of_every_ending(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for number, ending in enumerate([".jsonl", ".ndjson", ".jsonlines", ".json.gz", ".jsonl.gz"]):
        compression = ".gz" if ending.endswith(".gz") else ""
        (folder / f"a{ending}").write_bytes(packed(lines_of([f"{number}", f"{number} again"]), compression))
    (folder / "b.txt.gz").write_bytes(gzip.compress(b"story"))
    (folder / "dataset_info.json").write_text("{\n}")
    assert main([str(folder), "-o", str(tmp_path / "out"), "--tokenizer", "bytes"]) == 0
    got = decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val")
    assert sorted(got) == sorted([*(f"{i}{more}".encode() for i in range(5) for more in ("", " again")), b"story"])


@pytest.mark.parametrize("content, separator, documents", [
    (b"One.\n<|endoftext|>\nTwo.\n<|endoftext|>\n", "<|endoftext|>", [b"One.\n", b"Two.\n"]),
    (b"One.<|endoftext|>Two.", "<|endoftext|>", [b"One.", b"Two."]),
    (b"One.\r\n<|endoftext|>\r\nTwo.\r\n", "<|endoftext|>", [b"One.\r\n", b"Two.\r\n"]),
    (b"a\n\nb\nc\n\n\nd", "\n\n", [b"a", b"b\nc", b"d"]), ("eins§zwei".encode(), "§", [b"eins", b"zwei"])])
def test_a_separator_cuts_plain_text(tmp_path, content, separator, documents):
    (tmp_path / "a.txt").write_bytes(content)
    assert main([str(tmp_path / "a.txt"), "-o", str(tmp_path / "out"), "--tokenizer", "bytes",
                 "--separator", separator]) == 0
    assert sorted(decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val")) == sorted(documents)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1 << 20])
def test_separators_wherever_a_read_ends(size):
    generator = random.Random(size)
    for _ in range(100):
        content = bytes(generator.choices(b"ab-", k=60))

        class Stream(io.BytesIO):
            def read(self, _count):
                return super().read(size)
        for separator in (b"--", b"-a-", b"aba", b""):
            expected = content.split(separator) if separator else [content]
            assert list(tokenize_text.cut(Stream(content), separator, "a")) == expected


def test_a_separator_that_cuts_nothing(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("One.\nTwo.\n")
    out = ["-o", tmp_path / "out", "--tokenizer", "bytes", "--separator"]
    assert "'\\\\n' stands nowhere in 1 files of plain text" in fault(capsys, tmp_path / "a.txt", *out, "\\n")
    assert "stands nowhere in 0 files of plain text" in fault(capsys, jsonl(tmp_path / "a.jsonl", TEXTS), *out, "One")
    assert "must not be empty" in fault(capsys, tmp_path / "a.txt", *out, "")
    assert not list((tmp_path / "out").iterdir())


def test_a_file_of_stories_as_one_document_is_noticed(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("One.\n<|endoftext|>\n" * 3)
    assert main([str(tmp_path / "a.txt"), "-o", str(tmp_path / "out"), "--tokenizer", "bytes"]) == 0
    error = capsys.readouterr().err
    assert "a.txt has 3 lines that end in <|endoftext|>, which are taken as text; --separator" in error


@pytest.mark.parametrize("name, content, message", [
    ("a.csv", b"text\nx\n",
     "is a .csv file, which is not read: write its texts as JSON lines"), ("a.tsv.gz", b"", "is a .tsv file"),
    ("a.json", b' [{"text": "x"}]', "holds a JSON array, not a document on every line"),
    ("a.jsonl", b"[1]", "holds a JSON array"),
    ("a.json", b'{\n "text": "x"\n}\n', "line 1 of"), ("a.zip", b"PK", "is a .zip file, which is not read: unpack it"),
    ("a.tar.gz", b"", "is a .tar file"), ("a.jsonl.xz", b"", "is a .xz file"),
    ("a.parquet.gz", b"", "is compressed parquet"),
    ("a.jsonl", b'{"text": ' + b"[" * 100_000, "is not JSON in UTF-8"),
    ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "is not JSON in UTF-8"),
    ("a.jsonl.gz", b"no gzip", "Not a gzipped file"), ("a.jsonl.gz", gzip.compress(b'{"text": "x"}' * 9, mtime=0)[:-9],
                                                       "ended before"),
    ("a.txt.zst", b"no zstd", "decompress failed")])
def test_files_that_are_refused_by_name_or_content(tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in fault(capsys, tmp_path / name, "-o", tmp_path / "out", "--tokenizer", "bytes")


def test_a_decompression_bomb_is_not_unpacked_whole(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tokenize_text, "MOST_BYTES", 1 << 22)
    read = []
    for name, content in dict(text=b"a" * (1 << 26), json=b'{"text": "' + b"a" * (1 << 26)).items():
        path = tmp_path / (f"{name}.txt.gz" if name == "text" else f"{name}.jsonl.gz")
        path.write_bytes(gzip.compress(content))
        assert path.stat().st_size < 1 << 17
        stream = gzip.open(path)
        monkeypatch.setattr(tokenize_text.gzip, "open", lambda path, stream=stream: read.append(stream) or stream)
        monkeypatch.setattr(stream, "close", lambda: None)
        assert "more than 4,194,304 bytes" in fault(capsys, path, "-o", tmp_path / "out", "--tokenizer", "bytes")
        assert read[-1].tell() < 1 << 25


def test_pieces_have_the_whole_texts_tokens(tiny_merges):
    encode, generator = build_encoder(read_merges(GPT2) if GPT2.exists() else tiny_merges), random.Random(0)
    parts = ["a", "The", "\n", "\n", " ", "  ", "'s", "'", " \n", "\n\n", "é", "\u3000", "\u00a0", "\x85", "\x1c", "1",
             "!", "中", "\t", "\r\n", "\u2028", "b c"]
    cuts = 0
    for _ in range(300):
        text = "".join(generator.choices(parts, k=60))
        cut = list(pieces(text, size=generator.choice([1, 3, 7])))
        cuts += len(cut) - 1
        assert "".join(cut) == text and sum(encode(cut), []) == encode([text])[0]
    assert cuts > 200


def test_a_long_document_is_one_document(tmp_path, tiny_tiktoken):
    long = "the inn\nof the sea\n" * 60_000  # several pieces
    assert len(list(pieces(long))) > 3
    jsonl(tmp_path / "a.jsonl", ["x", long, "y"])
    assert main([str(tmp_path / "a.jsonl"), "-o", str(tmp_path / "out"), "--tokenizer", str(tiny_tiktoken),
                 "--shard_tokens", "100000"]) == 0
    assert sorted(decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val")) == sorted(
        [b"x", long.encode(), b"y"])
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["train"]["utf8_bytes"] + meta["val"]["utf8_bytes"] == len(long) + 2
    assert meta["train"]["documents"] + meta["val"]["documents"] == 3


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    import huggingface_hub
    fetched = []

    def download(repository, file, repo_type):
        assert (repository, repo_type) == ("owner/name", "dataset")
        fetched.append(file)
        return str(jsonl(tmp_path / "blob.jsonl", [f"{file} {i}" for i in range(3)]))
    files = ["README.md", "b/2.jsonl", "b/1.jsonl", "bb/3.jsonl"]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repository, repo_type: files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for given, expected in {"hub:owner/name": ["b/1.jsonl", "b/2.jsonl", "bb/3.jsonl"],
                            "hub:owner/name/b": ["b/1.jsonl", "b/2.jsonl"]}.items():
        fetched.clear()
        assert main([given, "-o", str(tmp_path / "out"), "--tokenizer", "bytes"]) == 0
        assert fetched == expected
        got = decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val")
        assert sorted(got) == [f"{file} {i}".encode() for file in expected for i in range(3)]


def test_the_hub_out_of_reach(tmp_path, capsys, monkeypatch):
    import huggingface_hub

    def refuse(*_, **__):
        raise ConnectionError("a long story\nof many lines")
    out = ["-o", tmp_path / "out", "--tokenizer", "bytes"]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", refuse)
    assert "cannot get hub:owner/name from the Hugging Face Hub (ConnectionError); check the name" in fault(
        capsys, "hub:owner/name", *out)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: ["a.jsonl"])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    assert "cannot get hub:owner/name" in fault(capsys, "hub:owner/name", *out)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: ["a.csv"])
    assert "has no .parquet or .jsonl file" in fault(capsys, "hub:owner/name", *out)
    for given in ("hub:", "hub:name", "hub:owner/"):
        assert "names no data set" in fault(capsys, given, *out)


def test_gpt2_out_of_reach(tmp_path, capsys, monkeypatch):
    import tiktoken

    def refuse(name):
        raise ConnectionError("a long story\nof many lines")
    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    assert "--tokenizer FILE.tiktoken" in fault(capsys, jsonl(tmp_path / "a.jsonl", TEXTS), "-o", tmp_path / "out")


@pytest.mark.parametrize("content, message", [
    (b"", "every document is empty"), (b" \n\t", "every document is empty"),
    (b"caf\xe9", "a.txt is not UTF-8 text: byte 3 is 0xe9"), ("Käse".encode("utf-16"), "byte 0 is 0xff"),
    ("plain".encode("utf-16-le"), "byte 1 is 0x00"), (b"x", "has 1 bytes, not to be cut at 0.99")])
def test_text_that_cannot_be_used(tmp_path, capsys, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    assert message in fault(capsys, tmp_path / "a.txt", "-o", tmp_path / "out", "--tokenizer", "bytes")


@pytest.mark.parametrize("line, message", [(b"{'text': 1}", "line 2 of"), (b'{"text": "\xff"}', "is not JSON in UTF-8"),
                                           (b"[1]", "but a list"), (b'{"text": 3}', "is a int, not text")])
def test_lines_that_cannot_be_used(tmp_path, capsys, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    assert message in fault(capsys, tmp_path / "a.jsonl", "-o", tmp_path / "out", "--tokenizer", "bytes")


def test_input_and_options_that_cannot_be_used(tmp_path, capsys, tiny_merges):
    source, out = jsonl(tmp_path / "a.jsonl", TEXTS), ["-o", tmp_path / "out", "--tokenizer"]
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.py").write_text("x")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    write_merges(tmp_path / "large.tiktoken", tiny_merges | {i.to_bytes(3, "big"): i for i in range(261, 65536)})
    assert "there is no file" in fault(capsys, tmp_path / "missing.txt", *out, "bytes")
    error = fault(capsys, tmp_path / "none", *out, "bytes")
    assert "no .txt, .md, .jsonl, .ndjson, .jsonlines, .parquet file in" in error
    assert "is not a whole parquet file" in fault(capsys, tmp_path / "b.parquet", *out, "bytes")
    assert "cannot read no_such_name: No such file" in fault(capsys, source, *out, "no_such_name")
    assert "is no .tiktoken file" in fault(capsys, source, *out, source)
    assert "has 65536 tokens besides the end of text" in fault(capsys, source, *out, tmp_path / "large.tiktoken")
    for fraction in ("0", "1", "-1", "nan"):
        assert "--val_fraction must lie between 0 and 1" in fault(capsys, source, *out, "bytes", "--val_fraction",
                                                                  fraction)
    assert "at least 1 token" in fault(capsys, source, *out, "bytes", "--shard_tokens", "0")
    assert "cannot be called 'my_val'" in fault(capsys, source, *out, "bytes", "--name", "my_val")
    assert "fell to the train set" in fault(capsys, source, *out, "bytes", "--val_fraction", "0.9999999999")
    assert not list(tmp_path.glob("out/*"))


def test_the_largest_vocabulary(tmp_path, tiny_merges):
    merges = tiny_merges | {b"a" + i.to_bytes(3, "big"): i for i in range(261, 65535)}
    write_merges(tmp_path / "large.tiktoken", merges)
    assert main([str(jsonl(tmp_path / "a.jsonl", TEXTS)), "-o", str(tmp_path / "out"), "--tokenizer",
                 str(tmp_path / "large.tiktoken")]) == 0
    assert open_shard(tmp_path / "out" / "text_train_000000.bin")[0] == 65535


def test_a_fault_at_the_end_leaves_nothing(tmp_path, capsys):
    source, out = jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out"
    assert main([str(source), "-o", str(out), "--tokenizer", "bytes"]) == 0
    with open(source, "ab") as file:
        file.write(b"broken\n")
    assert "line 301" in fault(capsys, source, "-o", out, "--tokenizer", "bytes", "--shard_tokens", "100")
    assert list(out.iterdir()) == []


def test_a_run_of_blanks_that_tiktoken_cannot_take(tmp_path, tiny_tiktoken, capfd):
    jsonl(tmp_path / "a.jsonl", ["x", "a" + "\n" * 1_500_000 + "b"])
    assert main([str(tmp_path / "a.jsonl"), "-o", str(tmp_path / "out"), "--tokenizer", str(tiny_tiktoken)]) == 1
    # below the Rust code's own lines
    assert "tokenize_text.py: error: tiktoken's pattern overflows" in capfd.readouterr().err


def test_exit_codes_and_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    assert run_module("data.tokenize_text", tmp_path / "missing", "-o", tmp_path / "out") == 1
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1
    assert error.startswith("tokenize_text.py: error: tiktoken cannot get GPT-2's merges")


def test_an_interrupt(tmp_path):
    os.mkfifo(tmp_path / "endless.jsonl")
    command = [*SCRIPT, tmp_path / "endless.jsonl", "-o", tmp_path / "out", "--tokenizer", "bytes", "--shard_tokens",
               "1000000"]
    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    line = (json.dumps({"text": "x" * 100_000}) + "\n").encode()
    with open(tmp_path / "endless.jsonl", "wb", buffering=0) as pipe:
        while not list(tmp_path.glob("out/*.part")):  # until it is writing shards
            pipe.write(line)
            time.sleep(0.001)
        run.send_signal(signal.SIGINT)
        error = run.communicate(timeout=60)[1]
    assert run.returncode == 130 and error.count("\n") == 1 and "interrupted" in error
    assert list((tmp_path / "out").iterdir()) == []


def test_shards_are_decoded_into_bytes(tmp_path, tiny_tiktoken, capsys):
    """Documents come back in their split and order, also those that go on in the next shard."""
    assert main([str(jsonl(tmp_path / "a.jsonl", TEXTS)), "-o", str(tmp_path / "tokens"), "--tokenizer",
                 str(tiny_tiktoken), "--val_fraction", "0.2", "--shard_tokens", "1000"]) == 0
    assert len(list((tmp_path / "tokens").glob("*_train_*.bin"))) > 3
    assert main([f"shards:{tmp_path / 'tokens'}", "-o", str(tmp_path / "bytes"), "--tokenizer", "bytes"]) == 0
    for split in ("train", "val"):
        assert decoded(tmp_path / "bytes", split) == decoded(tmp_path / "tokens", split)
    capsys.readouterr()

    # what is refused
    words = [f"shards:{tmp_path / 'tokens'}", "-o", tmp_path / "out"]
    assert "is decoded alone, and into bytes" in fault(capsys, *words)
    assert "is decoded alone, and into bytes" in fault(capsys, words[0], *words, "--tokenizer", "bytes")
    assert "holds bytes already" in fault(capsys, f"shards:{tmp_path / 'bytes'}", *words[1:], "--tokenizer", "bytes")
    assert "no train shards" in fault(capsys, f"shards:{tmp_path}", *words[1:], "--tokenizer", "bytes")
