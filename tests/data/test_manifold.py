"""
The domain Laplacian: graphs by hand, counts against slow ones, topics that must come out as clusters, the control's
spectrum, files, faults.
"""
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse

import train_gpt
import variants
from data import manifold as script
from data.manifold import (
    Graph,
    Tau,
    cooccurrences,
    cosines,
    from_chain,
    from_checkpoint,
    from_corpus,
    from_random,
    laplacian_of,
    mutual_information,
    quantile,
    random_laplacian,
    rayleigh_quotients,
    read_manifold,
    singular_vectors,
    varimax,
    weights,
)
from data.shards import write_meta, write_shard
from data.tokenizer import write_merges
from tests.errors import float_bound, relative_rms
from tests.loading import run_module
from train_gpt import RunError

WORDS, TOPICS = 30, 2  # words of a topic; the last id of the vocabulary is the end of text
END = TOPICS * WORDS


def topical(documents: int = 400, topics: bool = True, seed: int = 0) -> np.ndarray:
    """
    Documents of 40 words from one topic's few neighbouring words on a ring; without topics the words are drawn from
    all.
    """
    rng = np.random.default_rng(seed)
    texts = []
    for topic in rng.integers(TOPICS, size=documents):
        words = (rng.integers(WORDS) + rng.integers(-3, 4, size=40)) % WORDS + topic * WORDS
        texts += [[END], words if topics else rng.integers(END, size=40)]
    return np.concatenate(texts)


