"""Masked language modelling: words are hidden, and guessed from both sides (BERT, arXiv 1810.04805).

Notable: a row hides a fixed share of its tokens, so shapes are static and the vocabulary is computed
for hidden places only. Of the places 80% become the mask token, 10% another word, 10% stay (as in
BERT; `mask_share` of 0.3 is worth trying, arXiv 2202.08005). In training the places follow from seed and step; in
evaluation from the row itself, so every evaluation asks the same questions.
Left out: whole-word masking, next-sentence prediction.

Dims: B batch, T time, M masked places.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fastlm.data import sources
from fastlm.data.settings import Data, Evaluation
from fastlm.data.tokenizers import Tokenizer
from fastlm.decoding.inputs import bucket
from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig
from fastlm.ops.chunked_loss import MASK
from fastlm.ops.cross_entropy import TARGETS, CrossEntropy, TokenScores
from fastlm.parallel.rules import constrain
from fastlm.tasks.kind import TextKind, Trained
from fastlm.tasks.rows import row_layout
from fastlm.tasks.task import Batch, Read, Task, captured, of_model, through_head

HOLE = "[MASK]"  # how a person writes what is to be guessed
CHOICES = 5
REPLACED = 0.8
CHANGED = 0.1


@dataclasses.dataclass(frozen=True)
class MaskedLanguageModeling(TextKind):
    """The kind "masked_language_modeling".

    Attributes:
      mask_share: of a row's tokens that are hidden.
    """

    mask_share: float = 0.15

    head = "masked_language_model"
    families = ("encoder",)

    def __post_init__(self) -> None:
        if not 0 < self.mask_share < 1:
            raise UserError(f"config.task.mask_share: must lie between 0 and 1, got {self.mask_share}")

    def fit(self, cfg: ModelConfig, tokenizer: Tokenizer, data: Data) -> ModelConfig:
        """Makes room in the vocabulary for a mask token, where the tokenizer has none."""
        cfg = super().fit(cfg, tokenizer, data)
        return dataclasses.replace(cfg, vocab_size=max(cfg.vocab_size, mask_token(tokenizer) + 1))

    def make(self, model: Model, tokenizer: Tokenizer) -> Task:
        """Returns the task."""
        hidden_from_masking = jnp.asarray(tokenizer.token_bytes == 0)
        return make(model, mask_token(tokenizer), hidden_from_masking, self.mask_share)

    def inputs(self, trained: Trained, data: Data, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns a text's tokens between the special ones, with its holes."""
        return {"tokens": _between_special_tokens(trained.tokenizer, texts[0], data.length)}

    def answers(
        self, trained: Trained, data: Data, evaluation: Evaluation, split: str, limit: int = 0
    ) -> list[dict[str, Any]]:
        """Returns the likeliest words for each `HOLE` of each text, with their probabilities."""
        del evaluation
        texts = [text for spec, _ in data.sources for text in sources.load(spec, split, data_dir=data.data_dir)]
        return [
            fill(trained.model, trained.weights["model"], trained.tokenizer, text) for text in texts[: limit or None]
        ]


def _between_special_tokens(tokenizer: Tokenizer, text: str, length: int) -> np.ndarray:
    layout = row_layout(tokenizer, 1)
    tokens, _ = layout.join([_with_holes(tokenizer, text)[: max(0, length - layout.size)]])
    return tokens


def fill(model: Model, params: Any, tokenizer: Tokenizer, text: str) -> dict[str, Any]:
    """Returns a text and, for each of its holes, `CHOICES` words with their probabilities.

    Raises:
      UserError: it has no hole, or is longer than the model's context.
    """
    if HOLE not in text:
        raise UserError(f"{text[:40]!r} has no {HOLE} to fill; write one where a word is missing")
    tokens = _between_special_tokens(tokenizer, text, sys.maxsize)
    if len(tokens) > model.cfg.max_length:
        raise UserError(f"{text[:40]!r} has {len(tokens)} tokens, the model's context {model.cfg.max_length}; cut it")
    padded = np.zeros((1, bucket(len(tokens))), np.int32)
    padded[0, : len(tokens)] = tokens
    places = np.flatnonzero(tokens == mask_token(tokenizer))
    chances, words = _likeliest(model, params, padded, np.arange(padded.shape[1])[None] < len(tokens), places)
    holes = [
        [{"word": tokenizer.decode([word]).strip(), "probability": float(chance)} for chance, word in zip(*hole)]
        for hole in zip(np.asarray(chances), np.asarray(words))
    ]
    return {"text": text, "said": holes}


def _with_holes(tokenizer: Tokenizer, text: str) -> np.ndarray:
    own = tokenizer.special("mask")
    if own is not None:  # its tokenizer knows what becomes of the spaces around it
        spelling = next(marker for marker in tokenizer.markers() if tokenizer.encode_marked(marker).tolist() == [own])
        for marker in tokenizer.markers():
            if marker in text.replace(HOLE, ""):
                raise UserError(f"the text spells {marker!r}, which is no text for this model; write it otherwise")
        return tokenizer.encode_marked(text.replace(HOLE, spelling))
    first, *rest = (tokenizer.encode(part) for part in text.split(HOLE))
    return np.concatenate([first, *(np.concatenate([[mask_token(tokenizer)], part]) for part in rest)])


