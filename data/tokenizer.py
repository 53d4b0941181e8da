"""
Tokenizers: bytes, GPT-2's merges, or those of a .tiktoken file. A tokenizer is its merges, {token's bytes: id}, or None
for bytes; the end of text is the id after the last one and stands for no text.
"""

import base64
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from train_gpt import RunError, read_merges, require, write_atomically


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
        raise RunError(f"tiktoken cannot get GPT-2's merges ({type(error).__name__}); connect once, or give "
                       "data/tokenize_text.py a --tokenizer FILE.tiktoken") from None


def load_merges(tokenizer: str) -> dict[bytes, int] | None:
    """
    {token: id} of bytes, gpt2 or a .tiktoken file; None for bytes. RunError if there is no such tokenizer or its ids do
    not fit in 16 bits.
    """
    if tokenizer == "bytes":
        return None
    merges = gpt2_merges() if tokenizer == "gpt2" else read_merges(Path(tokenizer))
    require(len(merges) < 2 ** 16, f"{tokenizer} has {len(merges)} tokens besides the end of text, and shards hold at "
            "most 65535; give a smaller vocabulary")
    return merges


def build_encoder(merges: dict[bytes, int] | None) -> Callable[[list], list]:
    """
    A function from a list of texts (bytes without merges, str with) to a list of their tokens, without the end of text.
    It raises RunError for a text that tiktoken's pattern cannot take.
    """
    if not merges:
        return lambda texts: [encode_bytes(text) for text in texts]
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str
    encoding = tiktoken.Encoding("merges", pat_str=r50k_pat_str, mergeable_ranks=merges,
                                 special_tokens={"<|endoftext|>": len(merges)})

    def encode(texts: list[str]) -> list[list[int]]:
        try:
            return encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of tiktoken's Rust code, which derives from BaseException
                raise
            raise RunError("tiktoken's pattern overflows on a document, as it does on a run of about a million blanks; "
                           "shorten such runs") from None
    return encode