def folder_of(path: Path, train: np.ndarray, vocabulary: int = END + 1, shards: int = 1) -> str:
    path.mkdir(exist_ok=True)
    for i, part in enumerate(np.array_split(train, shards)):
        write_shard(path / f"a_train_{i:06d}.bin", part)
    write_shard(path / "a_val_000000.bin", train[:2000])
    write_meta(path, vocab_size=vocabulary, tokenizer="test")
    return str(path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return folder_of(tmp_path_factory.mktemp("corpus"), topical(), shards=3)


# ---- the graph --------------------------------------------------------------

HALF = math.sqrt(0.5)
CORNER = np.array([[1, HALF, 0], [0, HALF, 1]])  # three columns; neighbours have cosine sqrt(1/2)
NEAR = 1 / (1 + ((1 - HALF) / 0.535) ** 1.8)
FAR = 1 / (1 + (1 / 0.535) ** 1.8)


def spectral_bound(matrix: np.ndarray) -> float:
    """
    The bound of the eigenvalues and the sums of rows of a symmetric matrix, which float64 finds of one a few n eps of
    its norm away.
    """
    return float_bound(len(matrix) ** 2, torch.float64) * np.linalg.norm(matrix, 2)


def graph_of(vectors, **parameters) -> np.ndarray:
    return weights(cosines(np.array(vectors, dtype=np.float32)), Graph(**parameters))


@pytest.mark.parametrize("vectors, parameters, expected", [
    (CORNER, {}, [[0, NEAR, FAR], [NEAR, 0, NEAR], [FAR, NEAR, 0]]),
    (CORNER, dict(eps=0.5), [[0, NEAR, 0], [NEAR, 0, NEAR], [0, NEAR, 0]]),
    # the middle node names one neighbour and is named by both
    (CORNER, dict(topk=1), [[0, NEAR, 0], [NEAR, 0, NEAR], [0, NEAR, 0]]),
    (CORNER, dict(k=1), [[0, NEAR, 0], [NEAR, 0, NEAR], [0, NEAR, 0]]),
    # lengths do not count
    (CORNER * [1, 7, 0.1], dict(eps=0.5, p=1, sigma=1),
     [[0, 1 / (2 - HALF), 0], [1 / (2 - HALF), 0, 1 / (2 - HALF)], [0, 1 / (2 - HALF), 0]]),
    ([[1, 1], [0, 0]], {}, [[0, 1], [1, 0]]),                               # distance 0
    ([[1, -1], [0, 0]], {}, [[0, FAR], [FAR, 0]]),                          # opposite is as far as orthogonal
    ([[1, 0], [0, 0]], {}, [[0, FAR], [FAR, 0]]),                           # and so is a column of zeros
])
def test_small_graphs(vectors, parameters, expected):
    found = graph_of(vectors, **parameters)
    bound = float_bound(3, torch.float32)  # of float32 vectors
    np.testing.assert_allclose(found, expected, rtol=bound)
    np.testing.assert_allclose(laplacian_of(found), np.diag(np.sum(expected, 1)) - expected, rtol=bound)


def test_of_equal_distances_the_larger_cosine_comes_first():
    # column 0 is at distance 1 from column 1 (cosine -1) and from column 2 (cosine -0.1)
    found = graph_of([[1, -1, -0.1], [0, 0, 1]], topk=1)
    assert found[0, 2] == pytest.approx(FAR) and found[0, 1] == 0 < found[1, 2]
    # of rounding, which a number of threads changes
    noise = np.array([[1, -1e-15, 1e-15], [-1e-15, 1, 2e-15], [1e-15, 2e-15, 1]])
    assert np.array_equal(weights(noise, Graph(topk=1)) > 0,
                          [[False, True, True], [True, False, False], [True, False, False]])


def test_components():
    two_pairs = [[1, 1, 0, 0], [0, 0, 1, 1]]
    with pytest.raises(RunError,
                       match="^the graph of 4 nodes and 2 edges falls into 2 components, the largest of 2 nodes; "
                             "raise --eps, --k or --topk$"):
        graph_of(two_pairs, eps=0.9)
    with pytest.raises(RunError, match="falls into 2 components"):
        graph_of(two_pairs, topk=1)
    with pytest.raises(RunError,
                       match="^the graph of 3 nodes and 0 edges falls into 3 components, the largest of 1 nodes"):
        graph_of(np.eye(3), eps=0.5)


@pytest.mark.parametrize("parameters", [{}, dict(k=4), dict(topk=3), dict(k=6, topk=9, sigma=0.1), dict(p=5)], ids=str)
def test_laplacian_properties(parameters):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((200, 5)) @ rng.standard_normal((5, 40)) + 0.5
    laplacian, graph = laplacian_of(graph_of(vectors, **parameters)), Graph(**parameters)
    edges = -laplacian + np.diag(np.diag(laplacian))
    eigenvalues, bound = np.linalg.eigvalsh(laplacian), spectral_bound(laplacian)
    assert np.array_equal(laplacian, laplacian.T) and np.abs(laplacian.sum(1)).max() < bound
    assert edges.min() == 0 and edges.max() <= 1 and abs(eigenvalues[0]) < bound < 1e-6 < eigenvalues[1]
    assert ((edges > 0).sum(1) >= min(graph.k, graph.topk)).all()
    assert (edges > 0).sum() <= 2 * 40 * min(graph.k, graph.topk)


def test_rayleigh_quotients():
    laplacian, x = laplacian_of(graph_of(CORNER)), np.array([[1.0, 2, 4], [5, 5, 5], [0, 0, 0], [-1, -2, -4]])
    e = (NEAR * 1 + NEAR * 4 + FAR * 9) / 21
    # weights of float32 vectors
    np.testing.assert_allclose(rayleigh_quotients(laplacian, x), [e, 0, 0, e], rtol=0,
                               atol=float_bound(3 * 3, torch.float64) * 10 + e * float_bound(3, torch.float32))


def test_quantile_and_tau():
    rng = np.random.default_rng(0)
    values, counts = rng.standard_normal(50) ** 2, rng.integers(0, 9, 50)
    each = np.repeat(values, counts)
    for q in (0, 0.1, 0.5, 0.77, 1):
        assert quantile(values, counts, q) == np.quantile(each, q, method="inverted_cdf")

    def choose(*tau):
        return Tau(*tau).choose(values, counts)

    assert choose("fixed") == 1 and choose("mean") == pytest.approx(each.mean())
    assert choose("median") == quantile(values, counts, 0.5)
    assert choose("percentile", 90.0) == quantile(values, counts, 0.9)
    assert [Tau(mode).choose(np.zeros(3), np.ones(3)) for mode in ("median", "mean", "percentile")] == [1e-10] * 3
    assert Tau("median").choose(np.zeros(0), np.zeros(0)) == 1


# ---- the embedding ----------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3, 50])
def test_cooccurrences_and_mutual_information(window):
    rng = np.random.default_rng(1)
    words, documents = rng.integers(-1, 6, 40), np.sort(rng.integers(0, 4, 40))
    counted = Counter()
    for i in range(40):
        for j in range(40):
            if i != j and abs(i - j) <= window and documents[i] == documents[j] and min(words[i], words[j]) >= 0:
                counted[words[i], words[j]] += 1
    counts = cooccurrences(words, documents, 7, window)  # 6 never occurs
    assert counts.toarray().tolist() == [[counted[v, w] for w in range(7)] for v in range(7)]
    total = [sum(counted[v, w] for w in range(7)) for v in range(7)]
    smooth = [n ** 0.75 / sum(m ** 0.75 for m in total) for n in total]
    expected = [[max(0, math.log(counted[v, w] / total[v] / smooth[w])) if counted[v, w] else 0 for w in range(7)]
                for v in range(7)]
    np.testing.assert_allclose(mutual_information(counts).toarray(), expected, rtol=float_bound(1, torch.float32),
                               atol=float_bound(7, torch.float64))
    assert np.max(expected) > 0


@pytest.mark.parametrize("n", [40, 1100])  # dense and iterative
def test_singular_vectors(n):
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((n, 6)))[0] for _ in range(2))
    matrix = sparse.csr_matrix(((left * [9, 7, 5, 3, 2, 1]) @ right.T).astype(np.float32))
    vectors, values = singular_vectors(matrix, 4, seed=1)
    # of a float32 matrix of norm 9; a vector turns by that over the least gap of two values, 1
    rounding = float_bound(n, torch.float32) * 9
    np.testing.assert_allclose(values, [9, 7, 5, 3], rtol=0, atol=rounding)
    np.testing.assert_allclose(np.abs(vectors.T @ left), np.eye(4, 6), rtol=0, atol=rounding)
    with pytest.raises(RunError,
                       match=f"^the mutual information of {n} tokens has rank 6, too low for 8 features; lower "
                             "--features or read more --tokens$"):
        singular_vectors(matrix, 8, seed=1)


