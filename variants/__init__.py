"""
Loads variants, the replacement parts of the trainer: one idea, one file of this folder.

    python train_gpt.py --variant swiglu_mlp "parallel_residual:layers=0-3,7,norm=separate"
    python -m variants                                                              the table of all variants

- variants/<name>.py holds a docstring (idea, source, maths, cost; one line "Source: ..." and one "Status: ..."), a
  dataclass Options whose fields have defaults (int, float, bool, str, Literal[...] or tuple[int, ...]), its modules,
  and patch(options), which assigns to attributes of train_gpt (train_gpt.MLP = ...) or of its classes
  (train_gpt.GPT.run_blocks = ...). What a variant replaces is what its patch was seen to assign.
- train_gpt.SEAMS names what may be assigned. A variant that touches anything else there is refused, because all arms of
  a comparison share the rest.
- Every patch meets the unchanged trainer, so the order of variants does not matter.
- layers=0-3,7 works for every variant that changes nothing but what is made for each layer, with a signature (config,
  layer, ...): the other layers, and what belongs to no layer, keep the original.
"""

import copy
import dataclasses
import importlib
import inspect
import pkgutil
import re
import sys
import textwrap
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args, get_origin, get_type_hints

import train_gpt
from train_gpt import SEAMS, Config, RunError, require

VERBS = {"check", "new"}   # modules of this folder that are commands, not variants
ABSENT = object()   # stands for the value of an attribute that an owner does not hold itself
BOOLEANS = {"on": True, "true": True, "1": True, "yes": True, "off": False, "false": False, "0": False, "no": False}


# ---- Variants and what they change ------------------------------------------


@dataclass
class Claim:
    """One attribute that one of the wanted variants changes."""

    request: int                    # number of the variant's spec among those of the run
    variant: str                    # its name
    layers: tuple[int, ...] | None  # where it changes the attribute; None: everywhere
    owner: object                   # train_gpt or one of its classes
    name: str                       # of the owner's attribute
    value: object                   # the new one


