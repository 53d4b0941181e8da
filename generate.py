"""
Text from a checkpoint of any variant.

    python generate.py --checkpoint logs/RUN.pt --prompt "def main("             to the terminal, as it comes
    python generate.py --checkpoint last --prompt-file story.txt --tokens 2000 --temperature 0.8 --top-p 0.95 --seed 7
    python generate.py --checkpoint RUN --prompt "import" --batch 4 --bins 256   four texts; topological attention
                                                                                 with a state of fixed size
    python generate.py --checkpoint logs/RUN.pt --export DIR                     model.safetensors, config.json and
                                                                                 the tokenizer's files

- A checkpoint is a run's .pt file, a run's id or the beginning of one, `last`, or a folder that --export made. Nothing
  in it is executed. Where the code of a module has changed since the training, a line on stderr names it.
- Every layer keeps what later tokens need: softmax attention its keys and values, latent attention with decoupled
  positions its latents, topological attention coordinates and values or, with --bins, a state of fixed size, forgetting
  attention its sums besides. A model whose parts cannot go on from that is found out by a trial against the whole
  forward pass and then runs all of its context for every token; a line on stderr says so.
- A token sees --context tokens back (default: the row length of the training). A longer text goes on without what
  lies further back. What does not fit in memory is refused before it is allocated.
- Sampling: softmax of logits / temperature (0: the likeliest token), among the --top-k likeliest, then among the fewest
  that together have --top-p. A document's end ends a text, unless --endless.
- An exported folder holds every tensor once, however many names it has, and its config.json the SHA-256 of all files
  and of itself; both are checked when it is read.
- Exit code 1 and one line for a fault, 130 when interrupted, 141 when nobody reads the output any more (| head).
"""

import argparse
import codecs
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import train_gpt  # isort: skip  before torch: it sets how long PyTorch's waiting threads spin
import torch
import torch.nn.functional as F
from torch import Tensor

import variants
from data.command_line import Parser, check_limits, run_script
from data.tokenizer import build_encoder, load_merges
from kernels.topological_attention.cache import TokenBuffer, hidden_keys
from train_gpt import (
    GPT,
    AttentionContext,
    AttentionMask,
    Config,
    Ranks,
    RunError,
    changed_sources,
    check_value,
    config_from,
    digest_of,
    find_checkpoint,
    memory_of_machine,
    read_checkpoint,
    read_json,
    read_meta,
    require,
    sha256_of_file,
)

TRIAL = (40, 1, 1, 22)  # tokens of the trial, in steps
TRIAL_ERROR = 1e-3      # how far its logits may be from those of the whole pass, relative to their RMS

# ---- Decoding ---------------------------------------------------------------