def test_varimax_finds_what_was_turned():
    rng = np.random.default_rng(0)
    sparse_loadings = rng.standard_normal((500, 6)) * (rng.integers(6, size=500)[:, None] == np.arange(6))
    turn = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    rotation = varimax(sparse_loadings @ turn)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(6), atol=1e-10)
    # a permutation with signs
    np.testing.assert_allclose(np.sort(np.abs(turn @ rotation), 1), np.tile(np.eye(6)[-1], (6, 1)), atol=1e-3)


def clusters(manifold) -> tuple[np.ndarray, np.ndarray]:
    """
    (of which side of the graph's smoothest cut each feature is; the share of each feature's square that lies on the
    first topic's words).
    """
    square = manifold.vectors.astype(np.float64) ** 2
    return np.linalg.eigh(manifold.laplacian)[1][:, 1] > 0, square[manifold.tokens < WORDS].sum(0) / square.sum(0)


def test_two_topics_are_two_clusters(corpus, tmp_path):
    options = dict(features=12, min_count=10, graph=Graph(topk=5))
    manifold = from_corpus(corpus, **options)
    side, share = clusters(manifold)
    assert np.minimum(share, 1 - share).max() < 0.01 and 4 <= side.sum() <= 8
    assert (side == (share > 0.5)).all() | (side == (share < 0.5)).all()
    inside = side[:, None] == side
    edges = np.diag(np.diag(manifold.laplacian)) - manifold.laplacian
    assert edges[inside].sum() > 3 * edges[~inside].sum()
    with pytest.raises(RunError, match="falls into 2 components"):
        from_corpus(corpus, **options | dict(graph=Graph(eps=0.99)))
    # the same words without topics
    _, share = clusters(from_corpus(folder_of(tmp_path, topical(topics=False)), **options))
    assert np.minimum(share, 1 - share).min() > 0.05


