"""
The splits of an autopsy: validation tokens by position, by how far back their context stood before, by frequency, by
kind and by line. A split deals the tokens out to bins, each token to one of them; autopsy.py says what it is for.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

CONTEXTS = (2, 4, 8)        # tokens of a context; each is twice the one before it

KINDS = (                   # of a target; of bytes, {} is "letters", else "tokens"
    "{} that go on a word", "{} that begin a word", "numbers", "spaces and indents", "newlines",
    "punctuation and operators", "characters outside ASCII", "ends of documents and control characters")
GOES_ON, BEGINS, NUMBER, SPACE, NEWLINE, PUNCTUATION, NOT_ASCII, CONTROL = range(len(KINDS))
WORD = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_")
DIGITS = frozenset(b"0123456789")

LINES = ("comments", "def and class", "imports", "blank lines", "docstrings", "other code", "ends of documents")
COMMENT, DEFINITION, IMPORT, BLANK, DOCSTRING, CODE, END = range(len(LINES))
LINE = re.compile(rb"\s*(?:(#)|((?:async\s+)?def\b|class\b)|(import\b|from\b)|(\Z))")  # a group for each of the first 4
STRING = re.compile(rb"#[^\n]*|(?:\b[rRbBuUfF]{1,2})?('''|\"\"\"|'|\")")    # a comment, or how a string begins
CLOSE = {quote: re.compile(rb"\\.|\n|" + quote if len(quote) == 1 else rb"\\.|" + quote, re.DOTALL)
         for quote in (b"'", b'"', b"'''", b'"""')}



@dataclass
class Text:
    """The validation text, as the splits see it. N = rows T."""

    inputs: np.ndarray              # (N,) uint16
    targets: np.ndarray             # (N,) uint16
    row_tokens: int                 # T
    documents: np.ndarray           # (N,) int64: the number of the input's document, from 0
    starts: np.ndarray              # (N,) int64: the first input that the model sees at this one
    end_of_text: int                # the token id that begins a document
    spellings: list[bytes] | None   # of every token id; None where they are not known
    python: bool                    # whether the text is Python's as bytes


@dataclass
class Split:
    """The tokens, dealt out to bins."""

    name: str
    title: str
    labels: list[str]               # of the bins
    bins: np.ndarray                # (N,) uint8: the bin of each token
    sets: dict[str, Sequence[int]]  # the tokens in words -> bins: what may stand out


def read_text(tokens: np.ndarray, row_tokens: int, end_of_text: int, document_mask: bool,
              spellings: list[bytes] | None, python: bool) -> Text:
    """Return the text of tokens (N + 1,). A document begins at each end-of-text token; without any there is one."""
    inputs = tokens[:-1]
    index = np.arange(len(inputs))
    begins = inputs == end_of_text
    documents = np.cumsum(begins)
    documents -= documents[0]
    unseen = index % row_tokens == 0
    if document_mask:
        unseen |= begins
    starts = np.maximum.accumulate(np.where(unseen, index, 0))
    return Text(inputs, tokens[1:], row_tokens, documents, starts, end_of_text, spellings, python)


def make_splits(text: Text) -> list[Split]:
    """Return all splits that this text allows, but for the one by documents."""
    splits = [split_positions(text), *split_recall(text), split_frequencies(text)]
    if text.spellings is not None:
        splits.append(split_kinds(text))
    if text.python:
        splits.append(split_lines(text))
    return splits


def bits(values: np.ndarray) -> np.ndarray:
    """Return how many binary digits each integer has; zero has none."""
    return np.frexp(values)[1]


