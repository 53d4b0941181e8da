"""The loader: what it reads, what it changes and takes back, and the one line of every error."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import train_gpt
import variants
from train_gpt import RunError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = train_gpt.make_config(dict(vocab_size=257, layers=8, model_dim=32, heads=2, head_dim=16, mlp_hidden=96))
HEAD = '''"""An idea.\n\nSource: somebody, 2020\nStatus: unmeasured\n"""
from dataclasses import dataclass
from typing import Literal
import train_gpt
@dataclass
class Options:
    width: int = 8
    rate: float = 0.5
    gate: bool = False
    name: str = ""
    kind: Literal["a", "b", 3] = "a"
    depths: tuple[int, ...] = (1,)
'''
PATCH_LINE = HEAD.count("\n") + 2  # of the file that write() makes


@pytest.fixture
def write(write_file):
    """write(name, patch) makes a variant of that name; patch: lines of its function patch."""
    def write(name, patch, head=HEAD):
        write_file(name, head + f"def patch(options):\n    {patch}\n")

    return write


def state() -> dict:
    """What the trainer's module and three of its classes hold."""
    values = {name: value for name, value in vars(train_gpt).items() if not name.startswith("__")}
    for owner in (train_gpt.GPT, train_gpt.Trainer, train_gpt.TokenLoader):
        values |= {(owner.__name__, name): value for name, value in vars(owner).items()}
    return values


def error_of(*specs: str) -> str:
    """The message of the error of apply(), which must be one line and leave the trainer alone."""
    before = state()
    with pytest.raises(RunError) as caught:
        variants.apply(specs, CONFIG)
    after, message = state(), str(caught.value)
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert "\n" not in message
    return message


def options_of(name: str, text: str = ""):
    spec_name, texts = variants.parse_spec(f"{name}:{text}" if text else name)
    return variants.build_options(spec_name, variants.load(spec_name), texts)


# ---- Specs and options ------------------------------------------------------


@pytest.mark.parametrize("spec, expected", [
    ("a", ("a", {})),
    (" a ", ("a", {})),
    ("a:", ("a", {})),
    ("a:x=1", ("a", {"x": "1"})),
    ("a:layers=0-3,7,gate=on", ("a", {"layers": "0-3,7", "gate": "on"})),
    ("a:gate=on,layers=0-3,7,9-10", ("a", {"gate": "on", "layers": "0-3,7,9-10"})),
    ("a:x=", ("a", {"x": ""})),
])
def test_parse_spec(spec, expected):
    assert variants.parse_spec(spec) == expected


@pytest.mark.parametrize("text, expected", [("7", (7,)), ("0-3,7", (0, 1, 2, 3, 7)), ("5-5", (5,)), ("3,1", (3, 1))])
def test_parse_integers(text, expected):
    assert variants.parse_integers(text) == expected


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "3-1", "1,,2", "1;2", "1.5", "0--2", "0-99999999999"])
def test_no_integers(text):
    with pytest.raises(ValueError):
        variants.parse_integers(text)


def test_options_of_every_type(write):
    write("typed", "train_gpt.MLP = type('M', (train_gpt.MLP,), {})")
    assert vars(options_of("typed")) == dict(width=8, rate=0.5, gate=False, name="", kind="a", depths=(1,))
    options = options_of("typed", "width=-3,rate=1e-3,gate=Yes,name=x:y,kind=3,depths=2-4,9")
    assert vars(options) == dict(width=-3, rate=0.001, gate=True, name="x:y", kind=3, depths=(2, 3, 4, 9))
    for text in ("on", "true", "yes", "1"):
        assert options_of("typed", f"gate={text}").gate is True
    for text in ("off", "false", "no", "0"):
        assert options_of("typed", f"gate={text}").gate is False


@pytest.mark.parametrize("text", [
    "width=abc", "width=1.5", "rate=fast", "gate=maybe", "kind=c", "depths=2-", "depths=a", "width=",
])
def test_option_of_wrong_type(write, text):
    write("typed", "train_gpt.MLP = None")
    message = error_of(f"typed:{text}")
    assert message.startswith(f"variant typed: {text} is not of the type ")
    assert message.endswith(
        "its options are width (int, default 8), rate (float, default 0.5), gate (on|off, default off), name (str, "
        "default ''), kind (a|b|3, default a), depths (integers such as 0-3,7, default 1), layers (integers such as "
        "0-3,7, default all)")