def test_what_a_corpus_file_says(corpus, tmp_path):
    text = topical()
    manifold = from_corpus(corpus, features=6, min_count=10, tokens=9000, window=2, tau=Tau("percentile", 25.0))
    counts = np.bincount(text[:9000], minlength=END + 1)
    kept = np.flatnonzero((counts >= 10) & (np.arange(END + 1) < END))
    assert manifold.tokens.tolist() == kept.tolist() and manifold.counts.tolist() == counts[kept].tolist()
    assert manifold.vectors.shape == (len(kept), 6) and not len(manifold.labels)
    norms = np.linalg.norm(manifold.vectors, axis=0)
    assert (np.diff(norms) <= 0).all() and ((manifold.vectors ** 3).sum(0) > 0).all()
    provenance = manifold.provenance
    assert set(provenance["sha256"]) == {"a_train_000000.bin", "a_train_000001.bin"}  # the third is not read
    assert {name: provenance[name] for name in ("source", "data", "tokens", "vocabulary", "features", "window",
                                                "min_count", "seed")} == dict(
                                                    source="corpus", data=Path(corpus).name, tokens=9000,
                                                    vocabulary=len(kept), features=6, window=2, min_count=10, seed=1)
    assert provenance["graph"] == dict(eps=1.31, k=25, topk=15, p=1.8, sigma=0.535)
    assert provenance["tau"] == dict(mode="percentile", percentile=25.0)
    manifold.save(tmp_path / "a.npz")
    stored, again = np.load(tmp_path / "a.npz"), read_manifold(tmp_path / "a.npz")
    assert float(stored["tau"]) == pytest.approx(np.quantile(np.repeat(manifold.energies, manifold.counts), 0.25,
                                                             method="inverted_cdf"))
    assert again.provenance == provenance
    assert all(np.array_equal(getattr(again, name), getattr(manifold, name))
               for name in ("laplacian", "vectors", "counts", "tokens", "labels"))
    few = from_corpus(corpus, features=6, vocabulary=20, min_count=1)
    counts = np.bincount(text)[:END]
    assert len(few.tokens) == 20 and counts[few.tokens].min() >= np.sort(counts)[-20]


def test_labels(tmp_path):
    text = np.array([97, 98, 99, 100, 256] * 300)
    byte_labels = from_corpus(folder_of(tmp_path / "bytes", text, 257), features=2, window=1).labels
    assert len(byte_labels) == 2 and all(set(label.split(" ")) < set("abcd") for label in byte_labels)
    folder = Path(folder_of(tmp_path / "merged", np.array([257, 258, 128, 10, 261] * 300), 262))
    words = [b"th", b"the", b" the", b"in", b"\n\n"]
    write_merges(folder / "tiny.tiktoken", {token: i for i, token in enumerate([*map(bytes, zip(range(256))), *words])})
    merged = from_corpus(str(folder), features=2, window=1)
    assert sorted(set(" ".join(merged.labels).split(" "))) == ["<0a>", "<80>", "the"]


# ---- the other sources ------------------------------------------------------


def test_random_keeps_the_spectrum(corpus, tmp_path):
    original = from_corpus(corpus, features=12, min_count=10, graph=Graph(topk=5))
    original.save(tmp_path / "a.npz")
    control = from_random(str(tmp_path / "a.npz"), seed=3)
    spectrum = np.linalg.eigvalsh(original.laplacian)
    bound = spectral_bound(original.laplacian)
    np.testing.assert_allclose(np.linalg.eigvalsh(control.laplacian), spectrum, rtol=0, atol=bound)
    assert np.array_equal(control.laplacian, control.laplacian.T) and np.abs(control.laplacian.sum(1)).max() < bound
    assert (control.laplacian[~np.eye(12, dtype=bool)] > 0.01).any()  # no graph has positive entries there
    assert control.provenance["of"] == original.provenance and "not made from a graph" in control.provenance["matrix"]
    assert len(control.provenance["sha256"]) == 1
    assert np.array_equal(control.vectors, original.vectors) and control.tau != original.tau
    other = random_laplacian(original.laplacian, seed=4)
    assert np.abs(other - control.laplacian).max() > 0.01
    alike = np.abs(np.linalg.eigh(control.laplacian)[1].T @ np.linalg.eigh(original.laplacian)[1])
    # no eigenvector was kept but the constant one
    assert alike[0, 0] == pytest.approx(1) and alike[1:, 1:].max() < 0.95
    with pytest.raises(RunError, match="^rows of this Laplacian do not sum to 0"):
        random_laplacian(np.eye(4), seed=1)


