"""
The domain Laplacian: a graph of the channels of a feature space, for topological attention's laplacian=domain:FILE.npz.

    python -m data.manifold corpus DIR -o FILE.npz [--features 64] [--window 5] [--vocabulary 16384] [--min_count 100]
        [--tokens 10000000] [--seed 1] [graph] [tau]
    python -m data.manifold checkpoint FILE.pt -o FILE.npz [--layer -1] [--head -1] [--data DIR] [--tokens 65536]
        [--seed 1] [graph] [tau]
    python -m data.manifold random FILE.npz -o CONTROL.npz [--seed 1]
    python -m data.manifold chain -o FILE.npz [--features 64]
        graph: --eps 1.31 --k 25 --topk 15 --p 1.8 --sigma 0.535
        tau:   --tau fixed | median | mean | percentile [--percentile 50]

corpus reads training shards. Its vectors are those of the `vocabulary` most frequent tokens, of at least `min_count`
occurrences: rarer ones would take most features for themselves. The end of text has none and ends every window.
M = max(0, log p(w, c) / (p(w) p(c))) is the positive pointwise mutual information of tokens up to `window` apart, with
p(c) from counts to the power 0.75, and M ~ U S V' its truncated singular value decomposition. Columns of U S are
orthogonal: their cosines are 0 whatever the corpus. Hence they are rotated, U S R, by the R that makes U R sparse
(varimax). A feature is then a topic, its sign that of its third moment, and the cosine of two says how far tokens share
them. Features are in the order of their norms.
checkpoint takes the keys of a layer on validation data (in whole batches), of all heads as if they were one or of one
head, normalised where the model does that, without rotary positions: channels that turn through all phases have cosines
near 0.
random is the control for both: another matrix with the same eigenvalues, whose eigenvectors are drawn at random, but
for the constant one.
chain is the variant's own default, stored in the same way.

The graph has a node for each of the F channels, the columns of the vectors; distance d = 1 - max(0, cosine). A node's
candidates are its k nearest of those with d <= eps (of equal distance: the larger cosine first, to 9 digits, then the
lower index). Edges go to the topk nearest of them and hold in both directions, so that a node may have more; a graph in
several parts is refused. Weight A = 1 / (1 + (d / sigma)^p), and L = D - A with D the sums of rows. In arrowspace's
code only topk chooses neighbours, k is recorded, and dense graphs are thinned besides. An eps of 1 or more excludes no
pair.

tau is the scale of lambda = E / (E + tau) with E = x'Lx / x'x: 1 (fixed), or the median, mean or a percentile of E over
the vectors, each as often as its token occurs; never below 1e-10. Where there are no vectors, as with chain, it is 1.

FILE.npz: laplacian (F, F) float64; provenance, JSON; tau, float64; vectors (n, F) float32 with counts (n,), how often
each occurs, and tokens (n,), their ids: all of a vocabulary, or 8,192 keys, counted once and without tokens; labels
(F,), the tokens with the largest entries where their text is known. Equal input, options, seed and number of threads on
one machine give equal bytes. Exit code 1 and one line for a fault.
10M of GPT-2's tokens took 12 s at F = 64 and 58 s at F = 384, with 0.8 GB, on two virtual x86-64 cores that had other
work as well.

Source: graph and tau: Moriondo, arrowspace, JOSS 09002, github.com/tuned-org-uk/arrowspace-rs, with the parameters of
his Topological Transformer; embedding: Levy, Goldberg and Dagan, 2015; varimax: Kaiser, 1958, for the left singular
vectors: Rohe and Zeng, Vintage factor analysis with varimax, 2023.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import train_gpt  # isort: skip  before torch: it sets how long PyTorch's waiting threads spin
import numpy as np
import torch
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import svds

import variants
from data.command_line import run_script
from data.shards import sha256_of
from train_gpt import (
    RANGES,
    Config,
    Ranks,
    RunError,
    adopt_vocabulary,
    check_value,
    checked,
    find_checkpoint,
    find_shards,
    open_shard,
    read_checkpoint,
    read_merges,
    require,
    validation_batches,
    write_atomically,
)
from variants.topological_attention import chain_laplacian, read_laplacian

SMOOTHING = 0.75      # the power of the counts in p(c)
KEPT_KEYS = 8192      # vectors in the file of a checkpoint
TAU_FLOOR = 1e-10
TAU_MODES = ("fixed", "median", "mean", "percentile")
MOST_FEATURES = 4096  # the width of a head


@dataclass(frozen=True)
class Graph:
    """Parameters of a graph. RunError for impossible ones."""
    eps: float = 1.31     # largest distance of an edge
    k: int = 25           # candidates of a node
    topk: int = 15        # edges of a node
    p: float = 1.8        # exponent of the weight
    sigma: float = 0.535  # distance at which the weight is 1/2

    def __post_init__(self):
        for name, value in asdict(self).items():
            require(value > 0, f"--{name} must be above 0, got {value}")
        for name, most in dict(eps=1e6, k=10 ** 9, topk=10 ** 9, p=100.0, sigma=1e6).items():
            check_value(type(most), getattr(self, name), f"--{name}", (0, most))


@dataclass(frozen=True)
class Tau:
    """How tau is chosen. RunError for a percentile that is none."""
    mode: str = "median"
    percentile: float = 50.0

    def __post_init__(self):
        require(self.mode in TAU_MODES, f"--tau must be one of {', '.join(TAU_MODES)}; got {self.mode!r:.60}")
        check_value(float, self.percentile, "--percentile", None)
        require(0 <= self.percentile <= 100, f"--percentile must lie between 0 and 100, got {self.percentile}")

    def choose(self, energies: np.ndarray, counts: np.ndarray) -> float:
        """tau of energies (n,) that occur counts (n,) times."""
        if self.mode == "fixed" or not len(energies):
            return 1.0
        if self.mode == "mean":
            return max(np.average(energies, weights=counts), TAU_FLOOR)
        share = 0.5 if self.mode == "median" else self.percentile / 100
        return max(quantile(energies, counts, share), TAU_FLOOR)


@dataclass
class Manifold:
    """What a file holds, see above."""
    laplacian: np.ndarray                                                     # (F, F) float64
    provenance: dict                                                          # the Tau's fields are under "tau"
    vectors: np.ndarray                                                       # (n, F) float32
    counts: np.ndarray                                                        # (n,): how often each vector occurs
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64)) # (n,): their ids; (0,) of no tokens
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, "<U1"))    # (F,): words; (0,) where there are none

    @property
    def energies(self) -> np.ndarray:
        """E of every vector (n,)."""
        return rayleigh_quotients(self.laplacian, self.vectors)

    @property
    def tau(self) -> float:
        """The scale of lambda, as the provenance says that it is chosen."""
        return Tau(**self.provenance["tau"]).choose(self.energies, self.counts)

    def save(self, path: Path):
        """RunError where the disk refuses."""
        arrays = {**vars(self), "provenance": json.dumps(self.provenance, sort_keys=True), "tau": np.float64(self.tau)}
        write_atomically(Path(path), lambda file: np.savez(file, **arrays))


def read_manifold(path: Path) -> Manifold:
    """RunError if the file is damaged or not of this script."""
    try:
        laplacian = read_laplacian(str(path))
        with np.load(path) as file:
            arrays = (file[name] for name in ("vectors", "counts", "tokens", "labels"))
            manifold = Manifold(laplacian, json.loads(str(file["provenance"])), *arrays)
    except RunError as error:  # read_laplacian's names the option of the variant
        raise RunError(str(error).removeprefix("laplacian=domain:")) from None
    except Exception as error:  # of the archive or its arrays
        raise RunError(f"{path} was not made by data/manifold.py, or is damaged ({type(error).__name__}); make it again"
                       ) from None
    check_manifold(manifold, path)
    return manifold


def check_manifold(manifold: Manifold, path: Path):
    """Raise RunError, which names the file, unless the arrays and the provenance fit each other."""
    vectors, counts = manifold.vectors, manifold.counts
    F, n = len(manifold.laplacian), counts.size

    def check(holds, what):
        require(holds, f"{path} was not made by data/manifold.py, or is damaged: {what}; make it again")

    # the arrays
    check(vectors.shape == (n, F) and vectors.dtype == np.float32 and np.isfinite(vectors).all(),
          f"its vectors are no {n} x {F} numbers")
    check(counts.shape == (n,) and counts.dtype.kind == "i" and (counts > 0).all(), "its counts are no numbers above 0")
    check(manifold.tokens.shape in ((n,), (0,)) and manifold.tokens.dtype.kind == "i", f"its tokens are no {n} ids")
    check(manifold.labels.shape in ((F,), (0,)) and manifold.labels.dtype.kind == "U", f"its labels are no {F} words")

    # the provenance
    tau = manifold.provenance.get("tau")
    check(isinstance(manifold.provenance.get("source"), str), "its provenance names no source")
    check(isinstance(tau, dict) and set(tau) == set(Tau.__dataclass_fields__),
          "its provenance does not say how tau was chosen")
    try:
        Tau(**tau)
    except RunError as error:
        check(False, error)


# ---- Graph ------------------------------------------------------------------


def rayleigh_quotients(laplacian: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """x'Lx / x'x (n,) of vectors (n, F); 0 for a vector of zeros."""
    x = vectors.astype(np.float64)
    square = np.einsum("nf,nf->n", x, x)
    return np.maximum(np.einsum("nf,nf->n", x @ laplacian, x), 0) / np.where(square > 0, square, 1)


def quantile(values: np.ndarray, counts: np.ndarray, q: float) -> float:
    """The least of values (n,), occurring counts (n,) times, that has at least the share q of all at or below it."""
    order = np.argsort(values, kind="stable")
    below = np.cumsum(counts[order])
    return float(values[order[np.searchsorted(below, q * below[-1])]])


def cosines(vectors: np.ndarray) -> np.ndarray:
    """(F, F) of the columns of vectors (n, F); 0 for a column of zeros."""
    x = vectors.astype(np.float64)
    norms = np.linalg.norm(x, axis=0)
    x = x / np.where(norms > 0, norms, 1)
    return x.T @ x


def weights(cosine: np.ndarray, graph: Graph) -> np.ndarray:
    """The weights A (F, F) of the graph of nodes with these cosines (F, F). RunError if it is not connected."""
    # the edges
    n = len(cosine)
    distance = 1 - np.clip(cosine, 0, 1)
    others = np.where(np.eye(n, dtype=bool) | (distance > graph.eps), -np.inf, cosine.round(9))
    nearest = np.argsort(-others, axis=1, kind="stable")[:, :min(graph.k, graph.topk)]
    edges = np.zeros((n, n), dtype=bool)
    np.put_along_axis(edges, nearest, np.take_along_axis(others, nearest, 1) > -np.inf, 1)
    edges |= edges.T

    # is it one graph?
    components, component = connected_components(edges, directed=False)
    require(components == 1,
            f"the graph of {n} nodes and {edges.sum() // 2} edges falls into {components} components, the largest of "
            f"{np.bincount(component).max()} nodes; raise --eps, --k or --topk")

    # their weights
    with np.errstate(over="ignore"):
        weight = np.where(edges, 1 / (1 + (distance / graph.sigma) ** graph.p), 0)
    require((weight[edges] > 0).all(),
            f"an edge of distance {distance[edges].max():.3g} has the weight 0; raise --sigma or lower --p")
    return weight


def laplacian_of(weights: np.ndarray) -> np.ndarray:
    """D - A (F, F) of weights A."""
    return np.diag(weights.sum(1)) - weights


def random_laplacian(laplacian: np.ndarray, seed: int) -> np.ndarray:
    """
    A symmetric matrix (F, F) with the eigenvalues of laplacian and random eigenvectors, the constant one excepted: rows
    sum to 0 as before, but weights may be negative. RunError if rows of laplacian do not sum to 0.
    """
    n, eigenvalues = len(laplacian), np.linalg.eigvalsh(laplacian)
    require(np.abs(laplacian.sum(1)).max() <= 1e-6 * eigenvalues[-1],
            "rows of this Laplacian do not sum to 0; give one of a graph")
    columns = np.concatenate((np.ones((n, 1)), np.random.default_rng(seed).standard_normal((n, n - 1))), axis=1)
    basis = np.linalg.qr(columns)[0]
    result = (basis * np.maximum(eigenvalues, 0)) @ basis.T
    return (result + result.T) / 2


# ---- Vectors of a corpus ----------------------------------------------------


def read_tokens(config: Config, count: int) -> tuple[np.ndarray, list[Path]]:
    """(the first `count` training tokens (n,), all where there are fewer; the shards they are from)."""
    pieces, shards = [], []
    for file in find_shards(config, "train"):
        missing = count - sum(map(len, pieces))
        if missing <= 0:
            break
        pieces.append(open_shard(file)[:missing])
        shards.append(file)
    return checked(np.concatenate(pieces), config), shards


def cooccurrences(words: np.ndarray, documents: np.ndarray, vocabulary: int, window: int) -> sparse.csr_matrix:
    """
    Symmetric counts (vocabulary, vocabulary) of pairs up to `window` tokens apart. words (n,): negative ones belong to
    no pair; documents (n,): the document of each.
    """
    counts = sparse.csr_matrix((vocabulary, vocabulary), dtype=np.int64)
    for gap in range(1, min(window, len(words) - 1) + 1):
        first, second = words[:-gap], words[gap:]
        pairs = (first >= 0) & (second >= 0) & (documents[:-gap] == documents[gap:])
        ones = np.ones(np.count_nonzero(pairs), dtype=np.int64)
        counts = counts + sparse.coo_matrix((ones, (first[pairs], second[pairs])), shape=counts.shape).tocsr()
    return counts + counts.T


def mutual_information(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """
    Positive pointwise mutual information, float32, of symmetric counts; p of a column is that of counts to the power
    SMOOTHING.
    """
    totals = np.asarray(counts.sum(1), dtype=np.float64).ravel()
    pairs = counts.tocoo()
    context = totals ** SMOOTHING
    values = np.log(pairs.data / (totals[pairs.row] * (context / context.sum())[pairs.col]))
    kept = values > 0
    return sparse.csr_matrix((values[kept].astype(np.float32), (pairs.row[kept], pairs.col[kept])), shape=counts.shape)


def singular_vectors(matrix: sparse.csr_matrix, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """
    (left singular vectors (n, count), singular values (count,), largest first) of a square matrix (n, n), count < n.
    RunError if its rank is smaller.
    """
    n = matrix.shape[0]
    if n <= 1024:
        left, values, _ = np.linalg.svd(matrix.toarray().astype(np.float64))
        left, values = left[:, :count], values[:count]
    else:
        start = np.random.default_rng(seed).standard_normal(n).astype(matrix.dtype)
        left, values, _ = svds(matrix, k=count, v0=start)
        left, values = left[:, ::-1].astype(np.float64), values[::-1].astype(np.float64)
    rank = np.count_nonzero(values > 1e-5 * max(values[0], 1e-30))
    require(rank >= count, f"the mutual information of {n} tokens has rank {rank}, too low for {count} features; lower "
            "--features or read more --tokens")
    return left, values


def varimax(loadings: np.ndarray, iterations: int = 200) -> np.ndarray:
    """The rotation R (F, F) for which the squares of loadings (n, F) @ R differ most within columns."""
    rotation, before = np.eye(loadings.shape[1]), 0.0
    for _ in range(iterations):
        x = loadings @ rotation
        square = x * x
        left, values, right = np.linalg.svd(loadings.T @ (x * (square - square.mean(0))))
        rotation = left @ right
        if values.sum() <= before * (1 + 1e-7):
            break
        before = values.sum()
    return rotation


def embedding(words: np.ndarray, documents: np.ndarray, vocabulary: int, features: int, window: int,
              seed: int) -> np.ndarray:
    """
    Vectors (vocabulary, features) float32 of words (n,), see above. RunError if there are more features than the rank.
    """
    information = mutual_information(cooccurrences(words, documents, vocabulary, window))
    left, values = singular_vectors(information, features, seed)
    x = (left * values) @ varimax(left)
    x *= np.where((x ** 3).sum(0) < 0, -1, 1)
    return x[:, np.argsort(-(x * x).sum(0), kind="stable")].astype(np.float32)


def labels_of(vectors: np.ndarray, tokens: np.ndarray, config: Config) -> np.ndarray:
    """
    The three tokens with the largest entry of each column, as text (F,); of none where there are neither bytes nor
    merges.
    """
    merges = next(find_shards(config, "train")[0].parent.glob("*.tiktoken"), None)
    if config.vocab_size == 257:
        text = {i: bytes([i]) for i in range(256)}
    elif merges:
        text = {i: token for token, i in read_merges(merges).items()}
    else:
        return np.zeros(0, "<U1")
    top = tokens[np.argsort(-vectors, axis=0, kind="stable")[:3].T]
    return np.array([" ".join(readable(text.get(i, b"")) for i in row) for row in top.tolist()])


def readable(token: bytes) -> str:
    """A token as one printable word; its bytes where it is none."""
    try:
        word = token.decode().strip()
    except UnicodeDecodeError:
        word = ""
    return word if word.isprintable() and word else f"<{token.hex()}>"


# ---- Manifolds of every source ----------------------------------------------


def from_corpus(folder: str, features: int = 64, window: int = 5, vocabulary: int = 16384, min_count: int = 100,
                tokens: int = 10_000_000, seed: int = 1, graph: Graph = Graph(), tau: Tau = Tau()) -> Manifold:
    """The manifold of a folder of shards. RunError for too little data, or a graph in parts."""
    # the options
    for name, value, least, most in (("features", features, 2, MOST_FEATURES), ("window", window, 1, 10_000),
                                     ("vocabulary", vocabulary, 1, 2 ** 16), ("min_count", min_count, 1, 10 ** 15),
                                     ("tokens", tokens, 1, 10 ** 15)):
        require(value >= least, f"--{name} must be at least {least}, got {value}")
        check_value(int, value, f"--{name}", (least, most))
    check_value(int, seed, "--seed", RANGES["seed"])

    # the tokens that get a vector
    config = Config(data=folder)
    adopt_vocabulary(config)
    text, shards = read_tokens(config, tokens)
    counts = np.bincount(text, minlength=config.vocab_size)
    counts[config.end_of_text] = 0
    frequent = np.argsort(-counts, kind="stable")[:vocabulary]
    kept = np.sort(frequent[counts[frequent] >= min_count])
    require(len(kept) > features,
            f"{len(kept)} tokens of the vocabulary occur {min_count} times or more among the {len(text):,} "
            f"read from {folder}, and {features} features need more; give more data or a higher --vocabulary, or lower "
            "--min_count or --features")

    # their vectors and their graph
    rows = np.full(config.vocab_size, -1, dtype=np.int32)  # of every token: its row among the vectors, -1 for none
    rows[kept] = np.arange(len(kept))
    documents = np.cumsum(text == config.end_of_text, dtype=np.int32)
    vectors = embedding(rows[text], documents, len(kept), features, window, seed)
    provenance = dict(
        source="corpus", data=Path(folder).resolve().name, sha256=sha256_of(shards), tokens=len(text),
        vocabulary=len(kept), vocab_size=config.vocab_size, features=features, window=window, min_count=min_count,
        smoothing=SMOOTHING, seed=seed, graph=asdict(graph), tau=asdict(tau))
    laplacian = laplacian_of(weights(cosines(vectors), graph))
    return Manifold(laplacian, provenance, vectors, counts[kept], kept, labels_of(vectors, kept, config))


class Recorder(torch.nn.Module):
    """A projection that keeps its outputs."""

    def __init__(self, projection: torch.nn.Module):
        super().__init__()
        self.projection = projection
        self.outputs = []  # of every call, float32 on the CPU

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.projection(x)
        self.outputs.append(y.float().cpu())
        return y


@torch.no_grad()
def keys_of(saved: dict, config: Config, layer: int) -> np.ndarray:
    """
    The keys (tokens, heads, head_dim) float32 of a layer of a checkpoint's model on the first val_tokens validation
    tokens. RunError if it has none.
    """
    ranks = Ranks.start(config)
    with variants.applied(config.variant, config):
        # the model
        model = train_gpt.build_model(config, ranks)
        model.load_state_dict(saved["model"])
        model.eval()
        model.set_windows(1.0)
        require(-config.layers <= layer < config.layers,
                f"--layer {layer} is none of the checkpoint's {config.layers} layers")
        attention = getattr(model.blocks[layer], "attention", None)
        require(getattr(attention, "k", None) is not None, f"layer {layer} of this checkpoint, "
                f"{type(attention).__name__}, has no keys; choose another --layer")

        # its keys
        recorder = Recorder(attention.k)
        attention.k = recorder
        for batch in validation_batches(config):
            batch = torch.from_numpy(batch).to(ranks.device)
            model(batch[:, :-1], batch[:, 1:])
    keys = torch.cat([y.flatten(0, -2) for y in recorder.outputs]).unflatten(-1, (-1, attention.config.head_dim))
    return (train_gpt.RMSNormalize.apply(keys) if config.qk_norm else keys).numpy()


def from_checkpoint(path: str, layer: int = -1, head: int = -1, data: str = "", tokens: int = 65_536, seed: int = 1,
                    graph: Graph = Graph(), tau: Tau = Tau(), device: str = "auto") -> Manifold:
    """
    The manifold of a layer's keys, of all heads or (head >= 0) of one. RunError if they cannot be had, or for a graph
    in parts.
    """
    # the keys
    check_value(int, tokens, "--tokens", RANGES["val_tokens"])
    check_value(int, seed, "--seed", RANGES["seed"])
    saved = read_checkpoint(find_checkpoint(path))
    config = Config(**saved["config"])
    config = replace(config, compile="off", device=device, data=data or config.data, val_tokens=tokens)
    keys = keys_of(saved, config, layer)
    require(-1 <= head < keys.shape[1],
            f"--head {head} is none of the layer's {keys.shape[1]} heads (-1: all of them)")
    vectors = (keys if head < 0 else keys[:, head]).reshape(-1, keys.shape[-1])

    # their graph, and a sample of them
    provenance = dict(
        source="checkpoint", checkpoint=sha256_of([Path(path)]), variant=list(config.variant),
        layer=layer % config.layers, head=head, data=Path(config.data).resolve().name,
        sha256=sha256_of(find_shards(config, "val")), tokens=len(keys), features=vectors.shape[1], seed=seed,
        graph=asdict(graph), tau=asdict(tau))
    laplacian = laplacian_of(weights(cosines(vectors), graph))
    sample = np.sort(np.random.default_rng(seed).permutation(len(vectors))[:KEPT_KEYS])
    return Manifold(laplacian, provenance, vectors[sample], np.ones(len(sample), np.int64))


def from_random(path: str, seed: int = 1) -> Manifold:
    """The control of a stored manifold: its spectrum and vectors, with another matrix."""
    check_value(int, seed, "--seed", RANGES["seed"])
    original = read_manifold(path)
    require(original.provenance["source"] != "random",
            f"{path} is such a control already; give the file that it was made from, with another --seed")
    provenance = dict(
        source="random",
        matrix="eigenvalues of `of`, random eigenvectors but for the constant one: not made from a graph",
        seed=seed, sha256=sha256_of([Path(path)]), of=original.provenance, tau=original.provenance["tau"])
    return replace(original, laplacian=random_laplacian(original.laplacian, seed), provenance=provenance)


def from_chain(features: int = 64) -> Manifold:
    """The chain of `features` nodes."""
    require(features >= 2, f"--features must be at least 2, got {features}")
    check_value(int, features, "--features", (2, MOST_FEATURES))
    provenance = dict(source="chain", features=features, tau=asdict(Tau("fixed")))
    return Manifold(chain_laplacian(features).double().numpy(), provenance, np.zeros((0, features), np.float32),
                    np.zeros(0, np.int64))


def summary(manifold: Manifold) -> str:
    """One line about it."""
    n = len(manifold.laplacian)
    facts = [f"{n} nodes"]
    if manifold.provenance["source"] != "random":
        edges = -manifold.laplacian[np.triu_indices(n, 1)]
        edges = edges[edges > 0]
        facts.append(f"{len(edges)} edges of weight {edges.min():.3f} to {edges.max():.3f}")
    eigenvalues = np.linalg.eigvalsh(manifold.laplacian)
    facts.append(f"eigenvalues 0 and {eigenvalues[1]:.3f} to {eigenvalues[-1]:.3f}")
    facts.append(f"tau {manifold.tau:.4g}")
    line = ", ".join(facts)
    if len(manifold.vectors):
        scale = manifold.energies / (manifold.energies + manifold.tau)
        quantiles = " / ".join(f"{quantile(scale, manifold.counts, q):.3f}" for q in (0.05, 0.5, 0.95))
        line += f"; lambda {quantiles} (5, 50, 95 % of its vectors)"
    return line


# ---- The command ------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, 1 for a fault (one line on stderr), 130 when interrupted."""
    parser = build_parser()
    options = vars(parser.parse_args(argv))
    make = options.pop("make")
    output = options.pop("output")

    def work():
        require(len(output.name.encode()) <= 200 and output.parent.is_dir() and not output.is_dir(),
                f"cannot write {output}: it must be a file of up to 200 letters in a folder that is "
                "there; give another -o")
        if "tau" in options:
            options["tau"] = Tau(options["tau"], options.pop("percentile"))
            options["graph"] = Graph(**{name: options.pop(name) for name in asdict(Graph())})
        source = [options.pop("source")] if "source" in options else []
        manifold = make(*source, **options)
        manifold.save(output)
        print(f"{output}: {summary(manifold)}")
    return run_script("manifold.py", work)