def test_option_faults():
    assert error_of("swiglu_mlp:width=3") == (
        "variant swiglu_mlp: it has no option 'width'; its options are hidden (int, default 0), activation "
        "(silu|gelu|relu2, default silu), layers (integers such as 0-3,7, default all)")
    assert error_of("swiglu_mlp:hidden=1,hidden=2") == "variant swiglu_mlp: hidden= is given twice; give it once"
    for option in ("hidden", "=3"):
        assert error_of(f"swiglu_mlp:{option}") == (
            f"variant swiglu_mlp: {option!r} is no option; write swiglu_mlp:key=value,key=value")


# ---- Faults of files and patches --------------------------------------------


@pytest.mark.parametrize("name", ["nope", "", "__main__", "check", "swiglu_mlp.Options", "../train_gpt", "os"])
def test_unknown_variant(name):
    assert error_of(name) == f"unknown variant {name!r}; there are {', '.join(variants.available())}"


def test_available_is_the_folder(write):
    write("zz_new", "pass")
    files = {file.stem for file in (ROOT / "variants").glob("*.py")} - {"__init__", "__main__", "check", "new"}
    assert variants.available() == sorted(files) + ["zz_new"]


def test_faults_of_the_file(write):
    write("syntax", "pass", head="def f(:\n")
    message = error_of("syntax")
    assert message.startswith("variant syntax: SyntaxError: ") and "(syntax.py, line 1)" in message
    write("importing", "pass", head="import no_such_module_of_anybody\n")
    assert error_of("importing") == ("variant importing: ModuleNotFoundError: No module named "
                                     "'no_such_module_of_anybody' (importing.py, line 1)")
    write("lacking", "pass", head="")
    assert error_of("lacking") == ("variant lacking: its file lacks a dataclass Options or a function patch(options); "
                                   "add it")
    write("required", "train_gpt.MLP = None", head=HEAD.replace("width: int = 8", "width: int"))
    assert error_of("required").startswith("variant required: TypeError: ")


@pytest.mark.parametrize("patch, fault", [
    ("pass", "its patch changes nothing with these options; let it assign to an attribute of train_gpt"),
    ("train_gpt.MLP = train_gpt.MLP",
     "its patch changes nothing with these options; let it assign to an attribute of train_gpt"),
    ("train_gpt.MPL = train_gpt.MLP = object()",
     "its patch assigns MPL, which train_gpt does not define; correct the name"),
    ("train_gpt.GPT.run_block = None",
     "its patch assigns GPT.run_block, which train_gpt does not define; correct the name"),
    ("train_gpt.MLP = None; raise ValueError('width=8 is odd;\\n    take 9')", "width=8 is odd; take 9"),
    ("train_gpt.MLP = None; raise train_gpt.RunError('no kernel here')", "no kernel here"),
    ("train_gpt.GPT.embed = None; train_gpt.MLP = undefined",
     f"NameError: name 'undefined' is not defined (faulty.py, line {PATCH_LINE})"),
    ("del train_gpt.GPT.embed", "its patch deletes GPT.embed or alters it in place; assign a replacement instead"),
    ("train_gpt.rotate.__code__ = (lambda x, rotary: x).__code__",
     "its patch deletes rotate or alters it in place; assign a replacement instead"),
])
def test_faults_of_the_patch(write, patch, fault):
    write("faulty", patch)
    code = train_gpt.rotate.__code__
    assert error_of("faulty") == f"variant faulty: {fault}"
    assert train_gpt.rotate.__code__ is code


def test_options_refuse_for_the_user(write):
    check = ("    def __post_init__(self):\n        if self.width > 9:\n"
             "            raise ValueError(f'width={self.width} is too wide')\n")
    write("strict", "train_gpt.MLP = None", head=HEAD + check)
    assert error_of("strict:width=10") == "variant strict: width=10 is too wide"


