"""Pictures: that every kind of file gives one, labels that do not overlap, tokens counted in another corpus, faults."""
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import train_gpt
import variants
import visualize
from data.manifold import Graph, Manifold, from_chain, from_corpus, from_random
from data.shards import write_meta, write_shard

SCRIPT = Path(visualize.__file__)


def folder_of(path: Path, tokens: np.ndarray, vocabulary: int = 257) -> str:
    path.mkdir()
    for i, part in enumerate(np.array_split(tokens, 2)):
        write_shard(path / f"a_train_{i:06d}.bin", part)
    write_shard(path / "a_val_000000.bin", tokens[:100])
    write_meta(path, vocab_size=vocabulary, tokenizer="bytes")
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """One file of each source, and the corpus of the first."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    # printable, $ among them
    text = np.clip(np.cumsum(rng.integers(-2, 3, 20_000)) % 30 + rng.integers(0, 3, 20_000), 0, 31) + 33
    corpus = folder_of(folder / "corpus", text)
    from_corpus(corpus, features=8, graph=Graph(topk=4)).save(folder / "corpus.npz")
    from_random(str(folder / "corpus.npz")).save(folder / "random.npz")
    from_chain(5).save(folder / "chain.npz")
    from_chain(2).save(folder / "two.npz")
    keys = np.random.default_rng(1).standard_normal((50, 8)).astype(np.float32)
    source = dict(source="checkpoint", data="corpus", tau=dict(mode="median", percentile=50.0))
    Manifold(from_corpus(corpus, features=8).laplacian, source, keys,
             np.ones(50, np.int64)).save(folder / "checkpoint.npz")
    return {path.stem: str(path) for path in folder.glob("*.npz")} | dict(folder=corpus)


def run(*arguments) -> int:
    return visualize.main([str(part) for part in arguments])


@pytest.mark.parametrize("source", ["corpus", "random", "chain", "checkpoint"])
def test_every_source_has_a_picture(files, tmp_path, capsys, source):
    path = tmp_path / "a.png"
    assert run("manifold", files[source], "-o", path) == 0
    assert capsys.readouterr().out == f"{path}\n"
    image = matplotlib.image.imread(path)[..., :3]
    assert image.shape == (910, 1690, 3)
    for part in (image[:, :900], image[:440, 1150:], image[470:, 1150:]):  # graph or matrix, spectrum, histogram
        assert 0.002 < (part.min(-1) < 0.9).mean() < 0.7
    assert run("manifold", files[source], "-o", tmp_path / "b.png") == 0
    assert (tmp_path / "b.png").read_bytes() == path.read_bytes()


def drawn(files, monkeypatch, source: str, *arguments) -> dict:
    """What the picture of a file shows: texts and data of its panels."""
    from matplotlib.figure import Figure
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **others: figures.append(figure))
    options = visualize.argparse.Namespace(source=files[source], data="", output=Path(files["folder"]) / "a.png")
    vars(options).update(dict(arguments))
    visualize.run_manifold(options)
    return {panel.get_title().split(":")[0]: panel for panel in figures[0].axes}


def test_what_the_panels_show(files, monkeypatch):
    panels, stored = drawn(files, monkeypatch, "corpus"), np.load(files["corpus"])
    laplacian, tau = stored["laplacian"], float(stored["tau"])
    graph, spectrum, histogram = panels["graph"], panels["spectrum"], panels["lambda over the tokens of corpus"]
    edges = np.count_nonzero(np.triu(laplacian, 1))
    assert graph.get_title() == (f"graph: 8 nodes, {edges} edges of weight {-laplacian[laplacian < 0].max():.2f} to "
                                 f"{-laplacian.min():.2f}")
    assert len(graph.collections[0].get_segments()) == edges
    place = np.asarray(graph.collections[1].get_offsets())  # v of L v = m D v, for one m in each column
    for v in place.T:
        m = v @ laplacian @ v / (v @ (np.diag(laplacian) * v))
        np.testing.assert_allclose(laplacian @ v, m * np.diag(laplacian) * v, atol=1e-10)
    own, chain = spectrum.lines
    np.testing.assert_allclose(own.get_ydata(), np.linalg.eigvalsh(laplacian), atol=1e-12)
    np.testing.assert_allclose(chain.get_ydata(), 2 - 2 * np.cos(np.pi * np.arange(8) / 8), atol=1e-12)
    x = stored["vectors"].astype(float)
    energies = ((x @ laplacian) * x).sum(1) / (x * x).sum(1)
    for patches, scale in zip((histogram.patches[:visualize.BINS], histogram.patches[visualize.BINS:]), (1.0, tau),
                              strict=True):
        expected = np.histogram(energies / (energies + scale), visualize.BINS, (0, 1),
                                weights=stored["counts"] / stored["counts"].sum())[0]
        np.testing.assert_allclose([bar.get_height() for bar in patches], expected, atol=1e-12)


def test_tokens_of_another_corpus(files, tmp_path, monkeypatch):
    tokens = np.load(files["corpus"])["tokens"]
    other = folder_of(tmp_path / "other", np.array([tokens[2]] * 30 + [tokens[5]] * 10 + [5] * 7))
    counts = visualize.count_occurrences(visualize.read_manifold(files["corpus"]), other)
    assert counts[2] == 30 and counts[5] == 10 and counts.sum() == 40
    panels = drawn(files, monkeypatch, "random", ("data", other))  # the control knows the tokens too
    heights = sorted({round(bar.get_height(), 6) for bar in panels["lambda over the tokens of other"].patches})
    assert heights in ([0, 0.25, 0.75], [0, 1.0])


def test_labels_do_not_overlap():
    rng = np.random.default_rng(0)
    place, labels = rng.standard_normal((60, 2)), ["x" * n for n in rng.integers(1, 15, 60)]
    placed = visualize.place_labels(place, labels, np.arange(60))
    points = (place - place.min(0)) / np.ptp(place, axis=0) * visualize.PANEL
    boxes = []
    for i, text, offset in placed:
        assert text == labels[i]
        corner = points[i] + offset
        end = corner + np.sign(offset) * (0.62 * visualize.FONT * len(text), visualize.FONT)
        boxes.append((np.minimum(corner, end), np.maximum(corner, end)))
    overlaps = [(a, b) for a in range(len(boxes)) for b in range(a) if (boxes[a][0] <= boxes[b][1]).all()
                and (boxes[b][0] <= boxes[a][1]).all()]
    assert not overlaps and 20 < len(placed) < 60 and placed[0][0] == 0
    assert visualize.place_labels(place, [], np.arange(60)) == []


def test_faults(files, tmp_path, capsys):
    whole = Path(files["chain"]).read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[:len(whole) // 2])
    np.savez(tmp_path / "bare.npz", laplacian=np.eye(4), provenance='{"source": "elsewhere"}')
    words = folder_of(tmp_path / "words", np.arange(1000), 5000)
    strange = folder_of(tmp_path / "strange", np.full(500, 200))
    outside = folder_of(tmp_path / "outside", np.full(500, 300))
    for command, expected in {
        (tmp_path / "half.npz",): f"{tmp_path / 'half.npz'} cannot be read (BadZipFile)",
        (tmp_path / "none.npz",): f"{tmp_path / 'none.npz'} cannot be read (FileNotFoundError)",
        (tmp_path / "bare.npz",):
            f"{tmp_path / 'bare.npz'} was not made by data/manifold.py, or is damaged (KeyError); make it again",
        (files["two"],): f"{files['two']} has 2 nodes, and the third eigenvector needs 3",
        (files["checkpoint"], "--data", words):
            "--data counts tokens, and the vectors of this file are not those of tokens; leave it out",
        (files["chain"], "--data", words):
            "--data counts tokens, and the vectors of this file are not those of tokens; leave it out",
        (files["random"], "--data", words):
            f"the vectors are those of a vocabulary of 257 tokens, {words} has 5000; give shards of the same tokenizer",
        (files["corpus"], "--data", strange): f"none of the file's 32 tokens occurs in {strange}",
        (files["corpus"], "--data", outside): f"token 300 in {outside} is outside the vocabulary of 257",
        (files["corpus"], "--data", tmp_path / "nothing"):
            f"no train shards (*_train_*.bin) in {tmp_path / 'nothing'}",
    }.items():
        assert run("manifold", *command, "-o", tmp_path / "a.png") == 1
        error = capsys.readouterr().err
        assert error.startswith(f"visualize.py: error: {expected}") and error.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))


def refused(capsys, *arguments) -> str:
    """The one line that a command line is refused with."""
    code = run(*arguments)
    out, error = capsys.readouterr()
    assert code == 1 and out == "" and error.startswith("visualize.py: error: ") and error.count("\n") == 1, error
    return error


def test_where_no_picture_can_be_written(files, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for place, reason in {"nowhere/a.png": "there is no folder", "file/a.png": "there is no folder",
                          "folder.png": "directory", "x" * 300 + ".png": "File name too long"}.items():
        line = refused(capsys, "manifold", files["chain"], "-o", tmp_path / place)
        assert f" {tmp_path}" in line and reason in line
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder.png"}


CHAIN = dict(source="chain", features=4, tau=dict(mode="fixed", percentile=50.0))


@pytest.mark.parametrize("name, value", [
    *(("provenance", value) for value in (
        dict(CHAIN, source="elsewhere"), dict(CHAIN, source=[]), dict(tau=CHAIN["tau"]), dict(source="chain"),
        dict(CHAIN, tau=[]), dict(CHAIN, of=3), dict(CHAIN, of=dict(source="chain", data=[])), [1], 0,
        dict(CHAIN, tau=dict(mode="fixed", percentile="x")), dict(CHAIN, tau=dict(mode="fixed", percentile=1e300)),
        dict(CHAIN, tau=dict(mode=[], percentile=1)))),
    *(("laplacian", value) for value in (
        np.full((4, 4), np.nan), np.zeros((4, 4)), np.diag([0.0, 1, 1, 1]), np.eye(4), np.zeros(4))),
    *(("vectors", value) for value in (np.zeros((2, 4)), np.zeros((0, 3)), np.zeros(4), np.zeros((0, 4), "<U1"))),
    ("counts", np.zeros(3, int)), ("counts", np.zeros(0)), ("tokens", np.zeros(3, int)), ("tokens", np.zeros(0, "<U1")),
    ("labels", np.zeros(3, "<U1")), ("labels", np.zeros(4))], ids=lambda value: str(value).replace("\n", " ")[:60])
def test_arrays_that_do_not_fit(tmp_path, capsys, name, value):
    from_chain(4).save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as stored:
        arrays = dict(stored)
    arrays[name] = json.dumps(value) if name == "provenance" else value
    np.savez(tmp_path / "a.npz", **arrays)
    assert "a.npz" in refused(capsys, "manifold", tmp_path / "a.npz", "-o", tmp_path / "a.png")


@pytest.mark.parametrize("name, change", [
    ("vectors", lambda x: np.where(x == x.max(), np.nan, x)), ("counts", lambda x: x * 0), ("counts", lambda x: -x),
    ("tokens", lambda x: x + 1000), ("tokens", lambda x: -1 - x)])
def test_vectors_that_do_not_fit(files, tmp_path, capsys, name, change):
    with np.load(files["corpus"]) as stored:
        np.savez(tmp_path / "a.npz", **(dict(stored) | {name: change(stored[name])}))
    line = refused(capsys, "manifold", tmp_path / "a.npz", "--data", files["folder"], "-o", tmp_path / "a.png")
    assert "a.npz" in line or "the vectors are those of tokens" in line


def test_names_that_would_be_formulas(files, tmp_path, capsys):
    """A $ in a name from a file, and characters that the font lacks: shown as they are, no word on stderr."""
    with np.load(files["corpus"]) as stored:
        arrays = dict(stored)
    source = json.loads(str(arrays["provenance"])) | dict(data=r"$\bad{$ \u4e2d")
    labels = np.array([r"$\bad{$"] * len(arrays["labels"]))
    np.savez(tmp_path / "a.npz", **(arrays | dict(provenance=json.dumps(source), labels=labels)))
    assert run("manifold", tmp_path / "a.npz", "-o", tmp_path / "a.png") == 0
    assert run("stream", run_file(tmp_path / "a.json", (r"$\bad{$ \u4e2d",), 0.1), "-o", tmp_path / "b.png") == 0
    assert capsys.readouterr().err == ""


def test_a_console_that_nobody_reads(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(visualize, "__doc__", None)  # as with python -OO
    for arguments in (["manifold", files["chain"], "-o", tmp_path / "a.png"], ["--help"], ["stream", "--help"]):
        reading, writing = os.pipe()
        os.close(reading)
        with monkeypatch.context() as patch, os.fdopen(writing, "w") as pipe:
            patch.setattr(sys, "stdout", pipe)
            assert run(*arguments) == 141
    assert (tmp_path / "a.png").stat().st_size and capsys.readouterr().err == ""


def test_command_line(files, tmp_path):
    """In a locale without accents too, beside ranks that are somebody else's."""
    strange = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", RANK="3", WORLD_SIZE="8")
    command = [sys.executable, SCRIPT, "manifold", files["chain"], "-o", tmp_path / "é.png"]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=os.environ | strange)
    assert (done.returncode, done.stderr, done.stdout.decode()) == (0, b"", f"{tmp_path / '??.png'}\n")
    assert matplotlib.image.imread(io.BytesIO((tmp_path / "é.png").read_bytes())).size


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> list[str]:
    """Those at steps 0, 1 and 2 of a run of three layers, the first one without splanifolds."""
    folder = tmp_path_factory.mktemp("splanifold")
    data = folder_of(folder / "corpus", np.random.default_rng(0).integers(0, 256, 4000))
    model = ("--layers 3 --model_dim 16 --heads 2 --head_dim 8 --mlp_hidden 32 --window_pattern L "
             "--sequence_length 64 --batch_tokens 128 --val_tokens 64 --val_every 1")
    arguments = (f"--data {data} {model} --steps 2 --keep_every 1 --log_dir {folder} --run_id a --variant "
                 "splanifold_mlp:preset=dense16,dims=4,nodes=3,layers=1-2")
    assert train_gpt.main(arguments.split(), loader=variants) == 0
    return [str(folder / f"a{suffix}.pt") for suffix in ("-step000000", "-step000001", "")]


