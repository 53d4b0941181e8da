"""
Loads variants, the replacement parts of the trainer: one idea, one file of this folder.

    python train_gpt.py --variant swiglu_mlp "parallel_residual:layers=0-3,7,norm=separate"
    python -m variants                                                                          the table of all variants

variants/<name>.py holds a docstring (idea, source, maths, cost; one line "Source: ..." and one "Status: ..."), a dataclass Options whose fields have
defaults (int, float, bool, str, Literal[...] or tuple[int, ...]), its modules, and patch(options), which assigns to attributes of train_gpt
(train_gpt.MLP = ...) or of its classes (train_gpt.GPT.run_blocks = ...). What a variant replaces is what its patch was seen to assign.
train_gpt.SEAMS names what may be assigned; a variant that touches anything else there is refused, because all arms of a
comparison share the rest.

Every patch meets the unchanged trainer, so the order of variants does not matter. layers=0-3,7 works for every variant that changes nothing but parts
made for each layer, with a signature (config, layer, ...): the other layers, and what belongs to no layer, keep the original.
"""

import copy, dataclasses, importlib, inspect, pkgutil, re, sys, textwrap, traceback
from collections.abc import Callable
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args, get_origin, get_type_hints

import train_gpt
from train_gpt import SEAMS, Config, RunError, require

VERBS = {"check"}   # modules of this folder that are commands, not variants
ABSENT = object()   # stands for the value of an attribute that an owner does not hold itself
BOOLEANS = {"on": True, "true": True, "1": True, "yes": True, "off": False, "false": False, "0": False, "no": False}