@pytest.mark.parametrize("patch, names", [
    ("train_gpt.Trainer.validate = lambda self, batches: 0.1", "Trainer.validate"),
    ("train_gpt.TokenLoader = None", "TokenLoader"),
    ("train_gpt.Trainer = None", "Trainer"),
    ("train_gpt.RunLog = None", "RunLog"),
    ("train_gpt.write_checkpoint = None", "write_checkpoint"),
    ("train_gpt.measured_peak = lambda ranks: 1.0", "measured_peak"),
    ("train_gpt.MLP = train_gpt.Norm = None; train_gpt.GATE_CHANNELS = 4; train_gpt.validation_batches = None",
     "GATE_CHANNELS, validation_batches"),
    ("train_gpt.Config.val_tokens = 1", "Config.val_tokens"),
    ("train_gpt.Trainer.__init__ = None", "Trainer.__init__"),
    ("train_gpt.TokenLoader.__repr__ = lambda self: 'mine'", "TokenLoader.__repr__"),
    ("train_gpt.TRACKS['cpu']['lr_matrix'] = 1.0", "TRACKS"),
    ("train_gpt.RESUME_FIELDS.add('seed')", "RESUME_FIELDS"),
    ("train_gpt.Trainer.train_step.__code__ = (lambda self, rows, progress: 0).__code__", "Trainer.train_step"),
    ("del train_gpt.TokenLoader", "TokenLoader"),
    ("train_gpt.SEAMS = ('Trainer',)", "SEAMS"),
])
def test_the_referee_is_no_seam(write, patch, names):
    write("cheat", patch)
    tracks, code = str(train_gpt.TRACKS), train_gpt.Trainer.train_step.__code__
    assert error_of("cheat") == (
        f"variant cheat: its patch changes {names}, which all arms of a comparison must share; a variant may assign "
        f"{', '.join(train_gpt.SEAMS)}, and methods of these classes")
    assert (str(train_gpt.TRACKS), train_gpt.Trainer.train_step.__code__) == (tracks, code)


def test_import_changes_nothing(write):
    write("eager", "train_gpt.MLP = None",
          head=HEAD + "train_gpt.GPT.embed = None\ntrain_gpt.Trainer.validate = None\n")
    for _ in range(2):  # the second import is not silent
        assert error_of("eager") == ("variant eager: importing it changes GPT.embed, Trainer.validate; assign in its "
                                     "patch(options) instead")
    write("leaving", "train_gpt.MLP = None", head=HEAD + "raise SystemExit(3)\n")
    assert error_of("leaving") == f"variant leaving: SystemExit: 3 (leaving.py, line {PATCH_LINE - 1})"


# ---- Whose error it was -----------------------------------------------------


def test_blame(write):
    forward = "    def forward(self, x):\n        return super().forward(x[..., :3])\n"
    write("narrow", "train_gpt.MLP = Narrow", head=HEAD + f"class Narrow(train_gpt.MLP):\n{forward}")
    line, tokens = HEAD.count("\n") + 3, torch.zeros(1, 8, dtype=torch.int64)

    def error_in_forward(compiled: bool) -> str:
        with variants.applied(("narrow",), CONFIG), pytest.raises(Exception) as caught:
            model = train_gpt.build_model(CONFIG, train_gpt.Ranks(0, 1, torch.device("cpu"), torch.float32))
            if compiled:
                model.predict = torch.compile(model.predict, backend="eager", fullgraph=True)
            model(tokens)
        return variants.blame(caught.value)

    assert error_in_forward(False) == ("variant narrow: RuntimeError: mat1 and mat2 shapes cannot be multiplied (8x3 "
                                       f"and 32x96) (narrow.py, line {line})")
    torch._dynamo.reset()
    message = error_in_forward(True)
    assert message.startswith("variant narrow: TorchRuntimeError: ") and "\n" not in message
    assert message.endswith(f"(narrow.py, line {line})")
    torch._dynamo.reset()


def test_no_blame():
    with pytest.raises(RuntimeError) as caught:  # passes through the loader, but through no variant
        with variants.applied(("swiglu_mlp",), CONFIG):
            raise RuntimeError("a fault of somebody else")
    assert variants.blame(caught.value) is None


def test_blame_of_the_cause(write):
    write("wrapped", "train_gpt.MLP = None", head=HEAD + "def fail():\n    return {}['key']\n")
    with pytest.raises(RuntimeError) as caught:
        try:
            variants.load("wrapped").fail()
        except KeyError as error:
            raise RuntimeError("while training") from error
    message = f"variant wrapped: RuntimeError: while training (wrapped.py, line {PATCH_LINE})"
    assert variants.blame(caught.value) == message


# ---- What is changed, and taken back ----------------------------------------


