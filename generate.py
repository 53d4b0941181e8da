"""
Text from a checkpoint of any variant.

    python generate.py --checkpoint logs/RUN.pt --prompt "def main("                          to the terminal, as it comes
    python generate.py --checkpoint logs/RUN.pt --prompt-file story.txt --tokens 2000 --temperature 0.8 --top-p 0.95 --seed 7
    python generate.py --checkpoint logs/RUN.pt --prompt "import" --batch 4 --bins 256        four texts; topological attention with a state of fixed size
    python generate.py --checkpoint logs/RUN.pt --export DIR                                  model.safetensors, config.json and the tokenizer's merges

- A checkpoint is a run's .pt file or a folder that --export made. Nothing in it is executed.
- Every layer keeps what later tokens need: softmax attention its keys and values, topological attention coordinates and values or, with --bins, a state of
  fixed size, forgetting attention its sums besides. A model whose parts cannot go on from that is found out by a trial against the whole forward pass and
  then runs all of its context for every token; a line on stderr says so.
- A token sees --context tokens back (default: the row length of the training). A longer text goes on without what lies further back.
- Sampling: softmax of logits / temperature (0: the likeliest token), among the --top-k likeliest, then among the fewest that together have --top-p.
  A document's end ends a text, unless --endless.
- Exit code 1 and one line for a fault, 130 when interrupted.
"""

import argparse
import codecs
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from torch import Tensor

import train_gpt
import variants
from data.shards import encoder, load_merges
from kernels.topological_attention_cache import TokenBuffer, hidden_keys
from train_gpt import AttentionContext, AttentionMask, Config, GPT, Ranks, RunError, read_checkpoint

TRIAL, TRIAL_ERROR = (40, 1, 1, 22), 1e-3  # tokens of the trial in steps, and how far its logits may be from the whole pass, relative to their RMS

# ---------------------------------------------------------------------------------------------------------------------------------------------------
# Decoding


class LayerCache:
    """
    What one layer keeps of earlier tokens. Its attention finds it as ctx.cache. context: most tokens that softmax attention sees back; bins: of topological
    attention's state (0: exact), which has no such limit.
    """
    def __init__(self, context: int, bins: int = 0):
        self.context, self.bins, self.parts, self.length = context, bins, {}, 0

    def part(self, name: str, make: Callable):
        """The layer's memory of that name, made at its first use; it has .bytes_kept."""
        if name not in self.parts:
            self.parts[name] = make()
        return self.parts[name]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext, scale: float) -> Tensor:
        """train_gpt.attend for the new tokens q, k, v (B, t, H, D), over the earlier ones too."""
        keys, values = (self.part(name, TokenBuffer) for name in ("keys", "values"))
        for buffer, new in ((keys, k), (values, v)):
            buffer.keep((ctx.window or self.context) - 1)
            buffer.append(new.transpose(1, 2))
        self.length += q.shape[1]
        if self.length == q.shape[1] and (ctx.first_key is None or ctx.stretches is not None):  # whole rows, as in training
            return train_gpt.attend(q, k, v, replace(ctx.mask, cache=None), scale)
        hidden = hidden_keys(ctx.first_key, self.length - keys.tokens.shape[2], q.shape[1], self.length)
        mask = None if hidden is None else ~hidden[:, None].to(q.device)
        return torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), keys.tokens, values.tokens, attn_mask=mask, scale=scale).transpose(1, 2)

    def running_sum(self, x: Tensor) -> Tensor:
        """x (B, t, H) -> its sum over all tokens so far, at each of the new ones."""
        before = self.part("sum", TokenBuffer)
        total = x.cumsum(1) if before.data is None else x.cumsum(1) + before.tokens.transpose(1, 2)
        before.keep(0)
        before.append(total[:, -1:].transpose(1, 2))
        return total

    def with_earlier(self, x: Tensor, count: int) -> Tensor:
        """x (B, t, C) -> the `count` inputs before the new ones, zeros where there are none, then x: (B, count + t, C)."""
        before = self.part("inputs", TokenBuffer)
        joined = torch.cat((x.new_zeros(x.shape[0], count, x.shape[2]) if before.data is None else before.tokens[:, 0], x), 1)
        before.keep(0)
        before.append(joined[:, None, -count:])
        return joined

    @property
    def bytes_kept(self) -> int:
        return sum(part.bytes_kept for part in self.parts.values())