def available() -> list[str]:
    """The names of all variants."""
    names = {module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")}
    return sorted(names - VERBS)

def apply(specs: tuple[str, ...], config: Config) -> dict[str, list[str]]:
    """Change the trainer as specs say, each "name" or "name:key=value,key=value". Returns spec -> changed names. On RunError nothing is changed."""
    parts, changed = plan(specs, config)
    assign(parts)
    return changed

@contextmanager
def applied(specs: tuple[str, ...], config: Config):
    """apply() for the length of a with block; afterwards the trainer is what it was."""
    parts, changed = plan(specs, config)
    before = {(owner, name): vars(owner).get(name, ABSENT) for owner, name in parts}
    assign(parts)
    try:
        yield changed
    finally:
        assign(before)

def assign(parts: dict):
    """Set every (owner, attribute) to its value; ABSENT removes it, so that an inherited one shows again."""
    for (owner, name), value in parts.items():
        if value is not ABSENT:
            setattr(owner, name, value)
        elif name in vars(owner):
            delattr(owner, name)

def plan(specs: tuple[str, ...], config: Config) -> tuple[dict, dict[str, list[str]]]:
    """({(owner, attribute): new value}, {spec: changed names}); the trainer is left as it was. owner: train_gpt or one of its classes."""
    requests = [parse_spec(spec) for spec in specs]
    modules = [load(variant) for variant, _ in requests]  # all before the first patch: subclasses derive from the originals
    claims, changed = [], {}                              # claims: (place in specs, variant, layers or None, owner, attribute, new value)
    for place, (spec, (variant, texts), module) in enumerate(zip(specs, requests, modules)):
        layers = parse_layers(variant, texts.pop("layers"), config) if "layers" in texts else None
        changes = changes_of(variant, module, build_options(variant, module, texts))
        for owner, name in changes:
            if layers is not None and not is_per_layer(getattr(owner, name)):
                raise RunError(f"variant {variant}: no layers= here: it changes {label(owner, name)}, which is not made for each layer; leave it out")
        claims += [(place, variant, layers, owner, name, new) for (owner, name), new in changes.items()]
        changed[spec] = sorted(label(*key) for key in changes)
    for claim, other in combinations(claims, 2):
        if claim[0] != other[0]:
            check_collision(claim, other)
    parts, by_layers = {}, {}                             # by_layers: (owner, attribute) -> {layer: new value}
    for _, _, layers, owner, name, new in claims:
        if layers is None:
            parts[owner, name] = new
        else:
            by_layers.setdefault((owner, name), {}).update(dict.fromkeys(layers, new))
    parts |= {(owner, name): choose_by_layer(getattr(owner, name), chosen) for (owner, name), chosen in by_layers.items()}
    return parts, changed

def check_collision(claim: tuple, other: tuple):
    """RunError if two variants change the same name in the same layers, or one a class and the other a method of it."""
    (_, variant, layers, owner, name, _), (_, other_variant, other_layers, other_owner, other_name, _) = claim, other
    if (owner, name) == (other_owner, other_name) and (layers is None or other_layers is None or set(layers) & set(other_layers)):
        raise RunError(f"variants {variant} and {other_variant} both change {label(owner, name)}; leave one out"
                       + ", or give them different layers=" * is_per_layer(getattr(owner, name)))
    if getattr(owner, name) is other_owner or getattr(other_owner, other_name) is owner:
        raise RunError(f"variants {variant} and {other_variant} change {label(owner, name)} and {label(other_owner, other_name)}, "
                       "one a part of the other; leave one out")

def choose_by_layer(original, chosen: dict):
    """Stands for a part that only some layers replace; chosen: layer -> replacement."""
    def build(config, layer, *args, **kwargs):
        return chosen.get(layer, original)(config, layer, *args, **kwargs)
    return build

def is_per_layer(part) -> bool:
    return callable(part) and list(inspect.signature(part).parameters)[:2] == ["config", "layer"]

def label(owner, name: str) -> str:
    return name if owner is train_gpt else f"{owner.__name__}.{name}"

def is_seam(owner, name: str) -> bool:
    return (name if owner is train_gpt else owner.__name__) in SEAMS

def attributes(owners: list) -> dict:
    """
    (owner, attribute) -> value. Of names with two underscores it has methods of classes only: the others are Python's
    and the compiler's.
    """
    special = lambda owner, name, value: name.startswith("__") and (owner is train_gpt or not inspect.isfunction(value))
    held = ((owner, name, value) for owner in owners for name, value in vars(owner).items())
    return {(owner, name): value for owner, name, value in held if not special(owner, name, value)}

def contents(value):
    """What can be changed in a value without assigning it: a copy of a container's items, a function's code; None for anything else."""
    if isinstance(value, dict | list | set):
        return copy.deepcopy(value)
    return getattr(getattr(value, "__func__", value), "__code__", None)

def put_back(value, content):
    """Give a container or a function what contents() took from it."""
    if isinstance(value, list):
        value[:] = content
    elif isinstance(value, dict | set):
        value.clear()
        value.update(content)
    else:
        getattr(value, "__func__", value).__code__ = content

def observe(action: Callable[[], None]) -> dict:
    """
    Call action() and take back what it did to the trainer. Returns (owner, attribute) -> new value, ABSENT for one that
    it deleted or altered in place, as `train_gpt.TRACKS["cpu"] = ...` does.
    """
    own_name = lambda value: isinstance(value, type) and value.__module__ == train_gpt.__name__ and value.__name__
    owners = [train_gpt] + [value for name, value in vars(train_gpt).items() if own_name(value) == name]
    before = attributes(owners)
    held = {key: content for key, value in before.items() if (content := contents(value)) is not None}
    changes = {}
    try:
        action()
    finally:
        after = attributes(owners)
        for key in before | after:
            if before.get(key, ABSENT) is not after.get(key, ABSENT):
                changes[key] = after.get(key, ABSENT)
        assign({key: before.get(key, ABSENT) for key in changes})
        for key, content in held.items():
            if contents(before[key]) != content:
                changes.setdefault(key, ABSENT)
                put_back(before[key], content)
    return changes

def changes_of(variant: str, module: ModuleType, options) -> dict:
    """Run a patch and take it back: (owner, attribute) -> new value. RunError for one that fails, changes nothing or what is not a variant's."""
    try:
        changes = observe(lambda: module.patch(options))
    except (Exception, SystemExit) as error:
        raise fault(variant, error) from error
    names = lambda wanted: ", ".join(sorted(label(*key) for key in changes if wanted(*key)))
    unknown = names(lambda owner, name: not hasattr(owner, name))
    require(not unknown,
            f"variant {variant}: its patch assigns {unknown}, which train_gpt does not define; correct the name")
    check_seams(variant, changes, "its patch changes")
    altered = names(lambda owner, name: changes[owner, name] is ABSENT)
    require(not altered,
            f"variant {variant}: its patch deletes {altered} or alters it in place; assign a replacement instead")
    require(changes, f"variant {variant}: its patch changes nothing with these options; let it assign to an attribute "
                     "of train_gpt")
    return changes

def check_seams(variant: str, changes: dict, does: str):
    """RunError if a variant changes what it may not. does: the verb of the message, such as "its patch changes"."""
    refused = ", ".join(sorted(label(*key) for key in changes if not is_seam(*key)))
    require(not refused, f"variant {variant}: {does} {refused}, which all arms of a comparison must share; a variant "
                         f"may assign {', '.join(SEAMS)}, and methods of these classes")

def load(variant: str) -> ModuleType:
    """Import a variant by its full name. RunError if there is none, or it is broken."""
    if variant not in available():
        raise RunError(f"unknown variant {variant!r}; there are {', '.join(available())}")
    name = f"{__name__}.{variant}"
    try:
        changes = observe(lambda: importlib.import_module(name))
    except (Exception, SystemExit) as error:
        raise fault(variant, error) from error
    module = sys.modules[name]
    if changes:
        del sys.modules[name]  # or a second import would do nothing, and the variant would seem to be sound
        names = ", ".join(sorted(label(*key) for key in changes))
        raise RunError(f"variant {variant}: importing it changes {names}; assign in its patch(options) instead")
    if not dataclasses.is_dataclass(getattr(module, "Options", None)) or not callable(getattr(module, "patch", None)):
        raise RunError(f"variant {variant}: its file lacks a dataclass Options or a function patch(options); add it")
    return module

def fault(variant: str, error: BaseException) -> RunError:
    """An error of a variant's own in one line; with kind and place, unless it was raised for the user."""
    if isinstance(error, (ValueError, RunError)):
        return RunError(f"variant {variant}: {' '.join(str(error).split())}")
    return RunError(describe_error(variant, place_of(error), error))

def blame(error: BaseException) -> str | None:
    """
    One line, "variant NAME: KIND: text (NAME.py, line N)", for an error that came up in a variant's code or in what
    that called; None for an error that passed through no variant's file. Of several variants it names the one that was
    called last.
    """
    place = place_of(error)
    return describe_error(place[0], place, error) if place else None

def place_of(error: BaseException | None) -> tuple[str, int] | None:
    """(variant, line) of the last line of a variant's file that an error, or the one it came from, passed through."""
    names = available()
    files = {str(Path(folder, f"{name}.py")): name for folder in __path__ for name in names}
    while error is not None:
        lines = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
        compiled = getattr(error, "real_stack", None) or ()  # of the compiler's own errors: the code that it read
        lines += [(frame.filename, frame.lineno) for frame in compiled]
        if places := [(files[file], line) for file, line in lines if file in files]:
            return places[-1]
        error = error.__cause__ or error.__context__
    return None

def describe_error(variant: str, place: tuple[str, int] | None, error: BaseException) -> str:
    """An error's kind, text and place in one line."""
    text = textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...").removesuffix(":")
    return f"variant {variant}: {text}" + (f" ({place[0]}.py, line {place[1]})" if place else "")

def parse_spec(spec: str) -> tuple[str, dict[str, str]]:
    """"name:key=value,key=value" -> (name, {key: value}). A piece without = continues the value before it: layers=0-3,7,gate=on."""
    variant, _, rest = (part.strip() for part in spec.partition(":"))
    texts, key = {}, None
    for piece in rest.split(",") if rest else ():
        name, equals, value = (part.strip() for part in piece.partition("="))
        if equals and name in texts:
            raise RunError(f"variant {variant}: {name}= is given twice; give it once")
        if not equals and key is None or equals and not name:
            raise RunError(f"variant {variant}: {piece!r} is no option; write {variant}:key=value,key=value")
        if equals:
            key, texts[name] = name, value
        else:
            texts[key] += "," + name
    return variant, texts

def parse_integers(text: str) -> tuple[int, ...]:
    """"0-3,7" -> (0, 1, 2, 3, 7). ValueError for anything else, and for a range that holds nothing."""
    numbers = []
    for part in text.split(","):
        if not (match := re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip())) or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"{text!r} is no list such as 0-3,7")
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(numbers)

