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

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data.tokenizer import write_merges
from train_gpt import (
    HEADER_INTS,
    SHARD_MAGIC,
    SHARD_VERSION,
    Config,
    RunError,
    check_shards,
    is_of_split,
    read_merges,
    read_meta,
    require,
    sha256_of_file,
    write_atomically,
)

SHARD_TOKENS = 100_000_000
MOST_SHARDS = 10 ** 6   # of one split: six digits
SPLITS = ("train", "val")


# ---- Shards -----------------------------------------------------------------


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


def as_uint16(tokens) -> np.ndarray:
    """Tokens (n,) as uint16. ValueError for one that does not fit."""
    tokens = np.asarray(tokens)
    if tokens.size and (tokens.min() < 0 or tokens.max() >= 2 ** 16):
        raise ValueError(f"shards hold tokens from 0 to 65535, got {tokens.min()} to {tokens.max()}")
    return tokens.astype("<u2")


def write_shard(path: Path, tokens: np.ndarray):
    """
    Write tokens (n,) as one shard, atomically. ValueError for a token that does not fit in 16 bits, RunError where the
    disk refuses.
    """
    tokens = as_uint16(tokens)
    header = np.zeros(HEADER_INTS, dtype="<i4")
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
    """
    Make the folder for shards called NAME. RunError if that fails, or if the trainer would take others for these, or
    one split for the other.
    """
    # the name
    folder = Path(folder)
    require(re.fullmatch(r"[\w.-]+", name) and len(name.encode()) <= 200,
            f"shards cannot be called {name[:60]!r}: use up to 200 letters, digits, '_', '.' and '-'")
    require(not splits_in(f"{name}.bin"),
            f"shards cannot be called {name!r}: between '_', '.' or '-' the words train and val name the "
            "splits; leave them out")

    # the folder, and what else is in it
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
    """
    Collects one split's documents, a shard for every `shard_tokens`. Until close() files end in .part: the trainer
    never sees half a corpus.
    """

    def __init__(self, folder: Path, name: str, split: str, end_of_text: int, shard_tokens: int = SHARD_TOKENS):
        self.folder = Path(folder)
        self.name = name                  # first part of the shards' file names
        self.split = split                # train or val
        self.end_of_text = end_of_text    # the token id that begins a document
        self.shard_tokens = shard_tokens  # tokens of a full shard
        self.held = []                    # arrays of tokens that no file has yet
        self.held_tokens = 0              # how many tokens these are
        self.unfinished = []              # paths of the shards written so far, each with .part at its end
        self.documents = 0
        self.tokens = 0                   # of all documents, end-of-text tokens included
        self.text_bytes = 0               # UTF-8 bytes that the tokens stand for

        # a folder with nothing of an earlier corpus: a shorter one must not leave shards behind
        require(1 <= shard_tokens < 2 ** 31,
                f"a shard holds at least 1 token and less than 2^31, as its header counts them; got {shard_tokens}")
        claim_folder(self.folder, name)
        try:
            notes = [self.folder / note for note in ("meta.json", ".checked.json")]
            for old in [*notes, *files_of(self.folder, name, [split])]:
                old.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(f"cannot replace {old}: {error.strerror}; give another folder with -o") from None

    def add(self, tokens, text_bytes: int, begins: bool = True):
        """
        Add a document, or with begins=False more of the last one: its tokens without the end-of-text token, and the
        number of UTF-8 bytes that they stand for.
        """
        tokens = np.concatenate((as_uint16([self.end_of_text] if begins else []), as_uint16(tokens)))
        self.documents += begins
        self.tokens += len(tokens)
        self.text_bytes += text_bytes

        while self.held_tokens + len(tokens) >= self.shard_tokens:
            room = self.shard_tokens - self.held_tokens
            self.held.append(tokens[:room])
            tokens = tokens[room:]
            self._flush()
        if len(tokens):
            self.held.append(tokens)
            self.held_tokens += len(tokens)

    def _flush(self):
        require(len(self.unfinished) < MOST_SHARDS,
                f"{self.tokens:,} tokens make more than {MOST_SHARDS:,} shards of {self.shard_tokens:,}; "
                "make shards larger")
        self.unfinished.append(self.folder / f"{self.name}_{self.split}_{len(self.unfinished):06d}.bin.part")
        write_shard(self.unfinished[-1], np.concatenate(self.held))
        self.held = []
        self.held_tokens = 0

    def close(self) -> dict:
        """Write what is left and give every shard its name; returns this split's facts for meta.json."""
        if self.held:
            self._flush()
        shards = [path.with_suffix("") for path in self.unfinished]
        for path, shard in zip(self.unfinished, shards):
            os.replace(path, shard)
        return dict(documents=self.documents, tokens=self.tokens, utf8_bytes=self.text_bytes, sha256=sha256_of(shards))

    def discard(self):
        """Delete all that was written."""
        for path in self.unfinished:
            path.unlink(missing_ok=True)
            path.with_suffix("").unlink(missing_ok=True)