class Decoder:
    """
    A model that goes on with B rows of tokens. feed() takes the next ones, whole rows first. context: how many tokens each sees back, itself included;
    cached: by what its layers keep, else all of the last `context` tokens run anew.
    """
    def __init__(self, model: GPT, context: int, bins: int = 0, cached: bool = True):
        self.model, self.context, self.cached = model, context, cached
        self.caches = [LayerCache(context, bins) for _ in model.blocks]
        self.length, self.tokens, self.doc_start = 0, None, None

    @torch.no_grad()
    def feed(self, tokens: Tensor) -> Tensor:
        """The next tokens (B, t) -> logits (B, vocabulary) of what follows the last one, float32."""
        return (self._step if self.cached else self._whole)(tokens.to(self.model.embedding.weight.device))

    def _whole(self, tokens: Tensor) -> Tensor:
        self.tokens = (tokens if self.tokens is None else torch.cat((self.tokens, tokens), 1))[:, -self.context:]
        return self.model(self.tokens)[:, -1]

    def _step(self, tokens: Tensor) -> Tensor:
        model, start, device = self.model, self.length, tokens.device
        B, t = tokens.shape
        index = torch.arange(start, start + t, device=device, dtype=torch.int32)
        doc_start = torch.where(tokens == model.config.end_of_text, index, 0) if model.config.document_mask else torch.zeros_like(tokens)
        if start:
            doc_start[:, 0] = torch.maximum(doc_start[:, 0], self.doc_start)
        doc_start = doc_start.cummax(1).values.int()
        if not start and t <= self.context:
            masks = [replace(mask, window=window) for mask, window in zip(model.masks(tokens), self._windows())]
        else:
            masks = [self._mask(doc_start, index, window) for window in self._windows()]
        joined = tokens if self.tokens is None else torch.cat((self.tokens, tokens), 1)  # an embedding reads the token before
        overlap = joined.shape[1] - t
        x, contexts = model.embed(joined, masks, start - overlap)
        contexts = [replace(ctx, mask=replace(ctx.mask, cache=cache), rotary=None if ctx.rotary is None else tuple(table[overlap:] for table in ctx.rotary),
                            x0=ctx.x0[:, overlap:], value=None if ctx.value is None else ctx.value[:, overlap:]) for ctx, cache in zip(contexts, self.caches)]
        x = model.run_blocks(x[:, overlap:], contexts)
        self.length, self.tokens, self.doc_start = start + t, tokens[:, -1:], doc_start[:, -1]
        return model.head(model.final_norm(model.select_outputs(x)[:, -1:]))[:, 0]

    def _windows(self) -> Iterator[int | None]:
        """The window of each layer, no longer than the context, but for a state of fixed size, which forgets nothing."""
        for layer, cache in enumerate(self.caches):
            window = self.model.window(layer)
            yield min(window, self.context) if window else None if cache.bins else self.context

    def _mask(self, doc_start: Tensor, index: Tensor, window: int | None) -> AttentionMask:
        first_key = doc_start if window is None else torch.maximum(doc_start, index - (window - 1))
        return AttentionMask(doc_start, index - doc_start, window, first_key)

    @property
    def bytes_kept(self) -> int:
        """Of all layers' caches."""
        return sum(cache.bytes_kept for cache in self.caches)


@torch.no_grad()
def decodes_from_cache(model: GPT) -> bool:
    """Whether a short random text gives the same logits by what the layers keep, in several steps, as by the whole forward pass."""
    n, vocabulary = sum(TRIAL), model.config.vocab_size
    tokens = torch.randint(vocabulary, (2, n), generator=torch.Generator().manual_seed(0), dtype=torch.int32).to(model.embedding.weight.device)
    whole = model(tokens)
    decoder, end = Decoder(model, n), 0
    try:
        for count in TRIAL:
            end += count
            expected, got = whole[:, end - 1], decoder.feed(tokens[:, end - count:end])
            if not (got - expected).square().mean().sqrt() <= TRIAL_ERROR * expected.square().mean().sqrt().clamp_min(TRIAL_ERROR):
                return False
    except (TypeError, AttributeError, RuntimeError):  # of a part with other arguments, or one that expects whole rows
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------------------------------------
# Sampling


