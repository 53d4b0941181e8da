"""
The validation loss of a unigram and of a bigram model: what a transformer must beat before its loss means anything.

    python -m studies.ngram_loss DIR [--train_tokens 10000000] [--val_tokens 10485760]

Fitted on the first train_tokens tokens of the folder's training shards, evaluated on the first val_tokens of its
validation shards (fewer where there are fewer), each token from the one before it as the trainer does; give the
trainer's --val_tokens for the same tokens. Nats a token, and bits a byte where the vocabulary is bytes. Memory: at most
about 40 bytes a training token.

    unigram   p(w) = (c(w) + 1/2) / (n + V/2)                                           add-half: no token is impossible
    bigram    p(w | v) = max(c(v w) - D, 0) / c(v .) + D t(v) / c(v .) p(w), or p(w) where c(v .) = 0

c counts, n is the number of training tokens, V of token ids, t(v) of different tokens seen after v. The discount is
D = n1 / (n1 + 2 n2) with n1 and n2 the number of pairs seen once and twice; 1/2 where n1 is 0.
Source: absolute discounting, Ney, Essen and Kneser 1994, interpolated with the unigram.
"""

import argparse
import math
import sys

import numpy as np

from data.command_line import check_option, run_script
from train_gpt import Config, adopt_vocabulary, checked, find_shards, open_shard, require, token_bytes


def first_tokens(config: Config, split: str, count: int) -> np.ndarray:
    """
    The first `count` tokens of a split (n,), all where there are fewer. RunError for fewer than two or for a token
    outside the vocabulary.
    """
    pieces = []
    for file in find_shards(config, split):
        pieces.append(open_shard(file)[:count - sum(map(len, pieces))])
    tokens = checked(np.concatenate(pieces), config)
    require(len(tokens) >= 2,
            f"{len(tokens)} {split} tokens of {config.data} are too few for a bigram; ask for at least 2, or "
            "give more data")
    return tokens


def unigram(train: np.ndarray, vocabulary: int) -> np.ndarray:
    """p(w) of every token id, (vocabulary,) float64, from training tokens (n,)."""
    return (np.bincount(train, minlength=vocabulary) + 0.5) / (len(train) + 0.5 * vocabulary)


def bigram(train: np.ndarray, previous: np.ndarray, following: np.ndarray, p: np.ndarray) -> np.ndarray:
    """
    p(following | previous), (n,) float64 for pairs given as two (n,), from training tokens and the unigram p
    (vocabulary,).
    """
    # pairs v w as one number, with their counts and the discount
    vocabulary = len(p)
    pairs, counts = np.unique(train[:-1].astype(np.int64) * vocabulary + train[1:], return_counts=True)
    once, twice = np.sum(counts == 1), np.sum(counts == 2)
    discount = once / (once + 2 * twice) if once else 0.5

    # c(v .), t(v) and c(v w) of the pairs asked for
    context_count = np.bincount(train[:-1], minlength=vocabulary)[previous]
    context_types = np.bincount(pairs // vocabulary, minlength=vocabulary)[previous]
    wanted = previous.astype(np.int64) * vocabulary + following
    index = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    count = np.where(pairs[index] == wanted, counts[index], 0)

    seen = (np.maximum(count - discount, 0) + discount * context_types * p[following]) / np.maximum(context_count, 1)
    return np.where(context_count > 0, seen, p[following])


def report(options: argparse.Namespace):
    """Print both losses. RunError for data that are too few, or not there."""
    for name in ("train_tokens", "val_tokens"):
        check_option(options, name, 1, 10 ** 15)

    # the data
    config = Config(data=options.folder)
    adopt_vocabulary(config)
    train = first_tokens(config, "train", options.train_tokens)
    val = first_tokens(config, "val", options.val_tokens + 1)
    previous, following = val[:-1], val[1:]
    text_bytes = token_bytes(config)[following].sum() if config.vocab_size == 257 else 0

    # the losses
    p = unigram(train, config.vocab_size)
    print(f"{options.folder}: fitted on {len(train):,} training tokens, {len(following):,} validation tokens")
    for name, probability in dict(unigram=p[following], bigram=bigram(train, previous, following, p)).items():
        loss = -np.log(probability).mean()
        line = f"{name:8} {loss:.4f} nats/token"
        if text_bytes:
            line += f"  {loss * len(following) / math.log(2) / text_bytes:.4f} bits/byte"
        print(line)


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, 1 for a fault (one line on stderr), 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="ngram_loss.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", help="folder of shards")
    parser.add_argument("--train_tokens", type=int, default=10_000_000, help="training tokens to fit on")
    parser.add_argument("--val_tokens", type=int, default=10_485_760, help="validation tokens to predict")
    options = parser.parse_args(argv)
    return run_script("ngram_loss.py", lambda: report(options))


if __name__ == "__main__":
    sys.exit(main())
