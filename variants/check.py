"""
Says in words, in seconds, whether a variant is sound: that no position sees a later one, another document or another
row, and that it learns.

    python -m variants.check swiglu_mlp
    python -m variants.check "my_idea:width=8" "--layers 8 --rope none" --track small     with options of the trainer
    python -m variants.check all                                                         every variant, one line each
    python -m variants.check my_idea --json

It also says what the variant replaces and what it costs beside the baseline: parameters, FLOPs a token, milliseconds a
step.

- What is tried is the run's own model, with its layers, heads, windows and options, only narrower, with shorter rows
  and fewer token ids. Where a part does not work at that size, the run's own width is taken.
- Parameters that begin at zero are filled with random numbers, so that every part has its say.
- A model is asked twice, with one thing changed that it must not see. Equal questions begin with equal seeds and equal
  buffers, so dropout and the like give equal answers. An answer counts as changed from ROUNDING times float32's epsilon
  times the root mean square of the logits on, plus ten times what the same question asked twice differs by: 1e-4, where
  rounding makes 1e-6 and a real leak 1e-2 and more.
- Everything is asked in evaluation and in training, of the logits; in training of the loss as well, because a part may
  act only when it gets targets.
- Exit code 0: sound, 1: faults, one line each; notes are no faults.
"""

import argparse
import dataclasses
import inspect
import json
import math
import shlex
import statistics
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

import train_gpt
import variants
from train_gpt import GPT, Config, Ranks, RunError, say

ALONE = Ranks(0, 1, torch.device("cpu"), torch.float32)
EPSILON = torch.finfo(torch.float32).eps
ROUNDING = 1000         # times EPSILON and the logits' size: what rounding may change an answer by
LOSS_ROUNDING = 32      # times EPSILON and the loss: the same for a loss, which is one number
BORDER_REACH = 8        # tokens: a head that predicts several ahead trains across a document's border by so many
ROW_LENGTH = 128        # tokens of a tiny row, at most
HEAD_DIM = 16           # of a tiny model, at most
LAYERS = 16             # of a tiny model, at most, unless the variant names a later layer
COMPILED_LAYERS = 4     # the same for the trial of the compiler, which takes a second a layer
LEARNING_STEPS = 14
TIMED_FLOPS = 3e10      # of one timed step on a CPU, about half a second on two cores: it has as many rows as fit
ROW_FLOPS = 1e11        # a row that takes more is not timed on a CPU
TIMED_SECONDS = 6.0     # how long steps are timed; every arm has one at least

# ---- Tiny models and texts --------------------------------------------------


