"""
What makes two runs the same: their code, their data and their machine, as a comparison knows them before a run begins.
"""

import ast
import hashlib
import os
import re
from functools import cache
from pathlib import Path

# The trainer first: it bounds how long OpenMP's waiting threads spin, which torch reads when it is loaded.
from train_gpt import Config, Ranks, RunError, environment, find_shards, sha256_of_file, sha256_of_text

# isort: split
import torch

ROOT = Path(__file__).resolve().parent.parent


def module_file(module: str) -> Path | None:
    """
    The file of a module of this repository, a folder's __init__.py before a file of that name, as Python imports them;
    None where there is none.
    """
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


def text_and_digest(file: Path) -> tuple[str, str]:
    """(a source file's text, its sha256 as Run.code counts it: without newlines at its ends)."""
    text = file.read_text(encoding="utf-8", errors="replace")
    return text, sha256_of_text(text.strip("\n"))


def source_of(variants: list[str]) -> dict[str, str]:
    """
    Return {file: sha256} of all code that runs with these variants, joined by + or not, load: the trainer and, where
    there are variants, the loader, they and what these import of variants and kernels, in functions and by a name in
    quotes too. What stands beside them (data, tasks, studies, benchmarks) says nothing about a run.
    """
    specs = [spec for text in variants for spec in re.split(r"\+(?=[a-z_])", text)]
    waiting = ["train_gpt", *(f"variants.{spec.partition(':')[0].strip()}" for spec in specs)]
    source = {}
    done = set()

    while waiting:
        module = waiting.pop()
        file = module_file(module)
        if module in done or file is None:
            continue
        done.add(module)
        text, source[str(file.relative_to(ROOT))] = text_and_digest(file)

        # what it loads
        if "." in module:
            waiting.append(module.rpartition(".")[0])  # a package is loaded before its modules
        # The trainer loads what it is told to, and so does the variants' loader, beside what stands at its top.
        statements = [] if module == "train_gpt" else parse_source(file, text).body
        for statement in statements:
            for node in [statement] if module == "variants" else ast.walk(statement):
                waiting += imported(node, module, file)
    return source


def parse_source(file: Path, text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise RunError(f"{file.relative_to(ROOT)} is no Python: {error}; mend it") from None


def imported(node: ast.AST, module: str, file: Path) -> list[str]:
    """
    The modules of variants and kernels that a piece of a module's code may import. A text in a kernel is taken for the
    name of a module below kernels, which is how kernels name the loops that they import late.
    """
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        for _ in range(node.level - 1):
            package = package.rpartition(".")[0]
        base = ".".join(filter(None, [package if node.level else "", node.module]))
        names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and module.startswith("kernels."):
        names = [f"kernels.{name}" for name in re.findall(r"\A\w+(?:\.\w+)*\Z", node.value)]
    return [name for name in names if name.split(".")[0] in ("variants", "kernels")]


# A shard of up to BLOCK x BLOCKS bytes is read in full, of a longer one so many blocks.
BLOCK = 2 ** 16     # bytes
BLOCKS = 256


def data_identity(config: Config) -> dict:
    """
    Return dict(train=..., val=...): one sha256 of all training shards and {name: sha256} of the validation shards. Of
    long training shards, sizes and evenly spaced blocks are looked at: reading 20 GB takes longer than it is worth.
    """
    train = hashlib.sha256()
    for path in find_shards(config, "train"):
        size = path.stat().st_size
        train.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for index in range(BLOCKS):
                file.seek(max(index * BLOCK, (size - BLOCK) * index // (BLOCKS - 1)))
                train.update(file.read(BLOCK))
    return dict(train=train.hexdigest(), val={path.name: sha256_of_file(path) for path in find_shards(config, "val")})


def ranks_of(device: str, ranks: int) -> Ranks:
    """The first of the processes of a run with this --device, without starting any."""
    cuda = torch.cuda.is_available() and device != "cpu"
    return Ranks(0, ranks, torch.device("cuda" if cuda else "cpu"), torch.float32)


@cache
def machine_facts(device: str, threads: int, ranks: int) -> dict:
    """What a run of this machine and environment logs of it, for a configuration's device and threads."""
    there = ranks_of(device, ranks)
    facts = environment(there)
    if there.device.type == "cpu":
        usual = torch.get_num_threads()
        if ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
            usual = 1  # torchrun gives each of several processes one
        facts["threads"] = threads or usual
        facts["device"] = re.sub(r"\d+ threads$", f"{threads or usual} threads", facts["device"])
    return {name: facts[name] for name in ("device", "threads", "world_size", "torch", "cuda", "triton")}


def names_a_file(config: Config) -> bool:
    """
    Whether the result depends on a file whose content no log holds: a checkpoint to start from, or a variant's option
    that is a path.
    """
    words = [word for spec in config.variant for word in re.split(r"[:,=]", spec)[1:]]
    return bool(config.init_from) or any(os.path.exists(word) for word in words)


def digest_of(file: Path) -> str | None:
    """The sha256 of a source file as text_and_digest counts it; None where there is none."""
    return text_and_digest(file)[1] if file.is_file() else None
