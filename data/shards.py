"""
Writing a folder of shards: the one place that knows what the trainer expects to find there.

    NAME_train_%06d.bin, NAME_val_%06d.bin    256 int32 header [20240520, 1, number of tokens, 2, 0, ...], then uint16 tokens
    meta.json                                 vocab_size, tokenizer, where the text came from, tokens, bytes and sha256 of every shard
    *.tiktoken                                the tokenizer's merges, where it has any (for bits per byte, and to turn tokens back into text)

A document begins with the end-of-text token, which is the last id of the vocabulary.
Format: modded-nanogpt's and llm.c's; the header's fourth number, bytes a token, is ignored there.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts beside this file are run by their path
from train_gpt import HEADER_INTS, SHARD_MAGIC, SHARD_VERSION, RunError, open_shard, write_atomically  # noqa: E402, F401


def write_shard(path: Path, tokens: np.ndarray):
    """Write tokens (n,) as one shard, atomically. ValueError for a token that does not fit in 16 bits."""
    tokens = np.asarray(tokens)
    if tokens.size and (tokens.min() < 0 or tokens.max() >= 2 ** 16):
        raise ValueError(f"shards hold tokens from 0 to 65535, got {tokens.min()} to {tokens.max()}")
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:4] = SHARD_MAGIC, SHARD_VERSION, len(tokens), 2
    write_atomically(Path(path), lambda file: file.write(header.tobytes() + tokens.astype("<u2").tobytes()))


class ShardWriter:
    """Collects documents of one split and writes a shard whenever `shard_tokens` have come together."""

    def __init__(self, folder: Path, name: str, split: str, end_of_text: int, shard_tokens: int = 100_000_000):
        self.folder, self.name, self.split, self.end_of_text, self.shard_tokens = Path(folder), name, split, end_of_text, shard_tokens
        self.parts, self.held, self.written = [], 0, []
        self.documents, self.tokens, self.text_bytes = 0, 0, 0
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob(f"{name}_{split}_*.bin"):  # a shorter corpus than before must not leave old shards behind
            old.unlink()

    def add(self, tokens: np.ndarray, text_bytes: int):
        """One document: its tokens without the end-of-text token, and the UTF-8 bytes they stand for."""
        tokens = np.concatenate(([self.end_of_text], tokens)).astype(np.int64)
        self.documents, self.tokens, self.text_bytes = self.documents + 1, self.tokens + len(tokens), self.text_bytes + text_bytes
        while self.held + len(tokens) >= self.shard_tokens:
            room = self.shard_tokens - self.held
            self.parts.append(tokens[:room])
            tokens = tokens[room:]
            self._flush()
        if len(tokens):
            self.parts.append(tokens)
            self.held += len(tokens)

    def _flush(self):
        path = self.folder / f"{self.name}_{self.split}_{len(self.written):06d}.bin"
        write_shard(path, np.concatenate(self.parts))
        self.written.append(path)
        self.parts, self.held = [], 0

    def close(self) -> dict:
        """Write what is left; returns this split's facts for meta.json."""
        if self.parts:
            self._flush()
        return dict(documents=self.documents, tokens=self.tokens, utf8_bytes=self.text_bytes,
                    sha256={path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in self.written})


def write_meta(folder: Path, **facts):
    """meta.json of a folder of shards; vocab_size and tokenizer must be among the facts."""
    missing = {"vocab_size", "tokenizer"} - set(facts)
    if missing:
        raise ValueError(f"meta.json needs {sorted(missing)}")
    write_atomically(Path(folder) / "meta.json", lambda file: file.write(json.dumps(facts, indent=1).encode()))


def encode_bytes(text: bytes) -> np.ndarray:
    """Bytes as tokens 0..255; 256 is the end of text."""
    return np.frombuffer(text, dtype=np.uint8).astype(np.int64)
