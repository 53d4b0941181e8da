"""
Writing and checking a folder of shards: the one place that knows what the trainer expects to find there.

    NAME_train_%06d.bin, NAME_val_%06d.bin
                     256 int32 header [20240520, 1, number of tokens, 2, 0, ...], then uint16 tokens
    meta.json        vocab_size, end_of_text, tokenizer, where the text came from, tokens, bytes, sha256; written last
    NAME.tiktoken    the tokenizer's merges, where it has any, for bits per byte and to turn tokens back into text

A document begins with the end-of-text token, whose id meta.json gives as end_of_text; in folders that this file writes
it is the last id of the vocabulary. A file belongs to a split whose name, train or val, stands between separators
(_ . -) of the file's name.
Format: modded-nanogpt's and llm.c's; the header's fourth number, bytes a token, is ignored there.
"""

import base64
import hashlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts beside this file are run by their path
from train_gpt import (HEADER_INTS, SHARD_MAGIC, SHARD_VERSION, Config, RunError, check_shards, check_value,
                       find_shards, is_of_split, open_shard, read_merges, read_meta, require, write_atomically)  # noqa: F401

SHARD_TOKENS = 100_000_000
MOST_SHARDS = 10 ** 6   # of one split: six digits
SPLITS = ("train", "val")


def run_script(name: str, work: Callable[[], int | None], interrupted: str = "interrupted",
               explain: Callable[[Exception], str | None] = lambda error: None) -> int:
    """
    Run a script's work and return its exit code: what `work` returns (None is 0); 1 for a fault, which becomes one line
    on stderr; 130 for an interrupt; 141, as of a program that SIGPIPE ends, when nobody reads the output any more.
    Characters that a console cannot show are replaced. explain: the line for an error of another kind, None where it
    is a defect, which is raised.
    """
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream is not None]  # a closed one is None
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = code_of(name, work, interrupted, explain)
        for stream in streams:
            stream.flush()
        return code
    except OSError as error:
        for stream in streams:  # what is left unwritten must not be tried again when Python ends
            try:
                stream.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if isinstance(error, BrokenPipeError):
            return 141
        file = f"{error.filename}"[:300] if error.filename else "the output"
        fault = f"{file} cannot be used: {error.strerror or error}; check its name and its rights, or give another"
        print(f"{name}: error: {fault}", file=sys.stderr)
        return 1


def code_of(name: str, work: Callable[[], int | None], interrupted: str, explain: Callable) -> int:
    """run_script without its care for consoles that are gone."""
    try:
        return work() or 0
    except KeyboardInterrupt:
        print(f"{name}: {interrupted}", file=sys.stderr)
        return 130
    except SystemExit as end:  # argparse's, after --help
        return end.code
    except OSError:
        raise
    except Exception as error:
        fault = str(error) if isinstance(error, RunError) else explain(error)
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "OutOfMemory" in type(error).__name__:
            fault = f"this machine has too little memory for that ({error!s:.200}); ask for less"
        if fault is None:
            raise
        print(f"{name}: error: {' '.join(fault.split())[:1000]}", file=sys.stderr)
        return 1


def check_option(options, name: str, least: int, most: int):
    """Raise RunError, which names the option, unless the whole number options.NAME lies between least and most."""
    check_value(int, getattr(options, name), f"--{name}", (least, most))


def check_space(folder: Path, tokens: int, what: str, remedy: str):
    """
    Raise RunError unless the disk of a folder, which need not exist yet, has room for shards of so many tokens. what:
    what needs the room, and remedy: how to need less, in the words of the message.
    """
    existing = next(parent for parent in (Path(folder), *Path(folder).absolute().parents) if parent.exists())
    needed, free = 2 * tokens, shutil.disk_usage(existing).free
    require(needed <= free,
            f"{what} need {needed / 1e9:,.1f} GB and {folder} has {free / 1e9:,.1f} GB free; {remedy}, free "
            "some space or give another folder with -o")

