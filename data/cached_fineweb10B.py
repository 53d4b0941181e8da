"""
FineWeb as GPT-2 tokens, ready-made, from the Hugging Face Hub: the validation shard and the first N training shards.

    python -m data.cached_fineweb10B [N] [--dataset fineweb10B|fineweb100B|finewebedu10B] [-o DIR]

A shard holds 100 million tokens in 200 MB; N is 9 unless given. DIR is data/<dataset> unless given. Shards that are
there and whole stay, damaged ones are fetched again, and an interrupted download goes on where it stopped. Whole is a
shard whose sha256 is the Hub's; while the Hub cannot be asked, one that has the size its header promises, and a line
says so. Beside the shards: meta.json, with every shard's sha256, and gpt2.tiktoken if tiktoken can get GPT-2's merges.
Exit code 1 and one line for a fault.
Sources: the data sets kjj0/fineweb10B-gpt2, kjj0/fineweb100B-gpt2 and kjj0/finewebedu10B-gpt2, which modded-nanogpt
trains on.
"""

import argparse
import errno
import sys
from pathlib import Path

from data.command_line import run_script
from data.shards import SHARD_TOKENS, SPLITS, check_space, claim_folder, files_of, write_meta
from data.tokenizer import gpt2_merges, write_merges
from train_gpt import RunError, open_shard, read_meta, require, sha256_of_files

DATASETS = {  # name: (repository, first part of the file names, training shards there are)
    "fineweb10B": ("kjj0/fineweb10B-gpt2", "fineweb", 103),
    "fineweb100B": ("kjj0/fineweb100B-gpt2", "fineweb", 1030),
    "finewebedu10B": ("kjj0/finewebedu10B-gpt2", "finewebedu", 99),
}
END_OF_TEXT = 50256  # of GPT-2


def quiet_hub():
    """The package huggingface_hub, which does not log: its retries would hide the one line that counts."""
    import huggingface_hub.utils
    huggingface_hub.utils.logging.set_verbosity_error()
    return huggingface_hub


def hub_digests(repository: str, names: list[str]) -> dict[str, str]:
    """{name: sha256} of the files among `names` that the Hub has. RunError if it cannot be asked."""
    api = quiet_hub().HfApi()
    digests = {}
    try:
        for start in range(0, len(names), 100):
            for info in api.get_paths_info(repository, names[start:start + 100], repo_type="dataset"):
                if getattr(info, "lfs", None):
                    digests[info.path] = info.lfs.sha256
        return digests
    except Exception as error:  # of the network or the hub, in whatever library it came up
        raise RunError(f"the Hub cannot be asked for the sha256 of {repository} ({type(error).__name__}), so shards "
                       "are checked by their size only; run this again with a network") from None


def fault_of(path: Path, digests: dict[str, str]) -> str:
    """What is wrong with a shard, "" for nothing. digests: {name: sha256} as far as they are known."""
    try:
        open_shard(path)
        wanted = digests.get(path.name)
        if wanted and sha256_of_files(path.parent, [path.name])[path.name] != wanted:
            return f"its sha256 is not {wanted}"
    except RunError as error:
        return str(error)
    return ""


def fetch(repository: str, path: Path, digests: dict[str, str]):
    """Download one shard to path. RunError for whatever goes wrong; then nothing is left at path."""
    path.unlink(missing_ok=True)
    try:
        quiet_hub().hf_hub_download(repository, path.name, repo_type="dataset", local_dir=path.parent)
    except Exception as error:  # of the network, the hub or the disk, in whatever library it came up
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise RunError(f"no space left for {path}; free some or give another folder with -o; finished shards are "
                           "kept") from None
        if isinstance(error, PermissionError):
            raise RunError(f"cannot write {path}: {error.strerror}; give another folder with -o") from None
        raise RunError(f"cannot fetch {path.name} of {repository} ({type(error).__name__}); check the network and run "
                       "this again: finished shards are kept") from None
    fault = fault_of(path, digests)
    if fault:
        path.unlink(missing_ok=True)
        raise RunError(f"what came for {path.name} of {repository} was damaged; run this again: finished shards are "
                       f"kept ({fault})")


