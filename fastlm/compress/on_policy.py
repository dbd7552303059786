"""Learning where the student goes wrong: it writes, and the teacher says what should have come (GKD, arXiv 2306.13649).

Notable: a part of the batch's preparation, which is never differentiated: rows keep their beginning (of a language
model the first `prompt` tokens, of a target the start alone), the student draws the rest with its weights of this very
step, and everything behind the end it writes counts nothing. Whether a batch is written anew is drawn once for the
whole batch with the probability `share`, so that the others cost nothing. What the student wrote itself is no
truth to be learned: the task's own loss leaves it out.
Left out: gradients through the sampling (of MiniLLM, arXiv 2306.08543, reverse KL is then the single-step part of the
gradient; the long one, with its length normalisation, is missing), mixing in the teacher's proposals, replay of older
samples (DistiLLM).

Dims: B batch, T tokens of a row.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from fastlm.compress import schedules
from fastlm.compress.setting import Setting
from fastlm.decoding import inputs, sample
from fastlm.decoding import rules as token_rules
from fastlm.errors import UserError
from fastlm.models import Model
from fastlm.tasks.language_modeling import LanguageModeling
from fastlm.tasks.rows import segments
from fastlm.tasks.sequence_to_sequence import SequenceToSequence
from fastlm.tasks.task import Batch

WRITTEN = "written"  # in a batch, 1 for rows that the student wrote [B]


@dataclasses.dataclass(frozen=True)
class OnPolicy:
    """How often, and how, the student writes.

    Attributes:
      share: of the batches, a number or a schedule; 0 for none.
      prompt: tokens of a language model's rows that are kept; 0 for half.
      temperature: of the student's draws.
    """

    share: float | str = 0.0
    prompt: int = 0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.prompt < 0 or not 0 < self.temperature < float("inf"):
            raise UserError(
                f"prompt must be at least 0 and temperature a positive number, got {self.prompt}, {self.temperature}"
            )


@dataclasses.dataclass(frozen=True)
class Writer:
    """Replaces batches by what the student writes; see the header."""

    model: Model
    how: OnPolicy
    share: schedules.Schedule
    end: int
    prompt: int

    def __call__(self, weights: Any, batch: Batch, step: Array, rng: Array | None) -> Batch:
        """Returns the batch, or what the student makes of it; with "written" [B]. Evaluation (no key) keeps it."""
        kept = batch | {WRITTEN: jnp.zeros(batch["tokens"].shape[0], jnp.float32)}
        if rng is None:
            return kept
        coin, draws = jax.random.split(rng)
        write = lambda: self.write(weights["model"], batch, draws) | {WRITTEN: jnp.ones_like(kept[WRITTEN])}
        return jax.lax.cond(jax.random.uniform(coin) < self.share(step), write, lambda: kept)

    def write(self, params: Any, batch: Batch, rng: Array) -> Batch:
        """Returns a batch of the same shapes in which the student has written what follows each row's beginning."""
        rows, length = batch["tokens"].shape
        known, most = self._known(batch)
        source = {}
        if "source" in batch:
            source = {"sources": batch["source"], "segments": segments(batch, "source")}
        given = inputs.Inputs(batch["tokens"][:, :most], known, **source)
        steps = length + 1 - (most if "tokens_length" not in batch else 1)
        cache, logits = inputs.prefill(self.model, params, most + steps, given)
        how = sample.Sampling(temperature=self.how.temperature)
        rules = token_rules.make(self.model.cfg.vocab_size, steps)
        keys, none = jax.random.split(rng, rows), jnp.zeros((rows,), jnp.int32)
        _, _, new, _ = sample.decode(self.model, params, steps, how, rules, cache, logits, keys, none)
        return batch | self._joined(batch, known, new)

    def _known(self, batch: Batch) -> tuple[Int[Array, "B"], int]:
        """Returns how many tokens of each row are kept, and the most that any row could keep."""
        rows, length = batch["tokens"].shape
        if "scored" in batch:  # a decoder that reads source and target as one
            return jnp.argmax(batch["scored"] > 0, axis=1).astype(jnp.int32) + 1, length
        kept = 1 if "source" in batch else self.prompt
        return jnp.full((rows,), kept, jnp.int32), kept

    def _joined(self, batch: Batch, known: Int[Array, "B"], new: Int[Array, "B S"]) -> Batch:
        """Returns what of the batch changes."""
        rows, length = batch["tokens"].shape
        places = jnp.arange(length + 1)
        behind = jnp.clip(places - known[:, None], 0, new.shape[1] - 1)
        old = jnp.pad(batch["tokens"], ((0, 0), (0, 1)))
        whole = jnp.where(places < known[:, None], old, jnp.take_along_axis(new, behind, axis=1)).astype(jnp.int32)
        fresh = places >= known[:, None]
        ends = fresh & (whole == self.end)
        ended: Bool[Array, "B T"] = (jnp.cumsum(ends, axis=1) - ends) > 0  # behind an end that was written
        counts = (fresh & ~ended)[:, 1:]
        changed = {"tokens": whole[:, :-1], "targets": whole[:, 1:]}
        if "tokens_length" not in batch:
            real = jnp.any(batch["loss_mask"] > 0, axis=1, keepdims=True)  # rows of padding stay that
            ones = jnp.ones((rows, length), jnp.int32)
            more = {"segment_ids": ones, "positions": ones * jnp.arange(length)}
            changed |= {name: value for name, value in more.items() if name in batch}
            return changed | {"loss_mask": (counts & real).astype(batch["loss_mask"].dtype)}
        lengths = jnp.max(jnp.where(counts, places[1:], 0), axis=1)
        changed["tokens_length"] = lengths.astype(batch["tokens_length"].dtype)
        return changed | ({"scored": counts.astype(batch["scored"].dtype)} if "scored" in batch else {})


def make(how: OnPolicy, setting: Setting, where: str) -> Writer | None:
    """Returns what writes; None if nothing ever is.

    Raises:
      UserError: a task that writes nothing, a kind of attention that cannot, a prompt that leaves no room.
    """
    if how.share == 0:
        return None
    if not isinstance(setting.kind, (LanguageModeling, SequenceToSequence)):
        raise UserError(f"{where}.share: a model of this task writes no text; set it to 0")
    share = schedules.make(how.share, setting.steps, f"{where}.share")
    inputs.check_kinds(setting.model.cfg)
    prompt = how.prompt or max(1, setting.length // 2)
    if prompt >= setting.length:
        raise UserError(
            f"{where}.prompt: {prompt} leaves nothing to write in rows of {setting.length} tokens; lower it"
        )
    return Writer(setting.model, how, share, setting.tokenizer.eos, prompt)