# ----------------------------------------------------------------------------------------------------------------------
# Shards


def as_uint16(tokens) -> np.ndarray:
    """Tokens (n,) as uint16. ValueError for one that does not fit."""
    tokens = np.asarray(tokens)
    if tokens.size and (tokens.min() < 0 or tokens.max() >= 2 ** 16):
        raise ValueError(f"shards hold tokens from 0 to 65535, got {tokens.min()} to {tokens.max()}")
    return tokens.astype("<u2")


def write_shard(path: Path, tokens: np.ndarray):
    """Write tokens (n,) as one shard, atomically. ValueError for a token that does not fit in 16 bits, RunError where the disk refuses."""
    tokens, header = as_uint16(tokens), np.zeros(HEADER_INTS, dtype="<i4")
    header[:4] = SHARD_MAGIC, SHARD_VERSION, len(tokens), 2

    def write(file):
        file.write(header.tobytes())
        file.write(tokens.data)
    write_atomically(Path(path), write)


def splits_in(name: str) -> set[str]:
    """The splits that a shard's file name stands for, as the trainer reads it."""
    return {split for split in SPLITS if is_of_split(Path(name), split)}


def files_of(folder: Path, name: str, splits: Iterable[str] = SPLITS) -> list[Path]:
    """The shards called NAME of some splits in a folder, finished or not, and what a killed process left of them."""
    ours = re.compile(rf"\.?{re.escape(name)}_({'|'.join(splits)})_\d{{6}}\.bin(\.part)?(\.\d+)?")
    return [path for path in Path(folder).iterdir() if ours.fullmatch(path.name)]


def claim_folder(folder: Path, name: str):
    """Make the folder for shards called NAME. RunError if that fails, or if the trainer would take others for these, or one split for the other."""
    folder = Path(folder)
    require(re.fullmatch(r"[\w.-]+", name) and len(name.encode()) <= 200,
            f"shards cannot be called {name[:60]!r}: use up to 200 letters, digits, '_', '.' and '-'")
    require(not splits_in(f"{name}.bin"),
            f"shards cannot be called {name!r}: between '_', '.' or '-' the words train and val name the "
            "splits; leave them out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = {path.name for path in folder.glob("*.bin")} - {path.name for path in files_of(folder, name)}
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror}; give another folder with -o") from None
    # of a split the trainer takes the files whose names end in a number, and others only where there are none
    mixed = sorted(other for other in others
                   if len(splits_in(other)) == 2 or splits_in(other) and Path(other).stem[-1].isdigit())
    require(not mixed,
            f"{folder} holds {', '.join(mixed)[:200]}, which the trainer would mix with {name}'s shards; give another "
            "folder with -o, or delete it")


