"""
A trial: one small model trained from scratch on one skill of tasks/answers.py, and marked on fresh rows.

The model is the trainer's, with an arm's variants and settings; so are its initial tensors, its optimizers, their
schedules over the planned steps, the treatment of gradients and the average of weights. The batch, `rows` fresh rows a
step, is the trial's, and so is the loss: the mean cross-entropy of the answers alone, of the model's logits. What a
variant does to the order of data, to the size of a step or to the trainer's own loss has no effect here.

The model is marked every `every` steps and after the last one, on rows that are drawn for this mark. A trial ends as
soon as the accuracy has reached THRESHOLD at every length of the skill.
"""

import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

import train_gpt
import variants
from compare import Arm, parse_options, rate_options, trainer_options
from tasks.answers import STREAMS, accuracy, answer_loss, draw
from train_gpt import Config, Ranks, RunError

THRESHOLD = 0.95    # a skill is learnt from this accuracy on

# The size of a card's models, under an arm's own options: two layers of 64 channels, attention without windows.
SIZE = ("--track cpu --layers 2 --model_dim 64 --heads 4 --head_dim 16 --mlp_hidden 128 --attention_scale 0 "
        "--window_pattern L --window_short 0 --window_long 0 --no-document_mask --compile off --device cpu").split()


@dataclass(frozen=True)
class Trial:
    """What decides a trial's result, but for the code and the machine."""

    arm: Arm
    skill: Any              # as tasks/answers.py has it
    factor: float           # on all of the arm's learning rates
    seed: int
    steps: int              # optimizer steps, at most
    rows: int = 32          # of a step
    every: int = 50         # steps between two marks
    marked: int = 256       # rows of a mark, of each length

    def config(self) -> Config:
        """The trainer's configuration. RunError for what the trainer or the variants' loader does not take."""
        config = parse_options([*trainer_options(self.arm, SIZE), *rate_options(self.arm, SIZE, self.factor)])
        longest = max(self.skill.lengths)
        return replace(config, vocab_size=self.skill.vocab_size, document_token=self.skill.vocab_size - 1,
                       sequence_length=longest, batch_tokens=self.rows * longest,
                       micro_batch_tokens=self.rows * longest, steps=self.steps, seed=self.seed)


class Learner:
    """A model in training on a skill. Its variants must be applied as long as it is used."""

    def __init__(self, trial: Trial, config: Config):
        self.trial = trial
        self.config = config
        self.ranks = Ranks.start(config)
        self.model = train_gpt.build_model(config, self.ranks)
        self.optimizers = train_gpt.build_optimizers(self.model, config, self.ranks)
        self.average = train_gpt.build_average(self.model, config, self.ranks)  # None: of weights, there is none
        self.training = np.random.default_rng([trial.seed, STREAMS["train"]])   # draws rows to train on
        self.marking = np.random.default_rng([trial.seed, STREAMS["evaluate"]])  # draws rows to mark

    def train_step(self, step: int):
        """One optimizer step on fresh rows, `step` of them being done."""
        # fresh rows
        progress = step / self.trial.steps
        batch = draw(self.trial.skill, self.trial.rows, self.training, self.trial.skill.lengths[0])
        tokens, answers = (tensor.to(self.ranks.device) for tensor in batch)

        # forward and backward, a source of weights once
        source = self.model.source
        self.model.set_windows(progress)
        if source is not None:
            source.hold()
        answer_loss(self.model, tokens, answers).backward()
        if source is not None:
            source.release()

        # the update
        if train_gpt.treat_gradients is not None:
            with torch.no_grad():
                train_gpt.treat_gradients(self.optimizers, self.config, progress, self.ranks)
        factor = train_gpt.schedule_learning_rate(self.config, progress)
        for optimizer in self.optimizers:
            optimizer.step(factor, progress)
        if self.average is not None:
            self.average.update(progress)

    @torch.no_grad()
    def mark(self) -> list[float]:
        """The accuracy on fresh rows of each of the skill's lengths."""
        model, trial = self.model, self.trial
        model.eval()
        model.set_windows(1.0)
        with self.average.applied() if self.average is not None else nullcontext():
            shares = [accuracy(model, trial.skill, trial.marked, self.marking, length, self.ranks.device)[0]
                      for length in trial.skill.lengths]
        model.train()
        return shares


def run_trial(trial: Trial) -> dict:
    """
    Train and mark a model: dict(accuracy=[at the end, for each of the skill's lengths], steps=those that were done,
    seconds). RunError for an arm that cannot be built or fails, in one line that names the variant's file.
    """
    config = trial.config()
    begun = time.perf_counter()
    try:
        with variants.applied(config.variant, config):
            learner = Learner(trial, config)
            for step in range(trial.steps):
                learner.train_step(step)
                done = step + 1
                if done % trial.every == 0 or done == trial.steps:
                    shares = learner.mark()
                    if min(shares) >= THRESHOLD:
                        break
    except RunError:
        raise
    except Exception as error:
        blamed = variants.blame(error)
        if blamed is None:
            raise
        raise RunError(f"arm {trial.arm.name!r:.200}: {blamed}") from None
    return dict(accuracy=shares, steps=done, seconds=time.perf_counter() - begun)
