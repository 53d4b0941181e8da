"""
FineWeb as GPT-2 tokens, ready-made, from the Hugging Face Hub: the validation shard and the first N training shards.

    python data/cached_fineweb10B.py [N] [--dataset fineweb10B|fineweb100B|finewebedu10B] [-o DIR]

A shard holds 100 million tokens in 200 MB; N is 9 unless given. DIR is data/<dataset> unless given. Shards that are there and whole stay, damaged
ones are fetched again, and an interrupted download goes on where it stopped. Beside the shards: meta.json, and gpt2.tiktoken if tiktoken can get
GPT-2's merges. meta.json has the sha256 of the validation shard only, which is what runs are compared by. Exit code 1 and one line for a fault.
Sources: the data sets kjj0/fineweb10B-gpt2, kjj0/fineweb100B-gpt2 and kjj0/finewebedu10B-gpt2, which modded-nanogpt trains on.
"""

import argparse
import errno
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.shards import HEADER_INTS, SHARD_TOKENS, RunError, claim_folder, gpt2_merges, open_shard, sha256_of, write_merges, write_meta

DATASETS = {  # name: (repository, first part of the file names, training shards there are)
    "fineweb10B": ("kjj0/fineweb10B-gpt2", "fineweb", 103),
    "fineweb100B": ("kjj0/fineweb100B-gpt2", "fineweb", 1030),
    "finewebedu10B": ("kjj0/finewebedu10B-gpt2", "finewebedu", 99),
}
SHARD_BYTES = 4 * HEADER_INTS + 2 * SHARD_TOKENS


def is_whole(path: Path) -> bool:
    try:
        return len(open_shard(path)) > 0
    except RunError:
        return False


def fetch(repository: str, path: Path):
    """Download one shard to path. RunError for whatever goes wrong; then nothing is left at path."""
    import huggingface_hub.utils
    huggingface_hub.utils.logging.set_verbosity_error()  # its retries would hide the one line that counts
    path.unlink(missing_ok=True)
    try:
        huggingface_hub.hf_hub_download(repository, path.name, repo_type="dataset", local_dir=path.parent)
    except Exception as error:  # of the network, the hub or the disk, in whatever library it came up
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise RunError(f"no space left for {path}; free some or give another folder with -o; finished shards are kept") from None
        if isinstance(error, PermissionError):
            raise RunError(f"cannot write {path}: {error.strerror}; give another folder with -o") from None
        raise RunError(f"cannot fetch {path.name} of {repository} ({type(error).__name__}); check the network and run this again: "
                       "finished shards are kept") from None
    try:
        open_shard(path)
    except RunError as error:
        path.unlink(missing_ok=True)
        raise RunError(f"what came for {path.name} of {repository} was damaged; run this again: finished shards are kept ({error})") from None


def download(dataset: str, count: int, folder: Path) -> dict:
    """The validation shard, `count` training shards, meta.json and the merges into folder; returns the splits' facts. RunError for any fault."""
    repository, name, available = DATASETS[dataset]
    if not 1 <= count <= available:
        raise RunError(f"{dataset} has 1 to {available} training shards to fetch, got {count}")
    claim_folder(folder, name)
    try:
        source = json.loads((folder / "meta.json").read_text()).get("source", "elsewhere")
    except (OSError, ValueError):
        source = repository
    if source != repository:
        raise RunError(f"{folder} holds shards from {source}, whose names are the same; give another folder with -o")
    paths = [folder / f"{name}_val_{0:06d}.bin"] + [folder / f"{name}_train_{i:06d}.bin" for i in range(1, count + 1)]
    missing = [path for path in paths if not is_whole(path)]
    if (needed := len(missing) * SHARD_BYTES) > (free := shutil.disk_usage(folder).free):
        raise RunError(f"{len(missing)} shards need {needed / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free; ask for fewer shards, "
                       "free some space or give another folder with -o")
    if len(missing) < len(paths):
        print(f"{folder}: {len(paths) - len(missing)} of {len(paths)} shards are there", flush=True)
    for number, path in enumerate(missing, 1):
        print(f"fetching {path.name} ({number} of {len(missing)})", flush=True)
        fetch(repository, path)
    shards = {split: sorted(folder.glob(f"{name}_{split}_*.bin")) for split in ("train", "val")}  # all that the trainer finds, of earlier calls too
    facts = {split: dict(shards=len(files), tokens=sum(len(open_shard(file)) for file in files)) for split, files in shards.items()}
    facts["val"]["sha256"] = sha256_of(shards["val"])
    if not (merges := folder / "gpt2.tiktoken").exists():
        try:
            write_merges(merges, gpt2_merges())
        except RunError as error:
            print(f"cached_fineweb10B.py: warning: bits per byte will be missing: {error}", file=sys.stderr)
    write_meta(folder, vocab_size=50257, tokenizer="gpt2", source=repository, **facts)
    return facts


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, 1 for a fault (one line on stderr), 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="cached_fineweb10B.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="?", type=int, default=9, metavar="N", help="training shards of 100 million tokens (default: 9)")
    parser.add_argument("--dataset", choices=DATASETS, default="fineweb10B")
    parser.add_argument("-o", "--output", type=Path, help="folder to write (default: data/<dataset>)")
    options = parser.parse_args(argv)
    folder = options.output or Path(__file__).resolve().parent / options.dataset
    try:
        facts = download(options.dataset, options.shards, folder)
    except RunError as error:
        print(f"cached_fineweb10B.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cached_fineweb10B.py: interrupted; finished shards are kept, run this again to go on", file=sys.stderr)
        return 130
    train, val = facts["train"], facts["val"]
    print(f"{folder}: {train['tokens']:,} training tokens in {train['shards']} shards, {val['tokens']:,} validation tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