class LayerCache:
    """What one layer keeps of earlier tokens. Its attention finds it as ctx.mask.cache."""

    def __init__(self, context: int, bins: int = 0):
        self.context = context  # most tokens that softmax attention sees back
        self.bins = bins        # of topological attention's state, which has no such limit; 0: exact
        self.parts = {}         # name -> a memory, see part()
        self.length = 0         # tokens that attend() has seen

    def part(self, name: str, make: Callable):
        """The layer's memory of that name, made at its first use; it has .bytes_kept."""
        if name not in self.parts:
            self.parts[name] = make()
        return self.parts[name]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> Tensor:
        """train_gpt.attend for the new tokens q (B, t, H, D), k and v (B, t, G, D), over the earlier ones too."""
        t = q.shape[1]
        keys, values = self.keep(mask, keys=k.transpose(1, 2), values=v.transpose(1, 2))
        if self.is_whole(mask, t):
            return train_gpt.attend(q, k, v, replace(mask, cache=None), scale)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=self.seen(mask, t, keys),
                                           scale=scale, enable_gqa=q.shape[2] != k.shape[2])
        return y.transpose(1, 2)

    def keep(self, mask: AttentionMask, **new: Tensor) -> list[Tensor]:
        """
        Keep what attention needs of the new tokens, name=tensor (B, H, t, ..); returns of each name what there is of
        these tokens and of as many before them as the mask sees.
        """
        kept = []
        for name, tensor in new.items():
            buffer = self.part(name, TokenBuffer)
            buffer.keep((mask.window or self.context) - 1)
            buffer.append(tensor)
            kept.append(buffer.tokens)
        self.length += tensor.shape[2]
        return kept

    def is_whole(self, mask: AttentionMask, t: int) -> bool:
        """Whether the t tokens that were kept last are all of the text, and attend as in training."""
        return self.length == t and (mask.first_key is None or mask.stretches is not None)

    def seen(self, mask: AttentionMask, t: int, kept: Tensor) -> Tensor | None:
        """Which of the tokens kept (B, H, n, ..) the last t of them see, (B or 1, 1, t, n) bool; None: all."""
        hidden = hidden_keys(mask.first_key, self.length - kept.shape[2], t, self.length)
        return None if hidden is None else ~hidden[:, None].to(kept.device)

    def of_pass(self, number: int) -> "LayerCache":
        """What a layer that runs several times keeps in its pass of this number, from 0 on."""
        if number == 0:
            return self
        return self.part(f"pass {number}", lambda: LayerCache(self.context, self.bins))

    def running_sum(self, x: Tensor) -> Tensor:
        """x (B, t, H) -> its sum over all tokens so far, at each of the new ones."""
        before = self.part("sum", TokenBuffer)
        total = x.cumsum(1) if before.data is None else x.cumsum(1) + before.tokens.transpose(1, 2)
        before.keep(0)
        before.append(total[:, -1:].transpose(1, 2))
        return total

    def with_earlier(self, x: Tensor, count: int, name: str = "inputs") -> Tensor:
        """
        x (B, t, C) -> (B, count + t, C): the `count` inputs before the new ones, zeros where there are none, then x.
        name: of the memory, where a layer has several.
        """
        before = self.part(name, TokenBuffer)
        earlier = x.new_zeros(x.shape[0], count, x.shape[2]) if before.data is None else before.tokens[:, 0]
        joined = torch.cat((earlier, x), 1)
        before.keep(0)
        before.append(joined[:, None, -count:])
        return joined

    @property
    def bytes_kept(self) -> int:
        return sum(part.bytes_kept for part in self.parts.values())


class Decoder:
    """A model that goes on with B rows of tokens: feed() takes the next ones, whole rows first."""

    def __init__(self, model: GPT, context: int, bins: int = 0, cached: bool = True):
        self.model = model
        self.context = context  # how many tokens each one sees back, itself included
        self.cached = cached    # by what the layers keep; else all of the last `context` tokens run anew
        self.caches = [LayerCache(context, bins) for _ in model.blocks]
        self.length = 0         # tokens so far, of a row
        self.tokens = None      # (B, n) int32: the last one, without caches the last `context`; None at first
        self.doc_start = None   # (B,) int32: where the document of the last token begins; None at first

    @torch.no_grad()
    def feed(self, tokens: Tensor) -> Tensor:
        """The next tokens (B, t) -> logits (B, vocabulary) of what follows the last one, float32."""
        tokens = tokens.to(self.model.embedding.weight.device)
        joined = tokens if self.tokens is None else torch.cat((self.tokens, tokens), 1)
        if self.cached:
            return self._step(tokens, joined)
        self.tokens = joined[:, -self.context:]
        return self.model(self.tokens)[:, -1]

    def _step(self, tokens: Tensor, joined: Tensor) -> Tensor:
        """feed() by the caches. joined: the tokens and, as an embedding reads it, the one before them."""
        model = self.model
        start, t = self.length, tokens.shape[1]
        index = torch.arange(start, start + t, device=tokens.device, dtype=torch.int32)

        # where each token's document begins
        doc_start = torch.zeros_like(tokens)
        if model.config.document_mask:
            doc_start = torch.where(tokens == model.config.end_of_text, index, 0)
        if start:
            doc_start[:, 0] = torch.maximum(doc_start[:, 0], self.doc_start)
        doc_start = doc_start.cummax(1).values.int()

        # which keys each token sees
        if not start and t <= self.context:
            masks = [replace(mask, window=window) for mask, window in zip(model.masks(tokens), self._windows())]
        else:
            masks = [self._mask(doc_start, index, window) for window in self._windows()]

        # the new tokens through the model
        overlap = joined.shape[1] - t
        x, contexts = model.embed(joined, masks, start - overlap)
        contexts = [self._of_new(ctx, cache, overlap) for ctx, cache in zip(contexts, self.caches)]
        x = model.run_blocks(x[:, overlap:], contexts)
        self.length = start + t
        self.tokens = tokens[:, -1:]
        self.doc_start = doc_start[:, -1]
        return model.head(model.final_norm(model.select_outputs(x)[:, -1:]))[:, 0]

    def _of_new(self, ctx: AttentionContext, cache: LayerCache, overlap: int) -> AttentionContext:
        """A layer's context of the new tokens alone, without the `overlap` before them, and with the layer's cache."""
        rotary = None if ctx.rotary is None else tuple(table[overlap:] for table in ctx.rotary)
        value = None if ctx.value is None else ctx.value[:, overlap:]
        return AttentionContext(replace(ctx.mask, cache=cache), rotary, ctx.x0[:, overlap:], value)

    def _windows(self) -> Iterator[int | None]:
        """The window of each layer, at most the context; None for a state of fixed size, which forgets nothing."""
        for layer, cache in enumerate(self.caches):
            window = self.model.window(layer)
            if window:
                yield min(window, self.context)
            else:
                yield None if cache.bins else self.context

    def _mask(self, doc_start: Tensor, index: Tensor, window: int | None) -> AttentionMask:
        """The mask of tokens at these indices (t,) whose documents begin at doc_start (B, t)."""
        first_key = doc_start if window is None else torch.maximum(doc_start, index - (window - 1))
        return AttentionMask(doc_start, index - doc_start, window, first_key)

    @property
    def bytes_kept(self) -> int:
        """Of all layers' caches."""
        return sum(cache.bytes_kept for cache in self.caches)


