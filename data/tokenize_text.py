"""
Text to token shards for the trainer.

    python -m data.tokenize_text FILES... -o DIR [--tokenizer gpt2|bytes|PATH.tiktoken] [--val_fraction 0.01]
                                 [--name NAME] [--shard_tokens N] [--text_field text] [--separator TEXT]

FILES    .jsonl, .ndjson, .jsonlines, .json: a document on every line, in --text_field. .parquet: a document in every
         row, in the column --text_field. Any other file is plain text, UTF-8, kept byte for byte: one document, or with
         --separator the documents that stand between that text. A line end after a separator belongs to it:
         --separator '<|endoftext|>' for files like TinyStories'. All but .parquet may be compressed, with .gz, .zst or
         .zstd after the name. A folder is searched for .txt, .md and the endings above (.json only compressed).
         hub:OWNER/NAME[/FOLDER]: the parquet files of a data set on the Hugging Face Hub (its files of JSON lines if it
         has none), downloaded one by one into the Hub's cache. Empty documents are left out; half of a surrogate pair,
         which JSON can hold and UTF-8 cannot, becomes U+FFFD. A document may have 1 GiB. shards:DIR, alone and with
         --tokenizer bytes: the text of a folder of shards, decoded; its documents keep their split and their order.
Split    a document goes to validation if its hash (sha256 of its bytes) is below val_fraction, so that equal documents
         stay together and the order does not matter; where none is, the one with the lowest hash goes. A single
         document is cut instead: its last val_fraction is for validation, from byte int(length * (1 - val_fraction)) on
         with bytes, from the beginning of that byte's character on with merges.
Tokens   gpt2 by tiktoken (which downloads the merges once), bytes 0..255, or the merges of a .tiktoken file with
         GPT-2's pattern for words. Text that looks like a special token is text. The end of text is the id after the
         last one: 50256 for GPT-2's merges, 256 for bytes.

Shards, meta.json and NAME.tiktoken appear in DIR when all is done; shards of the same name are replaced, others
refused. Exit code 1 and one line for a fault.
"""

import argparse
import gzip
import hashlib
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, count, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.command_line import run_script
from data.shards import SHARD_TOKENS, SPLITS, write_folder
from data.tokenizer import build_encoder, load_merges
from train_gpt import Config, RunError, adopt_vocabulary, find_shards, open_shard, require

JSON_LINES = (".jsonl", ".ndjson", ".jsonlines", ".json")
SEARCHED = (".txt", ".md", ".jsonl", ".ndjson", ".jsonlines", ".parquet")  # in a folder, which a .json often describes
COMPRESSIONS = (".gz", ".zst", ".zstd")
MOST_BYTES = 2 ** 30  # of one document: a few kilobytes of compressed zeros must not fill the memory
TABLE = "write its texts as JSON lines ({\"text\": ...} on every line) or as parquet, and give that file"
REFUSED = {".csv": TABLE, ".tsv": TABLE, ".arrow": TABLE, ".xlsx": TABLE} | dict.fromkeys(
    (".zip", ".tar", ".tgz", ".7z", ".rar", ".bz2", ".xz", ".lz4"), "unpack it, and give its files or their folder")

# ---- Documents --------------------------------------------------------------


def kind_of(name: str) -> tuple[str, str]:
    """(ending, compression) of a name in small letters: (".jsonl", ".gz") of a.jsonl.gz, (".txt", "") of a.txt."""
    stem, compression = os.path.splitext(name.lower())
    return (os.path.splitext(stem)[1], compression) if compression in COMPRESSIONS else (compression, "")


def is_searched(name: str) -> bool:
    """Whether a file of this name counts as text where it is not named itself, but its folder or data set."""
    ending, compression = kind_of(name)
    return ending in SEARCHED or ending == ".json" and compression != ""


