"""
Loads variants, the replacement parts of the trainer: one idea, one file of this folder.

    python train_gpt.py --variant swiglu_mlp "parallel_residual:layers=0-3,7,norm=separate"
    python -m variants                                                                          the table of all variants

variants/<name>.py holds a docstring (idea, source, maths, cost; one line "Source: ..." and one "Status: ..."), a dataclass Options whose fields have
defaults (int, float, bool, str, Literal[...] or tuple[int, ...]), its modules, and patch(options), which assigns to attributes of train_gpt
(train_gpt.MLP = ...) or of its classes (train_gpt.GPT.run_blocks = ...). What a variant replaces is what its patch was seen to assign.

Every patch meets the unchanged trainer, so the order of variants does not matter. layers=0-3,7 works for every variant that changes nothing but parts
made for each layer, with a signature (config, layer, ...): the other layers, and what belongs to no layer, keep the original.
"""

import dataclasses, importlib, inspect, pkgutil, re, traceback
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args, get_origin, get_type_hints

import train_gpt
from train_gpt import Config, RunError

BOOLEANS = {"on": True, "true": True, "1": True, "yes": True, "off": False, "false": False, "0": False, "no": False}

def available() -> list[str]:
    """The names of all variants."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))

def apply(specs: tuple[str, ...], config: Config) -> dict[str, list[str]]:
    """Change the trainer as specs say, each "name" or "name:key=value,key=value". Returns spec -> changed names. On RunError nothing is changed."""
    parts, changed = plan(specs, config)
    assign(parts)
    return changed

@contextmanager
def applied(specs: tuple[str, ...], config: Config):
    """apply() for the length of a with block; afterwards the trainer is what it was."""
    parts, changed = plan(specs, config)
    before = {(owner, name): vars(owner)[name] for owner, name in parts}
    assign(parts)
    try:
        yield changed
    finally:
        assign(before)

def assign(parts: dict):
    for (owner, name), value in parts.items():
        setattr(owner, name, value)

def plan(specs: tuple[str, ...], config: Config) -> tuple[dict, dict[str, list[str]]]:
    """({(owner, attribute): new value}, {spec: changed names}); the trainer is left as it was. owner: train_gpt or one of its classes."""
    requests = [parse_spec(spec) for spec in specs]
    modules = [load(variant) for variant, _ in requests]  # all before the first patch: subclasses derive from the originals
    claims, changed = [], {}                              # claims: (place in specs, variant, layers or None, owner, attribute, new value)
    for place, (spec, (variant, texts), module) in enumerate(zip(specs, requests, modules)):
        layers = parse_layers(variant, texts.pop("layers"), config) if "layers" in texts else None
        changes = changes_of(variant, module, build_options(variant, module, texts))
        for owner, name in changes:
            if layers is not None and not is_per_layer(vars(owner)[name]):
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
    parts |= {(owner, name): choose_by_layer(vars(owner)[name], chosen) for (owner, name), chosen in by_layers.items()}
    return parts, changed

def check_collision(claim: tuple, other: tuple):
    """RunError if two variants change the same name in the same layers, or one a class and the other a method of it."""
    (_, variant, layers, owner, name, _), (_, other_variant, other_layers, other_owner, other_name, _) = claim, other
    if (owner, name) == (other_owner, other_name) and (layers is None or other_layers is None or set(layers) & set(other_layers)):
        raise RunError(f"variants {variant} and {other_variant} both change {label(owner, name)}; leave one out"
                       + ", or give them different layers=" * is_per_layer(vars(owner)[name]))
    if vars(owner)[name] is other_owner or vars(other_owner)[other_name] is owner:
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

def attributes(owners: list) -> dict:
    """(owner, attribute) -> value. Of names with two underscores constructors only: the others are Python's and the compiler's."""
    return {(owner, name): value for owner in owners for name, value in vars(owner).items() if not name.startswith("__") or name == "__init__"}

def changes_of(variant: str, module: ModuleType, options) -> dict:
    """Run a patch and take it back: (owner, attribute) -> new value. RunError for a patch that fails, changes nothing or makes a new name."""
    own_class = lambda name, value: isinstance(value, type) and (value.__module__, value.__name__) == (train_gpt.__name__, name)
    owners = [train_gpt] + [value for name, value in vars(train_gpt).items() if own_class(name, value)]
    before = attributes(owners)
    try:
        module.patch(options)
    except Exception as error:
        raise fault(variant, error) from error
    finally:
        after = attributes(owners)
        for owner, name in after.keys() - before.keys():
            delattr(owner, name)
        assign({key: value for key, value in before.items() if key not in after or after[key] is not value})
    if unknown := sorted(label(*key) for key in after.keys() - before.keys()):
        raise RunError(f"variant {variant}: its patch assigns {', '.join(unknown)}, which train_gpt does not define; correct the name")
    changes = {key: value for key, value in after.items() if before[key] is not value}
    if not changes:
        raise RunError(f"variant {variant}: its patch changes nothing with these options; let it assign to an attribute of train_gpt")
    return changes

def load(variant: str) -> ModuleType:
    """Import a variant by its full name. RunError if there is none, or it is broken."""
    if variant not in available():
        raise RunError(f"unknown variant {variant!r}; there are {', '.join(available())}")
    try:
        module = importlib.import_module(f"{__name__}.{variant}")
    except Exception as error:
        raise fault(variant, error) from error
    if not dataclasses.is_dataclass(getattr(module, "Options", None)) or not callable(getattr(module, "patch", None)):
        raise RunError(f"variant {variant}: its file lacks a dataclass Options or a function patch(options); add it")
    return module

def fault(variant: str, error: Exception) -> RunError:
    """An error of a variant's own in one line; with kind and place, unless it was raised for the user."""
    text = " ".join(str(error).split())
    if not isinstance(error, (ValueError, RunError)):
        files = [str(Path(folder, f"{variant}.py")) for folder in __path__]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
        text = f"{type(error).__name__}: {text}" + (f" ({variant}.py, line {lines[-1]})" if lines else "")
    return RunError(f"variant {variant}: {text}")

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
    except Exception as error:
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