def available() -> list[str]:
    """Return the names of all variants."""
    names = {module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")}
    return sorted(names - VERBS)


def apply(specs: tuple[str, ...], config: Config) -> dict[str, list[str]]:
    """
    Change the trainer as specs say, each "name" or "name:key=value,key=value". Return spec -> changed names. On
    RunError nothing is changed.
    """
    changes, changed = plan(specs, config)
    assign(changes)
    return changed


@contextmanager
def applied(specs: tuple[str, ...], config: Config):
    """apply() for the length of a with block; afterwards the trainer is what it was."""
    changes, changed = plan(specs, config)
    before = {(owner, name): vars(owner).get(name, ABSENT) for owner, name in changes}
    assign(changes)
    try:
        yield changed
    finally:
        assign(before)


def assign(values: dict):
    """Set every (owner, attribute) to its value; ABSENT removes it, so that an inherited one shows again."""
    for (owner, name), value in values.items():
        if value is not ABSENT:
            setattr(owner, name, value)
        elif name in vars(owner):
            delattr(owner, name)


def plan(specs: tuple[str, ...], config: Config) -> tuple[dict, dict[str, list[str]]]:
    """
    Return ({(owner, attribute): new value}, {spec: changed names}) and leave the trainer as it was. owner: train_gpt or
    one of its classes. RunError for a spec that is wrong and for two that cannot be combined.
    """
    # all are imported before the first patch, so that subclasses derive from the originals
    requests = [parse_spec(spec) for spec in specs]
    modules = [load(variant) for variant, _ in requests]

    # what each of them changes
    claims, changed = [], {}
    for number, (spec, (variant, texts), module) in enumerate(zip(specs, requests, modules)):
        layers = parse_layers(variant, texts.pop("layers"), config) if "layers" in texts else None
        changes = changes_of(variant, module, build_options(variant, module, texts))
        if layers is not None:
            check_per_layer(variant, changes)
        claims += [Claim(number, variant, layers, *key, value) for key, value in changes.items()]
        changed[spec] = sorted(label(*key) for key in changes)

    for claim, other in combinations(claims, 2):
        if claim.request != other.request:
            check_collision(claim, other)
    return join_claims(claims), changed


def join_claims(claims: list[Claim]) -> dict:
    """Return (owner, attribute) -> new value, which chooses by the layer where the claims are of some layers only."""
    joined, by_layer = {}, {}  # by_layer: (owner, attribute) -> {layer: new value}
    for claim in claims:
        if claim.layers is None:
            joined[claim.owner, claim.name] = claim.value
        else:
            chosen = by_layer.setdefault((claim.owner, claim.name), {})
            chosen.update(dict.fromkeys(claim.layers, claim.value))
    for (owner, name), chosen in by_layer.items():
        joined[owner, name] = choose_by_layer(getattr(owner, name), chosen)
    return joined


def choose_by_layer(original, chosen: dict):
    """Return what stands for a class that only some layers replace; chosen: layer -> replacement."""
    def build(config, layer, *args, **kwargs):
        return chosen.get(layer, original)(config, layer, *args, **kwargs)
    return build


def is_per_layer(attribute) -> bool:
    """Whether an attribute is made for each layer, by its signature."""
    return callable(attribute) and list(inspect.signature(attribute).parameters)[:2] == ["config", "layer"]


def check_per_layer(variant: str, changes: dict):
    """RunError if a variant with layers= changes what is not made for each layer."""
    for owner, name in changes:
        require(is_per_layer(getattr(owner, name)),
                f"variant {variant}: no layers= here: it changes {label(owner, name)}, which is not made for each "
                "layer; leave it out")


def check_collision(claim: Claim, other: Claim):
    """RunError if two variants change the same name in the same layers, or one a class and the other a method of it."""
    pair = f"variants {claim.variant} and {other.variant}"
    original, other_original = getattr(claim.owner, claim.name), getattr(other.owner, other.name)
    name, other_name = label(claim.owner, claim.name), label(other.owner, other.name)

    everywhere = claim.layers is None or other.layers is None
    if name == other_name and (everywhere or set(claim.layers) & set(other.layers)):
        remedy = ", or give them different layers=" if is_per_layer(original) else ""
        raise RunError(f"{pair} both change {name}; leave one out{remedy}")
    require(original is not other.owner and other_original is not claim.owner,
            f"{pair} change {name} and {other_name}, one a part of the other; leave one out")


# ---- Watching a patch -------------------------------------------------------


def label(owner, name: str) -> str:
    """Return how messages and records call an attribute: MLP, or GPT.embed."""
    return name if owner is train_gpt else f"{owner.__name__}.{name}"


def is_seam(owner, name: str) -> bool:
    return (name if owner is train_gpt else owner.__name__) in SEAMS


def classes_of_trainer() -> list[type]:
    """Return the classes that train_gpt defines; one that a variant has put there is not among them."""
    classes = {name: value for name, value in vars(train_gpt).items() if isinstance(value, type)}
    return [value for name, value in classes.items()
            if value.__module__ == train_gpt.__name__ and value.__name__ == name]


def attributes_of(owners: list) -> dict:
    """
    Return (owner, attribute) -> value. Of names with two underscores it has methods of classes only: the others are
    Python's and the compiler's.
    """
    values = {}
    for owner in owners:
        for name, value in vars(owner).items():
            is_method = owner is not train_gpt and inspect.isfunction(value)
            if is_method or not name.startswith("__"):
                values[owner, name] = value
    return values


def copy_contents(value):
    """
    Return what can be changed in a value without assigning it: a copy of a container's items, a function's code; None
    for anything else.
    """
    if isinstance(value, dict | list | set):
        return copy.deepcopy(value)
    return getattr(getattr(value, "__func__", value), "__code__", None)


def put_back(value, contents):
    """Give a container or a function what copy_contents() took from it."""
    if isinstance(value, list):
        value[:] = contents
    elif isinstance(value, dict | set):
        value.clear()
        value.update(contents)
    else:
        getattr(value, "__func__", value).__code__ = contents


def observe(action: Callable[[], None]) -> dict:
    """
    Call action() and take back what it did to the trainer. Return (owner, attribute) -> new value, ABSENT for one that
    it deleted or altered in place, as `train_gpt.TRACKS["cpu"] = ...` does.
    """
    owners = [train_gpt, *classes_of_trainer()]
    before = attributes_of(owners)
    contents = {key: copy_contents(value) for key, value in before.items()}
    try:
        action()
    finally:
        changes = take_back(owners, before, contents)
    return changes


def take_back(owners: list, before: dict, contents: dict) -> dict:
    """Make the owners what they were: attributes_of(owners) and their contents. Return what observe() returns."""
    after, changes = attributes_of(owners), {}
    for key in before | after:
        if before.get(key, ABSENT) is not after.get(key, ABSENT):
            changes[key] = after.get(key, ABSENT)
    assign({key: before.get(key, ABSENT) for key in changes})
    for key, value in before.items():
        if contents[key] is not None and copy_contents(value) != contents[key]:
            changes.setdefault(key, ABSENT)
            put_back(value, contents[key])
    return changes


def changes_of(variant: str, module: ModuleType, options) -> dict:
    """
    Run a patch and take it back. Return (owner, attribute) -> new value. RunError for one that fails, changes nothing
    or what is not a variant's.
    """
    try:
        changes = observe(lambda: module.patch(options))
    except (Exception, SystemExit) as error:
        raise fault_of(variant, error) from error

    unknown = join_labels(key for key in changes if not hasattr(*key))
    require(not unknown,
            f"variant {variant}: its patch assigns {unknown}, which train_gpt does not define; correct the name")
    refused = join_labels(key for key in changes if not is_seam(*key))
    require(not refused,
            f"variant {variant}: its patch changes {refused}, which all arms of a comparison must share; a variant may "
            f"assign {', '.join(SEAMS)}, and methods of these classes")
    altered = join_labels(key for key, value in changes.items() if value is ABSENT)
    require(not altered,
            f"variant {variant}: its patch deletes {altered} or alters it in place; assign a replacement instead")
    require(changes, f"variant {variant}: its patch changes nothing with these options; let it assign to an attribute "
                     "of train_gpt")
    return changes


def join_labels(keys) -> str:
    """Return the sorted labels of (owner, attribute) pairs, joined by commas."""
    return ", ".join(sorted(label(*key) for key in keys))


def load(variant: str) -> ModuleType:
    """Import a variant by its full name and return its module. RunError if there is none, or it is broken."""
    require(variant in available(), f"unknown variant {variant!r}; there are {', '.join(available())}")
    name = f"{__name__}.{variant}"
    try:
        changes = observe(lambda: importlib.import_module(name))
    except (Exception, SystemExit) as error:
        raise fault_of(variant, error) from error
    module = sys.modules[name]
    if changes:
        del sys.modules[name]  # or a second import would do nothing, and the variant would seem to be sound
    require(not changes,
            f"variant {variant}: importing it changes {join_labels(changes)}; assign in its patch(options) instead")
    require(dataclasses.is_dataclass(getattr(module, "Options", None)) and callable(getattr(module, "patch", None)),
            f"variant {variant}: its file lacks a dataclass Options or a function patch(options); add it")
    return module


# ---- Errors of a variant's code ---------------------------------------------


def fault_of(variant: str, error: BaseException) -> RunError:
    """Return an error of a variant's code in one line; with its kind and line, unless it was raised for the user."""
    if isinstance(error, (ValueError, RunError)):
        return RunError(f"variant {variant}: {' '.join(str(error).split())}")
    return RunError(describe_error(variant, locate(error), error))


def blame(error: BaseException) -> str | None:
    """
    Return one line, "variant NAME: KIND: text (NAME.py, line N)", for an error that came up in a variant's code or in
    what that called; None for an error that passed through no variant's file. Of several variants it names the one that
    was called last.
    """
    location = locate(error)
    return describe_error(location[0], location, error) if location else None


def locate(error: BaseException | None) -> tuple[str, int] | None:
    """
    Return (variant, line) of the last line of a variant's file that an error, or the one it came from, passed through;
    None if there is none.
    """
    names = available()
    files = {str(Path(folder, f"{name}.py")): name for folder in __path__ for name in names}
    while error is not None:
        lines = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
        compiled = getattr(error, "real_stack", None) or ()  # of the compiler's own errors: the code that it read
        lines += [(frame.filename, frame.lineno) for frame in compiled]
        locations = [(files[file], line) for file, line in lines if file in files]
        if locations:
            return locations[-1]
        error = error.__cause__ or error.__context__
    return None


def describe_error(variant: str, location: tuple[str, int] | None, error: BaseException) -> str:
    """Return an error's kind, text and location in one line."""
    text = textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...").removesuffix(":")
    where = f" ({location[0]}.py, line {location[1]})" if location else ""
    return f"variant {variant}: {text}{where}"


# ---- Specs and options ------------------------------------------------------


def parse_spec(spec: str) -> tuple[str, dict[str, str]]:
    """
    "name:key=value,key=value" -> (name, {key: value}). A piece without = continues the value before it:
    layers=0-3,7,gate=on.
    """
    variant, _, rest = (text.strip() for text in spec.partition(":"))
    pieces = rest.split(",") if rest else []
    texts = {}
    key = None  # whose value the next piece continues; None before the first
    for piece in pieces:
        name, equals, value = (text.strip() for text in piece.partition("="))
        require(not equals or name not in texts, f"variant {variant}: {name}= is given twice; give it once")
        require(name if equals else key,
                f"variant {variant}: {piece!r} is no option; write {variant}:key=value,key=value")
        if equals:
            key = name
            texts[key] = value
        else:
            texts[key] += f",{name}"
    return variant, texts


def parse_integers(text: str) -> tuple[int, ...]:
    """"0-3,7" -> (0, 1, 2, 3, 7). ValueError for anything else, and for a range that holds nothing."""
    numbers = []
    for piece in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", piece.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"{text!r} is no list such as 0-3,7")
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(numbers)


def parse_layers(variant: str, text: str, config: Config) -> tuple[int, ...]:
    """Return the layers that layers=text names. RunError if it names none, or one that the model does not have."""
    try:
        layers = parse_integers(text)
    except ValueError:
        raise RunError(f"variant {variant}: layers={text} is no list of layers; write it such as "
                       "layers=0-3,7") from None
    require(max(layers) < config.layers,
            f"variant {variant}: layers={text} goes beyond the model, which has the layers 0-{config.layers - 1}")
    return layers


def convert(kind, text: str):
    """Return a value of an option's type. ValueError, KeyError or StopIteration if the text is none."""
    if kind is bool:
        return BOOLEANS[text.lower()]
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if str(choice) == text)
    return parse_integers(text) if get_origin(kind) is tuple else kind(text)