def find_files(inputs: list[str]) -> list[tuple[str, Callable[[], Path]]]:
    """
    (name, function that returns the local file) of every file the inputs stand for, each once. RunError for an input
    that stands for none.
    """
    files = {}
    for word in inputs:
        path = Path(word)
        require(word, "one of FILES is an empty name; write . for the folder you are in")
        if word.startswith("hub:"):
            files |= hub_files(word)
        elif path.is_dir():
            texts = sorted(p for p in path.rglob("*") if is_searched(p.name) and p.is_file())
            require(texts, f"no {', '.join(SEARCHED)} file in {path}; name other files one by one")
            files |= {str(p): partial(Path, p) for p in texts}
        else:
            require(path.exists(),
                    f"there is no file {word}; for a data set of the Hugging Face Hub write hub:OWNER/NAME")
            files[word] = partial(Path, path)

    # what is not read, however it came here
    for name in files:
        ending, compression = kind_of(name)
        require(ending not in REFUSED, f"{name} is a {ending} file, which is not read: {REFUSED.get(ending)}")
        require(not compression or ending != ".parquet",
                f"{name} is compressed parquet, which is not read: unpack it, and give the .parquet file")
    return list(files.items())


def hub_files(address: str) -> dict[str, Callable[[], Path]]:
    """
    {name: function that downloads} of the files of hub:OWNER/NAME[/FOLDER]. RunError if it has none or the hub cannot
    be reached.
    """
    owner, _, rest = address.removeprefix("hub:").partition("/")
    name, _, folder = rest.strip("/").partition("/")
    require(owner and name, f"{address} names no data set; write hub:OWNER/NAME or hub:OWNER/NAME/FOLDER")
    try:
        import huggingface_hub.utils
    except ImportError:
        raise RunError(f"reading {address} needs the package huggingface_hub: pip install huggingface_hub") from None
    huggingface_hub.utils.logging.set_verbosity_error()  # its retries would hide the one line that counts

    def ask(function, *arguments):
        try:
            return function(*arguments, repo_type="dataset")
        except Exception as error:  # each library under it raises its own
            raise RunError(f"cannot get {address} from the Hugging Face Hub ({type(error).__name__}); check the name "
                           "and the network (HF_TOKEN for a closed data set), or download its files elsewhere and give "
                           "those") from None

    def download(file: str) -> Path:
        return Path(ask(huggingface_hub.hf_hub_download, repository, file))

    # parquet files, else those of JSON lines
    repository, prefix = f"{owner}/{name}", f"{folder}/" if folder else ""
    listed = sorted(ask(huggingface_hub.list_repo_files, repository))
    texts = [file for file in listed if file.startswith(prefix) and is_searched(file)]
    chosen = ([file for file in texts if kind_of(file)[0] == ".parquet"]
              or [file for file in texts if kind_of(file)[0] in JSON_LINES])
    require(chosen, f"{address} has no .parquet or .jsonl file; download what it has and give those files")
    return {f"hub:{repository}/{file}": partial(download, file) for file in chosen}


def open_file(path: Path, compression: str) -> io.BufferedReader:
    """A file as a stream of bytes, decompressed on the way. RunError where a package is missing."""
    if compression == ".gz":
        return io.BufferedReader(gzip.open(path))
    if compression:
        try:
            import pyarrow
        except ImportError:
            raise RunError(f"reading {path} needs the package pyarrow: pip install pyarrow; or "
                           "unpack it (unzstd)") from None
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return open(path, "rb")


def read_text(file: io.BufferedReader, name: str, separator: bytes) -> Iterator[bytes]:
    """The documents of plain text, the empty ones too. RunError for text that is not UTF-8, or a document too long."""
    start = 0  # of the document in the file
    for number, document in enumerate(cut(file, separator, name)):
        try:
            document.decode()
            wrong = document.find(0)
        except UnicodeDecodeError as error:
            wrong = error.start
        require(wrong < 0,
                f"{name} is not UTF-8 text: byte {start + wrong} is 0x{document[wrong:wrong + 1].hex()}; convert it "
                "(iconv) or leave it out")
        start += len(document) + len(separator)
        if number > 0:  # a separator came before
            document = document.removeprefix(b"\n" if document[:1] == b"\n" else b"\r\n")
        yield document