def label_range(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def split_positions(text: Text) -> Split:
    """Split by the number of tokens that the model sees before the input."""
    bins = bits(np.arange(len(text.inputs)) - text.starts).astype(np.uint8)
    count = int(bins.max()) + 1
    labels = ["0"] + [label_range(2 ** (k - 1), 2 ** k - 1) for k in range(1, count)]

    # bin k ends where 2^k tokens are seen, the input among them
    sets = {}
    for k in range(count - 1):
        seen = "1 token" if k == 0 else f"{2 ** k:,} tokens"
        sets[f"tokens that are predicted from at most {seen}"] = range(k + 1)
        sets[f"tokens that are predicted from more than {seen}"] = range(k + 1, count)
    return Split("position", "tokens before the input in its row and document", labels, bins, sets)


def last_occurrences(text: Text) -> Iterator[tuple[int, np.ndarray]]:
    """
    Yield, for each context length n, (n, the distance (N,) int64 from each input back to the last end of the same
    context). -1 means that the model sees no such context earlier, -2 that it sees fewer than n tokens.

    Contexts are ranked exactly: those of 2n tokens by the pair of ranks of their two halves, in one stable sort, in
    which equal contexts are neighbours in the order of the text. Where the neighbour lies before what the model sees,
    all earlier ones do. A length takes N log N operations and some five int64 arrays of N.
    """
    ranks = text.inputs.astype(np.int64)
    index = np.arange(len(ranks))
    for n in CONTEXTS:
        # one number for each pair of ranks: the first half ends n / 2 tokens earlier
        half = n // 2
        key = ranks * (int(ranks.max()) + 1)
        key[half:] = key[:-half] + ranks[half:]
        key[:half] = ranks[:half]  # no context of n ends here, and none asks for these

        # equal numbers side by side
        order = np.argsort(key, kind="stable")
        key = key[order]
        is_new = np.ones(len(key), dtype=bool)
        is_new[1:] = key[1:] != key[:-1]
        ranks = np.empty_like(key)
        ranks[order] = np.cumsum(is_new) - 1
        previous = np.full(len(key), -1)
        previous[order[1:]] = np.where(is_new[1:], -1, order[:-1])

        # those that the model sees
        distances = np.where(previous - (n - 1) >= text.starts, index - previous, -1)
        distances[index - text.starts < n - 1] = -2
        yield n, distances


def split_recall(text: Text) -> Iterator[Split]:
    """Split by the distance back to the last occurrence of the context, once for each of its lengths."""
    for n, distances in last_occurrences(text):
        # bin k has the distances from 4^k to 4^(k + 1) - 1
        count = max(1, (int(bits(distances.max())) + 1) // 2)
        bins = np.where(distances > 0, (bits(distances) - 1) // 2, np.where(distances == -1, count, count + 1))
        labels = [label_range(4 ** k, 4 ** (k + 1) - 1) for k in range(count)]
        labels += ["never in what is seen", f"fewer than {n} tokens are seen"]

        # the last of the sets by distance has all that were seen
        tokens = f"tokens whose context of {n}"
        sets = {f"{tokens} stood at most {4 ** (k + 1) - 1:,} tokens earlier in the row": range(k + 1)
                for k in range(count - 1)}
        sets[f"{tokens} stood earlier in the row"] = range(count)
        sets[f"{tokens} did not stand earlier in the row"] = [count]
        yield Split(f"recall {n}", f"distance back to the same {n} tokens", labels, bins.astype(np.uint8), sets)


def split_frequencies(text: Text) -> Split:
    """Split by how often the target stands among the targets; bin k has the numbers from 4^k to 4^(k + 1) - 1."""
    counts = np.bincount(text.targets)
    bins = ((bits(counts) - 1) // 2)[text.targets].astype(np.uint8)
    count = int(bins.max()) + 1
    labels = [f"{label_range(4 ** k, 4 ** (k + 1) - 1)} times" for k in range(count)]
    sets = {}
    for k in range(1, count):
        sets[f"targets that stand fewer than {4 ** k:,} times in the validation text"] = range(k)
        sets[f"targets that stand at least {4 ** k:,} times in the validation text"] = range(k, count)
    return Split("frequency", "how often the target stands in the validation text", labels, bins, sets)


def kind_of(spelling: bytes) -> int:
    """Return the kind of a token by its first byte that is no blank. A word is taken to begin."""
    rest = spelling.lstrip(b" \t")
    if not rest:
        return SPACE if spelling else CONTROL
    first = rest[0]
    if first in b"\r\n":
        return NEWLINE
    if first >= 128:
        return NOT_ASCII
    if first in WORD:
        return BEGINS
    if first in DIGITS:
        return NUMBER
    return PUNCTUATION if 32 < first < 127 else CONTROL


def split_kinds(text: Text) -> Split:
    """Split by the target's kind. A word goes on where a letter, a digit or what is not ASCII stands before it."""
    # of every token id
    size = max(len(text.spellings), int(max(text.inputs.max(), text.targets.max())) + 1)
    spellings = text.spellings + [b""] * (size - len(text.spellings))
    kinds = np.array([kind_of(spelling) for spelling in spellings], dtype=np.uint8)
    joins = np.array([spelling[:1] not in (b" ", b"\t") for spelling in spellings])
    is_open = np.array([spelling != b"" and (spelling[-1] in WORD or spelling[-1] in DIGITS or spelling[-1] >= 128)
                        for spelling in spellings])

    # of every target, after its input
    bins = kinds[text.targets]
    bins[(bins == BEGINS) & joins[text.targets] & is_open[text.inputs]] = GOES_ON
    noun = "letters" if max(map(len, spellings)) == 1 else "tokens"
    labels = [label.format(noun) for label in KINDS]
    return Split("kind", "kind of target", labels, bins, {label: [kind] for kind, label in enumerate(labels)})


def split_lines(text: Text) -> Split:
    """Split by the kind of the line that the target stands in."""
    tokens = np.concatenate((text.inputs[:1], text.targets))
    lines = np.full(len(tokens), END, dtype=np.uint8)
    ends = [*np.flatnonzero(tokens == text.end_of_text), len(tokens)]
    for start, end in zip([0] + [i + 1 for i in ends], ends):
        lines[start:end] = classify_lines(tokens[start:end].astype(np.uint8).tobytes())
    sets = {f"the bytes of {label}": [line] for line, label in enumerate(LINES)}
    return Split("line", "kind of line", list(LINES), lines[1:], sets)


def classify_lines(document: bytes) -> np.ndarray:
    """
    Return the kind of the line of each byte of a Python file, uint8. A line ends with its newline. The file may be cut
    off.
    """
    # each line by itself
    lines = document.splitlines(keepends=True)
    kinds = []
    for line in lines:
        match = LINE.match(line)
        kinds.append(CODE if match is None else match.lastindex - 1)

    # lines of strings
    starts = [0, *accumulate(map(len, lines))]
    for start, end, is_docstring in string_spans(document):
        first = bisect_right(starts, start) - 1
        last = bisect_right(starts, end - 1) - 1
        if is_docstring:
            kinds[first:last + 1] = [DOCSTRING] * (last + 1 - first)
        else:
            kinds[first + 1:last + 1] = [CODE] * (last - first)
    return np.repeat(np.array(kinds, dtype=np.uint8), [len(line) for line in lines])


def string_spans(document: bytes) -> Iterator[tuple[int, int, bool]]:
    """
    Yield (start, end, whether it is a docstring) of each string literal of a Python file, in bytes. A docstring begins
    its line outside brackets, and before it stands nothing or a colon, comments left out.
    """
    position = 0
    depth = 0       # of brackets
    before = b":"   # the last byte of code
    while True:
        match = STRING.search(document, position)
        if match is None:
            return
        code = document[position:match.start()]
        before = code.rstrip()[-1:] or before
        depth += sum(map(code.count, (b"(", b"[", b"{"))) - sum(map(code.count, (b")", b"]", b"}")))
        position = match.end()
        if match[1] is None:  # a comment
            continue

        # to the string's end: its quotes, the end of the line where they are single, or that of the file
        end = len(document)
        for mark in CLOSE[match[1]].finditer(document, position):
            if not mark[0].startswith(b"\\"):
                end = mark.end()
                break
        begins_line = not document[document.rfind(b"\n", 0, match.start()) + 1:match.start()].strip()
        yield match.start(), end, begins_line and before == b":" and depth == 0
        position = end
        before = b'"'
