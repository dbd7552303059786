"""One vector per text, for search and comparison: what a model without a head gives.

Notable: pooled as the model was trained to be (mean, first or last token) and of length 1, so that a product of two is
their cosine (Sentence-BERT, arXiv 1908.10084). Left out: training; a model gets here by `fastlm.convert`, or with
`--config.model.head=none` nothing would be learnt.

Dims: B batch, D embed.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fastlm.data.bucketing import Encode
from fastlm.data.encoded import CUT
from fastlm.data.examples import Row
from fastlm.data.settings import Data, Evaluation
from fastlm.data.tokenizers import Tokenizer
from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig
from fastlm.tasks.kind import Scored, Trained
from fastlm.tasks.rows import Joiner, RowsKind, predictions, rows_by_record, segments
from fastlm.tasks.task import Batch, Task, of_model


@dataclasses.dataclass(frozen=True)
class Embedding(RowsKind):
    """The kind "embedding".

    Attributes:
      text: field that is read.
    """

    text: str = "text"

    head = "none"
    families = ("encoder", "decoder")

    @property
    def text_fields(self) -> tuple[str, ...]:
        """The text."""
        return (self.text,)

    def unlabelled(self) -> "Embedding":
        """Nothing is labelled."""
        return self

    def encoder(self, cfg: ModelConfig, tokenizer: Tokenizer, data: Data) -> Encode:
        """Returns row -> tokens, token types where the model has them."""
        join = Joiner(tokenizer, data.length)

        def encode(row: Row) -> dict[str, Any]:
            joined = join(str(row[self.text]))
            types = {"token_types": joined.token_types} if cfg.token_types else {}
            return {"tokens": joined.tokens, CUT: joined.cut} | types

        return encode

    def make(self, model: Model, tokenizer: Tokenizer) -> Task:
        """Returns the task; `predict` gives unit vectors, "embedding" [B, D]."""
        del tokenizer

        def loss(*arguments: Any) -> Any:
            raise UserError("config.task.name: 'embedding' has no loss to train by; name a task that has one")

        def predict(weights: Any, constants: Any, carry: Any, batch: Batch) -> tuple[Any, dict[str, jax.Array]]:
            del constants
            params, real = weights["model"], segments(batch)
            options = {"segment_ids": real, "packed": False, "token_types": batch.get("token_types")}
            hidden, _ = model.features(params, batch["tokens"], **options)
            pooled = model.pool(hidden, real).astype(jnp.float32)
            return carry, {"embedding": pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True)}

        return of_model(
            model.cfg,
            loss=loss,
            summarize=dict,
            predict=predict,
        )

    def say(
        self, trained: Trained, data: Data, evaluation: Evaluation, split: str, limit: int = 0
    ) -> tuple[list[Row], list[dict[str, Any]]]:
        """Returns rows, and the vector of each."""
        batches = self.eval_batches(trained.model.cfg, trained.tokenizer, data, evaluation, split, limit)
        found = predictions(trained, batches)
        said = [{"said": [round(float(x), 6) for x in output["embedding"]]} for output in found.values()]
        return rows_by_record(self.load(data, split), list(found)), said

    def score(self, trained: Trained, data: Data, evaluation: Evaluation, split: str, limit: int = 0) -> Scored:
        """Refuses: vectors are neither right nor wrong."""
        raise UserError("embeddings have no score of their own; fastlm.predict prints them")