def test_random_directions_are_uniform():
    """
    The eigenvector of the only other eigenvalue has no preferred channel: its mean square is (1 - 1/n) / n everywhere.
    """
    n = 4
    basis = np.linalg.qr(np.column_stack((np.ones(n), np.eye(n)[:, 1:])))[0]
    matrix = np.outer(basis[:, 2], basis[:, 2])
    diagonals = np.mean([np.diag(random_laplacian(matrix, seed)) for seed in range(2000)], 0)
    np.testing.assert_allclose(diagonals, 1 / n, atol=0.02)


def test_chain(tmp_path):
    chain = from_chain(4)
    assert chain.laplacian.tolist() == [[1, -1, 0, 0], [-1, 2, -1, 0], [0, -1, 2, -1], [0, 0, -1, 1]] and chain.tau == 1
    assert chain.provenance["source"] == "chain"
    chain.save(tmp_path / "chain.npz")
    control = from_random(str(tmp_path / "chain.npz"))
    np.testing.assert_allclose(np.linalg.eigvalsh(control.laplacian), np.linalg.eigvalsh(chain.laplacian), rtol=0,
                               atol=spectral_bound(chain.laplacian))
    assert control.tau == 1


def trained(corpus: str, folder: Path, *arguments: str) -> str:
    """The checkpoint after one step."""
    assert train_gpt.main(["--data", corpus, "--log_dir", str(folder), "--run_id", "run", "--device", "cpu",
                           "--compile", "off", "--sequence_length", "40", "--batch_tokens", "160",
                           "--micro_batch_tokens", "160", "--steps", "1", "--val_every", "0", "--val_tokens", "400",
                           "--layers", "2", "--model_dim", "32", "--heads", "2", "--head_dim", "16", "--mlp_hidden",
                           "32", *arguments], loader=variants) == 0
    return str(folder / "run.pt")


def test_checkpoint(corpus, tmp_path):
    path = trained(corpus, tmp_path, "--rope", "none")
    saved = train_gpt.read_checkpoint(path)
    weight = saved["model"]["blocks.1.attention.k.weight"].view(2, 16, 32)
    weight[:, 5] = 2 * weight[:, 3]     # in both heads channel 5 is channel 3
    weight[1, 9] = weight[1, 0]         # and in the second channel 9 is channel 0
    train_gpt.write_checkpoint(Path(path), saved)
    manifold = from_checkpoint(path, tokens=800, graph=Graph(topk=4))
    edges = np.diag(np.diag(manifold.laplacian)) - manifold.laplacian
    rounding = float_bound(1600, torch.float32)  # of a sum over all keys
    assert manifold.laplacian.shape == (16, 16) and edges[3, 5] == pytest.approx(1, abs=rounding)
    assert np.sort(edges, None)[-3] < 0.9
    assert manifold.vectors.shape == (1600, 16) and (manifold.counts == 1).all() and not len(manifold.tokens)
    assert manifold.provenance["layer"] == 1 and manifold.provenance["tokens"] == 800
    assert set(manifold.provenance["checkpoint"]) == {"run.pt"}
    second = from_checkpoint(path, tokens=800, head=1)
    edges = np.diag(np.diag(second.laplacian)) - second.laplacian
    assert np.isclose(edges, 1, rtol=0, atol=rounding).sum() == 4 and len(second.vectors) == 800
    np.testing.assert_array_equal(second.vectors, manifold.vectors[1::2])
    # the keys are those that the attention sees
    config = train_gpt.Config(**saved["config"] | dict(val_tokens=800))
    model = train_gpt.GPT(config)
    model.load_state_dict(saved["model"])
    model.set_windows(1.0)
    keys, heads = [], model.blocks[1].attention.heads
    model.blocks[1].attention.heads = lambda x, ctx: keys.append(heads(x, ctx)[1]) or heads(x, ctx)
    with torch.no_grad():
        for batch in train_gpt.validation_batches(config):
            model(torch.from_numpy(batch[:, :-1]))
    assert relative_rms(torch.cat(keys).reshape(-1, 16),
                        torch.from_numpy(manifold.vectors)) < 2 * float_bound(40 + 5 * 32 + 32, torch.float32)


