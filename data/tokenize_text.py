"""
Text to token shards for the trainer.

    python data/tokenize_text.py FILES... -o DIR [--tokenizer gpt2|bytes|PATH.tiktoken] [--val_fraction 0.01] [--name NAME] [--shard_tokens N]
                                 [--text_field text]

FILES    .jsonl: a document on every line, in --text_field; .parquet: a document in every row, in the column --text_field; any other file: one
         document, UTF-8, kept byte for byte. A folder is searched for .txt, .md, .jsonl and .parquet. hub:OWNER/NAME[/FOLDER]: the parquet files of
         a data set on the Hugging Face Hub (its .jsonl files if it has none), downloaded one by one into the Hub's cache. Empty documents are left
         out; half of a surrogate pair, which JSON can hold and UTF-8 cannot, becomes U+FFFD.
Split    a document goes to validation if its hash (sha256 of its bytes) is below val_fraction, so that equal documents stay together and the order
         does not matter; where none is, the one with the lowest hash goes. A single document is cut instead: its last val_fraction is for validation,
         from byte int(length * (1 - val_fraction)) on with bytes, from the beginning of that byte's character on with merges.
Tokens   gpt2 by tiktoken (which downloads the merges once), bytes 0..255, or the merges of a .tiktoken file with GPT-2's pattern for words. Text
         that looks like a special token is text. The end of text is the id after the last one: 50256 for GPT-2's merges, 256 for bytes.

Shards, meta.json and NAME.tiktoken appear in DIR when all is done; shards of the same name are replaced, others refused. Exit code 1 and one line
for a fault.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.shards import SHARD_TOKENS, RunError, encoder, load_merges, write_folder

EXTENSIONS = (".txt", ".md", ".jsonl", ".parquet")

# ---------------------------------------------------------------------------------------------------------------------------------------------------
# Documents


def find_files(inputs: list[str]) -> list[tuple[str, Callable[[], Path]]]:
    """(name, function that returns the local file) of every file the inputs stand for, each once. RunError for an input that stands for none."""
    found = {}
    for given in inputs:
        path = Path(given)
        if given.startswith("hub:"):
            found |= hub_files(given)
        elif path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
            if not files:
                raise RunError(f"no {', '.join(EXTENSIONS)} file in {path}; name other files one by one")
            found |= {str(p): partial(Path, p) for p in files}
        elif path.exists():
            found[given] = partial(Path, path)
        else:
            raise RunError(f"there is no file {given}; for a data set of the Hugging Face Hub write hub:OWNER/NAME")
    return list(found.items())


def hub_files(given: str) -> dict[str, Callable[[], Path]]:
    """{name: function that downloads} of the files of hub:OWNER/NAME[/FOLDER]. RunError if it has none or the hub cannot be reached."""
    owner, _, rest = given.removeprefix("hub:").partition("/")
    name, _, folder = rest.strip("/").partition("/")
    if not owner or not name:
        raise RunError(f"{given} names no data set; write hub:OWNER/NAME or hub:OWNER/NAME/FOLDER")
    try:
        import huggingface_hub.utils
    except ImportError:
        raise RunError(f"reading {given} needs the package huggingface_hub: pip install huggingface_hub") from None
    huggingface_hub.utils.logging.set_verbosity_error()  # its retries would hide the one line that counts

    def ask(function, *arguments):
        try:
            return function(*arguments, repo_type="dataset")
        except Exception as error:  # each library under it raises its own
            raise RunError(f"cannot get {given} from the Hugging Face Hub ({type(error).__name__}); check the name and the network "
                           "(HF_TOKEN for a closed data set), or download its files elsewhere and give those") from None
    files = [file for file in sorted(ask(huggingface_hub.list_repo_files, f"{owner}/{name}")) if file.startswith(f"{folder}/" if folder else "")]
    chosen = [file for file in files if file.endswith(".parquet")] or [file for file in files if file.endswith(".jsonl")]
    if not chosen:
        raise RunError(f"{given} has no .parquet or .jsonl file; download what it has and give those files")
    return {f"hub:{owner}/{name}/{file}": lambda file=file: Path(ask(huggingface_hub.hf_hub_download, f"{owner}/{name}", file)) for file in chosen}


def read_text(path: Path, name: str, field: str) -> Iterator[bytes]:
    text = path.read_bytes()
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise RunError(f"{name} is not UTF-8 text: byte {error.start} is 0x{text[error.start]:02x}; convert it (iconv) or leave it out") from None
    yield text


def read_jsonl(path: Path, name: str, field: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:  # of JSON or of UTF-8
                raise RunError(f"line {number} of {name} is not JSON in UTF-8; mend or delete it") from None
            if not isinstance(row, dict) or field not in row:
                got = f"the fields {', '.join(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
                raise RunError(f"line {number} of {name} has no field {field!r} but {got}; give --text_field")
            yield utf8(row[field], f"line {number} of {name}", field)


def read_parquet(path: Path, name: str, field: str) -> Iterator[bytes]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise RunError(f"reading {name} needs the package pyarrow: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise RunError(f"{name} has no column {field!r} but {', '.join(file.schema_arrow.names)}; give --text_field")
            for number in range(file.num_row_groups):
                for rows in file.iter_batches(batch_size=1024, row_groups=[number], columns=[field]):
                    yield from (utf8(text, f"row group {number} of {name}", field) for text in rows.column(0).to_pylist())
    except (ValueError, OSError, pyarrow.ArrowException) as error:
        raise RunError(f"{name} is not a whole parquet file ({type(error).__name__}); fetch or make it again") from None


def utf8(text, place: str, field: str) -> bytes:
    """Text as UTF-8, None as nothing. RunError for anything else."""
    if not isinstance(text, str | None):
        raise RunError(f"{field!r} in {place} is a {type(text).__name__}, not text; give another --text_field")
    try:
        return (text or "").encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def read_documents(files: list[tuple[str, Callable[[], Path]]], field: str, bar: tqdm) -> Iterator[bytes]:
    """Every document that is not empty, in UTF-8. RunError for a file that cannot be read."""
    for number, (name, fetch) in enumerate(files, 1):
        bar.set_postfix_str(f"file {number} of {len(files)}", refresh=False)
        reader = {".jsonl": read_jsonl, ".parquet": read_parquet}.get(Path(name).suffix.lower(), read_text)
        try:
            for text in reader(fetch(), name, field):
                bar.update(len(text))
                if text.strip():
                    yield text
        except OSError as error:
            raise RunError(f"cannot read {name}: {error.strerror or error}; check it or leave it out") from None


def split_documents(texts: Iterator[bytes], val_fraction: float, whole_characters: bool) -> Iterator[tuple[str, bytes]]:
    """(train or val, document) for every document, by the rule at the top. RunError if there is none, or a single one is too short to cut."""
    first = list(islice(texts, 2))
    if not first:
        raise RunError("every document is empty; give files with text in them")
    if len(first) == 1:
        text, = first
        cut = int(len(text) * (1 - val_fraction))
        while whole_characters and 0 < cut < len(text) and text[cut] & 0xC0 == 0x80:  # inside a character
            cut -= 1
        if not 0 < cut < len(text):
            raise RunError(f"the only document has {len(text)} bytes, not to be cut at {1 - val_fraction:g}; give more text or other --val_fraction")
        yield from (("train", text[:cut]), ("val", text[cut:]))
        return
    waiting, validated = [], False  # [(hash, document)] of the lowest hash, for validation if no other document goes there
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

# ---------------------------------------------------------------------------------------------------------------------------------------------------
# Tokens


def pieces(text: str, size: int = 1 << 18) -> Iterator[str]:
    """
    A long text cut where GPT-2's pattern for words cuts as well: after a line end between two characters that are no blanks. The tokens are those of
    the whole text, many cores can work on one document, and memory stays bounded.
    """
    start, boundary = 0, re.compile(r"(?<=\S\n)(?=\S)")
    while len(text) - start > size and (cut := boundary.search(text, start + size)):
        yield text[start:cut.start()]
        start = cut.start()
    yield text[start:]


def encode_documents(documents: Iterable[tuple[str, bytes]], merges: dict[bytes, int] | None, size: int = 1 << 22) -> Iterator[tuple]:
    """(split, tokens, bytes of text, begins) as ShardWriter.add takes it, encoded about `size` characters at a time."""
    encode, texts, facts, held = encoder(merges), [], [], 0

    def encoded():
        for (split, *rest), tokens in zip(facts, encode(texts)):
            yield split, tokens, *rest
    for split, document in documents:
        for number, text in enumerate(pieces(document.decode()) if merges else [document]):
            texts.append(text)
            facts.append((split, len(document) * (number == 0), number == 0))
            held += len(text)
            if held >= size:
                yield from encoded()
                texts, facts, held = [], [], 0
    yield from encoded()


def tokenize(options: argparse.Namespace) -> dict:
    """Everything; returns the meta data. RunError for whatever the user can mend."""
    if not 0 < options.val_fraction < 1:
        raise RunError(f"--val_fraction must lie between 0 and 1, got {options.val_fraction:g}")
    merges, files = load_merges(options.tokenizer), find_files(options.files)
    with tqdm(unit="B", unit_scale=True, disable=None) as bar:  # None: only on a terminal
        documents = split_documents(read_documents(files, options.text_field, bar), options.val_fraction, whole_characters=bool(merges))
        end_of_text = len(merges) if merges else 256
        return write_folder(options.output, options.name, encode_documents(documents, merges), end_of_text, merges, options.shard_tokens,
                            tokenizer=Path(options.tokenizer).name, sources=options.files, val_fraction=options.val_fraction)


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, 1 for a fault (one line on stderr), 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="tokenize_text.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILES", help="files, folders, hub:OWNER/NAME")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2, bytes or a .tiktoken file")
    parser.add_argument("--val_fraction", type=float, default=0.01, help="part of the documents for validation")
    parser.add_argument("--name", default="text", help="first part of the shards' file names")
    parser.add_argument("--shard_tokens", type=int, default=SHARD_TOKENS, help="tokens of one shard")
    parser.add_argument("--text_field", default="text", help="field of .jsonl or column of .parquet that holds the text")
    options = parser.parse_args(argv)
    try:
        meta = tokenize(options)
    except RunError as error:
        print(f"tokenize_text.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"tokenize_text.py: interrupted; {options.output} holds no shards of this run", file=sys.stderr)
        return 130
    print(f"{options.output}: vocabulary {meta['vocab_size']}, " + ", ".join(
        f"{split} {facts['tokens']:,} tokens in {facts['documents']:,} documents ({facts['utf8_bytes']:,} bytes)"
        for split, facts in meta.items() if split in ("train", "val")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
