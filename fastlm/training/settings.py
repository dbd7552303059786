"""The sections of a config that say how a run goes, as typed values that check themselves."""

import dataclasses

from fastlm.configuration import at_least, naming
from fastlm.decoding import sample as sampling
from fastlm.errors import UserError


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
