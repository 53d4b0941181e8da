"""
The house rules of docs/house.md, as far as they can be checked by reading: arrows of imports, a test and a benchmark
for every kernel, width, statements that are statements, sizes of files and of the checkout.
"""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 120                     # columns of a .py or .sh file
FILE_BYTES = 1_000_000
CHECKOUT_BYTES = 20 * 2**20
PATH_LENGTH = 120               # characters, from the checkout's root

# What is above the trainer, at the root of the checkout or, of a folder of other things, by name.
SCRIPTS = {"compare", "generate", "visualize"}
COMMANDS = {"variants.check", "variants.__main__", "data.manifold"}  # commands that live beside what they look at

# layer -> layers that its modules may import
LIBRARY = {"variants", "data", "records", "train_gpt", "kernels"}
ARROWS = {
    "kernels": {"kernels"},
    "train_gpt": set(),
    "variants": {"variants", "train_gpt", "kernels"},
    "data": {"data", "train_gpt"},
    "records": {"records", "train_gpt"},
    "scripts": LIBRARY | {"scripts"},
    "tasks": LIBRARY | {"scripts", "tasks"},
    "benchmarks": LIBRARY | {"scripts", "benchmarks"},
    "studies": LIBRARY | {"scripts", "tasks", "benchmarks", "studies"},
}
UPWARDS = {("train_gpt", "variants"), ("train_gpt", "train_gpt")}  # by the trainer's entry, which runs it as a module
OUTSIDE_KERNELS = {"torch", "triton", "numba", "numpy", "llvmlite"}  # llvmlite: Numba's own way to write instructions

SUPPORT = {"__init__", "backend", "loops", "simd", "segmented_scan"}  # files of kernels/ that are no operation
WITHOUT_TEST = {}               # operation -> the reason
WITHOUT_BENCHMARK = {}          # operation -> the reason


# ---- What the checkout holds ------------------------------------------------

@cache
def files_of_checkout():
    """All files that are in git or would be added, relative to the root. A copy without git has no such list."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        pytest.skip("this is no git checkout")
    return sorted({Path(name) for name in result.stdout.split("\0") if name and (ROOT / name).is_file()})


def none(faults):
    """Fail with a line for each fault unless there is none."""
    faults = [str(fault) for fault in faults]
    assert not faults, f"{len(faults)} faults\n" + "\n".join(faults)


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


@cache
def python_files():
    """{path: its syntax tree}, of the whole checkout."""
    return {path: ast.parse(read(path)) for path in files_of_checkout() if path.suffix == ".py"}


def module_name(path):
    """Such as kernels.splanifold.triton; a folder's __init__.py has the folder's name."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


@cache
def modules():
    """{name: (path, syntax tree)}, of all but the tests."""
    return {module_name(path): (path, tree) for path, tree in python_files().items() if path.parts[0] != "tests"}


def layer_of(module):
    """The row of ARROWS that a module belongs to."""
    top = module.partition(".")[0]
    if top in SCRIPTS or module in COMMANDS:
        return "scripts"
    return top


# ---- Imports ----------------------------------------------------------------

