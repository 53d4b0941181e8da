"""
The embedded corpus: this machine's own Python standard library as bytes. Real text, nothing to download.

    python -m data.local_corpus [-o data/python_bytes]

Every module of the library is a document (tests, bundled wheels and generated files left out). A document's path
decides by its hash whether it belongs to the validation set (one in ten) and where it stands in the order, so that the
result is the same for one Python version on any machine.
Vocabulary: bytes 0..255 and 256, the end of text. meta.json records the Python version and the sha256 of each shard.
"""

import argparse
import hashlib
import platform
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from data.command_line import run_script
from data.shards import write_folder
from data.tokenizer import encode_bytes
from train_gpt import RunError, require

# Absent from some distributions, generated at build time, or not source text.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "lib2to3", "ensurepip",
            "__pycache__", "pydoc_data", "distutils", "tkinter"}


def library_files() -> list[tuple[str, Path]]:
    """(path inside the library, file) of every module that counts, in the corpus' order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {path.relative_to(root): path for path in root.rglob("*.py")
             if not path.name.startswith(("_sysconfigdata", "sitecustomize"))}
    counted = [(name.as_posix(), path) for name, path in files.items() if not LEFT_OUT & set(name.parts)]
    return sorted(counted, key=lambda item: hashlib.sha256(item[0].encode()).hexdigest())


def documents(files: list[tuple[str, Path]]) -> Iterator[tuple]:
    """(split, tokens, bytes of text, True) of every file that is not empty. RunError for one that cannot be read."""
    for name, path in files:
        try:
            text = path.read_bytes()
        except OSError as error:
            raise RunError(f"cannot read {path}: {error.strerror}; mend this Python, or give the trainer's --data "
                           "another folder of shards") from None
        if text.strip():
            digest = int(hashlib.sha256(b"split" + name.encode()).hexdigest(), 16)
            yield "train" if digest % 10 else "val", encode_bytes(text), len(text), True


def build(folder: Path) -> dict:
    """Write the shards; returns the meta data. RunError if this Python has no library source."""
    files = library_files()
    require(len(files) >= 100,
            f"only {len(files)} source files found in {sysconfig.get_paths()['stdlib']}: this Python has "
            "no library source; give --data another folder of shards")
    source = f"standard library of Python {platform.python_version()}"
    return write_folder(folder, "python", documents(files), end_of_text=256, tokenizer="bytes", source=source)


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, 1 for a fault (one line on stderr), 130 when interrupted."""
    default = Path(__file__).resolve().parent / "python_bytes"
    parser = argparse.ArgumentParser(prog="local_corpus.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=default, help="folder to write")
    folder = parser.parse_args(argv).output

    def work():
        meta = build(folder)
        counts = [f"{split} {meta[split]['tokens']:,} tokens in {meta[split]['documents']} documents"
                  for split in ("train", "val")]
        print(f"{folder}: {meta['source']}, {', '.join(counts)}")
    return run_script("local_corpus.py", work, f"interrupted; {folder} holds no shards of this run")


if __name__ == "__main__":
    sys.exit(main())