def write_folder(folder: Path, name: str, documents: Iterable[tuple], end_of_text: int,
                 merges: dict[bytes, int] | None = None, shard_tokens: int = SHARD_TOKENS, beside: Iterable[str] = (),
                 **facts) -> dict:
    """
    A whole folder: shards of both splits, the merges if there are any, and meta.json with the facts. Returns the meta
    data. documents yields (split, tokens, text_bytes, begins), see ShardWriter.add. beside: names of other files that
    it writes into the folder, whose sha256 is recorded too. Whatever interrupts it, no shard and no meta.json is left.
    RunError if a split gets no document.
    """
    folder = Path(folder)
    merges_file = folder / f"{name}.tiktoken"
    writers = {split: ShardWriter(folder, name, split, end_of_text, shard_tokens) for split in SPLITS}
    for other in set(folder.glob("*.tiktoken")) - {merges_file} if merges else ():
        require(read_merges(other) == merges,
                f"{other} holds other merges than this tokenizer's, and the trainer could count bytes by them; "
                "give another folder with -o, or delete it")

    try:
        # the documents
        for split, *document in documents:
            writers[split].add(*document)
        count = sum(writer.documents for writer in writers.values())
        for split, writer in writers.items():
            require(writer.documents,
                    f"none of {count} documents fell to the {split} set; give more text or another --val_fraction")

        # what lies beside them
        if merges:
            write_merges(merges_file, merges)
            beside = [*beside, merges_file.name]
        else:
            merges_file.unlink(missing_ok=True)
        recorded = dict(beside=dict(sha256=sha256_of([folder / other for other in beside]))) if beside else {}

        # the shards' names, and last meta.json
        splits = {split: writer.close() for split, writer in writers.items()}
        meta = dict(vocab_size=end_of_text + 1, end_of_text=end_of_text, **facts, **recorded, **splits)
        write_meta(folder, **meta)
        return meta
    except BaseException:
        for writer in writers.values():
            writer.discard()
        raise


# ---- meta.json and checksums ------------------------------------------------


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
    # the shards
    folder = Path(folder)
    meta = read_meta(folder)
    recorded = {section: recorded_in(meta, section, folder / "meta.json") for section in (*SPLITS, "beside")}
    if recorded["train"] or recorded["val"]:
        check_shards(Config(data=str(folder.absolute())))

    # the files beside them
    for name in recorded["beside"]:
        require(os.path.isfile(folder / name),
                f"{folder} lacks {name[:200]}, which its meta.json records; fetch or make the folder again")
    digests = sha256_of(folder / name for name in recorded["beside"])
    changed = [name for name, digest in recorded["beside"].items() if digests[name] != digest]
    require(not changed,
            f"{folder}: {', '.join(changed)[:200]} has changed since it was written: its sha256 is not the one in "
            "meta.json; fetch or make it again")


def sha256_of(files: Iterable[Path]) -> dict[str, str]:
    """{name: sha256} of files."""
    return {path.name: sha256_of_file(path) for path in files}
