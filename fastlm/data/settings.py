"""The sections of a config that name data, as typed values that check themselves."""

import dataclasses

from fastlm.configuration import at_least
from fastlm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Data:
    """What is trained on.

    Attributes:
      sources: pairs (spec, share); of texts for language models (shares of the tokens), of rows for other tasks.
      split: what of them.
      length, batch_size: T and B of a global batch; where a task reads pairs, length bounds the target.
      source_length: longest source of an encoder-decoder, in tokens; 0 takes `length`.
      buckets: lengths that rows of fields are padded to; empty for length / 4, / 2 and the whole.
      mode, packing, shards: of texts; see `data.pipeline.training_batches`.
      prefetch: batches made ahead.
      data_dir: where prepared data and caches lie.
    """

    sources: tuple[tuple[str, float], ...]
    split: str = "train"
    length: int = 256
    source_length: int = 0
    batch_size: int = 16
    buckets: tuple[int, ...] = ()
    mode: str = "packed"
    packing: str = "concat"
    shards: int = 0
    prefetch: int = 2
    data_dir: str | None = None

    def __post_init__(self) -> None:
        at_least("data", self, length=1, source_length=0, batch_size=1, shards=0, prefetch=0)
        if any(size < 1 for size in self.buckets) or list(self.buckets) != sorted(set(self.buckets)):
            raise UserError(f"config.data.buckets: must be rising lengths, got {self.buckets}")


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