def frames_of(path) -> list[np.ndarray]:
    from PIL import Image, ImageSequence
    with Image.open(path) as image:
        return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]


def test_splanifolds_as_png(checkpoints, tmp_path, capsys):
    path = tmp_path / "a.png"
    assert run("splanifold", checkpoints[2], "-o", path, "--groups", 3, "--size", 1.5) == 0
    assert capsys.readouterr().out.endswith(f"{path}\n")
    image = matplotlib.image.imread(path)[..., :3]
    assert image.shape == (360, 480, 3) and 0.01 < (image.min(-1) < 0.9).mean() < 0.7


def test_splanifolds_through_a_run(checkpoints, tmp_path):
    path = tmp_path / "a.gif"
    # in the order of steps, however given
    assert run("splanifold", *reversed(checkpoints), "-o", path, "--groups", 2, "--layer", 2, "--size", 1.5) == 0
    frames = frames_of(path)
    assert len(frames) >= 3 and not list(tmp_path.glob(".*"))  # equal frames at the end may be one
    assert (frames[0] != frames[1]).any() and (frames[1] != frames[2]).any()


def test_what_a_panel_of_splanifolds_shows(checkpoints):
    head, layers = visualize.splanifolds_of(checkpoints[2], [], 2, 50, "", None)
    assert head["layers"] == [1, 2] and head["step"] == 2 and [len(groups) for groups in layers] == [2, 2]
    group = layers[0][1]
    mlp = train_gpt.read_checkpoint(checkpoints[2])["model"]
    nodes, bases = mlp["blocks.1.mlp.points"][1].numpy(), 8 * mlp["blocks.1.mlp.bases"][1].numpy()
    assert np.allclose(group.nodes, nodes) and np.allclose(group.controls[2, 3], nodes[2] + bases[2, :, 3], atol=1e-6)
    assert group.tokens.shape == (50, 4) and group.t.shape == (50,)
    assert np.allclose(group.spine[[0, 32, 64]], nodes, atol=1e-5)  # the spine passes the nodes
    project = visualize.projection([group, layers[1][0]])
    points = np.concatenate([part.reshape(-1, 4) for g in (group, layers[1][0]) for part in (g.nodes, g.controls)])
    shown = project(points)
    assert abs(np.cov(shown.T)[0, 1]) < 1e-6 * shown.var()
    assert shown[:, 0].var() > shown[:, 1].var() >= np.sort(np.linalg.eigvalsh(np.cov(points.T)))[-2] * 0.8