@torch.no_grad()
def decodes_from_cache(model: GPT) -> bool:
    """
    Whether a short random text gives the same logits by what the layers keep, in several steps, as by the whole forward
    pass.
    """
    # the whole pass
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (2, sum(TRIAL)), generator=generator, dtype=torch.int32)
    logits = model(tokens.to(model.embedding.weight.device))

    # the same in steps
    decoder, end = Decoder(model, sum(TRIAL)), 0
    try:
        for count in TRIAL:
            end += count
            expected, got = logits[:, end - 1], decoder.feed(tokens[:, end - count:end])
            error = (got - expected).square().mean().sqrt()
            if not error <= TRIAL_ERROR * expected.square().mean().sqrt().clamp_min(TRIAL_ERROR):
                return False
    except (TypeError, AttributeError, RuntimeError):  # of a part with other arguments, or one that expects whole rows
        return False
    return True


# ---- Sampling ---------------------------------------------------------------


def choose(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    """A token for each row of logits (B, V) -> (B,) int64 on the CPU. RunError for logits that are no numbers."""
    # without a choice, or among all
    logits = logits.float().cpu()
    highest = logits.amax(-1, keepdim=True)
    require(highest.isfinite().all(),
            "the model's logits are infinite or no numbers; give a checkpoint of a run that learnt")
    if temperature == 0:
        return logits.argmax(-1)
    logits = (logits - highest) / max(temperature, 1e-30)  # below that a float32 quotient would be infinity times zero
    if not top_k and top_p == 1:
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]

    # among the likeliest
    logits, order = logits.sort(-1, descending=True)
    if top_k:
        logits, order = logits[:, :top_k], order[:, :top_k]
    probability = logits.softmax(-1)
    before = probability.cumsum(-1) - probability
    probability = probability.masked_fill(before >= top_p, 0)  # the first always stays
    return order.gather(1, torch.multinomial(probability, 1, generator=generator))[:, 0]


def sample(decoder: Decoder, prompt: Tensor, count: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
           seed: int = 1) -> Iterator[Tensor]:
    """Prompt (B, T) -> `count` times the next tokens (B,) int64, each as soon as it is chosen."""
    generator = torch.Generator().manual_seed(seed)
    logits = decoder.feed(prompt)
    for number in range(count):
        tokens = choose(logits, temperature, top_k, top_p, generator)
        yield tokens
        if number + 1 < count:
            logits = decoder.feed(tokens[:, None].int())