def cut(file: io.BufferedReader, separator: bytes, name: str) -> Iterator[bytes]:
    """What stands between separators, without one the whole file. RunError for a document that is too long."""
    held, seen = bytearray(), 0  # what is read but not yielded, and how much of it holds no beginning of a separator
    while piece := file.read(1 << 20):
        held += piece
        start = 0
        end = held.find(separator, seen) if separator else -1
        while end >= 0:
            yield bytes(held[start:end])
            start = end + len(separator)
            end = held.find(separator, start)
        del held[:start]
        seen = max(0, len(held) - len(separator) + 1)
        require(len(held) <= MOST_BYTES,
                f"{name} holds a document of more than {MOST_BYTES:,} bytes; cut it with --separator, or "
                "into several files")
    yield bytes(held)


def read_json_lines(file: io.BufferedReader, name: str, field: str) -> Iterator[bytes]:
    """The text of every line's object. RunError for a line that has none."""
    require(file.peek(1).lstrip()[:1] != b"[",
            f"{name} holds a JSON array, not a document on every line; write its items on lines of their own "
            "(jq -c .[] does), and give that file")
    # a line at a time
    for number in count(1):
        line = file.readline(MOST_BYTES + 1)
        require(len(line) <= MOST_BYTES,
                f"line {number} of {name} has more than {MOST_BYTES:,} bytes; cut that document")
        if not line:
            return
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # of JSON or of UTF-8
            raise RunError(f"line {number} of {name} is not JSON in UTF-8; every line holds one document (jq -c . "
                           "writes so); mend or delete it") from None
        got = f"the fields {', '.join(row)[:200]}" if isinstance(row, dict) else f"a {type(row).__name__}"
        require(isinstance(row, dict) and field in row,
                f"line {number} of {name} has no field {field!r} but {got}; give --text_field")
        yield utf8(row[field], f"line {number} of {name}", field)