def test_groups_of_one_output_are_drawn_over_t():
    def one(*shape):
        return np.zeros((*shape, 1)) + 0.5

    drawn = visualize.project_group(visualize.Group(one(2), one(2, 3), one(visualize.SPINE), one(7),
                                                    np.linspace(0.2, 0.8, 7)), None)
    assert np.allclose(drawn["tokens"], np.stack((np.linspace(0.2, 0.8, 7), np.full(7, 0.5)), 1))
    assert np.allclose(drawn["nodes"], [[0, 0.5], [1, 0.5]])
    assert drawn["controls"].shape == (2, 3, 2)


@pytest.mark.parametrize("arguments, message", [
    (["-o", "a.jpg"], "a.jpg must end in .png, .gif or .mp4"),
    (["-o", "a.gif"], "an animation needs at least 2 checkpoints, got 1"),
    (["-o", "a.png", "--layer", "0"], "has no splanifolds in layer 0"), (["--groups", "2"], "required: -o/--output"),
    *((["-o", "a.png", "--groups", number], "--groups must be from 1") for number in ("0", "-1", "1000000")),
    *((["-o", "a.png", "--size", number], "--size must be from 0.1") for number in ("0", "nan", "inf", "1e300")),
    (["-o", "a.png", "--layer", "1", "-1"], "--layer must be from 0"),
    (["-o", "a.png", "--tokens", "1" * 30], "--tokens must be from 1"),
    (["-o", "a.png", "--tokens", "1e3"], "invalid int value"), (["-o", "a.png", "--data", "nowhere"], "no val shards"),
    (["-o", "a.png", "--groups", "16", "--size", "50"], "pixels takes"),
    (["-o", "no/such/folder/a.png"], "cannot write")])