# ---- Text -------------------------------------------------------------------


class Tokenizer:
    """Text to tokens and back."""

    def __init__(self, merges: dict[bytes, int] | None):
        self.merges = merges                       # {token's bytes: id}; None: tokens are bytes
        self.encode_texts = build_encoder(merges)
        self.pieces = [bytes([n]) for n in range(256)] if merges is None else sorted(merges, key=merges.get)

    @classmethod
    def of(cls, folder: Path, config: Config) -> "Tokenizer":
        """
        That of a data folder, or of an exported model's. RunError if there is none, or if the model has another
        vocabulary.
        """
        # the merges
        remedy = "give --data the folder of the training shards"
        meta = read_meta(folder)
        name = meta.get("tokenizer") if meta else {257: "bytes", 50257: "gpt2"}.get(config.vocab_size, "")
        check_value(str, name, f"{folder / 'meta.json'}: tokenizer", None)
        files = sorted(folder.glob("*.tiktoken"))
        require(files or name in ("bytes", "gpt2"), f"no tokenizer of {config.vocab_size} ids for text in {folder} "
                f"(its name there: {name or 'none'}); give --data a folder that has its .tiktoken file")
        tokenizer = cls(load_merges(str(files[0]) if files else name))

        # do they fit the model?
        least = len(tokenizer.pieces) + 1  # the document's end, which has no text
        most = -(-least // 128) * 128  # a vocabulary may be padded to whole matrix units
        require(least <= config.vocab_size <= most,
                f"the model has {config.vocab_size} token ids and the tokenizer in {folder} {least}; {remedy}")
        return tokenizer

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in self.encode_texts([text if self.merges else text.encode()])[0]]

    def text_of(self) -> Callable[[int], str]:
        """
        A function of one token after another that returns what can be shown so far: a character's bytes may lie in
        several tokens.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: decoder.decode(self.pieces[token]) if token < len(self.pieces) else ""


# ---- Checkpoints ------------------------------------------------------------

WEIGHTS = "model.safetensors"
SETTINGS = "config.json"
FORMAT = "knotgpt-1"
UNFINISHED = ".export-"  # the beginning of a folder that an export fills
AGAIN = "export the model again, or give a run's .pt file"


def read_model(path: str) -> dict:
    """
    A checkpoint's contents, from a .pt file or an exported folder: config, model (name -> tensor) and, where it is
    known, sources. RunError, one line, if it is neither or damaged; nothing in it is executed.
    """
    require(Path(path).is_dir() or Path(path).is_file() or not Path(path).exists(),
            f"{path} is neither a file nor a folder; give a .pt file, or a folder that --export made")
    saved = read_export(Path(path)) if Path(path).is_dir() else read_checkpoint(path)
    tensors = saved.get("model")
    require(isinstance(tensors, dict) and all(isinstance(tensor, Tensor) for tensor in tensors.values()),
            f"{path}: its model is no set of tensors; give another checkpoint")
    for name, tensor in tensors.items():
        require(tensor.layout == torch.strided,
                f"{path}: tensor {name} is {tensor.layout}, not dense; give another checkpoint")
        require(not tensor.is_floating_point() or tensor.isfinite().all(), f"{path}: tensor {name} holds numbers that "
                "are infinite or none; give a checkpoint of a run that learnt")
    return saved


def read_export(folder: Path) -> dict:
    """
    An exported folder's config, model and sources; checked: whether it has checksums, which older ones lack. RunError
    where they do not hold, and for anything else in the folder that is not as --export writes it.
    """
    # the settings
    origin = folder / SETTINGS
    require(origin.is_file(), f"{folder} has no {SETTINGS}; give a folder that --export made, or a .pt file")
    settings = read_json(origin, AGAIN)
    require(settings.get("format") == FORMAT,
            f"{origin} is none that --export wrote; give another folder, or a .pt file")
    old = settings.keys() == {"format", "config"}  # as written before there were checksums
    digest = settings.pop("sha256", None)
    require(old or digest == digest_of(settings), f"{origin} is damaged, its checksum does not hold; {AGAIN}")
    for name in () if old else ("sources", "shared", "files"):
        words = settings.get(name)
        require(isinstance(words, dict) and all(isinstance(word, str) for word in words.values()),
                f"{origin}: {name} must be an object of texts, got {words!r:.60}; {AGAIN}")

    # the files
    files = settings.get("files", {})
    require(old or WEIGHTS in files, f"{origin} names no checksum of {WEIGHTS}; {AGAIN}")
    for name, expected in files.items():
        try:
            require((folder / name).is_file(), f"{folder} has no {name}; {AGAIN}")
            held = sha256_of_file(folder / name) == expected
        except OSError as error:
            raise RunError(f"cannot read {folder / name}: {error.strerror}; {AGAIN}") from None
        require(held, f"{folder / name} is damaged, its checksum does not hold; {AGAIN}")
    strange = {path.name for path in (folder / "meta.json", *folder.glob("*.tiktoken")) if path.exists()} - files.keys()
    require(old or not strange, f"{folder} holds {', '.join(sorted(strange))}, which --export did not write; {AGAIN}")

    # the tensors, a shared one under all of its names
    tensors = read_tensors(folder / WEIGHTS)
    shared = settings.get("shared", {})
    for name, first in shared.items():
        require(first in tensors and name not in tensors, f"{origin}: {name} cannot share {first}; {AGAIN}")
    tensors |= {name: tensors[first] for name, first in shared.items()}
    return dict(config=settings.get("config"), model=tensors, sources=settings.get("sources", {}), checked=not old)


def import_safetensors():
    """The module safetensors.torch. RunError where it is not installed."""
    try:
        import safetensors.torch
    except ImportError:
        raise RunError("exported models need the package safetensors; install it: pip install safetensors") from None
    return safetensors


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. RunError for any other."""
    library = import_safetensors()
    require(path.is_file(), f"{path.parent} has no {path.name}; {AGAIN}")
    try:
        return library.torch.load_file(path)
    except (library.SafetensorError, OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise RunError(f"{path} is no whole file of tensors ({type(error).__name__}); {AGAIN}") from None


def share_tensors(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Name -> tensor -> ({name: tensor}, every tensor once, under its first name; {other name: that first name})."""
    first, shared = {}, {}
    names = {}  # a tensor's memory and form -> its first name
    for name, tensor in tensors.items():
        memory = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and memory in names:
            shared[name] = names[memory]
        else:
            first[name] = tensor
            names[memory] = name
    return first, shared


def export(saved: dict, config: Config, folder: Path, checkpoint: Path, tokenizer_folder: Path):
    """
    model.safetensors, each tensor once, the tokenizer's files where there are any, and, last, config.json with what
    each tensor's other names are and the checksums of all. RunError if `folder` holds anything but an earlier export.
    """
    # what the folder may hold, and what goes there
    folder, source = folder.resolve(), checkpoint.resolve()
    require(folder != source and folder not in source.parents,
            f"--export {folder} is the checkpoint's own folder; give another one")
    tokenizer_files = sorted(path for path in (tokenizer_folder / "meta.json", *tokenizer_folder.glob("*.tiktoken"))
                             if path.is_file())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        present = {path.name for path in folder.iterdir() if not path.name.startswith(UNFINISHED)}
        earlier = {name for name in present if name in (SETTINGS, WEIGHTS, "meta.json") or name.endswith(".tiktoken")}
        others = ", ".join(sorted(present - earlier or present))
        require(not present or present == earlier and earlier >= {SETTINGS, WEIGHTS}, f"--export {folder} holds other "
                f"files ({others[:80]}); give a new folder, an empty one or that of an earlier export")
        contents = {path.name: path.read_bytes() for path in tokenizer_files}

        # the weights, and what is said of all
        tensors, shared = share_tensors(saved["model"])
        contents[WEIGHTS] = import_safetensors().torch.save(
            {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()})
        settings = dict(format=FORMAT, config=asdict(config), sources=saved.get("sources", {}), shared=shared,
                        files={name: hashlib.sha256(content).hexdigest() for name, content in contents.items()})
        settings = json.loads(json.dumps(settings))  # as it will be read: lists for tuples
        contents[SETTINGS] = json.dumps(settings | dict(sha256=digest_of(settings)), indent=1).encode() + b"\n"

        # all files under another name first: where the disk is full, an earlier export stays as it is
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder) as unfinished:
            for name, content in contents.items():
                train_gpt.write_atomically(Path(unfinished, name), lambda file, content=content: file.write(content))
            for name in contents:
                os.replace(Path(unfinished, name), folder / name)
        for name in earlier - contents.keys():
            (folder / name).unlink()
    except OSError as error:
        raise RunError(f"cannot export to {folder}: {error.strerror}; choose another folder") from None


def load_model(saved: dict, config: Config, ranks: Ranks, path: str) -> GPT:
    """
    The model of a checkpoint's contents, ready for use; its variants must be applied. RunError, one line, unless its
    tensors are those of the model that its settings describe, by name, shape and dtype.
    """
    with torch.device("meta"):
        expected = train_gpt.GPT(config).state_dict()
    tensors = saved["model"]
    fault = f"{path} does not fit the model that its settings describe"
    for title, names in (("lacks", expected.keys() - tensors), ("has besides", tensors.keys() - expected)):
        require(not names, f"{fault}: it {title} {', '.join(sorted(map(str, names))[:3])} ({len(names)} in all)")
    for name, tensor in expected.items():
        got = tensors[name]
        require(got.shape == tensor.shape and got.dtype == tensor.dtype, f"{fault}: {name} is {tuple(got.shape)} "
                f"{got.dtype}, the model's {tuple(tensor.shape)} {tensor.dtype}")
    return train_gpt.trained_model(saved, config, ranks)


def warn(saved: dict, path: Path):
    """Say on stderr what a checkpoint's contents leave in doubt."""
    if not saved.get("checked", True):
        print(f"warning: {path} is an older export, without checksums: damage in it cannot be seen; export it again",
              file=sys.stderr)
    changed = changed_sources(saved)
    if changed:
        print(f"warning: since {path} was trained, the code of {', '.join(changed)} has changed; what it computes may "
              "be another thing now", file=sys.stderr)


def start_alone(config: Config) -> Ranks:
    """This process alone, whatever the environment says of ranks."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    return Ranks.start(config)


# ---- Memory -----------------------------------------------------------------


def bytes_needed(model: GPT, context: int, bins: int, cached: bool, batch: int, prompt: int, count: int) -> int:
    """
    The least that `batch` texts of `count` tokens after a prompt of `prompt` tokens need: the weights, what the layers
    keep at the end, the logits and their probabilities, the streams of the longest pass and the texts. What a layer
    keeps of a token is measured on two short rows.
    """
    # the weights, the logits and the texts
    config, longest = model.config, min(context, prompt + count)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    texts = 4 * prompt + (count if batch > 1 else 0)
    total = weights + batch * (3 * 4 * config.vocab_size + texts)
    width = (config.model_dim + config.mlp_hidden) * model.dtype.itemsize
    if not cached:
        return total + batch * longest * (width + 2 * 4 * config.vocab_size)

    # what the layers keep: so much at first, and so much of each token
    kept = []  # bytes of every layer after 16 tokens and after 32
    for length in (16, 32):
        decoder = Decoder(model, max(context, 32), bins)
        try:
            decoder.feed(torch.zeros(1, length, dtype=torch.int32))
        except ValueError as error:  # of a layer with a window, which a state cannot have
            raise RunError(f"--bins {bins}: {error}") from None
        kept.append([cache.bytes_kept for cache in decoder.caches])
    require(not bins or any(few == more for few, more in zip(*kept)),
            f"--bins {bins}: no layer of this model can keep a state of fixed size; leave --bins out")
    for layer, (few, more) in enumerate(zip(*kept)):
        token = (more - few) / 16
        total += int(batch * (few - 16 * token + token * min(longest, model.window(layer) or longest)))
    return total + batch * prompt * width


# ---- The command ------------------------------------------------------------

LIMITS = dict(tokens=(1, 10 ** 9), temperature=(0.0, 1e6), top_k=(0, 65_536), top_p=(1e-6, 1.0),
              seed=train_gpt.RANGES["seed"], batch=(1, 2 ** 20), context=(0, 2 ** 24), bins=(0, 65_536))
MOST_PROMPT = 2 ** 26  # bytes of a prompt


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options of a command line. RunError for a value outside of its range, and for two that exclude each other."""
    options = build_parser().parse_args(argv)
    check_limits(options, LIMITS)
    require(options.bins != 1, "--bins must be at least 2, or 0 for none, got 1")
    require(not (options.bins and options.no_cache),
            "--bins is a way to keep earlier tokens, which --no-cache forbids; leave one out")
    require(options.prompt is None or options.prompt_file is None, "give --prompt or --prompt-file, not both")
    return options


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="generate.py", description=__doc__)
    where = parser.add_argument_group("where the model comes from")
    where.add_argument("--checkpoint", required=True, metavar="RUN",
                       help="a run's .pt file, its id, the beginning of its id, `last`, or a folder that --export made")
    where.add_argument("--log-dir", default=Config.log_dir, metavar="DIR", help="folder of runs (default: %(default)s)")
    where.add_argument("--data", default="", metavar="DIR",
                       help="folder with the tokenizer (default: the training's data)")
    where.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(default: %(default)s)")

    say = parser.add_argument_group("what to say")
    say.add_argument("--prompt", metavar="TEXT", help="what the text begins with")
    say.add_argument("--prompt-file", type=Path, metavar="FILE", help="file with it, UTF-8")
    say.add_argument("--tokens", type=int, default=256, metavar="N",
                     help="tokens of each text after the prompt (default: %(default)s)")
    say.add_argument("--batch", type=int, default=1, metavar="N", help="texts from one prompt (default: %(default)s)")
    say.add_argument("--endless", action="store_true", help="go on after a document's end")

    how = parser.add_argument_group("how to sample")
    how.add_argument("--temperature", type=float, default=1.0, metavar="T",
                     help="divides the logits; 0: the likeliest token (default: %(default)s)")
    how.add_argument("--top-k", type=int, default=0, metavar="K",
                     help="among so many likeliest tokens; 0: all (default: %(default)s)")
    how.add_argument("--top-p", type=float, default=1.0, metavar="P",
                     help="among the fewest tokens of this probability (default: %(default)s)")
    how.add_argument("--seed", type=int, default=1, help="of the samples (default: %(default)s)")
    how.add_argument("--context", type=int, default=0, metavar="N",
                     help="tokens that each one sees back; 0: the training's row length (default: %(default)s)")
    how.add_argument("--bins", type=int, default=0, metavar="N",
                     help="topological attention by a state of so many bins; 0: exact (default: %(default)s)")
    how.add_argument("--no-cache", action="store_true", help="run the whole context for every token")

    output = parser.add_argument_group("output (default: the text to the terminal)")
    output.add_argument("--export", type=Path, metavar="DIR", help="write the model there instead")
    return parser


def read_prompt(options: argparse.Namespace) -> str:
    """The text to begin with. RunError for none, and for bytes that are not UTF-8."""
    source = options.prompt_file or "--prompt"
    try:
        if options.prompt_file is None:
            content = (options.prompt or "").encode("utf-8", "surrogateescape")  # as typed, in whatever locale
        else:
            with open(source, "rb") as file:
                content = file.read(MOST_PROMPT + 1)
        text = content.decode("utf-8")
    except OSError as error:
        raise RunError(f"cannot read {source}: {error.strerror}; give a text file") from None
    except ValueError:
        raise RunError(f"cannot read {source} as UTF-8; give a text in UTF-8") from None
    require(len(content) <= MOST_PROMPT, f"{source} has more than {MOST_PROMPT:,} bytes; give a shorter prompt")
    require(text, "the prompt is empty; give --prompt TEXT or --prompt-file FILE")
    return text


def data_folder(name: str) -> Path:
    """A folder of shards by its name; a relative one that is not here is looked for beside the trainer."""
    return Path(name) if Path(name).is_dir() else Path(train_gpt.__file__).resolve().parent / name


def generate(options: argparse.Namespace):
    """Print the texts that a command line asks for, or export its model."""
    # the checkpoint
    path = find_checkpoint(options.checkpoint, options.log_dir)
    saved = read_model(str(path))
    config = config_from(saved.get("config"), str(path))
    data = data_folder(options.data or (str(path) if path.is_dir() else config.data))
    require(not options.data or data.is_dir(), f"--data {options.data} is no folder; give that of the training shards")
    if options.export:
        export(saved, config, options.export, path, data)
        warn(saved, path)
        numbers = sum(tensor.numel() for tensor in share_tensors(saved["model"])[0].values())
        print(f"{options.export}: {numbers:,} numbers")
        return

    # the prompt and the model
    tokenizer = Tokenizer.of(data, config)
    text = read_prompt(options)
    tokens = [config.end_of_text, *tokenizer.encode(text)]
    config = replace(config, compile="off", device=options.device)
    ranks = start_alone(config)
    variants.apply(config.variant, config)
    model = load_model(saved, config, ranks, str(path))

    # the decoder
    context = options.context or config.sequence_length
    require(len(tokens) <= context, f"the prompt has {len(tokens):,} tokens and the model sees {context:,} back; "
            f"give a shorter one or --context {len(tokens)}")
    cached = not options.no_cache and decodes_from_cache(model)
    require(cached or not options.bins, "--bins: a part of this model keeps nothing for later tokens; leave --bins out")
    needed = bytes_needed(model, context, options.bins, cached, options.batch, len(tokens), options.tokens)
    memory = memory_of_machine(ranks)
    require(needed <= memory, f"the model and these texts need at least {needed:,} bytes of memory, and there are "
            f"{memory:,}; lower --batch, --context or --tokens")
    warn(saved, path)
    if not cached:
        reason = "" if options.no_cache else ": a part of this model keeps nothing for later tokens"
        print(f"generate.py: every token runs the whole context{reason}", file=sys.stderr)
    decoder = Decoder(model, context, options.bins, cached)

    # the texts
    start = time.perf_counter()
    end_of_text = None if options.endless else config.end_of_text
    count = say_texts(decoder, tokenizer, text, tokens, end_of_text, options)
    seconds = time.perf_counter() - start
    print(f"{count:,} tokens in {seconds:.2f} s, {1000 * seconds / count:.2f} ms each; "
          f"{decoder.bytes_kept:,} bytes kept", file=sys.stderr)


def say_texts(decoder: Decoder, tokenizer: Tokenizer, text: str, tokens: list[int], end_of_text: int | None,
              options: argparse.Namespace) -> int:
    """
    Print what follows a text, whose tokens these are: a single row as it comes, several at the end. Returns the number
    of tokens chosen for each. end_of_text: the token that ends a row; None: nothing does.
    """
    # every row until it ends
    show = [tokenizer.text_of() for _ in range(options.batch)]  # for each row: a token -> text
    texts, open_rows = [text] * options.batch, set(range(options.batch))
    count = 0
    if options.batch == 1:
        print(text, end="", flush=True)
    prompt = torch.tensor([tokens], dtype=torch.int32).repeat(options.batch, 1)
    for chosen in sample(decoder, prompt, options.tokens, options.temperature, options.top_k, options.top_p,
                         options.seed):
        count += 1
        for row in sorted(open_rows):
            token = int(chosen[row])
            if token == end_of_text:
                open_rows.remove(row)
                continue
            piece = show[row](token)
            if options.batch == 1:
                print(piece, end="", flush=True)
            else:
                texts[row] += piece
        if not open_rows:
            break

    # the end of the line, or all rows
    if options.batch == 1:
        print()
    else:
        print("\n\n".join(f"--- {number}\n{text}" for number, text in enumerate(texts, 1)))
    return count


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code, see data.command_line.run_script."""
    return run_script("generate.py", lambda: generate(parse(argv)), explain=variants.blame)


if __name__ == "__main__":
    sys.exit(main())