def is_entry(node):
    """Whether a statement is `if __name__ == "__main__":`."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def imports_of(tree, module, path):
    """The full names that a module imports, those within functions too, in order: (name, whether its entry does)."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names = []
    for statement in tree.body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Import):
                names += [(alias.name, is_entry(statement)) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[:len(package.split(".")) - node.level + 1] if node.level else []
                start = ".".join([*above, *([node.module] if node.module else [])])
                names += [(f"{start}.{alias.name}", is_entry(statement)) for alias in node.names]
    return names


def imported_module(name, known):
    """The module of the checkout that a full name is, or is defined in; None where it is none of these."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


@cache
def arrows():
    """{module: {modules that it imports}}, entries left out, and a set of the pairs (module, module) of entries."""
    known, entries = modules(), set()
    below = {}
    for module, (path, tree) in known.items():
        below[module] = set()
        for name, entry in imports_of(tree, module, path):
            target = imported_module(name, known)
            if target and entry:
                entries.add((module, target))
            elif target and target != module:
                below[module].add(target)
    return below, entries


def test_every_folder_has_a_layer():
    none({layer_of(module) for module in modules()} - set(ARROWS))


def test_arrows_point_one_way():
    below, _ = arrows()
    wrong = []
    for module, targets in below.items():
        allowed = ARROWS[layer_of(module)]
        wrong += [f"{module} imports {target}" for target in sorted(targets) if layer_of(target) not in allowed]
    none(wrong)


def test_one_arrow_points_upwards():
    """What a module imports in its entry alone keeps to the same arrows, but for the trainer's."""
    _, entries = arrows()
    upwards = {(module, target) for module, target in entries if layer_of(target) not in ARROWS[layer_of(module)]}
    none(upwards - UPWARDS)


def test_no_variant_knows_a_command():
    below, _ = arrows()
    none(module for module in modules() if layer_of(module) == "variants" and below[module] & COMMANDS)


def test_nothing_imports_in_a_circle():
    below, _ = arrows()
    finished, circles = set(), []

    def visit(module, way):
        if module in way:
            circles.append(" -> ".join([*way[way.index(module):], module]))
        elif module not in finished:
            for target in sorted(below[module]):
                visit(target, [*way, module])
            finished.add(module)

    for module in sorted(below):
        visit(module, [])
    none(circles)


def test_kernels_need_little():
    wrong = []
    for module, (path, tree) in modules().items():
        if layer_of(module) == "kernels":
            tops = {name.partition(".")[0] for name, _ in imports_of(tree, module, path)}
            others = tops - OUTSIDE_KERNELS - sys.stdlib_module_names - {"kernels"}
            wrong += [f"{module} imports {name}" for name in sorted(others)]
    none(wrong)


@pytest.mark.parametrize("text, names", [
    ("import a.b, c", ["a.b", "c"]),
    ("from a import b as d, c", ["a.b", "a.c"]),
    ("def f():\n    from a import b", ["a.b"]),
    ("from . import x", ["kernels.splanifold.x"]),
    ("from ..loops import x", ["kernels.loops.x"]),
    ("try:\n    import a\nexcept ImportError:\n    a = None", ["a"]),
])
def test_imports_are_found(text, names):
    found = imports_of(ast.parse(text), "kernels.splanifold.triton", Path("kernels/splanifold/triton.py"))
    assert found == [(name, False) for name in names]


def test_the_entry_is_told_apart():
    found = imports_of(ast.parse("import a\nif __name__ == '__main__':\n    import b"), "x", Path("x.py"))
    assert found == [("a", False), ("b", True)]


# ---- Kernels ----------------------------------------------------------------

def kernels():
    """The operations: files and folders of kernels/ that are no support."""
    names = {path.parts[1].removesuffix(".py") for path in python_files() if path.parts[0] == "kernels"}
    return sorted(names - SUPPORT)


def test_every_kernel_has_its_tests():
    paths = {str(path) for path in files_of_checkout()}
    folders = {path.parent.name for path in files_of_checkout() if path.parts[:2] == ("tests", "kernels")}
    missing = {name for name in kernels() if f"tests/kernels/test_{name}.py" not in paths and name not in folders}
    none(missing ^ set(WITHOUT_TEST))  # an exception that is none any more is a fault, too


def test_every_kernel_has_its_benchmark():
    paths = {str(path) for path in files_of_checkout()}
    none({name for name in kernels() if f"benchmarks/{name}.py" not in paths} ^ set(WITHOUT_BENCHMARK))


# ---- Text -------------------------------------------------------------------

def wide_lines(path):
    """path:number of the lines over the width; a row of a table of numbers is let off by # noqa: E501."""
    lines = []
    for number, line in enumerate(read(path).splitlines(), 1):
        marked = path.suffix == ".py" and re.search(r"# noqa: .*\bE501\b", line)
        if len(line) > WIDTH and not marked:
            lines.append(f"{path}:{number}")
    return lines


def test_width():
    scripts = [path for path in files_of_checkout() if path.suffix in (".py", ".sh")]
    none(line for path in scripts for line in wide_lines(path))


def effects_in_disguise(tree):
    """Lines of statements that are an `a and f()` or `a or f()`, or hide an assignment in an expression."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            assigns = any(isinstance(inner, ast.NamedExpr) for inner in ast.walk(node.value))
            if isinstance(node.value, ast.BoolOp) or assigns:
                lines.append(node.lineno)
    return lines


def test_statements_are_statements():
    none(f"{path}:{line}" for path, tree in python_files().items() for line in effects_in_disguise(tree))


def changes_of_path(tree):
    """Lines that name sys.path."""
    lines = []
    for node in ast.walk(tree):
        by_name = isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"
        imported = isinstance(node, ast.ImportFrom) and node.module == "sys"
        if by_name or imported and "path" in {alias.name for alias in node.names}:
            lines.append(node.lineno)
    return lines


def test_only_the_tests_set_pythons_path():
    others = {path: tree for path, tree in python_files().items() if path.name != "conftest.py"}
    none(f"{path}:{line}" for path, tree in others.items() for line in changes_of_path(tree))


@pytest.mark.parametrize("text, faults", [
    ("a and f()", [1]),
    ("x = 1\na or f()", [2]),
    ("f(b := 3)", [1]),
    ("x = a and b\nif a and (c := f()):\n    f(c)", []),
])
def test_disguises_are_found(text, faults):
    assert effects_in_disguise(ast.parse(text)) == faults


@pytest.mark.parametrize("text, faults", [
    ("import sys\nsys.path.insert(0, '.')", [2]),
    ("import sys\nsys.path = []", [2]),
    ("from sys import path", [1]),
    ("import os, sys\nos.path.exists(sys.prefix)", []),
])
def test_changes_of_path_are_found(text, faults):
    assert changes_of_path(ast.parse(text)) == faults


# ---- Sizes ------------------------------------------------------------------

def test_paths_are_short():
    none(path for path in files_of_checkout() if len(str(path)) > PATH_LENGTH)


def test_files_are_small():
    none(path for path in files_of_checkout() if (ROOT / path).stat().st_size > FILE_BYTES)


def test_the_checkout_is_small():
    assert sum((ROOT / path).stat().st_size for path in files_of_checkout()) < CHECKOUT_BYTES
