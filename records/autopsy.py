"""
Where an arm wins or loses against the baseline: the autopsy of a comparison.

At its end a run keeps the loss of every validation token beside its log, RUN_ID.losses.npz. Over P pairs of runs of
equal seeds and N tokens the mean difference is arm minus baseline, so that less than zero is better. A split deals the
tokens out to bins, each token to one of them:

    contribution of bin b = 1 / (P N) * sum over pairs p and tokens i in b of (loss of the arm - loss of the baseline)

The contributions of a split add up to the mean difference. The splits are

    position        how many tokens the model sees before the input token: 0, 1, 2 to 3, 4 to 7, ...
    recall 2, 4, 8  how far back the 2, 4, 8 tokens up to the input stood before: what recall (induction) would give
    frequency       how often the target token stands in the validation text
    kind            the target's kind of character or token, where the tokens' texts are known
    line            the kind of line that the target stands in, where the text is Python's as bytes
    document        the documents that contribute most

Position and recall count what the model sees: from the start of the row, or of the document within the row where
documents are masked. A context of n tokens is the input token and the n - 1 before it; it was seen where the same n
tokens stand earlier, all of them in the row and in the document.

Intervals are of 95 %, from a bootstrap that draws documents with replacement and, independently, seeds. With sums of
the differences S[c, b] by document and bin, mean over the pairs, and S[p, b] by pair and bin, n[c] tokens of a
document, which is drawn w[c] times, and v[p] draws of a pair,

    contribution of bin b in a resample = sum_c w[c] S[c, b] / sum_c w[c] n[c] + sum_p (v[p] - 1) S[p, b] / (P N)

What differs by document and by seed at once is noise in both terms and so counts twice in the variance: the interval
errs to the wide side. (Products v[p] w[c], the pigeonhole bootstrap, would count it three times: A. B. Owen, Annals of
Applied Statistics 1, 2007.) A bootstrap of n things gives intervals that are too narrow where n is small; so
1 + f (v - 1) stands for v, and likewise for w: f = sqrt(n / (n - 1)) t / z makes the interval of a mean as wide as
Student's. With one pair there is nothing to draw seeds from: the interval is of the documents alone. Where the
documents count as fewer than ten of equal length, (sum n)^2 / sum n^2, rows are drawn in their place, and the interval
says nothing of other texts.

A set of bins stands out by its surplus, its contribution less its tokens' share of the difference, where

    |surplus| > sqrt((z s_d)^2 + (t s_s)^2)

with s_d the surplus' standard deviation over drawn documents, s_s its standard error over the P seeds, z and t the
quantiles of the normal distribution and of Student's with P - 1 degrees of freedom, two-sided, at 0.05 divided by the
number of sets (Bonferroni): of twenty differences that are spread evenly at most about one has a set that stands out.
With two pairs t is in the hundreds, and hardly anything does; with one pair s_s is not known and left out.
"""

import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from records.runs import Run, file_beside, one_line
from records.splits import Split, Text, make_splits, read_text
from records.statistics import LEVEL
from train_gpt import (
    Config,
    RunError,
    data_folder,
    find_shards,
    open_shard,
    read_merges,
    read_meta,
    require,
    sha256_of_file,
)

FORMAT = "knotgpt-autopsy-1"
RESAMPLES = 1000
FEWEST_DOCUMENTS = 10       # of equal length; below that rows are drawn
LARGEST_DOCUMENTS = 8       # that the split by documents names
SMALLEST_SURPLUS = 1e-6     # nats; what is less does not stand out: float16 rounds a loss of 1 by up to 2.4e-4
ROUNDING = {"float32": 2.0 ** -11, "bfloat16": 2.0 ** -7}  # relative, of a kept loss: float16's, and of activations


# ---- What runs leave behind