def read_parquet(path: Path, name: str, field: str) -> Iterator[bytes]:
    """The text of every row of a column. RunError for a file that is not parquet or has no such column."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise RunError(f"reading {name} needs the package pyarrow: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            require(field in columns,
                    f"{name} has no column {field!r} but {', '.join(columns)[:200]}; give --text_field")
            for number in range(file.num_row_groups):
                for rows in file.iter_batches(batch_size=1024, row_groups=[number], columns=[field]):
                    for text in rows.column(0).to_pylist():
                        yield utf8(text, f"row group {number} of {name}", field)
    except (ValueError, OSError, MemoryError, pyarrow.ArrowException) as error:
        raise RunError(f"{name} is not a whole parquet file ({type(error).__name__}); fetch or make it again") from None


def utf8(text, origin: str, field: str) -> bytes:
    """Text as UTF-8, None as nothing. RunError, which names the origin, for anything else."""
    require(isinstance(text, str | None),
            f"{field!r} in {origin} is a {type(text).__name__}, not text; give another --text_field")
    try:
        return (text or "").encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def read_file(path: Path, name: str, field: str, separator: bytes) -> Iterator[bytes]:
    """The documents of one file, by the ending of its name. RunError for a file that cannot be read."""
    ending, compression = kind_of(name)
    if ending == ".parquet":
        yield from read_parquet(path, name, field)
        return
    try:
        with open_file(path, compression) as file:
            if ending in JSON_LINES:
                yield from read_json_lines(file, name, field)
            else:
                yield from read_text(file, name, separator)
    except (OSError, EOFError, ValueError, zlib.error) as error:  # of the disk or of what unpacks
        fault = getattr(error, "strerror", None) or error
        raise RunError(f"cannot read {name}: {fault}; check it, fetch it again or leave it out") from None


def read_documents(files: list[tuple[str, Callable[[], Path]]], field: str, separator: bytes,
                   bar: tqdm) -> Iterator[bytes]:
    """
    Every document that is not empty, in UTF-8. RunError for a file that cannot be read, and for a separator that stands
    in no file.
    """
    texts, separators = 0, 0  # files of plain text, and what was found in them
    for number, (name, fetch) in enumerate(files, 1):
        bar.set_postfix_str(f"file {number} of {len(files)}", refresh=False)
        is_plain = kind_of(name)[0] not in (*JSON_LINES, ".parquet")
        documents, marks = 0, 0  # of this file, and its lines that end in <|endoftext|>

        # its documents
        for text in read_file(fetch(), name, field, separator):
            bar.update(len(text))
            documents += 1
            if is_plain:
                marks += text.count(b"<|endoftext|>\n")
            if text.strip():
                yield text

        # did the separator stand in it?
        if is_plain:
            texts += 1
            separators += documents - 1
        if marks > 1 and not separator:
            print(f"tokenize_text.py: warning: {name} has {marks:,} lines that end in <|endoftext|>, which "
                  "are taken as text; --separator '<|endoftext|>' cuts there", file=sys.stderr)
    require(not separator or separators,
            f"--separator {separator.decode(errors='replace')!r} stands nowhere in {texts} files of plain text; "
            "give what stands between the documents (a shell writes a line end as $'\\n')")


def split_documents(texts: Iterator[bytes], val_fraction: float, whole_characters: bool) -> Iterator[tuple[str, bytes]]:
    """
    (train or val, document) for every document, by the rule at the top. RunError if there is none, or a single one is
    too short to cut.
    """
    # a single document is cut
    first = list(islice(texts, 2))
    require(first, "every document is empty; give files with text in them")
    if len(first) == 1:
        text, = first
        cut = int(len(text) * (1 - val_fraction))
        while whole_characters and 0 < cut < len(text) and text[cut] & 0xC0 == 0x80:  # inside a character
            cut -= 1
        require(0 < cut < len(text),
                f"the only document has {len(text)} bytes, not to be cut at {1 - val_fraction:g}; give more text or "
                "other --val_fraction")
        yield from (("train", text[:cut]), ("val", text[cut:]))
        return

    # of several, each goes where its hash says; that of the lowest hash waits, until another goes to validation
    waiting, validated = [], False  # [(hash, document)]
    for text in chain(first, texts):
        share = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2 ** 64
        if share < val_fraction:
            validated = True
            yield "val", text
        else:
            waiting.append((share, text))
        waiting.sort()
        while len(waiting) > (not validated):
            yield "train", waiting.pop()[1]
    for _share, text in waiting:
        yield "val", text


def read_shards(folder: str, bar: tqdm) -> Iterator[tuple[str, bytes]]:
    """
    (train or val, document) of every document in a folder of shards, as bytes. Its tokens are those of its .tiktoken
    file, GPT-2's where it has none. RunError for a folder without shards, and for a token that is none of these.
    """
    # what a token stands for
    config = Config(data=folder)
    adopt_vocabulary(config)
    end = config.end_of_text
    beside = sorted(find_shards(config, "train")[0].parent.glob("*.tiktoken"))
    require(config.vocab_size != 257, f"{folder} holds bytes already; give --data {folder} to the trainer")
    merges = load_merges(str(beside[0]) if beside else "gpt2")
    text_of = sorted(merges, key=merges.get)

    # a document may go on in the next shard
    for split in SPLITS:
        held = []  # of the document that is being read: its text, shard by shard
        for shard in find_shards(config, split):
            tokens = open_shard(shard)
            ends = np.flatnonzero(tokens == end)
            for start, stop in zip([0, *ends + 1], [*ends, len(tokens)]):
                if start and held:
                    yield split, b"".join(held)
                    held = []
                document = tokens[start:stop]
                largest = document.max(initial=0)
                require(largest < len(text_of), f"{shard} holds token {largest}, and its tokenizer has "
                        f"{len(text_of)} tokens; put the .tiktoken file of its tokenizer beside it")
                held.append(b"".join(map(text_of.__getitem__, document.tolist())))
                bar.update(len(held[-1]))
        yield split, b"".join(held)


# ---- Tokens -----------------------------------------------------------------


def pieces(text: str, size: int = 1 << 18) -> Iterator[str]:
    """
    A long text cut where GPT-2's pattern for words cuts as well: after a line end between two characters that are no
    blanks. The tokens are those of the whole text, many cores can work on one document, and memory stays bounded.
    """
    start, boundary = 0, re.compile(r"(?<=\S\n)(?=\S)")
    while len(text) - start > size and (cut := boundary.search(text, start + size)):
        yield text[start:cut.start()]
        start = cut.start()
    yield text[start:]


def encode_documents(documents: Iterable[tuple[str, bytes]], merges: dict[bytes, int] | None,
                     size: int = 1 << 22) -> Iterator[tuple]:
    """(split, tokens, bytes of text, begins) as ShardWriter.add takes it, encoded about `size` characters at a time."""
    encode = build_encoder(merges)
    texts, facts = [], []  # what is not encoded yet: pieces of documents, and (split, bytes of text, begins) of each
    held = 0               # characters of these texts

    def encode_held():
        for (split, *rest), tokens in zip(facts, encode(texts)):
            yield split, tokens, *rest

    # a document in pieces, and pieces of several at once
    for split, document in documents:
        for number, text in enumerate(pieces(document.decode()) if merges else [document]):
            texts.append(text)
            begins = number == 0
            facts.append((split, len(document) if begins else 0, begins))
            held += len(text)
            if held >= size:
                yield from encode_held()
                texts, facts = [], []
                held = 0
    yield from encode_held()


def tokenize(options: argparse.Namespace) -> dict:
    """Read, split, encode and write all documents; returns the meta data. RunError for whatever the user can mend."""
    # the options
    require(0 < options.val_fraction < 1, f"--val_fraction must lie between 0 and 1, got {options.val_fraction:g}")
    require(options.separator != "", "--separator must not be empty; leave it out where a file is one document")
    decoded = [word.removeprefix("shards:") for word in options.files if word.startswith("shards:")]
    require(not decoded or (len(options.files) == 1 and options.tokenizer == "bytes"),
            f"a folder of shards is decoded alone, and into bytes, got {' '.join(options.files)!r:.200} and "
            f"--tokenizer {options.tokenizer}; leave the other files out and give --tokenizer bytes")
    merges, files = load_merges(options.tokenizer), [] if decoded else find_files(options.files)
    separator = os.fsencode(options.separator or "")

    # a document at a time, from the files to the shards
    with tqdm(unit="B", unit_scale=True, disable=None) as bar:  # None: only on a terminal
        if decoded:
            documents = (item for item in read_shards(decoded[0], bar) if item[1].strip())
        else:
            texts = read_documents(files, options.text_field, separator, bar)
            documents = split_documents(texts, options.val_fraction, whole_characters=bool(merges))
        end_of_text = len(merges) if merges else 256
        return write_folder(
            options.output, options.name, encode_documents(documents, merges), end_of_text, merges,
            options.shard_tokens, tokenizer=Path(options.tokenizer).name, sources=options.files,
            val_fraction=options.val_fraction)


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, 1 for a fault (one line on stderr), 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="tokenize_text.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILES", help="files, folders, hub:OWNER/NAME, shards:DIR")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2, bytes or a .tiktoken file")
    parser.add_argument("--val_fraction", type=float, default=0.01, help="part of the documents for validation")
    parser.add_argument("--name", default="text", help="first part of the shards' file names")
    parser.add_argument("--shard_tokens", type=int, default=SHARD_TOKENS, help="tokens of one shard")
    parser.add_argument("--text_field", default="text", help="field of JSON lines or column of .parquet with the text")
    parser.add_argument("--separator", metavar="TEXT", help="what stands between documents of plain text")
    options = parser.parse_args(argv)

    def work():
        meta = tokenize(options)
        counts = [f"{split} {facts['tokens']:,} tokens in {facts['documents']:,} documents "
                  f"({facts['utf8_bytes']:,} bytes)" for split, facts in meta.items() if split in ("train", "val")]
        print(f"{options.output}: vocabulary {meta['vocab_size']}, {', '.join(counts)}")
    return run_script("tokenize_text.py", work, f"interrupted; {options.output} holds no shards of this run")


if __name__ == "__main__":
    sys.exit(main())