def test_a_sample_of_many_keys(corpus, tmp_path, monkeypatch):
    path = trained(corpus, tmp_path)
    whole = from_checkpoint(path, tokens=320, layer=0)
    monkeypatch.setattr(script, "KEPT_KEYS", 50)
    some = from_checkpoint(path, tokens=320, layer=0)
    assert np.array_equal(some.laplacian, whole.laplacian) and len(some.vectors) == 50 and len(whole.vectors) == 640
    assert {row.tobytes() for row in some.vectors} < {row.tobytes() for row in whole.vectors}


def test_the_variant_trains_with_the_file_and_hands_keys_back(corpus, tmp_path):
    from_corpus(corpus, features=16, min_count=10).save(tmp_path / "a.npz")
    path = trained(corpus, tmp_path, "--variant", f"topological_attention:laplacian=domain:{tmp_path / 'a.npz'}")
    saved = torch.load(path, weights_only=True)["model"]
    np.testing.assert_allclose(saved["blocks.1.attention.laplacian"], np.load(tmp_path / "a.npz")["laplacian"],
                               rtol=float_bound(1, torch.float32))
    manifold = from_checkpoint(path, tokens=400)
    assert manifold.laplacian.shape == (16, 16)
    assert manifold.provenance["variant"] == [f"topological_attention:laplacian=domain:{tmp_path / 'a.npz'}"]
    scalar = trained(corpus, tmp_path / "scalar", "--variant", "topological_attention:preset=fast,layers=1")
    assert from_checkpoint(scalar, tokens=400, layer=0).laplacian.shape == (16, 16)
    with pytest.raises(RunError,
                       match="^layer 1 of this checkpoint, TopologicalAttention, has no keys; choose another --layer$"):
        from_checkpoint(scalar, tokens=400, layer=1)
    # what the variants replaced is back
    assert train_gpt.CausalSelfAttention.__module__ == "train_gpt" and variants.available()


# ---- files and faults -------------------------------------------------------


def run(*arguments) -> int:
    return script.main([str(part) for part in arguments])


def test_equal_input_gives_equal_bytes(corpus, tmp_path, capsys):
    for name in "ab":
        assert run("corpus", corpus, "-o", tmp_path / f"{name}.npz", "--features", 8, "--min_count", 10, "--tau",
                   "mean") == 0
        assert run("random", tmp_path / "a.npz", "-o", tmp_path / f"random_{name}.npz", "--seed", 5) == 0
    run("random", tmp_path / "a.npz", "-o", tmp_path / "random_c.npz", "--seed", 6)

    def read(name):
        return (tmp_path / f"{name}.npz").read_bytes()

    assert read("a") == read("b") and read("random_a") == read("random_b") != read("random_c")
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{tmp_path / 'a.npz'}: 8 nodes, 28 edges of weight 0.") and ", tau " in first
    assert "lambda 0." in first
    assert second.startswith(f"{tmp_path / 'random_a.npz'}: 8 nodes, eigenvalues 0 and ")
    assert str(tmp_path) not in json.dumps(read_manifold(tmp_path / "a.npz").provenance)


@pytest.mark.parametrize("arguments, message", [
    ("--features 1", "--features must be at least 2, got 1"), ("--window 0", "--window must be at least 1, got 0"),
    ("--tokens 0", "--tokens must be at least 1, got 0"), ("--min_count 0", "--min_count must be at least 1, got 0"),
    ("--eps 0", "--eps must be above 0, got 0.0"), ("--sigma nan", "--sigma must be above 0, got nan"),
    ("--topk 0", "--topk must be above 0, got 0"),
    ("--percentile 101", "--percentile must lie between 0 and 100, got 101.0"),
    ("--min_count 10 --features 60",
     "60 tokens of the vocabulary occur 10 times or more among the 16,400 read from {corpus}, and 60 "
     "features need more; give more data or a higher --vocabulary, or lower --min_count or --features"),
    ("--tokens 50", "0 tokens of the vocabulary occur 100 times or more among the 50 read from {corpus}, and 64 "
     "features need more; give more data or a higher --vocabulary, or lower --min_count or --features"),
    ("--features 12 --eps 0.0001",
     "the graph of 12 nodes and 0 edges falls into 12 components, the largest of 1 nodes; raise --eps, "
     "--k or --topk")])
