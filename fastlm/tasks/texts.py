"""What tasks that read one text, or a pair of texts, and say something about the whole of it share.

Dims: B batch, C numbers per text.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

from jaxtyping import Array, Float

from fastlm.data.encoded import CUT
from fastlm.data.examples import Row
from fastlm.data.settings import Data
from fastlm.data.tokenizers import Tokenizer
from fastlm.models import Model, ModelConfig
from fastlm.ops.chunked_loss import MASK
from fastlm.tasks.rows import Joiner, RowsKind, segments
from fastlm.tasks.task import Batch, Read, captured


@dataclasses.dataclass(frozen=True)
class TextsKind(RowsKind):
    """A task with a "sequence" head of `classes` numbers per text.

    Attributes:
      text, pair: fields that are read; no pair if that is "".
    """

    text: str = "text"
    pair: str = ""

    head = "sequence"
    families = ("encoder", "decoder")

    @property
    @abstractmethod
    def classes(self) -> int:
        """C, how many numbers the head gives."""

    @property
    def text_fields(self) -> tuple[str, ...]:
        """The text, and what it is paired with."""
        return (self.text, self.pair) if self.pair else (self.text,)

    def fit(self, cfg: ModelConfig, tokenizer: Tokenizer, data: Data) -> ModelConfig:
        """Sizes the head; a decoder is read at its last token."""
        cfg = super().fit(cfg, tokenizer, data)
        pooling = "last" if cfg.family == "decoder" else cfg.pooling
        return dataclasses.replace(cfg, classes=self.classes, pooling=pooling)

    def encode_texts(self, join: Joiner, row: Row, cfg: ModelConfig) -> dict[str, Any]:
        """Returns what the model reads of a row, tokens and token types where it has them, and what of it is cut."""
        joined = join(*(str(row[name]) for name in self.text_fields))
        types = {"token_types": joined.token_types} if cfg.token_types else {}
        return {"tokens": joined.tokens, CUT: joined.cut} | types


def text_logits(model: Model, weights: Any, batch: Batch, rng: Array | None) -> Float[Array, "B C"]:
    """Runs a model with a "sequence" head over padded texts."""
    return model.head(weights["model"], read_texts(model, weights, batch, rng).hidden[:, 0])


def read_texts(model: Model, weights: Any, batch: Batch, rng: Array | None, capture: Iterable[str] = ()) -> Read:
    """Runs a model over padded texts up to its "sequence" head: one prediction each, P = 1; no pieces but a mask."""
    real = segments(batch)
    options = {"segment_ids": real, "packed": False, "token_types": batch.get("token_types")}
    hidden, aux = model.features(weights["model"], batch["tokens"], rng=rng, capture=capture, **options)
    pieces = {MASK: batch["row_mask"][:, None]}
    pooled = model.pool(hidden, real)[:, None]
    return Read(pooled, pieces, (), captured(aux, capture), {"": real})
