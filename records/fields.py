"""
What the fields of JSON files are: the one place where a value that was read from a file is checked before it is used.

A shape says what a value must be:
    int, float, bool, str       a value of that type; a text has no control characters, a float may be an integer
    (kind, least, most)         the same, a number within limits
    check_text                  any text, of several lines too
    Maybe(shape)                the same or null
    [shape]                     a list of such values
    {"name": shape}             an object with this field, or "name?" where it may be missing; it may have others
    {str: shape}                an object whose fields all have this shape
    a function                  which gets value and name, and raises RunError
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from train_gpt import RANGES, Config, RunError, check_value, read_json, require

DEPTH = 16  # levels of objects and lists in a file; this project's own have seven
NUMBER = (float, -1e30, 1e30)  # Infinity, which a JSON file can hold as 1e999, lies outside
POSITIVE = (float, 0.0, 1e30)
COUNT = (int, 0, 2 ** 63)
SHARE = (float, 0.0, 1.0)


@dataclass
class Maybe:
    """A shape whose value may be null."""

    shape: object


def check_text(value, name: str):
    """Any text."""
    require(isinstance(value, str), f"{name} must be text, got {value!r:.60}")


def check_config(settings, name: str):
    """A run's configuration. It may hold settings of other versions of the trainer, too: values and lists of values."""
    require(isinstance(settings, dict), f"{name} must be an object of settings, got {settings!r:.60}")
    kinds = {field.name: field.type for field in dataclasses.fields(Config)}
    for setting, item in settings.items():
        check_value(str, setting, f"a setting's name in {name}", None)
        if setting in kinds:
            value = tuple(item) if isinstance(item, list) else item
            check_value(kinds[setting], value, f"{name}.{setting}", RANGES.get(setting))
        for single in item if isinstance(item, list) else [item]:
            require(not isinstance(single, dict | list),
                    f"{name}.{setting} must be a value or a list of values, got {item!r:.60}")


# ---- The shapes

# The facts in a log's header.
FACTS = {
    "run_id?": str,
    "status?": check_text,
    "config?": check_config,
    "command?": check_text,
    "seed?": COUNT,
    "replaced?": {str: [str]},          # by each variant, names of the trainer

    "python?": str,
    "torch?": str,
    "cuda?": Maybe(str),
    "triton?": Maybe(str),
    "platform?": str,
    "device?": str,
    "world_size?": (int, 1, 2 ** 20),
    "dtype?": str,
    "compile?": str,
    "git_commit?": str,
    "git_dirty?": bool,
    "sources?": {str: str},             # module: sha256

    "parameters?": COUNT,
    "parameters_without_embeddings?": COUNT,
    "flops_per_token?": Maybe(POSITIVE),
    "peak_flops?": Maybe(POSITIVE),

    "train_data?": str,
    "train_tokens_available?": COUNT,
    "target?": POSITIVE,                # 0 where it was set for other validation data
    "val_tokens?": COUNT,
    "val_bytes_per_token?": Maybe(POSITIVE),
    "val_sha256?": {str: str}}          # shard: sha256

# A validation.
POINT = {
    "step": COUNT,
    "tokens?": Maybe(COUNT),
    "train_ms?": POSITIVE,
    "val_loss": NUMBER,
    "val_bits_per_byte?": Maybe(NUMBER),
    "train_loss?": Maybe(NUMBER)}

# The JSON beside a log.
SAVED = FACTS | {
    "curve?": [POINT],
    "train_curve?": [[NUMBER]],
    "step?": COUNT,
    "val_loss?": NUMBER,
    "val_bits_per_byte?": Maybe(NUMBER),
    "train_seconds?": POSITIVE,
    "warmup_seconds?": Maybe(POSITIVE),
    "ms_per_step?": Maybe(POSITIVE),
    "tokens_per_second?": Maybe(POSITIVE),
    "mfu?": Maybe(POSITIVE),
    "peak_memory_mib?": Maybe(COUNT),
    "peak_memory_reserved_mib?": Maybe(COUNT)}

SUMMARY = {"mean": NUMBER, "sd": Maybe(POSITIVE), "n": (int, 1, 2 ** 31), "min": NUMBER, "max": NUMBER}
TEST = {"difference": Maybe(NUMBER), "low": Maybe(NUMBER), "high": Maybe(NUMBER), "p_holm": Maybe(SHARE),
        "verdict": str}

