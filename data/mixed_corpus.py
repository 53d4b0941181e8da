"""
Two corpora of bytes in one folder, for runs that read a share of each.

    python -m data.mixed_corpus data/python_bytes data/english_bytes --shares 2 6 -o data/mixed_2_6
    python train_gpt.py --data data/mixed_2_6 --variant data_order:rows=shuffled,take=2,6

Training data are one shard a corpus, its first --tokens tokens; the variant data_order mixes their rows, so that a
training shard has text of one corpus only. Validation data are mixed here, because no variant may touch them: stretches
of the corpora in turn, --stretch tokens each, as many of a corpus as its number in --shares says, until one corpus has
no more. Each stretch begins with the end of text and goes on where the corpus' last one ended, so that no document
sees the other corpus. A run's first validation tokens have these shares, too, where they hold a few turns.

Exit code 1 and one line for a fault.
"""

import argparse
import sys
from itertools import count
from pathlib import Path

import numpy as np

from data.command_line import check_option, run_script
from data.shards import claim_folder, sha256_of, write_meta, write_shard
from train_gpt import Config, find_shards, open_shard, read_meta, require

TOKENS = 10_000_000     # of a training shard
STRETCH = 1024          # tokens of a stretch of validation data
END_OF_TEXT = 256
NAME = "mixed"


def read_split(folder: str, split: str, most: int | None = None) -> np.ndarray:
    """The first tokens of a split of a folder, (n,) uint16, all of them where most is None."""
    pieces = [open_shard(shard) for shard in find_shards(Config(data=folder), split)]
    return np.concatenate(pieces)[:most]


def mix_stretches(corpora: list[np.ndarray], shares: list[int], stretch: int) -> np.ndarray:
    """
    Stretches of the corpora in turn, see above, (n,) uint16. RunError where a corpus is shorter than its part of one
    turn.
    """
    length = stretch - 1  # the end of text is the first of a stretch
    turns = min(len(tokens) // (length * share) for tokens, share in zip(corpora, shares))
    require(turns,
            f"a turn needs {[length * share for share in shares]} validation tokens of the two corpora, and they have "
            f"{[len(tokens) for tokens in corpora]}; lower --stretch or give a longer corpus")
    columns = [tokens[:turns * share * length].reshape(turns, share, length) for tokens, share in zip(corpora, shares)]
    stretches = np.concatenate(columns, axis=1)
    return np.pad(stretches, ((0, 0), (0, 0), (1, 0)), constant_values=END_OF_TEXT).ravel()


def build(folders: list[str], shares: list[int], output: Path, tokens: int = TOKENS, stretch: int = STRETCH) -> dict:
    """Write the folder; returns the meta data. RunError for corpora that are no bytes, and for numbers below 1."""
    # what is mixed
    require(len(shares) == len(folders) == 2 and min(shares) >= 1,
            f"--shares takes a number from 1 on for each of two corpora, got {shares} for {len(folders)}")
    for folder in folders:
        meta = read_meta(find_shards(Config(data=folder), "train")[0].parent)
        require(meta.get("vocab_size") == END_OF_TEXT + 1,
                f"{folder} has {meta.get('vocab_size', 'an unknown number of')} token ids, and bytes have 257; make it "
                "again by data/tokenize_text.py with --tokenizer bytes")

    # the shards, and last meta.json
    claim_folder(output, NAME)
    (output / "meta.json").unlink(missing_ok=True)
    shards = [output / f"{NAME}_train_{number:06d}.bin" for number, _ in zip(count(), folders)]
    val_shard = output / f"{NAME}_val_000000.bin"
    for folder, shard in zip(folders, shards):
        write_shard(shard, read_split(folder, "train", tokens))
    validation = mix_stretches([read_split(folder, "val") for folder in folders], shares, stretch)
    write_shard(val_shard, validation)
    splits = dict(train=dict(sha256=sha256_of(shards)),
                  val=dict(tokens=len(validation), sha256=sha256_of([val_shard])))
    meta = dict(vocab_size=END_OF_TEXT + 1, end_of_text=END_OF_TEXT, tokenizer="bytes", sources=list(folders),
                shares=list(shares), stretch=stretch, train_tokens=tokens, **splits)
    write_meta(output, **meta)
    return meta


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, 1 for a fault (one line on stderr), 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="mixed_corpus.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs=2, metavar="FOLDER", help="of shards of bytes")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--shares", nargs=2, type=int, default=[1, 1], metavar="N",
                        help="parts of each corpus (default: 1 1)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a training shard (default: %(default)s)")
    parser.add_argument("--stretch", type=int, default=STRETCH,
                        help="tokens of validation data in one piece (default: %(default)s)")
    options = parser.parse_args(argv)

    def work():
        check_option(options, "tokens", 2, 2 ** 31 - 1)
        check_option(options, "stretch", 2, 2 ** 24)
        meta = build(options.folders, options.shares, options.output, options.tokens, options.stretch)
        print(f"{options.output}: {' and '.join(options.folders)}, {meta['val']['tokens']:,} validation tokens")
    return run_script("mixed_corpus.py", work, f"interrupted; {options.output} holds no sound folder of shards")


if __name__ == "__main__":
    sys.exit(main())
