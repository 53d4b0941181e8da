"""Sources of stored runs: a source is put together again from the texts of its modules, whatever they hold."""

import pytest

from records.manifest import (
    MANIFEST,
    SOURCES,
    find_unused,
    make_manifest,
    parse_manifest,
    read_stored_source,
    share_texts,
    split_source,
)
from train_gpt import RunError, sha256_of_text

SOURCE = "# ---- train_gpt\nimport torch\n\n# ---- variants\n\n# ---- variants.a\nx = 1"


@pytest.fixture
def store(tmp_path):
    """store(source) -> the manifest's file in a record's folder; the texts go to sources/."""

    def store(source):
        file = tmp_path / "cpu" / "record" / f"source-{sha256_of_text(source)[:12]}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        manifest, texts = make_manifest(source)
        file.write_text(manifest)
        share_texts(texts, tmp_path / SOURCES)
        return file

    return store


@pytest.mark.parametrize("source", [
    SOURCE,
    "# ---- train_gpt",
    "# ---- train_gpt\n\n\nx = 1",
    "# ---- train_gpt\nx = 1\n# ---- variants",
    "# ---- a\n\n\n# ---- a\nx\n# ---- Numbers ------\n# ---- b\n é \t\n\n# ---- c\n\n\n# ---- d",
    "import torch",
    "import torch\n# ---- train_gpt\nx = 1",
])
def test_a_source_is_put_together_again(store, source):
    file = store(source)
    assert read_stored_source(file, file, sha256_of_text(source)) == source


def test_what_is_stored(store, tmp_path):
    """Each text has the SHA-256 of the module's file, which ends with a newline."""
    file = store(SOURCE)
    texts = {"train_gpt": "import torch\n", "variants": "", "variants.a": "x = 1\n"}
    digests = {name: sha256_of_text(text) for name, text in texts.items()}
    lines = [f"{name} {digest}\n" for name, digest in digests.items()]
    assert file.read_text() == "".join([MANIFEST + "\n", *lines])
    for name, digest in digests.items():
        assert (tmp_path / SOURCES / f"{digest[:12]}.txt").read_text() == texts[name]
    assert parse_manifest(file, file, file.read_text()) == list(digests.items())
    assert split_source(SOURCE) == [*list(texts.items())[:2], ("variants.a", "x = 1")]


def test_a_source_without_modules_is_stored_itself(store, tmp_path):
    assert store("import torch").read_text() == "import torch"
    assert not list((tmp_path / SOURCES).iterdir())


def test_texts_are_shared(store, tmp_path):
    first = store(SOURCE)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / SOURCES).iterdir()}
    store(SOURCE + "\n\n# ---- variants.b\ny = 1")  # variants.a is no longer the last
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / SOURCES).iterdir()}
    assert len(after) == len(before) + 1 and after.items() > before.items()
    assert find_unused(tmp_path, [first.parent]) == []
    first.unlink()
    assert find_unused(tmp_path, [first.parent]) == []
    assert len(find_unused(tmp_path, [])) == 4


@pytest.mark.parametrize("text", [MANIFEST, f"{MANIFEST}\n", f"{MANIFEST}\n\n", f"{MANIFEST}\na {'0' * 63}\n",
                                  f"{MANIFEST}\na {'0' * 64}", f"{MANIFEST}\na {'A' * 64}\n"])
def test_a_damaged_manifest(tmp_path, text):
    with pytest.raises(RunError, match="source-1.txt has a line that is no module and its SHA-256"):
        parse_manifest(tmp_path, tmp_path / "source-1.txt", text)


def test_a_text_that_was_altered_is_not_shared(store, tmp_path):
    """Nothing is written then."""
    store("# ---- train_gpt\nx = 1")
    (file,) = (tmp_path / SOURCES).iterdir()
    file.write_text("x = 2\n")
    with pytest.raises(RunError, match=f"{file.name}: altered: it has not the SHA-256"):
        share_texts(["y = 1\n", "x = 1\n"], tmp_path / SOURCES)
    assert list((tmp_path / SOURCES).iterdir()) == [file]