def tiny_configs(config: Config) -> list[Config]:
    """
    Return a run's configuration shrunk to be tried, on the CPU in float32: narrow and not too deep with 256 token ids;
    with the run's own layers; with its own width; with its own token ids. The later ones are for parts that do not work
    in the smaller.
    """
    length = min(config.sequence_length, ROW_LENGTH)
    head_dim = min(config.head_dim, HEAD_DIM)

    def shrink(size: int) -> int:
        return max(4, round(size * head_dim / config.head_dim))

    def shrink_windows(sizes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(size and max(2, round(size * length / config.sequence_length)) for size in sizes)

    all_ids = dataclasses.replace(
        config,
        sequence_length=length, batch_tokens=4 * length, micro_batch_tokens=4 * length,
        window_short=shrink_windows(config.window_short), window_long=shrink_windows(config.window_long),
        vocab_size=config.padded_vocabulary, document_token=-1,
        steps=LEARNING_STEPS, time_budget=0.0,
        device="cpu", dtype="float32", compile="off",
        resume="", init_from="", save=False,
    )
    few_ids = dataclasses.replace(all_ids, vocab_size=256, bigram_rows=min(config.bigram_rows, 512))
    narrow = dataclasses.replace(few_ids, head_dim=head_dim, model_dim=shrink(config.model_dim),
                                 mlp_hidden=shrink(config.mlp_hidden))
    shallow = dataclasses.replace(narrow, layers=min(config.layers, LAYERS))
    return [shallow, narrow, few_ids, all_ids]


def build(config: Config) -> GPT:
    """Return the model with its initial tensors, on the CPU, with the windows of the beginning of a run."""
    model = train_gpt.build_model(config, ALONE)
    model.set_windows(0.0)
    return model


def awake(model: GPT) -> GPT:
    """Fill the parameters that begin at zero with random numbers, so that every part has its say. Returns the model."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.1, generator=generator)
    return model


def random_rows(config: Config, rows: int, seed: int = 0) -> Tensor:
    """
    Return (rows, T + 1) random tokens. Every row begins a document, as do its thirds, but for the last row, which is
    the middle of a document.
    """
    shape, generator = (rows, config.sequence_length + 1), torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.end_of_text, shape, generator=generator)  # the end of text is the last id
    tokens[:-1, borders(config)] = config.end_of_text
    return tokens


def borders(config: Config) -> list[int]:
    """Return where the three documents of a random row begin."""
    third = (config.sequence_length + 1) // 3
    return [0, third, 2 * third]


class Probe:
    """
    An awake model and three rows of text, to be asked what a prediction depends on. Every question begins with the same
    seed and the same buffers, so that equal questions get equal answers. training: as in a training step, else as in
    validation.
    """

    def __init__(self, model: GPT):
        self.model = awake(model)
        self.config = model.config
        if model.source is not None:  # every question is asked of the same weights
            with torch.no_grad():
                model.source.hold()
        self.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        rows = random_rows(self.config, 3)
        self.tokens = rows[:, :-1]   # (3, T)
        self.targets = rows[:, 1:]   # (3, T)
        self.other_targets = random_rows(self.config, 3, seed=1)[:, 1:]  # (3, T), what the targets are changed to

        # (3, T), what the tokens are changed to: every one is another, and documents begin elsewhere
        other = random_rows(self.config, 3, seed=2)[:, :-1].roll(self.config.sequence_length // 5, 1)
        self.other = torch.where(other == self.tokens, (other + 1) % self.config.end_of_text, other)

    def begin(self, training: bool):
        torch.manual_seed(1)
        for name, buffer in self.model.named_buffers():
            if name in self.buffers and self.buffers[name].shape == buffer.shape:
                buffer.copy_(self.buffers[name])
        self.model.train(training)
        self.model.set_windows(0.0 if training else 1.0)

    def logits(self, tokens: Tensor, training: bool = False) -> Tensor:
        """Return (B, T, vocabulary) for tokens (B, T)."""
        self.begin(training)
        with torch.set_grad_enabled(training):
            return self.model(tokens).detach()

    def loss(self, tokens: Tensor, targets: Tensor, training: bool = True) -> float:
        self.begin(training)
        with torch.set_grad_enabled(training):
            return self.model(tokens, targets).item()

    @cached_property
    def answers(self) -> dict[bool, tuple[Tensor, float]]:
        """training -> (logits of the text, how far two of equal questions may be apart)."""
        return {training: self.answer(training) for training in (False, True)}

    def answer(self, training: bool) -> tuple[Tensor, float]:
        logits = self.logits(self.tokens, training)
        noise = (self.logits(self.tokens, training) - logits).abs().max().item()
        return logits, rounding_of(logits) + 10 * noise

    def has_numbers(self, training: bool) -> bool:
        """Return whether all logits are finite."""
        return bool(self.answers[training][0].isfinite().all())

    def is_steady(self, training: bool) -> bool:
        """Return whether logits are numbers, and equal questions get equal answers but for rounding."""
        logits, tolerance = self.answers[training]
        return self.has_numbers(training) and tolerance <= 2 * rounding_of(logits)

    def changed(self, tokens: Tensor, training: bool) -> Tensor:
        """Return (3, T) bool: which predictions differ from those of the text, for tokens (3, T)."""
        logits, tolerance = self.answers[training]
        return (self.logits(tokens, training) - logits).abs().amax(-1) > tolerance

    @cached_property
    def training_loss(self) -> float:
        return self.loss(self.tokens, self.targets)

    @cached_property
    def loss_tolerance(self) -> float:
        """
        How far sums and differences of a few training losses may be from zero by rounding; infinite where the loss
        cannot be asked by targets.
        """
        loss = self.training_loss
        noise = abs(self.loss(self.tokens, self.targets) - loss)
        tolerance = LOSS_ROUNDING * EPSILON * abs(loss) + 10 * noise

        # a loss that is no sum over tokens, as one of the hardest half of them, couples targets by itself: the
        # unlikeliest targets show it best
        unlikely = self.answers[True][0].argmin(-1)
        in_first, in_others = self.targets.clone(), unlikely.clone()
        in_first[0], in_others[0] = unlikely[0], self.targets[0]
        apart = self.loss(self.tokens, in_first) + self.loss(self.tokens, in_others)
        coupling = loss + self.loss(self.tokens, unlikely) - apart
        return tolerance if abs(coupling) <= tolerance else math.inf

    def loss_depends(self, tokens: Tensor, where: Tensor) -> bool:
        """
        Return whether in training the prediction of the targets at `where` (3, T) depends on what `tokens` changes in
        the text. With L(x, y) for the loss of tokens x and targets y it asks for L(x, y) - L(x, y') - L(x', y) +
        L(x', y'): zero unless the log-probabilities of y or y' at `where` change.
        """
        targets = torch.where(where, self.other_targets, self.targets)
        before = self.training_loss - self.loss(self.tokens, targets)
        after = self.loss(tokens, self.targets) - self.loss(tokens, targets)
        return abs(after - before) > self.loss_tolerance


def rounding_of(logits: Tensor) -> float:
    """Return by how much rounding may change logits."""
    return ROUNDING * EPSILON * logits.square().mean().sqrt().item()


# ---- What must hold ---------------------------------------------------------
# Each function returns its faults, one line each: [] for a sound variant.


def number_faults(probe: Probe) -> list[str]:
    """
    Logits and losses that are no numbers; a validation that says something else the second time; a loss that is not the
    logits' cross-entropy.
    """
    faults = []
    for training in (False, True):
        if not probe.has_numbers(training):
            faults.append(f"NaN or infinite logits{mode(training)}")
        loss = probe.loss(probe.tokens, probe.targets, training)
        if not math.isfinite(loss):
            faults.append(f"the loss is {loss}{mode(training)}")
    if faults:
        return faults

    if not probe.is_steady(False):
        return ["RANDOM in evaluation: the same text and the same seed give other logits the second time"]
    logits, tolerance = probe.answers[False]
    expected = F.cross_entropy(logits.flatten(0, 1), probe.targets.flatten()).item()
    loss = probe.loss(probe.tokens, probe.targets, False)
    if abs(loss - expected) > tolerance + ROUNDING * EPSILON * expected:
        return [f"WRONG VALIDATION LOSS: with targets the model says {loss:.4f}, the cross-entropy of its own logits "
                f"is {expected:.4f}"]
    return []


def causality_faults(probe: Probe) -> list[str]:
    """Predictions that change when later tokens do."""
    T = probe.config.sequence_length
    for training in (False, True):
        for position in sorted({7, T // 2 + 1, T - 1} & set(range(1, T))):
            changed = probe.changed(change_from(probe, position), training)
            if changed[:, :position].any():
                return [looks_ahead(probe, position, changed, training)]
            if not training and not changed[:, position].any():
                return [f"BLIND: other tokens from {position} on change no prediction at {position}; is the input "
                        "used?"]

    position = T // 2 + 1
    if probe.loss_depends(change_from(probe, position), mark(probe, slice(None), slice(position))):
        return [f"LOOKS AHEAD in the training loss: changing the tokens from {position} on changes how targets before "
                f"{position} are predicted"]
    return []


def change_from(probe: Probe, position: int) -> Tensor:
    """Return the text (3, T) with other tokens from a position on."""
    return torch.cat((probe.tokens[:, :position], probe.other[:, position:]), 1)


def mark(probe: Probe, rows: int | slice, positions: slice) -> Tensor:
    """Return (3, T) bool: True at these rows and positions."""
    marks = torch.zeros_like(probe.tokens, dtype=torch.bool)
    marks[rows, positions] = True
    return marks


def looks_ahead(probe: Probe, position: int, changed: Tensor, training: bool) -> str:
    """
    Return the line for predictions before `position` that changed with the tokens from there on. It names one token, if
    one alone does it.
    """
    what, seen = f"the tokens from {position} on", changed[:, :position].any(0)
    for later in range(position, probe.config.sequence_length):
        tokens = probe.tokens.clone()
        tokens[:, later] = probe.other[:, later]
        seen_by_one = probe.changed(tokens, training)[:, :later].any(0)
        if seen_by_one.any():
            what, seen = f"token {later}", seen_by_one
            break
    return f"LOOKS AHEAD: changing {what} changes the prediction at token {first(seen)}{mode(training)}"


def document_faults(probe: Probe) -> list[str]:
    """Predictions that change when another document of the row does."""
    if not probe.config.document_mask:
        return []
    _, begin, end = borders(probe.config)
    ordinary = torch.where(probe.other == probe.config.end_of_text, 0, probe.other)
    tokens = probe.tokens.clone()
    tokens[:-1, begin + 1:end] = ordinary[:-1, begin + 1:end]  # the last row is one document
    return leaks(probe, tokens, "SEES ANOTHER DOCUMENT", f"changing the document of tokens {begin}-{end - 1} changes",
                 predictions=mark(probe, slice(-1), slice(end, None)),
                 targets=mark(probe, slice(-1), slice(end + BORDER_REACH, None)), which="targets after it")


def row_faults(probe: Probe) -> list[str]:
    """Predictions that change when another row of the batch does."""
    tokens = probe.other.clone()
    tokens[1] = probe.tokens[1]
    row = mark(probe, 1, slice(None))
    return leaks(probe, tokens, "SEES ANOTHER ROW", "changing the other rows of the batch changes",
                 predictions=row, targets=row, which="a row's targets")


def leaks(probe: Probe, tokens: Tensor, title: str, cause: str, predictions: Tensor, targets: Tensor,
          which: str) -> list[str]:
    """
    Return a line, "title: cause ...", if other `tokens` (3, T) change logits at `predictions` (3, T) or, in training,
    how the targets at `targets` (3, T), in words `which`, are predicted.
    """
    for training in (False, True):
        seen = (probe.changed(tokens, training) & predictions).any(0)
        if seen.any():
            return [f"{title}: {cause} the prediction at token {first(seen)}{mode(training)}"]
    if probe.loss_depends(tokens, targets):
        return [f"{title} in the training loss: {cause} how {which} are predicted"]
    return []


def gradient_faults(probe: Probe) -> list[str]:
    """
    Parameters that three texts, at the beginning of a run and at its end, give no gradient, and gradients that are no
    numbers. Frozen parameters are not looked at.
    """
    parameters = {name: p for name, p in probe.model.named_parameters() if p.requires_grad}
    probe.model.zero_grad()
    if probe.model.source is not None:
        probe.model.source.held = None
    for seed, progress in enumerate((0.0, 1.0, 0.0)):  # some learn at the end of a run only
        probe.begin(training=True)
        probe.model.set_windows(progress)
        rows = random_rows(probe.config, 3, seed)
        probe.model(rows[:, :-1], rows[:, 1:]).backward()
        dead = [name for name, p in parameters.items() if p.grad is None or not p.grad.any()]
        if not dead:
            break
    wrong = [name for name, p in parameters.items() if p.grad is not None and not p.grad.isfinite().all()]
    named = {"NaN or infinite gradients": wrong, "no gradient": dead}
    return [f"{fault}: {some(names)}" for fault, names in named.items() if names]


def start_faults(model: GPT) -> list[str]:
    """A validation loss at the start, of a model that is not awake, that is not within 2 % of guessing."""
    loss, ids = start_loss(model), model.config.vocab_size
    if abs(loss / math.log(ids) - 1) <= 0.02:
        return []
    return [f"the loss at the start is {loss:.3f}, guessing gives ln {ids} = {math.log(ids):.3f}"]


@torch.no_grad()
def start_loss(model: GPT) -> float:
    """Return the validation loss of one random text."""
    rows = random_rows(model.config, 4)
    return model.eval()(rows[:, :-1], rows[:, 1:]).item()


def train(model: GPT, steps: int = LEARNING_STEPS) -> dict[int, float]:
    """
    Train a new model on one random text at full learning rate. Returns steps taken -> the text's validation loss then,
    every tenth and the last.
    """
    optimizers = train_gpt.build_optimizers(model, model.config, ALONE)
    rows, losses = random_rows(model.config, 4), {}
    torch.manual_seed(1)
    for step in range(steps):
        if step % 10 == 0:
            losses[step] = start_loss(model)
        take_step(model.train(), optimizers, rows, step / steps)
    return losses | {steps: start_loss(model)}


def take_step(model: GPT, optimizers: list, rows: Tensor, progress: float):
    """Make one optimizer step on rows of tokens (n, T + 1), as the trainer makes it alone."""
    model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()).backward()
    for optimizer in optimizers:
        optimizer.step(1.0, progress)


def learning_faults(losses: dict[int, float]) -> list[str]:
    """Of the losses of train(): one that is no number or rises far above the start, or a text that is not learnt."""
    def line(fault: str, step: int) -> str:
        return (f"{fault}: the loss is {losses[step]:.3f} after {step} steps on one random text, {losses[0]:.3f} at "
                "the start")

    unstable = [step for step, loss in losses.items() if not math.isfinite(loss) or loss > 1.5 * losses[0]]
    if unstable:
        return [line("UNSTABLE", unstable[0])]
    last = max(losses)
    return [line("does not learn", last)] if losses[last] >= 0.9 * losses[0] else []


def compile_fault(model: GPT) -> str | None:
    """
    Return why what the trainer compiles of the model does not compile to one graph with the loss that it has without,
    in one line; None if it does. Changes nothing in it.
    """
    torch._dynamo.reset()
    rows = random_rows(model.config, 2)
    torch.manual_seed(1)  # of dropout
    expected = model(rows[:, :-1], rows[:, 1:]).item()
    torch.manual_seed(1)
    try:
        model.predict = torch.compile(model.predict, backend="eager", fullgraph=True, dynamic=False)
        loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()
    except Exception as error:
        return error_line(error)
    finally:
        vars(model).pop("predict", None)
        torch._dynamo.reset()
    if abs(loss.item() - expected) > ROUNDING * EPSILON * abs(expected):
        return f"the compiled model's loss is {loss.item():.6f}, without compiling {expected:.6f}"
    return None


def mode(training: bool) -> str:
    return " in training" if training else ""


def first(flags: Tensor) -> int:
    return int(flags.nonzero()[0])


def some(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


SOUNDNESS = dict(  # what is tried -> (how, what a sound variant is told)
    numbers=(number_faults, "finite; the validation loss is the cross-entropy of the logits, and the same the second "
                            "time"),
    causality=(causality_faults, "sound: no position sees a later one"),
    documents=(document_faults, "sound: no document of a row sees another"),
    rows=(row_faults, "sound: no row of a batch sees another"),
    gradients=(gradient_faults, "every parameter gets one"),
)


def faults_of(config: Config) -> list[str]:
    """
    Return what makes the runs of config.variant worthless, one line each; [] if it is sound. It tries causality,
    isolation of documents and rows, numbers and gradients at a tiny size, on the CPU, in this process, and leaves the
    trainer, random numbers and threads as they were.
    """
    with quiet():
        faults, result = attempt(lambda: try_sizes(config))
        return faults or sum(result[1].values(), [])


def try_sizes(config: Config) -> tuple[Config, dict[str, list[str]]]:
    """
    Return (the first of tiny_configs() at which the variant works, its faults there by what was tried). Raises the last
    size's error if there is none.
    """
    *smaller, last = tiny_configs(config)
    for size in smaller:
        try:
            return size, try_size(size)
        except Exception:  # it needs its own width or token ids; one that is broken at any size is so at the last, too
            continue
    return last, try_size(last)


def try_size(size: Config) -> dict[str, list[str]]:
    """
    Return what was tried -> its faults. Where logits are no numbers or not the same twice, nothing else can be tried.
    """
    faults = {}

    def try_all():
        probe = Probe(build(size))
        for name, (find_faults, _) in SOUNDNESS.items():
            faults[name] = find_faults(probe)
            if not probe.is_steady(False) or not probe.has_numbers(True):
                break

    with variants.applied(size.variant, size):
        changes = variants.observe(try_all)
    if changes:
        names = ", ".join(sorted(variants.label(*key) for key in changes))
        faults["trainer"] = [f"changes the trainer while it runs: {names}; assign in patch(options) only"]
    return faults


def attempt(action: Callable) -> tuple[list[str], object]:
    """Return ([], what action() returns), or ([the error in one line], None)."""
    try:
        return [], action()
    except Exception as error:
        return [error_line(error)], None


def error_line(error: Exception) -> str:
    """
    Return an error in one line; with its kind, and the variant's file and line if it came from there, unless it was
    raised for the user.
    """
    if isinstance(error, RunError):
        return str(error)
    return variants.blame(error) or textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...")


@contextmanager
def quiet():
    """One thread, with which tiny models are fastest, and random numbers that nobody else notices."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)


# ---- Facts ------------------------------------------------------------------


def count_parameters(config: Config) -> tuple[list[str], int, int]:
    """Return (names that config.variant changes, parameters of the model, parameters without embeddings and head)."""
    with variants.applied(config.variant, config) as changed, torch.device("meta"):
        model = train_gpt.GPT(config)
    return sorted(sum(changed.values(), [])), *train_gpt.count_parameters(model)


def measure_size(config: Config) -> dict:
    """Return what the variant replaces, and parameters and FLOPs of the run's own model."""
    replaced, parameters, without_embeddings = count_parameters(config)
    with variants.applied(config.variant, config):
        flops = train_gpt.flops_per_token(config)
    return dict(replaces=replaced, parameters=parameters, parameters_without_embeddings=without_embeddings,
                flops_per_token=flops)


def time_steps(arms: list[Config], flops_per_token: float, seconds: float) -> dict | str:
    """
    Return milliseconds of eager training steps of the arms in turn, on the run's own device at its own size, or why
    not: dict(tokens=a step's, ms=a list for each arm). A step has one micro batch, on a CPU no more rows than
    TIMED_FLOPS.
    """
    arms = [dataclasses.replace(arm, compile="off") for arm in arms]
    config = arms[0]
    ranks, T = Ranks.start(config), config.sequence_length
    if config.threads:
        torch.set_num_threads(config.threads)

    # rows of a step
    count = max(1, min(config.batch_tokens, config.micro_batch_tokens) // T)
    if ranks.device.type == "cpu":
        row_flops = flops_per_token * T
        if row_flops > ROW_FLOPS:
            return f"not timed without a GPU: one row of {T:,} tokens takes {row_flops / 1e12:,.1f} TFLOPs"
        count = min(count, max(1, int(TIMED_FLOPS // row_flops)))
    rows = torch.randint(config.vocab_size, (count, T + 1), generator=torch.Generator().manual_seed(0))
    rows = rows.to(ranks.device)

    built = []
    for arm in arms:
        with variants.applied(arm.variant, arm):
            model = train_gpt.build_model(arm, ranks)
            built.append((model, train_gpt.build_optimizers(model, arm, ranks)))
            model.set_windows(0.0)
            take_step(*built[-1], rows, 0.0)  # the first one loads code and makes threads

    times = [[] for _ in arms]
    end = time.perf_counter() + seconds
    while not times[0] or time.perf_counter() < end:
        for arm, (model, optimizers), milliseconds in zip(arms, built, times):
            with variants.applied(arm.variant, arm):
                ranks.synchronize()
                start = time.perf_counter()
                take_step(model, optimizers, rows, 0.5)
                ranks.synchronize()
            milliseconds.append(1000 * (time.perf_counter() - start))
    return dict(tokens=count * T, device=str(ranks.device), ms=times)


def examine(config: Config, seconds: float) -> dict:
    """
    Return all that is said of config.variant, as facts; steps are timed for so many seconds. faults: what is wrong,
    notes: what is good to know, one line each.
    """
    baseline = dataclasses.replace(config, variant=())
    facts = dict(variant=list(config.variant), track=config.track, vocab_size=config.vocab_size, notes=[])
    with quiet():
        facts["faults"], size = attempt(lambda: measure_size(config))
        if size is None:
            return facts
        facts |= size | dict(baseline=measure_size(baseline))
        facts["faults"], result = attempt(lambda: try_sizes(config))
        if result is None:
            return facts

        # what was tried, and more of it
        tiny, facts["tried"] = result
        facts["faults"] = sum(facts["tried"].values(), [])
        sizes = ("layers", "model_dim", "sequence_length", "vocab_size")
        facts["tiny"] = {name: getattr(tiny, name) for name in sizes}
        if tiny.model_dim != tiny_configs(config)[0].model_dim:
            facts["notes"].append(f"it does not work in a narrow model, so it was tried {tiny.model_dim} wide with "
                                  f"{tiny.vocab_size:,} token ids")
        with variants.applied(tiny.variant, tiny):
            facts["faults"] += attempt(lambda: look_closer(tiny, facts))[0]

    flops = max(facts["flops_per_token"], facts["baseline"]["flops_per_token"])
    errors, timed = attempt(lambda: time_steps([config, baseline], flops, seconds))
    facts["faults"] += errors
    if isinstance(timed, str):
        facts["notes"].append(timed)
    elif timed:
        facts["step"] = timed
    return facts


def look_closer(tiny: Config, facts: dict):
    """
    Add to facts what new tiny models with the variant applied do: the start, learning, repeating, compiling, decoding.
    """
    faults, notes = facts["faults"], facts["notes"]
    probe = Probe(build(tiny))
    if not probe.is_steady(True):
        notes.append("training is random beyond its seed, so a look ahead in training alone could not be tried")
    elif probe.loss_tolerance == math.inf:
        notes.append("the training loss is no sum over tokens, so it was not asked for a look ahead in training, its "
                     "logits were")

    # start and learning
    model = build(tiny)
    facts["loss_at_start"] = start_loss(model)
    facts["guessing"] = math.log(tiny.vocab_size)
    faults += start_faults(model)
    facts["learning"] = train(model)
    faults += learning_faults(facts["learning"])

    # repeating
    pair = [build(tiny) for _ in range(2)]
    for model in pair:
        train(model, 2)
    facts["repeats"] = all(map(torch.equal, *(model.state_dict().values() for model in pair)))
    if not facts["repeats"]:
        notes.append("not reproducible: equal seeds give other parameters after equal steps, so a resumed run is "
                     "another run")

    # compiling and decoding
    facts["not_compiled"] = try_compiler(tiny)
    if facts["not_compiled"]:
        notes.append(f"does not compile to one graph, run it with --compile off: {facts['not_compiled']}")
    from generate import decodes_from_cache  # a script: wanted here only
    facts["decodes_from_cache"] = decodes_from_cache(awake(build(tiny)).eval())
    if not facts["decodes_from_cache"]:
        notes.append("does not decode from a cache: generate.py runs the whole context for every token")


def try_compiler(tiny: Config) -> str | None:
    """Return compile_fault() of an awake model of a few layers, or of all where the variant needs more."""
    shallow = dataclasses.replace(tiny, layers=min(tiny.layers, COMPILED_LAYERS))
    try:
        variants.plan(tiny.variant, shallow)
        return compile_fault(awake(build(shallow)))
    except RunError:
        return compile_fault(awake(build(tiny)))


# ---- The report -------------------------------------------------------------


def report_lines(facts: dict) -> list[str]:
    """Return the report of examine() for a person."""
    lines = {"variant": f"{' + '.join(facts['variant']) or 'baseline'} on track {facts['track']}"}
    if "baseline" in facts:
        amounts = {name: f"{facts[name]:,.0f} ({against_baseline(facts, name)})"
                   for name in ("parameters", "parameters_without_embeddings", "flops_per_token")}
        lines["replaces"] = ", ".join(facts["replaces"]) or "nothing"
        lines["parameters"] = (f"{amounts['parameters']}, without embeddings and head "
                               f"{amounts['parameters_without_embeddings']}")
        lines["FLOPs"] = f"{amounts['flops_per_token']} a token"
    if "tried" in facts:
        tiny = facts["tiny"]
        lines["tried with"] = (f"{tiny['layers']} layers, {tiny['model_dim']} wide, rows of {tiny['sequence_length']} "
                               "tokens, in evaluation and training")
        for name, faults in facts["tried"].items():
            lines[name] = "; ".join(faults) or SOUNDNESS[name][1]

    # of a closer look, which an error may have ended
    if "loss_at_start" in facts:
        lines["at start"] = (f"loss {facts['loss_at_start']:.4f}, ln {facts['tiny']['vocab_size']} = "
                             f"{facts['guessing']:.4f}")
    if "learning" in facts:
        steps, loss = max(facts["learning"].items())
        lines["learning"] = f"loss {facts['learning'][0]:.3f} -> {loss:.3f} in {steps} steps on one random text"
    if "repeats" in facts:
        lines["repeats"] = "bit for bit with equal seeds" if facts["repeats"] else "not with equal seeds"
    if "not_compiled" in facts:
        lines["compiles"] = "not to one graph" if facts["not_compiled"] else "to one graph"
    if "decodes_from_cache" in facts:
        lines["decodes"] = "from a cache" if facts["decodes_from_cache"] else "without a cache"

    if "step" in facts:
        arms, step = facts["step"]["ms"], facts["step"]
        variant, baseline = map(statistics.median, arms)
        spreads = " and ".join(f"{min(times):.0f}-{max(times):.0f}" for times in arms)
        lines["step"] = (f"{variant:.1f} ms beside {baseline:.1f} ({slower(facts)}); medians of {len(arms[0])} in "
                         f"turn, {spreads}; {step['tokens']:,} tokens, eager, {step['device']}")

    rows = list(lines.items())
    rows += [("note", note) for note in facts["notes"]]
    rows += [("fault", fault) for fault in facts["faults"]]
    rows.append(("verdict", "not sound" if facts["faults"] else "sound"))
    return [f"{title:<11} {text}" for title, text in rows]


def percent(value: float, base: float) -> str:
    return f"{100 * (value / base - 1):+.1f} %"


def against_baseline(facts: dict, name: str) -> str:
    return percent(facts[name], facts["baseline"][name])


def slower(facts: dict) -> str:
    """
    Return how much longer a step takes than the baseline's: the median over pairs of steps taken in turn, and the least
    and the most of them.
    """
    ratios = [variant / baseline for variant, baseline in zip(*facts["step"]["ms"])]
    return f"{percent(statistics.median(ratios), 1.0)}, {percent(min(ratios), 1.0)} to {percent(max(ratios), 1.0)}"


def table_row(facts: dict) -> tuple[str, ...]:
    """Return a variant's line in the table of all."""
    sizes = [against_baseline(facts, name) if name in facts else "" for name in ("parameters", "flops_per_token")]
    step = slower(facts) if "step" in facts else ""
    verdict = "; ".join(facts["faults"]) or "; ".join(["sound", *facts["notes"]])
    return facts["variant"][0], *sizes, step, verdict


def parse_run(spec: str, track: str, options: list[str]) -> Config:
    """Return the configuration that is checked. RunError for what the trainer or the loader refuses."""
    variant = [] if spec == "baseline" else ["--variant", spec]
    config = train_gpt.parse_config(["--track", track, *options, *variant])
    try:
        train_gpt.adopt_vocabulary(config)
    except RunError:  # without its data: that of bytes or of GPT-2
        config.vocab_size = 257 if config.data == Config.data else 50257
    return config


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0 sound, 1 with faults."""
    parser = argparse.ArgumentParser(prog="variants.check", description=inspect.getdoc(sys.modules[__name__]),
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", help="NAME[:options], several joined by +, baseline, or all")
    parser.add_argument("--track", default=Config.track, help="the track whose model is checked (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print facts as JSON instead of words")
    arguments, rest = parser.parse_known_args(argv)
    options = [word for text in rest for word in shlex.split(text)]
    sys.stdout.reconfigure(errors="replace")  # a console that lacks a letter shows the others
    try:
        if arguments.variant == "all":
            return check_all(arguments.track, options, arguments.json)
        facts = examine(parse_run(arguments.variant, arguments.track, options), TIMED_SECONDS)
    except RunError as error:
        say(f"variants.check: error: {error}", stream=sys.stderr)
        return 1
    say(as_json(facts) if arguments.json else "\n".join(report_lines(facts)))
    return int(bool(facts["faults"]))


def as_json(facts: dict | list) -> str:
    """Return facts as JSON, in which a number that is none is null."""
    return json.dumps(json.loads(json.dumps(facts), parse_constant=lambda name: None), indent=1)


def check_all(track: str, options: list[str], json_wanted: bool) -> int:
    """Check every variant and print a line for each as soon as it is known, or all facts in one JSON list."""
    names, everything = variants.available(), []
    width = max(map(len, names))

    def show(cells: tuple[str, ...]):
        name, parameters, flops, step, verdict = cells
        if not json_wanted:
            say(f"{name:<{width}}  {parameters:>10}  {flops:>8}  {step:>28}  {verdict}")

    show(("variant", "parameters", "FLOPs", "ms", "verdict"))
    for name in names:
        faults, facts = attempt(lambda name=name: examine(parse_run(name, track, options), TIMED_SECONDS / 2))
        everything.append(facts or dict(variant=[name], track=track, notes=[], faults=faults))
        show(table_row(everything[-1]))
    if json_wanted:
        say(as_json(everything))
    return int(any(facts["faults"] for facts in everything))


if __name__ == "__main__":
    from variants.check import main as run_main  # the one module, by name

    sys.exit(run_main())