def test_faults_of_a_corpus(corpus, tmp_path, capsys, arguments, message):
    assert run("corpus", corpus, "-o", tmp_path / "a.npz", *arguments.split()) == 1
    assert capsys.readouterr().err == f"manifold.py: error: {message.format(corpus=corpus)}\n"
    assert not list(tmp_path.iterdir())


def test_a_corpus_of_little_rank(tmp_path, capsys):
    # 0 and 1 have the same neighbours, 2 and 3 too
    folder = folder_of(tmp_path / "pair", np.array([4, 0, 2, 4, 1, 2, 4, 0, 3, 4, 1, 3] * 100), 5)
    assert run("corpus", folder, "-o", tmp_path / "a.npz", "--features", 3) == 1
    assert capsys.readouterr().err == (
        "manifold.py: error: the mutual information of 4 tokens has rank 2, too low for 3 features; lower "
        "--features or read more --tokens\n")


def test_faults_of_files(corpus, tmp_path, capsys):
    from_chain(8).save(tmp_path / "chain.npz")
    from_random(str(tmp_path / "chain.npz")).save(tmp_path / "random.npz")
    whole = (tmp_path / "chain.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[:len(whole) // 2])
    np.savez(tmp_path / "bare.npz", laplacian=from_chain(8).laplacian, provenance='{"source": "elsewhere"}')
    (tmp_path / "text.pt").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a_train_000000.bin").write_bytes(b"text")
    checkpoint = trained(corpus, tmp_path)
    capsys.readouterr()
    for command, expected in {
        ("random", tmp_path / "half.npz"): f"{tmp_path / 'half.npz'} cannot be read (BadZipFile)",
        ("random", tmp_path / "none.npz"): f"{tmp_path / 'none.npz'} cannot be read (FileNotFoundError)",
        ("random", tmp_path / "bare.npz"):
            f"{tmp_path / 'bare.npz'} was not made by data/manifold.py, or is damaged (KeyError); make it again",
        ("random", tmp_path / "random.npz"): f"{tmp_path / 'random.npz'} is such a control already; give the file that "
                                             "it was made from, with another --seed",
        ("checkpoint", tmp_path / "text.pt"): f"{tmp_path / 'text.pt'} is not a whole checkpoint of this trainer",
        ("checkpoint", checkpoint, "--layer", 2): "--layer 2 is none of the checkpoint's 2 layers",
        ("checkpoint", checkpoint, "--head", 2): "--head 2 is none of the layer's 2 heads (-1: all of them)",
        ("checkpoint", checkpoint, "--eps", 0.001):
            "the graph of 16 nodes and 0 edges falls into 16 components, the largest of 1 nodes",
        ("checkpoint", checkpoint, "--tokens", 3): "4 validation tokens in",
        ("corpus", tmp_path / "empty"): f"no train shards (*_train_*.bin) in {tmp_path / 'empty'}",
        ("corpus", tmp_path / "broken"): f"{tmp_path / 'broken' / 'a_train_000000.bin'} is no token shard",
        ("chain", "--features", 1): "--features must be at least 2, got 1",
    }.items():
        assert run(*command, "-o", tmp_path / "out.npz") == 1
        error = capsys.readouterr().err
        assert error.startswith(f"manifold.py: error: {expected}") and error.count("\n") == 1
    assert run("chain", "-o", tmp_path / "nowhere" / "a.npz") == 1 and "cannot write" in capsys.readouterr().err


def test_command_line(tmp_path, capsys):
    assert run_module("data.manifold", "chain", "-o", tmp_path / "a.npz", "--features", "4") == 0
    assert capsys.readouterr() == (
        f"{tmp_path / 'a.npz'}: 4 nodes, 3 edges of weight 1.000 to 1.000, eigenvalues 0 and 0.586 to "
        "3.414, tau 1\n", "")