@functools.partial(jax.jit, static_argnums=0)
def _likeliest(model: Model, params: Any, tokens: Array, real: Array, places: Array) -> tuple[Array, Array]:
    hidden, _ = model.features(params, tokens, segment_ids=real.astype(jnp.int32), packed=False)
    found = jax.lax.top_k(jax.nn.softmax(model.head(params, hidden[0, places])), CHOICES)
    return tuple(constrain(x, (None, None)) for x in found)  # whole on every process


def mask_token(tokenizer: Tokenizer) -> int:
    """The tokenizer's mask token, or the first id behind its vocabulary."""
    own = tokenizer.special("mask")
    return tokenizer.vocab_size if own is None else own


def make(model: Model, mask_id: int, special: Array, mask_share: float) -> Task:
    """Returns the task; `special` [V'] says which tokens are never hidden (they stand for no text)."""
    ordinary = tuple(jnp.flatnonzero(~special).tolist())
    lowest, highest = min(ordinary), max(ordinary)

    def prepare(weights: Any, constants: Any, batch: Batch, step: Array, rng: Array | None) -> Batch:
        del weights, step
        tokens = batch["tokens"]
        keys = _row_keys(tokens) if rng is None else jax.random.split(rng, tokens.shape[0])
        asked = (batch["segment_ids"] > 0) & ~jnp.take(constants["special"], tokens, mode="fill", fill_value=True)
        places, mask = jax.vmap(lambda key, row: choose(key, row, mask_share))(keys, asked)
        targets = jnp.take_along_axis(tokens, places, axis=1)
        fates = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1), places.shape[1:]))(keys)
        other = jax.vmap(
            lambda key: jax.random.randint(jax.random.fold_in(key, 2), places.shape[1:], lowest, highest + 1)
        )(keys)
        shown = jnp.where(fates < REPLACED, mask_id, jnp.where(fates < REPLACED + CHANGED, other, targets))
        shown = jnp.where(mask > 0, shown, targets)
        rows = jnp.arange(tokens.shape[0])[:, None]
        seen = tokens.at[rows, places].set(shown.astype(tokens.dtype))
        kept = {name: batch[name] for name in ("segment_ids", "positions") if name in batch}
        return kept | {"tokens": seen, "places": places, "targets": targets, "loss_mask": mask}

    def read(weights, constants, carry, batch, rng, capture):
        del constants
        options = {name: batch[name] for name in ("positions", "segment_ids") if name in batch}
        hidden, aux = model.features(weights["model"], batch["tokens"], rng=rng, capture=capture, **options)
        hidden = jnp.take_along_axis(hidden, batch["places"][..., None], axis=1)
        pieces = {TARGETS: batch["targets"], MASK: batch["loss_mask"]}
        return Read(hidden, pieces, carry, captured(aux, capture), {"": batch["segment_ids"]})

    predictions = through_head(model, read, CrossEntropy(), sums)

    def predict(weights: Any, constants: Any, carry: Any, batch: Batch) -> tuple[Any, dict[str, Array]]:
        asked = prepare(weights, constants, batch, jnp.zeros((), jnp.int32), None)
        found = read(weights, constants, carry, asked, None, ())
        scores, mask = predictions.scored(weights, found)[1], asked["loss_mask"]
        rows = jnp.arange(mask.shape[0])[:, None]
        spread = lambda values: jnp.zeros(batch["tokens"].shape).at[rows, asked["places"]].add(values * mask)
        said = {"nll": spread(scores.nll), "correct": spread(scores.correct), "tokens": spread(jnp.ones_like(mask))}
        return carry, said

    return of_model(
        model.cfg,
        prepare=prepare,
        predictions=predictions,
        summarize=summarize,
        predict=predict,
        constants={"special": special},
    )


def sums(scores: TokenScores, pieces: Mapping[str, Array], constants: Any) -> dict[str, Array]:
    """Returns what `summarize` reads."""
    del constants
    mask = pieces[MASK]
    return {"nll": jnp.sum(scores.nll * mask), "correct": jnp.sum(scores.correct * mask), "tokens": jnp.sum(mask)}


def choose(key: Array, asked: Array, share: float) -> tuple[Array, Array]:
    """Draws places of one row [T] among those that may be asked.

    Returns:
      (places [M] int32, mask [M] float32): M is `share` of T, rounded up; the mask is 1 for `share` of the
      real places (at least one where there is any), 0 for the rest.
    """
    size = max(1, math.ceil(share * asked.shape[0]))
    order = jnp.where(asked, jax.random.uniform(key, asked.shape), 2.0)
    places = jax.lax.top_k(-order, size)[1].astype(jnp.int32)
    wanted = jnp.minimum(jnp.ceil(share * jnp.sum(asked)), size)
    return places, (jnp.arange(size) < wanted).astype(jnp.float32)


def summarize(sums: dict[str, Any]) -> dict[str, float]:
    """Returns loss (nats per hidden token), perplexity over them and accuracy."""
    tokens = max(sums["tokens"], 1.0)
    loss = sums["nll"] / tokens
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "accuracy": sums["correct"] / tokens}


def _row_keys(tokens: Array) -> Array:
    """A key for each row that depends on what stands in it only."""
    words = tokens.astype(jnp.uint32) * (2 * jnp.arange(tokens.shape[1], dtype=jnp.uint32) + 1)
    return jax.vmap(lambda word: jax.random.fold_in(jax.random.key(0), word))(jnp.sum(words, axis=1, dtype=jnp.uint32))