class ShardWriter:
    """Collects one split's documents, a shard for every `shard_tokens`. Until close() files end in .part: the trainer never sees half a corpus."""

    def __init__(self, folder: Path, name: str, split: str, end_of_text: int, shard_tokens: int = SHARD_TOKENS):
        self.folder, self.name, self.split, self.end_of_text, self.shard_tokens = Path(folder), name, split, end_of_text, shard_tokens
        self.held, self.held_tokens, self.parts = [], 0, []
        self.documents, self.tokens, self.text_bytes = 0, 0, 0
        require(1 <= shard_tokens < 2 ** 31,
                f"a shard holds at least 1 token and less than 2^31, as its header counts them; got {shard_tokens}")
        claim_folder(self.folder, name)
        try:
            notes = [self.folder / note for note in ("meta.json", ".checked.json")]
            for old in [*notes, *files_of(self.folder, name, [split])]:  # a shorter corpus must not leave shards behind
                old.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(f"cannot replace {old}: {error.strerror}; give another folder with -o") from None

    def add(self, tokens, text_bytes: int, begins: bool = True):
        """A document, or with begins=False more of the last one: its tokens without the end-of-text token, and the UTF-8 bytes they stand for."""
        tokens = np.concatenate((as_uint16([self.end_of_text] if begins else []), as_uint16(tokens)))
        self.documents, self.tokens, self.text_bytes = self.documents + begins, self.tokens + len(tokens), self.text_bytes + text_bytes
        while self.held_tokens + len(tokens) >= self.shard_tokens:
            room = self.shard_tokens - self.held_tokens
            self.held.append(tokens[:room])
            tokens = tokens[room:]
            self._flush()
        if len(tokens):
            self.held.append(tokens)
            self.held_tokens += len(tokens)

    def _flush(self):
        require(len(self.parts) < MOST_SHARDS,
                f"{self.tokens:,} tokens make more than {MOST_SHARDS:,} shards of {self.shard_tokens:,}; "
                "make shards larger")
        self.parts.append(self.folder / f"{self.name}_{self.split}_{len(self.parts):06d}.bin.part")
        write_shard(self.parts[-1], np.concatenate(self.held))
        self.held, self.held_tokens = [], 0

    def close(self) -> dict:
        """Write what is left and give every shard its name; returns this split's facts for meta.json."""
        if self.held:
            self._flush()
        shards = [part.with_suffix("") for part in self.parts]
        for part, shard in zip(self.parts, shards):
            os.replace(part, shard)
        return dict(documents=self.documents, tokens=self.tokens, utf8_bytes=self.text_bytes, sha256=sha256_of(shards))

    def discard(self):
        """Delete all that was written."""
        for part in self.parts:
            part.unlink(missing_ok=True)
            part.with_suffix("").unlink(missing_ok=True)


def write_folder(folder: Path, name: str, documents: Iterable[tuple], end_of_text: int, merges: dict[bytes, int] | None = None,
                 shard_tokens: int = SHARD_TOKENS, beside: Iterable[str] = (), **facts) -> dict:
    """
    A whole folder: shards of both splits, the merges if there are any, and meta.json with the facts. Returns the meta
    data. documents yields (split, tokens, text_bytes, begins), see ShardWriter.add. beside: names of other files that
    it writes into the folder, whose sha256 is recorded too. Whatever interrupts it, no shard and no meta.json is left.
    RunError if a split gets no document.
    """
    folder, own_merges = Path(folder), Path(folder) / f"{name}.tiktoken"
    writers = {split: ShardWriter(folder, name, split, end_of_text, shard_tokens) for split in SPLITS}
    for other in set(folder.glob("*.tiktoken")) - {own_merges} if merges else ():
        require(read_merges(other) == merges,
                f"{other} holds other merges than this tokenizer's, and the trainer could count bytes by them; "
                "give another folder with -o, or delete it")
    try:
        for split, *document in documents:
            writers[split].add(*document)
        for split, writer in writers.items():
            count = sum(w.documents for w in writers.values())
            require(writer.documents,
                    f"none of {count} documents fell to the {split} set; give more text or another --val_fraction")
        if merges:
            write_merges(own_merges, merges)
            beside = [*beside, own_merges.name]
        else:
            own_merges.unlink(missing_ok=True)
        recorded = dict(beside=dict(sha256=sha256_of([folder / other for other in beside]))) if beside else {}
        splits = {split: writer.close() for split, writer in writers.items()}
        meta = dict(vocab_size=end_of_text + 1, end_of_text=end_of_text, **facts, **recorded, **splits)
        write_meta(folder, **meta)
        return meta
    except BaseException:
        for writer in writers.values():
            writer.discard()
        raise

# ----------------------------------------------------------------------------------------------------------------------
# meta.json and checksums


def write_meta(folder: Path, **facts):
    """meta.json of a folder of shards; vocab_size and tokenizer must be among the facts."""
    missing = {"vocab_size", "tokenizer"} - set(facts)
    if missing:
        raise ValueError(f"meta.json needs {sorted(missing)}")
    write_atomically(Path(folder) / "meta.json", lambda file: file.write(json.dumps(facts, indent=1).encode()))


