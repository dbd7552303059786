"""The sections of a config that say how a run goes, as typed values that check themselves."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from fastlm.decoding import sample as sampling
from fastlm.errors import UserError


def at_least(section: str, settings: Any, **least: int) -> None:
    """Checks fields of a section against the least they may be."""
    for key, value in least.items():
        if getattr(settings, key) < value:
            raise UserError(f"config.{section}.{key}: must be at least {value}, got {getattr(settings, key)}")


@contextlib.contextmanager
def naming(section: str) -> Iterator[None]:
    """Names the section in what a part below, which knows no config, has to say."""
    try:
        yield
    except UserError as error:
        known = str(error).startswith("config.")
        raise UserError(str(error) if known else f"config.{section}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Training:
    """How long and in which pieces.

    Attributes:
      steps: optimizer steps of the whole run.
      accumulation: microbatches per step; must divide the batch.
      average_decay: of an exponential moving average of the weights; 0 keeps none.
      max_skipped: non-finite steps in a row after which the run stops.
    """

    steps: int
    accumulation: int = 1
    average_decay: float = 0.0
    max_skipped: int = 10

    def __post_init__(self) -> None:
        at_least("training", self, steps=1, accumulation=1, max_skipped=1)
        if not 0 <= self.average_decay < 1:
            raise UserError(f"config.training.average_decay: must be in [0, 1), got {self.average_decay}")


@dataclasses.dataclass(frozen=True)
class Data:
    """What is trained on; the arguments of `data.pipeline.training_batches`.

    Attributes:
      sources: pairs (spec, share of the tokens).
      length, batch_size: T and B of a global batch.
    """

    sources: tuple[tuple[str, float], ...]
    split: str = "train"
    length: int = 256
    batch_size: int = 16
    mode: str = "packed"
    packing: str = "concat"
    shards: int = 0
    prefetch: int = 2
    data_dir: str | None = None

    def __post_init__(self) -> None:
        at_least("data", self, length=1, batch_size=1, shards=0, prefetch=0)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is scored, and when.

    Attributes:
      every: steps between evaluations; 0 evaluates only at the end.
      batches: batches per evaluation while training; 0 takes the whole split.
      split, final_split: scored while training, and once at the end ("" for neither).
      batch_size: rows; 0 takes that of training.
      overlap: tokens of context repeated, unscored, at the start of each window after a document's first.
    """

    every: int = 500
    batches: int = 20
    split: str = "validation"
    final_split: str = "test"
    batch_size: int = 0
    overlap: int = 0

    def __post_init__(self) -> None:
        at_least("evaluation", self, every=0, batches=0, batch_size=0, overlap=0)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Steps between checkpoints, and how many of the newest stay beside the best."""

    every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        at_least("checkpoint", self, every=1, keep=1)


@dataclasses.dataclass(frozen=True)
class Logging:
    """Steps between log lines; TensorBoard files; project name for Weights & Biases ("" is off)."""

    every: int = 20
    tensorboard: bool = True
    wandb: str = ""

    def __post_init__(self) -> None:
        at_least("logging", self, every=1)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Text generated when the run ends: one continuation of `tokens` tokens per prompt."""

    prompts: tuple[str, ...] = ()
    tokens: int = 120
    temperature: float = 0.8
    top_p: float = 0.95

    def __post_init__(self) -> None:
        at_least("sample", self, tokens=1)
        with naming("sample"):
            _ = self.how

    @property
    def how(self) -> sampling.Sampling:
        """How tokens are drawn."""
        return sampling.Sampling(temperature=self.temperature, top_p=self.top_p)