def test_an_inherited_method(write):
    original = train_gpt.GPT.train
    write("averaged",
          "train_gpt.GPT.train = lambda self, mode=True: setattr(self, 'asked', mode) or original(self, mode)",
          head=HEAD + "original = train_gpt.GPT.train\n")
    with variants.applied(("averaged",), CONFIG) as changed:
        assert changed == {"averaged": ["GPT.train"]}
        model = train_gpt.GPT(CONFIG).eval()
        assert model.asked is False and not model.blocks[0].training
    assert "train" not in vars(train_gpt.GPT) and train_gpt.GPT.train is original

    write("calling", "train_gpt.GPT.__call__ = lambda self, *arguments: None")
    with variants.applied(("calling", "averaged"), CONFIG) as changed:
        assert changed["calling"] == ["GPT.__call__"] and train_gpt.GPT(CONFIG)(0) is None
    assert not {"train", "__call__"} & set(vars(train_gpt.GPT))
    assert error_of("averaged", "averaged") == "variants averaged and averaged both change GPT.train; leave one out"
    assert error_of("averaged:layers=1").startswith("variant averaged: no layers= here: it changes GPT.train")


def test_apply_and_undo(write):
    # two names
    write("block_order", "train_gpt.GPT.run_blocks = lambda self, x, contexts: x")
    before = state()
    with variants.applied(("swiglu_mlp", "block_order"), CONFIG) as changed:
        assert changed == {"swiglu_mlp": ["MLP"], "block_order": ["GPT.run_blocks"]}
        differing = {name for name, value in state().items() if before[name] is not value}
        assert differing == {"MLP", ("GPT", "run_blocks")}
        assert type(train_gpt.GPT(CONFIG).blocks[0].mlp).__name__ == "GatedMLP"
    assert state() == before

    # a method
    write("constructor", "train_gpt.MLP.__init__ = lambda self, config, layer: None")
    constructor = train_gpt.MLP.__init__
    with variants.applied(("constructor",), CONFIG) as changed:
        assert changed == {"constructor": ["MLP.__init__"]} and train_gpt.MLP.__init__ is not constructor
    assert train_gpt.MLP.__init__ is constructor

    # an error inside
    with pytest.raises(ZeroDivisionError), variants.applied(("swiglu_mlp",), CONFIG):
        raise ZeroDivisionError
    assert state() == before

    # for good
    try:
        changed = variants.apply(("swiglu_mlp:layers=1", "parallel_residual"), CONFIG)
        assert changed == {"swiglu_mlp:layers=1": ["MLP"], "parallel_residual": ["Block"]}
        assert train_gpt.MLP is not before["MLP"] and train_gpt.Block is not before["Block"]
    finally:
        train_gpt.MLP, train_gpt.Block = before["MLP"], before["Block"]
    assert variants.apply((), CONFIG) == {}


def test_order_does_not_matter_and_patches_meet_the_original(write):
    write("wrapping", "original = train_gpt.attend; "
                      "train_gpt.attend = lambda *arguments, **options: original(*arguments, **options)")
    write("deriving", "train_gpt.MLP = type('Derived', (train_gpt.MLP,), {})")
    specs = ("deriving:layers=0", "swiglu_mlp:layers=1", "wrapping")
    for order in (specs, specs[::-1]):
        with variants.applied(order, CONFIG):
            kinds = [type(block.mlp) for block in train_gpt.GPT(CONFIG).blocks]
        assert [kind.__name__ for kind in kinds] == ["Derived", "GatedMLP"] + ["MLP"] * 6
        assert kinds[0].__mro__[1] is train_gpt.MLP


def test_collisions(write):
    write("other_mlp", "train_gpt.MLP = lambda config, layer: None")
    remedy = "both change MLP; leave one out, or give them different layers="
    for mine, other in (("", ""), (":layers=0-3", ""), (":layers=0-3", ":layers=3")):
        message = error_of(f"swiglu_mlp{mine}", f"other_mlp{other}")
        assert message == f"variants swiglu_mlp and other_mlp {remedy}"
    assert error_of("swiglu_mlp", "swiglu_mlp:hidden=8") == f"variants swiglu_mlp and swiglu_mlp {remedy}"
    write("one", "train_gpt.attend = None")
    write("two", "train_gpt.attend = 2")
    assert error_of("one", "two") == "variants one and two both change attend; leave one out"
    write("model", "train_gpt.GPT = type('G', (train_gpt.GPT,), {})")
    write("method", "train_gpt.GPT.embed = None")
    for pair, names in ((("model", "method"), "GPT and GPT.embed"), (("method", "model"), "GPT.embed and GPT")):
        assert error_of(*pair) == (f"variants {pair[0]} and {pair[1]} change {names}, one a part of the other; leave "
                                   "one out")


# ---- Layers -----------------------------------------------------------------