def recorded_in(meta: dict, section: str, path: Path) -> dict[str, str]:
    """
    {file name: sha256} that a section (train, val, beside) of a folder's meta data records. RunError, which names
    meta.json, for another kind of value.
    """
    facts = meta.get(section, {})
    digests = facts.get("sha256", {}) if isinstance(facts, dict) else None
    require(isinstance(digests, dict)
            and all(re.fullmatch(r"[^/\\\0]{1,255}", name) and name not in (".", "..") for name in digests)
            and all(isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) for digest in digests.values()),
            f"{path}: {section} has no list of files of this folder and their sha256; make the shards again, or give "
            "--vocab_size and delete it")
    return digests


def check_folder(folder: Path):
    """
    Raise RunError unless all files whose sha256 meta.json records are there and unchanged, and each split that has such
    records holds no other shards. Where meta.json records nothing, or is not there, there is nothing to check.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    recorded = {section: recorded_in(meta, section, folder / "meta.json") for section in (*SPLITS, "beside")}
    if recorded["train"] or recorded["val"]:
        check_shards(Config(data=str(folder.absolute())))
    for name in recorded["beside"]:
        require(os.path.isfile(folder / name),
                f"{folder} lacks {name[:200]}, which its meta.json records; fetch or make the folder again")
    digests = sha256_of(folder / name for name in recorded["beside"])
    changed = [name for name, digest in recorded["beside"].items() if digests[name] != digest]
    require(not changed,
            f"{folder}: {', '.join(changed)[:200]} has changed since it was written: its sha256 is not the one in "
            "meta.json; fetch or make it again")


def sha256_of(shards: Iterable[Path]) -> dict[str, str]:
    """{name: sha256} of files."""
    digests = {}
    for path in shards:
        with open(path, "rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests

# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


def encode_bytes(text: bytes) -> np.ndarray:
    """Bytes as tokens 0..255; 256 is the end of text."""
    return np.frombuffer(text, dtype=np.uint8)


def write_merges(path: Path, merges: dict[bytes, int]):
    """A .tiktoken file: a token in base64 and its id on every line, by id."""
    lines = [base64.b64encode(token) + b" %d\n" % i for token, i in sorted(merges.items(), key=lambda item: item[1])]
    write_atomically(Path(path), lambda file: file.write(b"".join(lines)))


def gpt2_merges() -> dict[bytes, int]:
    """GPT-2's 50,256 merges by tiktoken, which may have to download them. RunError if it cannot."""
    import tiktoken
    try:
        return tiktoken.get_encoding("gpt2")._mergeable_ranks
    except Exception as error:  # of the network, in whatever library it came up
        raise RunError(f"tiktoken cannot get GPT-2's merges ({type(error).__name__}); connect once, or give data/tokenize_text.py a "
                       "--tokenizer FILE.tiktoken") from None


def load_merges(tokenizer: str) -> dict[bytes, int] | None:
    """{token: id} of a tokenizer, None for bytes. RunError if there is no such tokenizer or its ids do not fit in 16 bits."""
    merges = None if tokenizer == "bytes" else gpt2_merges() if tokenizer == "gpt2" else read_merges(Path(tokenizer))
    require(not merges or len(merges) < 2 ** 16,
            f"{tokenizer} has {len(merges or ())} tokens besides the end of text, and shards hold at most 65535; give "
            "a smaller vocabulary")
    return merges


def encoder(merges: dict[bytes, int] | None) -> Callable[[list], list]:
    """A function from a list of texts (bytes without merges, str with) to a list of their tokens, without the end of text."""
    if not merges:
        return lambda texts: [encode_bytes(text) for text in texts]
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str
    encoding = tiktoken.Encoding("merges", pat_str=r50k_pat_str, mergeable_ranks=merges, special_tokens={"<|endoftext|>": len(merges)})

    def encode(texts: list[str]) -> list[list[int]]:
        try:
            return encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of tiktoken's Rust code, which derives from BaseException
                raise
            raise RunError("tiktoken's pattern overflows on a document, as it does on a run of about a million blanks; shorten such runs") from None
    return encode