def build_parser() -> argparse.ArgumentParser:
    """The command line; an option `make` is the function that the others, but --output, are the arguments of."""
    parser = argparse.ArgumentParser(prog="manifold.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    # what each source needs
    corpus = commands.add_parser("corpus", help="from the tokens of a folder of shards")
    corpus.add_argument("source", metavar="DIR", help="folder of shards")
    corpus.add_argument("--window", type=int, default=5, help="largest distance of a pair, in tokens")
    corpus.add_argument("--vocabulary", type=int, default=16384,
                        help="number of tokens that get a vector, the most frequent ones")
    corpus.add_argument("--min_count", type=int, default=100, help="least number of times that they occur")
    checkpoint = commands.add_parser("checkpoint", help="from the keys of a checkpoint of the trainer")
    checkpoint.add_argument("source", metavar="FILE.pt")
    checkpoint.add_argument("--layer", type=int, default=-1, help="of the keys; -1 is the last")
    checkpoint.add_argument("--head", type=int, default=-1, help="of the keys; -1: all heads")
    checkpoint.add_argument("--data", default="", help="folder of shards (default: the checkpoint's)")
    checkpoint.add_argument("--device", choices=train_gpt.CHOICES["device"], default="auto")
    random = commands.add_parser("random", help="the control: the same eigenvalues, other eigenvectors")
    random.add_argument("source", metavar="FILE.npz")
    chain = commands.add_parser("chain", help="the variant's default")

    # what several have
    for command, tokens in ((corpus, 10_000_000), (checkpoint, 65_536)):
        command.add_argument("--tokens", type=int, default=tokens, help="number of tokens to read, from the start")
        for name, default in asdict(Graph()).items():
            command.add_argument(f"--{name}", type=type(default), default=default, help="of the graph, see above")
        command.add_argument("--tau", choices=TAU_MODES, default=Tau().mode)
        command.add_argument("--percentile", type=float, default=Tau().percentile, help="of --tau percentile")
    for command in (corpus, chain):
        command.add_argument("--features", type=int, default=64, help="nodes of the graph: the width of a head")
    for command in (corpus, checkpoint, random):
        command.add_argument("--seed", type=int, default=1, help="of the random numbers")
    for command in (corpus, checkpoint, random, chain):
        command.add_argument("-o", "--output", metavar="FILE.npz", type=Path, required=True)
    makers = {corpus: from_corpus, checkpoint: from_checkpoint, random: from_random, chain: from_chain}
    for command, make in makers.items():
        command.set_defaults(make=make)
    return parser


if __name__ == "__main__":
    sys.exit(main())
