"""
The sources of stored runs: the text of each module once for all records.

    records/sources/0123456789ab.txt                a module's text, named by the first 12 digits of its SHA-256
    records/TRACK/RECORD/source-0123456789ab.txt    a manifest: the modules of a run's source, named by the source's

The source of a run, as its log has it, is the text of every module that was loaded, each under a line "# ---- NAME". A
manifest is one line that is always the same, MANIFEST, and then a line for each module, in order:

    train_gpt 0123456789ab... (all 64 digits of the SHA-256 of its text)

The source is put together from these texts. A log does not keep the newlines at the end of its source: the last text is
stored with one, as files end, and loses it when the source is put together. A reader compares every text with the
manifest, and the source with the SHA-256 that the log names.

An older record has the source itself in place of a manifest, and so has a source that does not begin with a module's
line. Both are read as they are.
"""

import re
from pathlib import Path

from train_gpt import RunError, require, sha256_of_text, write_atomically

MANIFEST = ("The source of a run: its modules in order, each with the SHA-256 of its text, which is "
            "records/sources/FIRST_12_DIGITS.txt")
HEADING = re.compile(r"# ---- ([\w.]+)")  # of a module in a source
ENTRY = re.compile(r"([\w.]+) ([0-9a-f]{64})")
SOURCES = "sources"  # beside the folders of the tracks
RESTORE = "put the file back from where the record came"


# ---- Writing

def split_source(source: str) -> list[tuple[str, str]]:
    """[(module, its text)] of a source, in order; what stands before the first module is left out."""
    modules = []  # [(module, its lines)]
    for line in source.split("\n"):
        match = HEADING.fullmatch(line)
        if match:
            modules.append((match[1], []))
        elif modules:
            modules[-1][1].append(line)
    return [(name, "\n".join(lines)) for name, lines in modules]


def join_modules(modules: list[tuple[str, str]]) -> str:
    """The source of these modules, [(module, its text)], as a log has it: without newlines at its ends."""
    return "\n".join(f"# ---- {name}\n{text}" for name, text in modules).strip("\n")


def make_manifest(source: str) -> tuple[str, list[str]]:
    """(the manifest of a source, the texts of its modules); (the source, []) where it does not begin with a module."""
    modules = split_source(source)
    if join_modules(modules) != source:
        return source, []
    name, last = modules[-1]
    if last:
        modules[-1] = (name, last + "\n")
    lines = [MANIFEST, *(f"{name} {sha256_of_text(text)}" for name, text in modules)]
    return "\n".join(lines) + "\n", [text for _, text in modules]


def share_texts(texts: list[str], folder: Path):
    """
    Write the texts of modules that the folder of all records' texts does not have yet. RunError before anything is
    written where it has another text of this name, or where the disk refuses.
    """
    missing = {}  # file: its text
    for text in texts:
        file = folder / text_file(sha256_of_text(text))
        if not file.exists():
            missing[file] = text
            continue
        require(read_stored_text(file, file) == text,
                f"{file}: altered: it has not the SHA-256 that its name begins; {RESTORE}")
    folder.mkdir(exist_ok=True)
    for file, text in missing.items():
        write_atomically(file, lambda stream, text=text: stream.write(text.encode()))


def text_file(digest: str) -> str:
    """The name of the file that holds the text of this SHA-256."""
    return f"{digest[:12]}.txt"


# ---- Reading

def read_stored_source(path: Path, file: Path, digest: str) -> str:
    """The source that a record's file holds or names. RunError unless it has the SHA-256 that the log names."""
    source = read_stored_text(path, file)
    modules = parse_manifest(path, file, source)
    if modules:
        folder = file.parent.parent.parent / SOURCES
        source = join_modules([(name, check_text(path, folder / text_file(sha), sha)) for name, sha in modules])
    require(sha256_of_text(source) == digest,
            f"{path}: its source was altered: the source in {file} has not the SHA-256 that the log names; {RESTORE}")
    return source


def parse_manifest(path: Path, file: Path, text: str) -> list[tuple[str, str]]:
    """[(module, SHA-256 of its text)] of a manifest; [] for the text of a source. RunError for a damaged manifest."""
    first, *lines = text.split("\n")
    if first != MANIFEST:
        return []
    entries = [ENTRY.fullmatch(line) for line in lines[:-1]]
    require(entries and all(entries) and not lines[-1],
            f"{path}: its source was altered: {file} has a line that is no module and its SHA-256; {RESTORE}")
    return [(entry[1], entry[2]) for entry in entries]


def check_text(path: Path, file: Path, digest: str) -> str:
    """The text of a module. RunError unless the file holds the one of this SHA-256."""
    text = read_stored_text(path, file)
    require(sha256_of_text(text) == digest,
            f"{path}: its source was altered: {file} has not the SHA-256 {digest}; {RESTORE}")
    return text


def read_stored_text(path: Path, file: Path) -> str:
    """The text of a file that a record needs. RunError, which names it, where there is none."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise RunError(f"{path}: its source is missing: there is no text {file}; {RESTORE}") from None


def find_unused(root: Path, folders: list[Path]) -> list[str]:
    """The names of the texts below root that no manifest in these folders of records names. RunError as for reading."""
    used = set()
    for folder in folders:
        for file in folder.glob("source-*.txt"):
            modules = parse_manifest(file, file, read_stored_text(file, file))
            used |= {text_file(digest) for _, digest in modules}
    return sorted({path.name for path in (root / SOURCES).glob("*.txt")} - used)
