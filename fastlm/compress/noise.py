"""Rows that nobody wrote: words of a row give way to others of its batch, and the teacher says what that means.

Notable: a small labelled set is soon known by heart, by the teacher too, whose answers there say little more than the
labels. Changed rows are as many as there are steps, and cost no more than the rows they are made of. Their labels are
no longer true, so the task's own loss leaves these rows out. A cheap relative of TinyBERT's augmentation (arXiv
1909.10351), whose words fit their place (`experiments.augment_texts` writes such rows), and of the masked text of
Tang et al. (1903.12136), whose replaced words have the right frequency, as here.
Left out: decoders, whose words are their targets too.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fastlm.compress.on_policy import WRITTEN
from fastlm.compress.setting import Setting
from fastlm.errors import UserError
from fastlm.tasks.rows import segments
from fastlm.tasks.task import Batch


@dataclasses.dataclass(frozen=True)
class Noise:
    """How much of the batches is changed.

    Attributes:
      rows: share of the rows that are changed; 0 for none.
      words: of a changed row, the share of words that may give way: drawn for each row between 0 and this.
    """

    rows: float = 0.0
    words: float = 0.4

    def __post_init__(self) -> None:
        for key in ("rows", "words"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"{key}: must be from 0 to 1, got {getattr(self, key)}")


@dataclasses.dataclass(frozen=True)
class Noisy:
    """Changes batches; see the header.

    Attributes:
      words: [V], whether a token stands for text, and not for the layout of rows.
    """

    how: Noise
    words: np.ndarray

    def __call__(self, weights: object, batch: Batch, step: Array, rng: Array | None) -> Batch:
        """Returns the batch with some rows changed, and "written" [B] 1 for these. Evaluation (no key) keeps it."""
        del weights, step
        tokens = batch["tokens"]
        rows, length = tokens.shape
        if rng is None:
            return batch | {WRITTEN: jnp.zeros(rows, jnp.float32)}
        which, how_much, where, what = jax.random.split(rng, 4)
        changed = jax.random.uniform(which, (rows,)) < self.how.rows
        share = self.how.words * jax.random.uniform(how_much, (rows, 1))
        other = tokens.reshape(-1)[jax.random.randint(what, (rows, length), 0, tokens.size)]
        is_text = jnp.asarray(self.words)
        free = is_text[tokens] & is_text[other] & (segments(batch) != 0) & changed[:, None]
        moved = free & (jax.random.uniform(where, (rows, length)) < share)
        return batch | {"tokens": jnp.where(moved, other, tokens), WRITTEN: changed.astype(jnp.float32)}


def make(how: Noise, setting: Setting, where: str) -> Noisy | None:
    """Returns what changes batches, or None if nothing does.

    Raises:
      UserError: a model whose words are not all it reads.
    """
    if not how.rows:
        return None
    if setting.model.cfg.family != "encoder" or setting.model.cfg.head != "sequence":
        raise UserError(f"{where}.rows: is for tasks that say something of whole texts (classification); set it to 0")
    words = np.zeros(setting.model.cfg.vocab_size, bool)
    words[: setting.tokenizer.vocab_size] = setting.tokenizer.token_bytes > 0
    return Noisy(how, words)