def choose(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    """A token for each row of logits (B, V) -> (B,) int64 on the CPU."""
    logits = logits.float().cpu()
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if not top_k and top_p == 1:
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    logits, order = logits.sort(-1, descending=True)
    if top_k:
        logits, order = logits[:, :top_k], order[:, :top_k]
    probability = logits.softmax(-1)
    before = probability.cumsum(-1) - probability
    probability = probability.masked_fill(before >= top_p, 0)  # the first always stays
    return order.gather(1, torch.multinomial(probability, 1, generator=generator))[:, 0]


def sample(decoder: Decoder, prompt: Tensor, count: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 1) -> Iterator[Tensor]:
    """Prompt (B, T) -> `count` times the next tokens (B,) int64, each as soon as it is chosen."""
    generator, logits = torch.Generator().manual_seed(seed), decoder.feed(prompt)
    for number in range(count):
        tokens = choose(logits, temperature, top_k, top_p, generator)
        yield tokens
        if number + 1 < count:
            logits = decoder.feed(tokens[:, None].int())


# ---------------------------------------------------------------------------------------------------------------------------------------------------
# Text


class Tokenizer:
    """Text to tokens and back. merges: {token's bytes: id}, None for bytes."""
    def __init__(self, merges: dict[bytes, int] | None):
        self.encode_texts, self.pieces = encoder(merges), [bytes([n]) for n in range(256)] if merges is None else sorted(merges, key=merges.get)
        self.merges = merges

    @classmethod
    def of(cls, folder: Path, config: Config) -> "Tokenizer":
        """That of a data folder, or of an exported model's. RunError if there is none, or the model has another vocabulary."""
        try:
            name = json.loads((folder / "meta.json").read_text())["tokenizer"]
        except FileNotFoundError:
            name = {257: "bytes", 50257: "gpt2"}.get(config.vocab_size, "")
        except (OSError, ValueError, KeyError, TypeError):
            raise RunError(f"{folder}/meta.json cannot be read; give --data the folder of the training shards") from None
        files = sorted(folder.glob("*.tiktoken"))
        if name not in ("bytes", "gpt2") and not files:
            raise RunError(f"no tokenizer of {config.vocab_size} ids for text in {folder} (found {name or 'nothing'}); give --data a folder that has its .tiktoken file")
        tokenizer = cls(load_merges(str(files[0]) if files else name))
        if len(tokenizer.pieces) + 1 != config.vocab_size:
            raise RunError(f"the model has {config.vocab_size} token ids and the tokenizer in {folder} {len(tokenizer.pieces) + 1}; give --data the folder of its training shards")
        return tokenizer

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in self.encode_texts([text if self.merges else text.encode()])[0]]

    def text_of(self) -> Callable[[int], str]:
        """A function of one token after another that returns what can be shown so far: a character's bytes may lie in several tokens."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: decoder.decode(self.pieces[token]) if token < len(self.pieces) else ""


# ---------------------------------------------------------------------------------------------------------------------------------------------------
# Checkpoints


def read_model(path: str) -> dict:
    """A checkpoint's contents, from a .pt file or an exported folder. RunError if it is neither or damaged; nothing in it is executed."""
    folder = Path(path)
    if not folder.is_dir():
        return read_checkpoint(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        saved = json.loads((folder / "config.json").read_text())
        return dict(config=saved["config"], model=load_file(folder / "model.safetensors"))
    except FileNotFoundError as error:
        raise RunError(f"{path} has no {Path(error.filename or 'model.safetensors').name}; give a folder that --export made, or a .pt file") from None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(f"{path} is not a whole exported model ({type(error).__name__}); export it again") from None


def config_of(saved: dict, path: str) -> Config:
    known = {field.name for field in fields(Config)}
    if not isinstance(saved["config"], dict) or (unknown := set(saved["config"]) - known):
        raise RunError(f"{path} has settings that this trainer does not know ({', '.join(sorted(unknown)) if isinstance(saved['config'], dict) else 'none at all'}); "
                       "use the trainer that wrote it")
    given = saved["config"]
    return Config(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def export(saved: dict, config: Config, folder: Path, tokenizer_folder: Path):
    """model.safetensors (shared tensors once), config.json, and the tokenizer's files where there are any."""
    from safetensors.torch import save_file
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in saved["model"].items()}, folder / "model.safetensors")
    train_gpt.write_atomically(folder / "config.json", lambda file: file.write(json.dumps(dict(format="knotgpt-1", config=asdict(config)), indent=1).encode() + b"\n"))
    for file in (tokenizer_folder / "meta.json", *tokenizer_folder.glob("*.tiktoken")):
        if file.exists():
            shutil.copyfile(file, folder / file.name)


def loaded(saved: dict, config: Config, ranks: Ranks, path: str) -> GPT:
    """The model, with its variants applied for the rest of this process."""
    variants.apply(config.variant, config)
    try:
        return train_gpt.trained_model(saved, config, ranks)
    except RuntimeError as error:  # of load_state_dict: names or shapes
        raise RunError(f"{path} does not fit the model that its settings describe: {str(error).splitlines()[-1].strip()}") from None