def parse_layers(variant: str, text: str, config: Config) -> tuple[int, ...]:
    try:
        layers = parse_integers(text)
    except ValueError:
        raise RunError(f"variant {variant}: layers={text} is no list of layers; write it such as layers=0-3,7") from None
    if max(layers) >= config.layers:
        raise RunError(f"variant {variant}: layers={text} goes beyond the model, which has the layers 0-{config.layers - 1}")
    return layers

def convert(kind, text: str):
    """A value of an option's type. ValueError, KeyError or StopIteration if the text is none."""
    if kind is bool:
        return BOOLEANS[text.lower()]
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if str(choice) == text)
    return parse_integers(text) if get_origin(kind) is tuple else kind(text)

def build_options(variant: str, module: ModuleType, texts: dict[str, str]):
    """The variant's Options from texts. RunError of one line for an unknown option, a value of another type, and what Options itself refuses."""
    kinds = get_type_hints(module.Options)
    try:
        defaults = module.Options()
        values = {}
        for key, text in texts.items():
            if key not in kinds:
                raise ValueError(f"it has no option {key!r}; its options are {describe_options(kinds, defaults)}")
            try:
                values[key] = convert(kinds[key], text)
            except (ValueError, KeyError, StopIteration):
                kind, valid = describe_kind(kinds[key]), describe_options(kinds, defaults)
                raise ValueError(f"{key}={text} is not of the type {kind}; its options are {valid}") from None
        return module.Options(**values)
    except (Exception, SystemExit) as error:
        raise fault(variant, error) from error

def describe_options(kinds: dict, defaults) -> str:
    own = [f"{name} ({describe_kind(kind)}, default {describe_value(getattr(defaults, name))})" for name, kind in kinds.items()]
    return ", ".join(own + ["layers (integers such as 0-3,7, default all)"])

def describe_kind(kind) -> str:
    if get_origin(kind) is Literal:
        return "|".join(str(choice) for choice in get_args(kind))
    return "on|off" if kind is bool else "integers such as 0-3,7" if get_origin(kind) is tuple else kind.__name__

def describe_value(value) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(str(v) for v in value) if isinstance(value, tuple) else repr(value) if value == "" else str(value)