def build_options(variant: str, module: ModuleType, texts: dict[str, str]):
    """
    Return the variant's Options from texts. RunError of one line for an unknown option, a value of another type, and
    what Options itself refuses.
    """
    kinds = get_type_hints(module.Options)
    try:
        defaults = module.Options()
        values = {key: read_option(key, text, kinds, defaults) for key, text in texts.items()}
        return module.Options(**values)
    except (Exception, SystemExit) as error:
        raise fault_of(variant, error) from error


def read_option(key: str, text: str, kinds: dict, defaults):
    """Return the value of one option. ValueError, which says what the variant takes, for what it does not take."""
    if key not in kinds:
        raise ValueError(f"it has no option {key!r}; its options are {describe_options(kinds, defaults)}")
    try:
        return convert(kinds[key], text)
    except (ValueError, KeyError, StopIteration):
        raise ValueError(f"{key}={text} is not of the type {describe_kind(kinds[key])}; its options are "
                         f"{describe_options(kinds, defaults)}") from None


def describe_options(kinds: dict, defaults) -> str:
    """Return all options of a variant with their types and defaults, joined by commas."""
    texts = []
    for name, kind in kinds.items():
        texts.append(f"{name} ({describe_kind(kind)}, default {describe_value(getattr(defaults, name))})")
    return ", ".join([*texts, "layers (integers such as 0-3,7, default all)"])


def describe_kind(kind) -> str:
    if get_origin(kind) is Literal:
        return "|".join(str(choice) for choice in get_args(kind))
    if kind is bool:
        return "on|off"
    return "integers such as 0-3,7" if get_origin(kind) is tuple else kind.__name__


def describe_value(value) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(str(number) for number in value)
    return str(value) or "''"
