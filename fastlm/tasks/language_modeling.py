"""Next-token prediction.

Notable: `bits_per_byte` counts the UTF-8 bytes that the scored tokens stand for, so models with
different tokenizers compare; end-of-document tokens cost bits but stand for no bytes. Perplexity is
per token and compares only within one tokenizer.
Layers whose attention carries something (a state, a window, Transformer-XL's memory) go on from row to row where rows
do (`data.mode = "stream"`), in training and in evaluation; the memory is part of the checkpoint.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fastlm.data.settings import Data
from fastlm.data.tokenizers import Tokenizer
from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig
from fastlm.models import attention as attention_kinds
from fastlm.ops.chunked_loss import MASK
from fastlm.ops.cross_entropy import TARGETS, CrossEntropy, TokenScores
from fastlm.tasks.kind import TextKind
from fastlm.tasks.task import Read, Task, captured, of_model, through_head
from fastlm.tasks.writing import Writing, continuing


@dataclasses.dataclass(frozen=True)
class LanguageModeling(TextKind):
    """The kind "language_modeling"; see `make` for the fields."""

    z_loss: float = 0.0
    label_smoothing: float = 0.0

    head = "language_model"
    families = ("decoder",)

    def __post_init__(self) -> None:
        if not self.z_loss >= 0 or not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"config.task: z_loss must not be negative (got {self.z_loss}), label_smoothing must lie in [0, 1) "
                f"(got {self.label_smoothing})"
            )

    def fit(self, cfg: ModelConfig, tokenizer: Tokenizer, data: Data) -> ModelConfig:
        """Refuses learned positions where documents go on from row to row, and so beyond any table."""
        cfg = super().fit(cfg, tokenizer, data)
        goes_on = any(attention_kinds.kind(cfg.layer(i).attention).carry for i in cfg.stack)
        if data.mode == "stream" and cfg.positions == "learned" and goes_on:
            raise UserError(
                "config.data.mode: in a 'stream' positions count on from row to row, beyond any table of learned ones; "
                "set model.positions to 'rotary', 'sinusoidal' or 'none', or data.mode to 'packed'"
            )
        return cfg

    def make(self, model: Model, tokenizer: Tokenizer) -> Task:
        """Returns the task."""
        return make(model, tokenizer.token_bytes, z_loss=self.z_loss, label_smoothing=self.label_smoothing)

    def writing(self, cfg: ModelConfig, tokenizer: Tokenizer) -> Writing:
        """Goes on from a text."""
        del cfg
        return continuing(tokenizer)


def make(model: Model, token_bytes: np.ndarray, *, z_loss: float = 0.0, label_smoothing: float = 0.0) -> Task:
    """Returns the task of predicting each next token.

    `predict` gives, per token [B, T], what `loss` sums: see `per_token`.

    Args:
      token_bytes: [V'] bytes of text that each token stands for; ids from V' to V stand for none.
      z_loss: weight of log(Z)^2 per token (arXiv 2204.02311).
      label_smoothing: share of the target spread evenly over the vocabulary.
    """

    unused = model.cfg.vocab_size - len(token_bytes)

    def read(weights, constants, carry, batch, rng, capture):
        del constants
        options = {name: batch[name] for name in ("positions", "segment_ids") if name in batch}
        goes_on = carry != () and "reset" in batch
        if goes_on:
            options["cache"] = carry.emptied(batch["reset"])
        hidden, aux = model.features(weights["model"], batch["tokens"], rng=rng, capture=capture, **options)
        mask = batch["loss_mask"].astype(jnp.float32)
        pieces = {TARGETS: batch["targets"], MASK: mask}
        documents = batch.get("segment_ids", jnp.ones_like(batch["tokens"]))
        own = captured(aux, capture)
        return Read(hidden, pieces, aux["cache"] if goes_on else carry, own, {"": documents})

    predictions = through_head(model, read, CrossEntropy(z_loss, label_smoothing), token_sums)

    def predict(weights: Any, constants: Any, carry: Any, batch: dict) -> tuple[Any, dict[str, Array]]:
        found = read(weights, constants, carry, batch, None, ())
        return found.carry, per_token(predictions.scored(weights, found)[1], found.pieces, constants)

    return of_model(
        model.cfg,
        predictions=predictions,
        summarize=summarize,
        predict=predict,
        carry=lambda rows: model.empty_carry(rows) or (),
        constants={"token_bytes": jnp.pad(jnp.asarray(token_bytes, jnp.float32), (0, unused))},
    )


def per_token(scores: TokenScores, pieces: Mapping[str, Array], constants: Any) -> dict[str, Array]:
    """Returns what a loss sums for each token [B, T]: nll (nats), correct, tokens (1 where scored), bytes."""
    mask = pieces[MASK]
    text_bytes = jnp.take(constants["token_bytes"], pieces[TARGETS], mode="clip")
    found = {"nll": scores.nll, "correct": scores.correct, "tokens": jnp.ones_like(mask), "bytes": text_bytes}
    return {name: values * mask for name, values in found.items()}


def token_sums(scores: TokenScores, pieces: Mapping[str, Array], constants: Any) -> dict[str, Array]:
    """Returns the sums of `per_token`."""
    return {name: jnp.sum(values) for name, values in per_token(scores, pieces, constants).items()}


def summarize(sums: dict[str, float]) -> dict[str, float]:
    """Returns loss (nats per token), perplexity, bits_per_byte and accuracy from summed scores."""
    tokens = max(sums["tokens"], 1.0)
    nats = sums["nll"] / tokens
    return {
        "loss": nats,
        "perplexity": math.exp(min(nats, 700.0)),
        "bits_per_byte": sums["nll"] / math.log(2) / max(sums["bytes"], 1.0),
        "accuracy": sums["correct"] / tokens,
    }