def read_losses(run: Run) -> np.ndarray | None:
    """
    Return the losses that the run kept, (rows, T) float16, nats, of its first validation rows; None where it kept none.
    It raises RunError, one line with the file's name, for a file that is damaged or does not agree with the run's log.
    """
    path = file_beside(run.path, ".losses.npz")
    if not path.exists():
        return None
    remedy = "copy it again, or delete it: the comparison then has no autopsy of this run"
    config = run.config
    scored = run.facts.get("val_tokens")
    require(scored and config.get("sequence_length") and run.val_loss is not None,
            f"{path}: its log {run.path.name} does not say what was validated; {remedy}")

    # the array
    row_tokens = config["sequence_length"]
    rows = scored // row_tokens
    kept = min(rows, -(-config.get("keep_losses", scored) // row_tokens))
    require(kept > 0, f"{path}: by its log {run.path.name} the run kept no losses; {remedy}")
    losses = read_array(path, (kept, row_tokens), remedy)
    finite = np.isfinite(losses)
    require(finite.all(), f"{path}: {losses.size - np.count_nonzero(finite):,} of {losses.size:,} losses are no "
            f"numbers; {remedy}")
    require(losses.min() >= -ROUNDING["float32"], f"{path}: a loss is {losses.min()}, below zero; {remedy}")

    # its mean, where it is of all tokens that the log's loss is of
    if kept == rows:
        low, high = expected_mean(run)
        mean = losses.mean(dtype=np.float64)
        require(low <= mean <= high,
                f"{path}: the mean of its losses is {mean:.4f}, and by {run.path.name} it lies from {low:.4f} to "
                f"{high:.4f}; {remedy}")
    return losses


def read_array(path: Path, shape: tuple[int, int], remedy: str) -> np.ndarray:
    """Return the array `losses` of an .npz file, float16 of this shape. It raises RunError for any other file."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("losses.npy") as file:
            version = np.lib.format.read_magic(file)
            require(version == (1, 0), f"{path}: an array of format {version}, wanted (1, 0); {remedy}")
            stored, in_columns, dtype = np.lib.format.read_array_header_1_0(file)
            require(stored == shape and dtype == np.float16 and not in_columns,
                    f"{path}: losses of shape {stored} and type {dtype}, wanted {shape} and float16 by its log; "
                    f"{remedy}")
            size = 2 * shape[0] * shape[1]
            content = file.read(size + 1)
    except (OSError, EOFError, KeyError, ValueError, NotImplementedError, RuntimeError, zipfile.BadZipFile,
            zlib.error) as error:
        reason = f"{type(error).__name__}: {one_line(str(error))[:80]}"
        raise RunError(f"{path}: damaged, no array of losses ({reason}); {remedy}") from None
    require(len(content) == size, f"{path}: damaged, it holds other than {size:,} bytes of losses; {remedy}")
    return np.frombuffer(content, dtype="<f2").reshape(shape)


def expected_mean(run: Run) -> tuple[float, float]:
    """
    Return the least and the most that the mean of all kept losses can be, by the loss in the log.

    Both are of the same logits, but the log's loss is rounded to four digits and counts the head's padding, ids from V
    to V' that no text has. That adds -log(1 - q), with q the padding's share of the probability. Where all logits are
    equal, as at the start, q is 1 - V / V', and training lowers it: so it adds from 0 to log(V' / V). A kept loss is
    rounded to float16, by 2^-11 of it at most. Activations in bfloat16 have 8 bits, and two ways to compute a logit may
    round it differently.
    """
    logged = run.val_loss
    config = config_of(run)
    padding = np.log(config.padded_vocabulary / config.vocab_size) if config.vocab_size else 0.0
    rounding = 5e-5 + ROUNDING.get(run.facts.get("dtype"), ROUNDING["bfloat16"]) * abs(logged)
    return float(logged - rounding - padding), float(logged + rounding)


def config_of(run: Run) -> Config:
    """Return the settings that say which tokens the run was validated on and what the model sees of them."""
    names = ("data", "vocab_size", "document_token", "sequence_length", "document_mask")
    return Config(**{name: run.config[name] for name in names if name in run.config})


def validation_tokens(run: Run, rows: int) -> tuple[np.ndarray | None, str]:
    """
    Return (the tokens (rows T + 1,) uint16 of the run's first validation rows, ""). Row r has the inputs r T to
    r T + T - 1, and its targets are one further. Return (None, the reason in a sentence) where the run's data folder is
    not there or holds other validation data than the run's.
    """
    config = config_of(run)
    try:
        files = find_shards(config, "val")
        present = {file.name: sha256_of_file(file) for file in files}
        if present != run.val_sha256:
            return None, f"{config.data} holds other validation data than those of {run.path.name}."
        pieces = []
        missing = rows * config.sequence_length + 1
        for file in files:
            pieces.append(open_shard(file)[:missing])
            missing -= len(pieces[-1])
    except (RunError, OSError) as error:
        return None, f"the validation text cannot be read: {one_line(str(error))}."
    if missing:
        return None, f"{config.data} has {missing:,} validation tokens fewer than the losses of {run.path.name}."
    return np.concatenate(pieces), ""


def read_spellings(config: Config) -> tuple[list[bytes] | None, bool]:
    """
    Return (the bytes of every token id, whether the text is Python's as bytes). An id that stands for no text has b"".
    The first is None where the bytes are not known. It raises RunError for a damaged file of merges.
    """
    folder = data_folder(config)
    meta = read_meta(folder, must=False)
    if config.vocab_size == 257 and meta.get("tokenizer", "bytes") == "bytes":
        sources = f"{meta.get('source', '')} {meta.get('sources', '')}"
        return [bytes([i]) for i in range(256)] + [b""], re.search(r"\bPython\b|\.py\b", sources) is not None
    merges = next(folder.glob("*.tiktoken"), None)
    if merges is None:
        return None, False
    ranks = read_merges(merges)
    spellings = [b""] * max(config.vocab_size, len(ranks))
    for token, i in ranks.items():
        spellings[i] = token
    return spellings, False


# ---- Sums and intervals

def choose_clusters(text: Text) -> tuple[np.ndarray, str]:
    """
    Return ((N,) int64, the cluster that each token is drawn with; "documents" or "rows", what the clusters are). They
    are rows where the documents count as fewer than FEWEST_DOCUMENTS of equal length.
    """
    sizes = np.bincount(text.documents)
    if equal_documents(sizes) >= FEWEST_DOCUMENTS:
        return text.documents, "documents"
    return np.arange(len(text.inputs)) // text.row_tokens, "rows"


def equal_documents(sizes: np.ndarray) -> float:
    """Return as how many documents of equal length these count."""
    return float(sizes.sum() ** 2 / np.square(sizes).sum())


@dataclass
class Sums:
    """The differences in nats, summed by the B bins of all splits, one after the other."""

    by_pair: np.ndarray             # (P, B) float64
    by_cluster: np.ndarray          # (C, B) float64, mean over the pairs
    tokens: np.ndarray              # (C, B) int64: how many tokens these are of
    cluster_tokens: np.ndarray      # (C,) int64


def sum_bins(pairs: list, splits: list[Split], clusters: np.ndarray) -> Sums:
    """Return the sums by pair and bin, and by cluster and bin."""
    # by pair, and the differences' mean
    mean = np.zeros(len(clusters))
    by_pair = []
    for pair in pairs:
        difference = difference_of(pair)
        mean += difference / len(pairs)
        by_pair.append(np.concatenate([np.bincount(split.bins, weights=difference, minlength=len(split.labels))
                                       for split in splits]))

    # by cluster
    count = int(clusters.max()) + 1
    by_cluster, tokens = [], []
    for split in splits:
        size = len(split.labels)
        cells = clusters * size + split.bins
        tokens.append(np.bincount(cells, minlength=count * size).reshape(count, size))
        by_cluster.append(np.bincount(cells, weights=mean, minlength=count * size).reshape(count, size))
    return Sums(np.stack(by_pair), np.concatenate(by_cluster, axis=1), np.concatenate(tokens, axis=1),
                np.bincount(clusters))


def difference_of(pair: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Return arm minus baseline, (N,) float32."""
    arm, baseline = pair
    return np.subtract(arm, baseline, dtype=np.float32).ravel()


def widening(n: int) -> float:
    """
    Return by what the deviations of a bootstrap over n things are multiplied so that the interval of a mean is as wide
    as Student's. It is 0 for one thing, which has no deviations.
    """
    if n < 2:
        return 0.0
    tail = (1 - LEVEL) / 2
    return float(np.sqrt(n / (n - 1)) * stats.t.isf(tail, n - 1) / stats.norm.isf(tail))


def draw_weights(generator: np.random.Generator, n: int, resamples: int) -> np.ndarray:
    """Return how often each of n things is drawn, (resamples, n) float64, with the deviations from 1 widened."""
    times = generator.multinomial(n, np.full(n, 1 / n), size=resamples)
    return 1 + widening(n) * (times - 1.0)


@dataclass
class Resamples:
    """What R resamples give for the B bins."""

    by_cluster: np.ndarray          # (R, B): contributions where clusters are drawn, nats
    by_seed: np.ndarray             # (R, B): deviations from the contributions where seeds are drawn, nats
    shares: np.ndarray              # (R, B): of the tokens, where clusters are drawn

    def contributions(self) -> np.ndarray:
        return self.by_cluster + self.by_seed


def resample(sums: Sums, resamples: int) -> Resamples:
    """Draw clusters and, independently, seeds so many times. The draws are the same each time it is called."""
    generator = np.random.default_rng(0)
    pairs, clusters = len(sums.by_pair), len(sums.by_cluster)
    seeds = draw_weights(generator, pairs, resamples) - 1
    by_seed = seeds @ sums.by_pair / (pairs * sums.cluster_tokens.sum())
    by_cluster, shares = [], []
    for start in range(0, resamples, 100):  # so many at a time: there may be 10,000s of clusters
        weights = draw_weights(generator, clusters, min(100, resamples - start))
        scored = (weights @ sums.cluster_tokens)[:, None]
        by_cluster.append(weights @ sums.by_cluster / scored)
        shares.append(weights @ sums.tokens / scored)
    return Resamples(np.concatenate(by_cluster), by_seed, np.concatenate(shares))


def interval_of(samples: np.ndarray) -> tuple[float, float]:
    """Return the ends of the middle 95 % of the samples (R,)."""
    low, high = np.quantile(samples, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)


# ---- The result

def dissect(pairs: list[tuple[np.ndarray, np.ndarray]], tokens: np.ndarray, end_of_text: int,
            document_mask: bool = True, spellings: list[bytes] | None = None, python: bool = False,
            resamples: int = RESAMPLES) -> dict:
    """
    Return where the differences lie, ready for JSON.

    pairs: (losses of the arm, losses of the baseline) of equal seeds, each (rows, T), nats
    tokens: (rows T + 1,), those of the rows, as validation_tokens gives them
    end_of_text: the token id that begins a document; document_mask: whether the model sees its own document only
    spellings: the bytes of every token id, if they are known; python: whether the text is Python's as bytes

    The result has pairs, rows, row_tokens, tokens, documents, equal_documents (as how many of equal length these
    count), counted_from ("document" or "row"), drawn (what the intervals are over, [str], [] where there are none),
    difference, splits [dict(name, title, bins)], spread (of the documents' mean differences) and stands_out (see
    judge_sets). A bin has label, tokens, share, difference (mean within it, nats), contribution, low and high (nats).
    It raises ValueError for arrays that do not fit each other.
    """
    check_arrays(pairs, tokens)
    text = read_text(tokens, pairs[0][0].shape[1], end_of_text, document_mask, spellings, python)
    splits = make_splits(text)

    # sums by bin, and resamples of these
    clusters, name = choose_clusters(text)
    sums = sum_bins(pairs, splits, clusters)
    drawn = []
    if len(pairs) > 1:
        drawn.append("seeds")
    if len(sums.cluster_tokens) > 1:
        drawn.append(name)
    drawings = resample(sums, resamples) if drawn else None

    # the difference, the bins, what stands out
    difference, described = describe_splits(splits, sums, drawings)
    by_document, spread = split_documents(pairs, text)
    sizes = np.bincount(text.documents)
    return dict(
        format=FORMAT, pairs=len(pairs), rows=len(pairs[0][0]), row_tokens=text.row_tokens, tokens=len(text.inputs),
        documents=len(sizes), equal_documents=equal_documents(sizes),
        counted_from="document" if document_mask else "row", drawn=drawn, resamples=resamples, difference=difference,
        splits=[*described, by_document], spread=spread,
        stands_out=judge_sets(splits, sums, drawings) if drawings else None)


def check_arrays(pairs: list, tokens: np.ndarray):
    """Raise ValueError unless all losses have one shape (rows, T) and the tokens are those of the rows."""
    if not pairs:
        raise ValueError("no pairs of runs")
    shapes = {losses.shape for pair in pairs for losses in pair}
    if len(shapes) > 1 or len(pairs[0][0].shape) != 2 or not pairs[0][0].size:
        raise ValueError(f"losses must all have one shape (rows, T), got {sorted(shapes)}")
    if tokens.shape != (pairs[0][0].size + 1,):
        raise ValueError(f"losses of {pairs[0][0].size} tokens need one token more, got {tokens.shape}")


def with_interval(value: float, samples: np.ndarray | None) -> dict:
    """Return dict(mean, low, high). Without samples low and high are None."""
    low, high = (None, None) if samples is None else interval_of(samples)
    return dict(mean=value, low=low, high=high)


def describe_splits(splits: list[Split], sums: Sums, drawings: Resamples | None) -> tuple[dict, list[dict]]:
    """Return (the difference, the splits with those of their bins that have tokens), as the result has them."""
    scored = int(sums.cluster_tokens.sum())
    contributions = sums.by_pair.mean(axis=0) / scored
    counts = sums.tokens.sum(axis=0)
    samples = drawings.contributions() if drawings else None

    # a column for each bin of each split
    described = []
    start = 0
    for split in splits:
        bins = []
        for i, label in enumerate(split.labels, start):
            if counts[i]:
                of_bin = None if samples is None else samples[:, i]
                bins.append(describe_bin(label, int(counts[i]), float(contributions[i]), scored, of_bin))
        described.append(dict(name=split.name, title=split.title, bins=bins))
        start += len(split.labels)

    # the bins of one split add up to the difference
    columns = slice(0, len(splits[0].labels))
    of_all = None if samples is None else samples[:, columns].sum(axis=1)
    return with_interval(float(contributions[columns].sum()), of_all), described


def describe_bin(label: str, tokens: int, contribution: float, scored: int, samples: np.ndarray | None) -> dict:
    """Return what the result says of one bin."""
    interval = with_interval(contribution, samples)
    return dict(label=label, tokens=tokens, share=tokens / scored, difference=contribution * scored / tokens,
                contribution=contribution, low=interval["low"], high=interval["high"])


def list_sets(splits: list[Split]) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Return ([(split's name, the set's tokens in words)], membership (B, K) float64, 1 where a bin is of a set)."""
    names, columns = [], []
    start = 0
    size = sum(len(split.labels) for split in splits)
    for split in splits:
        for words, bins in split.sets.items():
            column = np.zeros(size)
            column[[start + i for i in bins]] = 1.0
            names.append((split.name, words))
            columns.append(column)
        start += len(split.labels)
    return names, np.stack(columns, axis=1)


def judge_sets(splits: list[Split], sums: Sums, drawings: Resamples) -> dict | None:
    """
    Return the set that stands out most, by its surplus; None where no set stands out.

    Where the differences are d within some set A and zero elsewhere, A has the largest surplus of all sets, d a (1 - a)
    with a the share of its tokens. The result has split, tokens_that (the set in words), share, contribution, low,
    high, surplus.
    """
    # the surplus of each set, altogether and of each pair
    names, members = list_sets(splits)
    bins = slice(0, len(splits[0].labels))  # of one split: they add up to the difference
    scored = sums.cluster_tokens.sum()
    shares = sums.tokens.sum(axis=0) @ members / scored
    of_pairs = sums.by_pair / scored
    surpluses = of_pairs @ members - of_pairs[:, bins].sum(axis=1, keepdims=True) * shares
    surplus = surpluses.mean(axis=0)

    # how large it is by chance: documents are drawn, seeds are few
    by_cluster = drawings.by_cluster @ members
    by_cluster -= drawings.by_cluster[:, bins].sum(axis=1, keepdims=True) * (drawings.shares @ members)
    tail = (1 - LEVEL) / 2 / len(names)
    limits = stats.norm.isf(tail) * by_cluster.std(axis=0)
    pairs = len(surpluses)
    if pairs > 1:
        error = surpluses.std(axis=0, ddof=1) / np.sqrt(pairs)
        limits = np.hypot(limits, stats.t.isf(tail, pairs - 1) * error)
    standing = np.flatnonzero(np.abs(surplus) > np.maximum(limits, SMALLEST_SURPLUS))
    if not len(standing):
        return None

    # a set and all the others have the same surplus but for its sign: the one that has more of the difference
    of_sets = of_pairs.mean(axis=0) @ members
    sign = np.sign(of_pairs[:, bins].sum())
    best = max(standing, key=lambda k: (round(abs(surplus[k]), 12), sign * of_sets[k]))
    low, high = interval_of(drawings.contributions() @ members[:, best])
    return dict(split=names[best][0], tokens_that=names[best][1], share=float(shares[best]),
                contribution=float(of_sets[best]), low=low, high=high, surplus=float(surplus[best]))


def split_documents(pairs: list, text: Text) -> tuple[dict, dict]:
    """
    Return (the split by documents, how the difference is spread over them). The split has the documents that contribute
    most, which were chosen by what they contribute, and all others as one bin. Its intervals are Student's over the
    seeds alone: documents are what it names, so none are drawn.

    spread: documents, lower and higher (how many have a lower or a higher loss), and quartiles of their mean
    differences, nats a token.
    """
    sizes = np.bincount(text.documents)
    sums = np.stack([np.bincount(text.documents, weights=difference_of(pair)) for pair in pairs])
    means = sums.mean(axis=0) / sizes
    spread = dict(documents=len(sizes), lower=int((means < 0).sum()), higher=int((means > 0).sum()),
                  quartiles=[float(value) for value in np.quantile(means, (0.25, 0.5, 0.75))])

    # the largest, and the others together
    scored = len(text.inputs)
    largest = np.argsort(-np.abs(sums.mean(axis=0)), kind="stable")[:LARGEST_DOCUMENTS]
    others = np.setdiff1d(np.arange(len(sizes)), largest)
    groups = [(name_document(text, number), [number]) for number in largest]
    if len(others):
        groups.append((f"{len(others):,} others", others))
    bins = []
    for label, members in groups:
        each = sums[:, members].sum(axis=1) / scored
        entry = describe_bin(label, int(sizes[members].sum()), float(each.mean()), scored, None)
        if len(each) > 1:
            half = stats.t.isf((1 - LEVEL) / 2, len(each) - 1) * each.std(ddof=1) / np.sqrt(len(each))
            entry |= dict(low=float(each.mean() - half), high=float(each.mean() + half))
        bins.append(entry)
    return dict(name="document", title="documents with the largest contributions", bins=bins), spread


def name_document(text: Text, number: int) -> str:
    """Return a document's number, from 1, and how it begins, where the tokens' texts are known."""
    name = f"document {number + 1:,}"
    if text.spellings is None:
        return name
    start = np.searchsorted(text.documents, number)
    tokens = text.inputs[start:start + 200][text.documents[start:start + 200] == number]
    spelled = b"".join(text.spellings[token] for token in tokens if token < len(text.spellings))
    beginning = one_line(spelled.decode("utf-8", "replace"))
    return f"{name}: {beginning[:28]}" if beginning else name


def dissect_runs(pairs: list[tuple[Run, Run]]) -> dict:
    """
    Return the autopsy of an arm, ready for JSON. pairs: (run of the arm, the baseline's run of the same seed). The
    result is what dissect returns, and seeds. It is dict(reason=a sentence) where there is none: no pair kept losses,
    the rows have two lengths, or the validation text is not there. It raises RunError for a damaged file.
    """
    # the losses of those pairs where both runs kept them
    kept, losses = [], []
    for run, other in pairs:
        both = read_losses(run), read_losses(other)
        if both[0] is not None and both[1] is not None:
            kept.append((run, other))
            losses.append(both)
    if not kept:
        return dict(reason="no pair of runs of equal seeds kept its losses.")
    runs = [run for pair in kept for run in pair]
    lengths = sorted({run.config["sequence_length"] for run in runs})
    if len(lengths) > 1:
        return dict(reason=f"the runs were validated on rows of {' and '.join(map(str, lengths))} tokens.")
    if any(run.val_sha256 != runs[0].val_sha256 for run in runs):
        return dict(reason="the runs were validated on different data.")

    # the text, as the baseline sees it
    rows = min(len(array) for both in losses for array in both)
    tokens, reason = validation_tokens(runs[1], rows)
    if tokens is None:
        return dict(reason=reason)
    config = config_of(runs[1])
    spellings, python = read_spellings(config)
    result = dissect([(arm[:rows], baseline[:rows]) for arm, baseline in losses], tokens, config.end_of_text,
                     config.document_mask, spellings, python)
    return result | dict(seeds=[run.seed for run, _ in kept])
