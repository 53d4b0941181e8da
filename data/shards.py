"""
Writing a folder of shards: the one place that knows what the trainer expects to find there.

    NAME_train_%06d.bin, NAME_val_%06d.bin    256 int32 header [20240520, 1, number of tokens, 2, 0, ...], then uint16 tokens
    meta.json                                 vocab_size, tokenizer, where the text came from, tokens, bytes and sha256; written last
    NAME.tiktoken                             the tokenizer's merges, where it has any (for bits per byte, and to turn tokens back into text)

A document begins with the end-of-text token, which is the last id of the vocabulary.
Format: modded-nanogpt's and llm.c's; the header's fourth number, bytes a token, is ignored there.
"""

import base64
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts beside this file are run by their path
from train_gpt import HEADER_INTS, SHARD_MAGIC, SHARD_VERSION, RunError, open_shard, write_atomically  # noqa: F401

SHARD_TOKENS = 100_000_000


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


def claim_folder(folder: Path, name: str):
    """Make the folder for shards called NAME. RunError if that fails, or if the trainer would take others for these, or one split for the other."""
    folder = Path(folder)
    if not re.fullmatch(r"[\w.-]+", name) or "train" in name or "val" in name:
        raise RunError(f"shards cannot be called {name!r}: use letters, digits, '_', '.' and '-', but not 'train' or 'val', which name the splits")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = sorted(path.name for path in folder.glob("*.bin") if not re.fullmatch(rf"{re.escape(name)}_(train|val)_\d{{6}}\.bin", path.name))
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror}; give another folder with -o") from None
    if others:
        raise RunError(f"{folder} holds {others[0]}, which the trainer would mix with {name}'s shards; give another folder with -o, or delete it")


class ShardWriter:
    """Collects one split's documents, a shard for every `shard_tokens`. Until close() files end in .part: the trainer never sees half a corpus."""

    def __init__(self, folder: Path, name: str, split: str, end_of_text: int, shard_tokens: int = SHARD_TOKENS):
        self.folder, self.name, self.split, self.end_of_text, self.shard_tokens = Path(folder), name, split, end_of_text, shard_tokens
        self.held, self.held_tokens, self.parts = [], 0, []
        self.documents, self.tokens, self.text_bytes = 0, 0, 0
        if shard_tokens < 1:
            raise RunError(f"a shard holds at least 1 token, got {shard_tokens}")
        claim_folder(self.folder, name)
        try:
            for old in [self.folder / "meta.json", *self.folder.glob(f"{name}_{split}_*.bin*")]:  # a shorter corpus must not leave old shards behind
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
                 shard_tokens: int = SHARD_TOKENS, **facts) -> dict:
    """
    A whole folder: shards of both splits, the merges if there are any, and meta.json with the facts. Returns the meta data.
    documents yields (split, tokens, text_bytes, begins), see ShardWriter.add. Whatever interrupts it, no shard and no meta.json is left.
    RunError if a split gets no document.
    """
    folder, own_merges = Path(folder), Path(folder) / f"{name}.tiktoken"
    writers = {split: ShardWriter(folder, name, split, end_of_text, shard_tokens) for split in ("train", "val")}
    for other in set(folder.glob("*.tiktoken")) - {own_merges} if merges else ():
        if read_merges(other) != merges:
            raise RunError(f"{other} holds other merges than this tokenizer's, and the trainer could count bytes by them; "
                           "give another folder with -o, or delete it")
    try:
        for split, *document in documents:
            writers[split].add(*document)
        for split, writer in writers.items():
            if not writer.documents:
                count = sum(w.documents for w in writers.values())
                raise RunError(f"none of {count} documents fell to the {split} set; give more text or another --val_fraction")
        if merges:
            write_merges(own_merges, merges)
        else:
            own_merges.unlink(missing_ok=True)
        meta = dict(vocab_size=end_of_text + 1, **facts, **{split: writer.close() for split, writer in writers.items()})
        write_meta(folder, **meta)
        return meta
    except BaseException:
        for writer in writers.values():
            writer.discard()
        raise


def write_meta(folder: Path, **facts):
    """meta.json of a folder of shards; vocab_size and tokenizer must be among the facts."""
    missing = {"vocab_size", "tokenizer"} - set(facts)
    if missing:
        raise ValueError(f"meta.json needs {sorted(missing)}")
    write_atomically(Path(folder) / "meta.json", lambda file: file.write(json.dumps(facts, indent=1).encode()))


def sha256_of(shards: list[Path]) -> dict[str, str]:
    """{name: sha256} of files."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards}


def encode_bytes(text: bytes) -> np.ndarray:
    """Bytes as tokens 0..255; 256 is the end of text."""
    return np.frombuffer(text, dtype=np.uint8)


def read_merges(path: Path) -> dict[bytes, int]:
    """{token: id} of a .tiktoken file. RunError if it is none, or if its ids are not 0, 1, .. n-1 with every single byte among the tokens."""
    import tiktoken.load
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        merges = tiktoken.load.load_tiktoken_bpe(str(path), digest)  # tiktoken caches by path: only the hash makes it notice a changed file
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}; --tokenizer takes gpt2, bytes or a .tiktoken file") from None
    except ValueError:
        raise RunError(f"{path} is no .tiktoken file: its lines must be a token in base64, a space and its id") from None
    if sorted(merges.values()) != list(range(len(merges))) or not all(bytes([b]) in merges for b in range(256)):
        raise RunError(f"{path} is no whole set of merges: ids must be 0 to n-1, each once, with all 256 single bytes; got {len(merges)} tokens")
    return merges


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
    if merges and len(merges) + 1 > 2 ** 16:
        raise RunError(f"{tokenizer} has {len(merges)} tokens besides the end of text, and shards hold at most 65535; give a smaller vocabulary")
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