def test_faults_of_splanifolds(checkpoints, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, "splanifold", checkpoints[0], *arguments)


def test_a_run_by_its_name(checkpoints, tmp_path, capsys, monkeypatch):
    """A run's id, its beginning and `last`, among strangers' ranks; code that has changed is named."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "x")
    folder = Path(checkpoints[0]).parent
    small = ["--log-dir", folder, "--groups", 1, "--size", 1, "-o"]
    for name in ("a", "last"):
        assert run("splanifold", name, *small, tmp_path / f"{name}.png") == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "last.png").read_bytes() and capsys.readouterr().err == ""
    assert "there is no checkpoint of a run 'b'" in refused(capsys, "splanifold", "b", *small, tmp_path / "b.png")
    assert "no stream statistics" in refused(capsys, "stream", "a", "--log-dir", folder, "-o", tmp_path / "b.png")
    write_changed(checkpoints[2], tmp_path / "c.pt", sources={"variants.splanifold_mlp": "0" * 64})
    assert run("splanifold", tmp_path / "c.pt", *small, tmp_path / "c.png") == 0
    assert "the code of variants.splanifold_mlp has changed" in capsys.readouterr().err


def write_changed(source: str, path: Path, **changes):
    """A checkpoint with other contents, its digest in order."""
    saved = train_gpt.read_checkpoint(source)
    contents = {name: value for name, value in saved.items() if name not in ("format", "digest")}
    train_gpt.write_checkpoint(path, contents | changes)


def test_checkpoints_of_two_runs(checkpoints, files, tmp_path, capsys):
    config = train_gpt.read_checkpoint(checkpoints[1])["config"] | dict(seed=2)
    write_changed(checkpoints[1], tmp_path / "b.pt", config=config)
    assert run("splanifold", checkpoints[0], tmp_path / "b.pt", "-o", tmp_path / "a.gif") == 1
    assert "b.pt is of another run than the checkpoints before it" in capsys.readouterr().err
    assert run("splanifold", *checkpoints[:2], "-o", tmp_path / "a.png") == 1
    assert "a PNG shows one checkpoint, got 2" in capsys.readouterr().err


def test_a_model_without_splanifolds(tmp_path, capsys):
    data = folder_of(tmp_path / "corpus", np.random.default_rng(0).integers(0, 256, 2000))
    model = ("--layers 1 --model_dim 16 --heads 2 --head_dim 8 --mlp_hidden 32 --value_embeddings 0 "
             "--sequence_length 64 --batch_tokens 64 --val_tokens 64 --val_every 0")
    assert train_gpt.main(f"--data {data} {model} --steps 1 --log_dir {tmp_path} --run_id a".split()) == 0
    assert run("splanifold", tmp_path / "a.pt", "-o", tmp_path / "a.png") == 1
    assert "a.pt has no splanifolds; give checkpoints of --variant splanifold_mlp" in capsys.readouterr().err


def run_file(path: Path, variant: tuple, growth: float, steps=(0, 10)) -> Path:
    names = [f"blocks.{layer}.{branch}_residual" for layer in range(3) for branch in ("attention", "mlp")]

    def row(depth, step):
        return dict(branch=names[depth], x_norm=10 * np.exp(growth * depth), z_norm=10 * np.exp(growth * (depth + 1)),
                    rho_par=0.1 + 0.01 * step, relative_step=0.2, kurtosis=3.0)

    curve = [dict(step=step, val_loss=2.0, stream=[row(depth, step) for depth in range(6)]) for step in steps]
    path.write_text(json.dumps(dict(config=dict(variant=variant), seed=1, curve=curve)))
    return path


def test_stream(tmp_path, capsys):
    plain, variant = run_file(tmp_path / "a.json", (), 0.125), run_file(tmp_path / "b.json", ("orthogonal_residual",),
                                                                        0.0625)
    name, points = visualize.stream_history(str(variant), "logs")
    assert name == "orthogonal_residual, seed 1"
    assert [visualize.norm_slope(point["stream"]) for point in points] == pytest.approx([0.0625] * 2)
    for number, paths in enumerate(([plain], [plain, variant])):
        assert run("stream", *paths, "-o", tmp_path / f"{number}.png") == 0
        image = matplotlib.image.imread(tmp_path / f"{number}.png")[..., :3]
        assert image.shape == (770, 1210, 3) and 0.005 < (image.min(-1) < 0.9).mean() < 0.3
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "1.png").read_bytes()


@pytest.mark.parametrize("text, message", [
    ("{", "is damaged, not a JSON object"), ("[]", "holds a JSON list"), ("{}", "has no list config.variant"),
    ("[" * 100_000, "is damaged"), ('{"seed": ' + "9" * 5000 + "}", "is damaged"), ("\xff", "is damaged"),
    ('{"config": {"variant": []}, "seed": 1, "curve": [{"step": 0}]}', "has no stream statistics; train with")],
    ids=range(7))
def test_stream_faults(tmp_path, capsys, text, message):
    path = tmp_path / "run.json"
    path.write_bytes(text.encode("latin-1"))
    assert message in refused(capsys, "stream", path, "-o", tmp_path / "a.png") and not (tmp_path / "a.png").exists()
    assert "a.gif must end in .png" in refused(capsys, "stream", path, "-o", tmp_path / "a.gif")


def test_stream_numbers_that_are_none(tmp_path, capsys):
    """Every field that is drawn, of another type, missing or no finite number: one line that names the file."""
    path = tmp_path / "run.json"
    sound, count = json.loads(run_file(path, (), 0.1).read_text()), 0
    place = dict(config=[], variant=["config"], seed=[], curve=[], step=["curve", 1], stream=["curve", 1])
    place |= {key: ["curve", 1, "stream", 2] for key in (*visualize.STREAM_PANELS, "z_norm")}
    for key, steps in place.items():
        for value in ("nan", "1e400", "[]", "{}", "[1]", '"x"', "-1e99", "null", "true", "10" * 2000, None):
            content = json.loads(json.dumps(sound))
            owner = content
            for step in steps:
                owner = owner[step]
            owner[key] = "HERE"
            if value is None:
                del owner[key]
            path.write_text(json.dumps(content).replace('"HERE"', str(value)).replace("nan", "NaN"))
            if (key, value) == ("variant", "[]") or key == "stream" and value in ("[]", "{}", "null", None):
                continue  # no variant, and a step without statistics
            assert "run.json" in refused(capsys, "stream", path, "-o", tmp_path / "a.png"), (key, value)
            count += 1
    assert count == len(place) * 11 - 5