def test_layers():
    with variants.applied(("swiglu_mlp:hidden=16,layers=0-1,7", "swiglu_mlp:layers=2"), CONFIG):
        widths = [block.mlp.fc.weight.shape[0] for block in train_gpt.GPT(CONFIG).blocks]
    assert widths == [16, 16, 64, 96, 96, 96, 96, 16]


def test_layers_of_a_linear(write):
    write("marked_linear", "train_gpt.Linear = type('Marked', (train_gpt.Linear,), {})")
    with variants.applied(("marked_linear:layers=6-7",), CONFIG):
        model = train_gpt.GPT(CONFIG)
    marked = {name for name, module in model.named_modules() if type(module).__name__ == "Marked"}
    assert len(marked) == 14  # q k v o gate fc proj
    assert all(name.startswith(("blocks.6.", "blocks.7.")) for name in marked)
    assert type(model.head.projection) is train_gpt.Linear
    with variants.applied(("marked_linear",), CONFIG):
        assert type(train_gpt.GPT(CONFIG).head.projection).__name__ == "Marked"


@pytest.mark.parametrize("name", ["CausalSelfAttention", "MLP", "Residual", "Linear", "Block"])
def test_what_is_made_for_each_layer(name):
    assert variants.is_per_layer(getattr(train_gpt, name))


@pytest.mark.parametrize("name", ["Norm", "GPT", "LanguageModelHead", "attend", "build_optimizers", "GATE_CHANNELS"])
def test_what_is_made_once(name):
    assert not variants.is_per_layer(getattr(train_gpt, name))


@pytest.mark.parametrize("text", ["", "all", "3-1", "-1", "1-", "0,,1", "0-0x"])
def test_malformed_layers(text):
    assert error_of(f"swiglu_mlp:layers={text}") == (
        f"variant swiglu_mlp: layers={text} is no list of layers; write it such as layers=0-3,7")


def test_layers_that_do_not_apply(write):
    assert error_of("swiglu_mlp:layers=6-8") == (
        "variant swiglu_mlp: layers=6-8 goes beyond the model, which has the layers 0-7")
    write("norms", "train_gpt.MLP = train_gpt.Block; train_gpt.Norm = None")
    assert error_of("norms:layers=0") == ("variant norms: no layers= here: it changes Norm, which is not made for each "
                                          "layer; leave it out")


# ---- Command lines ----------------------------------------------------------


@pytest.mark.parametrize("spec, message", [
    ("nope", "unknown variant 'nope'; there are "),
    ("swiglu_mlp:hidden=abc", "variant swiglu_mlp: hidden=abc is not of the type int; its options are hidden (int, "),
    ("swiglu_mlp:layers=4+parallel_residual",
     "variant swiglu_mlp: layers=4 goes beyond the model, which has the layers 0-3"),
])
def test_command_line(spec, message, capsys):
    assert train_gpt.main(["--variant", spec], loader=variants) == 1
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and error.startswith(f"train_gpt.py: error: {message}")


def test_the_script_finds_the_loader(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", "--variant", "nope"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "train_gpt.py"), run_name="__main__")
    out, error = capsys.readouterr()
    assert (end.value.code, out) == (1, "") and error.startswith("train_gpt.py: error: unknown variant 'nope'; there")


def test_table(write, capsys):
    write("broken", "raise TypeError('what\\never')")
    write("unbuildable", "train_gpt.MLP = None")
    bare = "from dataclasses import dataclass\nimport train_gpt\n@dataclass\nclass Options:\n    pass\n"
    write("bare", "train_gpt.MLP = type('M', (train_gpt.MLP,), {})", head=bare)
    runpy.run_module("variants", run_name="__main__")
    out, error = capsys.readouterr()
    lines = out.splitlines()
    assert error == "" and [line.split()[0] for line in lines] == ["variant", "baseline", *variants.available()]
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    assert rows["broken"].startswith("broken: variant broken: TypeError: what ever (broken.py, line ")
    assert rows["unbuildable"] == "broken: TypeError: 'NoneType' object is not callable"
    assert re.fullmatch(r"MLP +[\d,]+ +\+0\.0 % +no Status: line +no docstring +no Source: line", rows["bare"])

    config = train_gpt.make_config(dict(vocab_size=257))
    with torch.device("meta"):
        baseline = sum(p.numel() for p in train_gpt.GPT(config).parameters())
    count = baseline + 4 * 128 * (3 * 344 - 2 * 512)
    change = f"{100 * (count / baseline - 1):.1f}"
    assert re.match(rf"MLP +{count:,} +\+{change} % +\S.* Gated feed-forward .* Shazeer", rows["swiglu_mlp"])
