"""Questions made from the context itself: a span is the answer, the words around it with a gap are the question.

Notable: made on the device, anew in every step, so that little data teaches what all extractive questions
need: to find the place in the context that the question speaks of. After span selection pre-training (arXiv
1909.04120) and cloze questions (1906.04980). A row keeps its shape: the made question is as long as the one that
it replaces. Left out: names and dates as preferred answers; any few tokens are one.

Dims: B batch, T time, G tokens of the gap.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from fastlm.tasks.task import Batch

LONGEST_ANSWER = 5


def ask(batch: Batch, rng: Array, gap: Int[Array, "G"], opening: int, share: float) -> Batch:
    """Replaces the question of a share of rows, and with it their answer.

    Args:
      batch: windows as `question_answering` encodes them.
      rng: key of everything drawn here.
      gap: tokens that stand for what is missing.
      opening: tokens of a row before its question.
      share: of the rows, chosen independently.

    Rows whose question has no room for the gap and a word on each side, or whose context is hardly longer than the
    question, stay as they are.
    """
    chance, size_key, left_key, place_key = jax.random.split(rng, 4)
    first, stop = batch["context_first"], batch["context_stop"]
    room = first - 1 - opening - len(gap)  # for words on both sides; before the context stands a separator
    size = jax.random.randint(size_key, first.shape, 1, LONGEST_ANSWER + 1)
    left = jax.random.randint(left_key, first.shape, 1, jnp.maximum(room, 2))
    last_start = stop - size - (room - left)
    start = jax.random.randint(place_key, first.shape, first + left, jnp.maximum(last_start, first + left) + 1)
    fits = (room >= 2) & (last_start >= first + left)
    chosen = fits & (jax.random.uniform(chance, first.shape) < share)

    place = jnp.arange(batch["tokens"].shape[1])[None] - opening
    in_gap = place - left[:, None]
    before = start[:, None] + in_gap
    after = before - len(gap) + size[:, None]
    source = jnp.clip(jnp.where(in_gap < 0, before, after), 0, batch["tokens"].shape[1] - 1)
    made = jnp.take_along_axis(batch["tokens"], source, axis=1)
    made = jnp.where((in_gap >= 0) & (in_gap < len(gap)), gap[jnp.clip(in_gap, 0, len(gap) - 1)], made)
    in_question = (place >= 0) & (place + opening < first[:, None] - 1)
    return batch | {
        "tokens": jnp.where(chosen[:, None] & in_question, made, batch["tokens"]),
        "answer_first": jnp.where(chosen, start, batch["answer_first"]),
        "answer_last": jnp.where(chosen, start + size - 1, batch["answer_last"]),
    }