def download(dataset: str, count: int, folder: Path) -> dict:
    """
    Fetch the validation shard and `count` training shards into a folder, with meta.json and the merges; returns the
    splits' facts. RunError for any fault.
    """
    # the folder
    repository, name, available = DATASETS[dataset]
    require(1 <= count <= available, f"{dataset} has 1 to {available} training shards to fetch, got {count}")
    claim_folder(folder, name)
    meta = read_meta(folder)
    source = meta.get("source", "elsewhere") if meta else repository
    require(source == repository,
            f"{folder} holds shards from {source}, whose names are the same; give another folder with -o")

    # what is missing: by the Hub's sha256, which an earlier call may have left in meta.json
    wanted = {f"{name}_val_{0:06d}.bin", *(f"{name}_train_{i:06d}.bin" for i in range(1, count + 1))}
    present = {path.name for path in files_of(folder, name) if path.suffix == ".bin"}
    paths = [folder / file for file in sorted(wanted | present, key=lambda file: ("_val_" not in file, file))]
    digests = {}
    if meta.get("verified") is True:
        for split in SPLITS:
            digests |= meta.get(split, {}).get("sha256", {})
    if not {path.name for path in paths} <= set(digests):
        try:
            digests = hub_digests(repository, [path.name for path in paths])
        except RunError as error:
            print(f"cached_fineweb10B.py: warning: {error}", file=sys.stderr)
    missing = [path for path in paths if fault_of(path, digests)]
    check_space(folder, len(missing) * SHARD_TOKENS, f"{len(missing)} shards", "ask for fewer shards")
    if len(missing) < len(paths):
        print(f"{folder}: {len(paths) - len(missing)} of {len(paths)} shards are there", flush=True)

    # the missing shards, and the facts of all
    for number, path in enumerate(missing, 1):
        print(f"fetching {path.name} ({number} of {len(missing)})", flush=True)
        fetch(repository, path, digests)
    facts = {}
    for split in SPLITS:
        shards = [path for path in paths if f"_{split}_" in path.name]
        facts[split] = dict(shards=len(shards), tokens=sum(len(open_shard(path)) for path in shards),
                            sha256=sha256_of_files(folder, [path.name for path in shards]))

    # the merges, and last meta.json
    merges = folder / "gpt2.tiktoken"
    if not merges.exists():
        try:
            write_merges(merges, gpt2_merges())
        except RunError as error:
            print(f"cached_fineweb10B.py: warning: bits per byte will be missing: {error}", file=sys.stderr)
    write_meta(folder, vocab_size=END_OF_TEXT + 1, end_of_text=END_OF_TEXT, tokenizer="gpt2", source=repository,
               verified={path.name for path in paths} <= set(digests), **facts)
    return facts


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, 1 for a fault (one line on stderr), 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="cached_fineweb10B.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="?", type=int, default=9, metavar="N",
                        help="training shards of 100 million tokens (default: 9)")
    parser.add_argument("--dataset", choices=DATASETS, default="fineweb10B")
    parser.add_argument("-o", "--output", type=Path, help="folder to write (default: data/<dataset>)")
    options = parser.parse_args(argv)
    folder = options.output or Path(__file__).resolve().parent / options.dataset

    def work():
        facts = download(options.dataset, options.shards, folder)
        train, val = facts["train"], facts["val"]
        print(f"{folder}: {train['tokens']:,} training tokens in {train['shards']} shards, {val['tokens']:,} "
              "validation tokens")
    return run_script("cached_fineweb10B.py", work, "interrupted; finished shards are kept, run this again to go on")


if __name__ == "__main__":
    sys.exit(main())