# As sequential.make_design gives it.
DESIGN = {"looks": [COUNT], "levels": [SHARE], "levels_equivalence": Maybe([SHARE]), "levels_interval": [SHARE]}
SETTINGS = {
    "track?": Maybe(str),
    "command?": check_text,
    "target?": Maybe(NUMBER),
    "rule?": str,
    "alpha?": SHARE,
    "margin?": Maybe(POSITIVE),
    "design?": Maybe(DESIGN)}

# An arm in stats.json.
ARM = {
    "name": check_text,
    "folder": str,
    "variant": [str],
    "options": [check_text],
    "parameters": Maybe(COUNT),
    "seeds": [COUNT],
    "losses": [NUMBER],
    "train_seconds": [POSITIVE],
    "loss": SUMMARY,
    "time": SUMMARY,
    "p_target": Maybe(SHARE),
    "vs_baseline": Maybe({"loss": TEST, "time": {"verdict": str}})}

# stats.json of a record.
STATS = {
    "format": str,
    "name": str,
    "date": str,
    "track": str,
    "what": check_text,
    "kind": str,
    "arm": Maybe(check_text),
    "rules": {"target": POSITIVE, "val_tokens": COUNT},
    "settings": SETTINGS,
    "reread?": {"date": str, "words": {str: [str]}},    # arm: its verdict before and now
    "hardware": str,
    "val_sha256": {str: str},
    "versions": {str: Maybe(str)},
    "arms": [ARM]}

# results.json of a comparison, as far as the board reads it.
RESULTS = {
    "format": str,
    "settings": SETTINGS,
    "arms": [{"name": check_text, "options": [check_text],
              "runs": [{"seed": COUNT, "log?": str, "val_loss?": Maybe(NUMBER)}]}]}


# ---- Checking

def check_fields(value, shape, name: str):
    """Raise RunError, which calls the value `name`, unless it has the shape."""
    if isinstance(shape, Maybe):
        if value is not None:
            check_fields(value, shape.shape, name)
    elif isinstance(shape, list):
        require(isinstance(value, list), f"{name} must be a list, got {value!r:.60}")
        for i, item in enumerate(value):
            check_fields(item, shape[0], f"{name}[{i}]")
    elif isinstance(shape, dict):
        require(isinstance(value, dict), f"{name or 'its content'} must be an object, got {value!r:.60}")
        check_object(value, shape, f"{name}." if name else "")
    elif isinstance(shape, tuple):
        check_value(shape[0], value, name, shape[1:])
    elif isinstance(shape, type):
        check_value(shape, value, name, None)
    else:
        shape(value, name)


def check_object(value: dict, shape: dict, prefix: str):
    """check_fields of an object's fields, which messages call `prefix` and their names."""
    if str in shape:
        for key, item in value.items():
            check_fields(key, str, f"a name in {prefix.rstrip('.')}")
            check_fields(item, shape[str], f"{prefix}{key}")
        return
    for field, kind in shape.items():
        key = field.removesuffix("?")
        require(key in value or key != field, f"{prefix}{key} is missing")
        if key in value:
            check_fields(value[key], kind, f"{prefix}{key}")


def check_content(value):
    """
    Raise RunError for what no field may be, those without a shape included: more than DEPTH levels, since what walks
    through the value recursively must come to an end, numbers that are too large to count with, and text that cannot be
    written to a file.
    """
    level = [value]
    for _ in range(DEPTH):
        for item in level:
            if isinstance(item, int | float):
                require(abs(item) <= NUMBER[2], f"it holds the number {item!r:.60}")
        objects = [list(item.values()) for item in level if isinstance(item, dict)]
        lists = [item for item in level if isinstance(item, list)]
        level = [child for children in objects + lists for child in children]
    require(not level, f"its objects and lists nest more than {DEPTH} levels deep")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RunError(f"it holds text that is no Unicode, {error.object[error.start]!a}") from None


def read_fields(path: Path, remedy: str, shape: dict) -> dict:
    """Return a file's JSON object. RunError, one line with the file's name and the remedy, unless it has the shape."""
    return check_file_content(read_json(path, remedy), path, remedy, shape)


def parse_fields(text: str, path: Path, name: str, remedy: str, shape: dict) -> dict:
    """The JSON object in a text of the file, which a message calls `name`, checked in the same way."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: damaged: {name} are not a JSON object ({type(error).__name__}); {remedy}") from None
    return check_file_content(content, path, remedy, shape)


def check_file_content(content, path: Path, remedy: str, shape: dict) -> dict:
    """Return the content. RunError, one line with the file's name and the remedy, unless it has the shape."""
    try:
        check_content(content)
        check_fields(content, shape, "")
    except RunError as error:
        raise RunError(f"{path}: damaged: {error}; {remedy}") from None
    return content