# ---------------------------------------------------------------------------------------------------------------------------------------------------
# The command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="generate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help=".pt file of a run, or a folder that --export made")
    parser.add_argument("--prompt", default=None, help="what the text begins with")
    parser.add_argument("--prompt-file", type=Path, help="file with it")
    parser.add_argument("--tokens", type=int, default=256, help="of each text after the prompt (256)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token (1.0)")
    parser.add_argument("--top-k", type=int, default=0, help="among so many likeliest tokens (0: all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="among the fewest tokens of this probability (1.0)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1, help="texts from one prompt (1)")
    parser.add_argument("--context", type=int, default=0, help="tokens that each one sees back (0: the training's row length)")
    parser.add_argument("--bins", type=int, default=0, help="topological attention by a state of so many bins (0: exact)")
    parser.add_argument("--no-cache", action="store_true", help="run the whole context for every token")
    parser.add_argument("--endless", action="store_true", help="go on after a document's end")
    parser.add_argument("--data", type=Path, help="folder with the tokenizer (default: the training's data)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--export", type=Path, metavar="DIR", help="write the model there instead")
    given = parser.parse_args(argv)
    faults = [(given.tokens < 1, f"--tokens must be at least 1, got {given.tokens}"), (given.batch < 1, f"--batch must be at least 1, got {given.batch}"),
              (not 0 <= given.temperature < math.inf, f"--temperature must be 0 or above, got {given.temperature:g}"),
              (given.top_k < 0, f"--top-k must be 0 or above, got {given.top_k}"), (not 0 < given.top_p <= 1, f"--top-p must lie above 0 and be at most 1, got {given.top_p:g}"),
              (given.context < 0, f"--context must be 0 or above, got {given.context}"),
              (given.bins < 0 or given.bins == 1, f"--bins must be at least 2, or 0 for none, got {given.bins}"),
              (given.prompt is not None and given.prompt_file is not None, "give --prompt or --prompt-file, not both")]
    if message := next((message for fault, message in faults if fault), None):
        raise RunError(message)
    return given


def read_prompt(given: argparse.Namespace) -> str:
    if given.prompt_file is None:
        text = given.prompt or ""
    else:
        try:
            text = given.prompt_file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"cannot read {given.prompt_file} ({type(error).__name__}); give a text file in UTF-8") from None
    if not text:
        raise RunError("the prompt is empty; give --prompt TEXT or --prompt-file FILE")
    return text


def generate(given: argparse.Namespace):
    saved = read_model(given.checkpoint)
    config = config_of(saved, given.checkpoint)
    data = given.data or (Path(given.checkpoint) if Path(given.checkpoint).is_dir() else Path(config.data))
    if given.export:
        export(saved, config, given.export, data)
        print(f"{given.export}: {sum(tensor.numel() for tensor in saved['model'].values()):,} numbers")
        return
    tokenizer, text = Tokenizer.of(data, config), read_prompt(given)
    ranks = Ranks.start(replace(config, compile="off", device=given.device))
    model = loaded(saved, replace(config, compile="off", device=given.device), ranks, given.checkpoint)
    context, tokens = given.context or config.sequence_length, [config.end_of_text, *tokenizer.encode(text)]
    if len(tokens) > context:
        raise RunError(f"the prompt has {len(tokens):,} tokens and the model sees {context:,} back; give a shorter one or --context {len(tokens)}")
    cached = not given.no_cache and decodes_from_cache(model)
    if not cached:
        print("generate.py: every token runs the whole context" + ("" if given.no_cache else ": a part of this model keeps nothing for later tokens"), file=sys.stderr)
    decoder, start = Decoder(model, context, given.bins, cached), time.perf_counter()
    shown = [tokenizer.text_of() for _ in range(given.batch)]
    texts, open_rows, count = [text] * given.batch, set(range(given.batch)), 0
    if given.batch == 1:
        print(text, end="", flush=True)
    prompt = torch.tensor([tokens], dtype=torch.int32).repeat(given.batch, 1)
    for chosen in sample(decoder, prompt, given.tokens, given.temperature, given.top_k, given.top_p, given.seed):
        count += 1
        for row in sorted(open_rows):
            if chosen[row] == config.end_of_text and not given.endless:
                open_rows.remove(row)
                continue
            piece = shown[row](int(chosen[row]))
            texts[row] += piece
            if given.batch == 1:
                print(piece, end="", flush=True)
        if not open_rows:
            break
    seconds = time.perf_counter() - start
    print("" if given.batch == 1 else "\n\n".join(f"--- {number + 1}\n{text}" for number, text in enumerate(texts)))
    print(f"{count:,} tokens in {seconds:.2f} s, {1000 * seconds / count:.2f} ms each; {decoder.bytes_kept:,} bytes kept", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    try:
        generate(parse(argv))
        return 0
    except (RunError, ValueError) as error:
        print(f"generate.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ngenerate.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
