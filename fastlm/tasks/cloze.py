"""Questions made from the context itself: a span is the answer, the words around it with a gap are the question.

Notable: made on the device, anew in every step, so that little data teaches what all extractive questions
need: to find the place in the context that the question speaks of. After span selection pre-training (arXiv
1909.04120) and cloze questions (1906.04980). The made question is as long as the one that it replaces. The
context is cut to a random part, often a short one: a place is found among few tokens before it is found
among many, and a model from scratch that only sees long contexts learns nothing for thousands of rows.
Left out: names and dates as preferred answers; any few tokens are one.

Dims: B batch, T time, G tokens of the gap.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from fastlm.data.tokenizers.layout import Layout
from fastlm.tasks.task import Batch

LONGEST_ANSWER = 5


def ask(batch: Batch, rng: Array, gap: Int[Array, "G"], layout: Layout, share: float) -> Batch:
    """Replaces the question and the answer of a share of rows, and cuts their context.

    Args:
      batch: windows as `question_answering` encodes them.
      rng: key of everything drawn here.
      gap: tokens that stand for what is missing.
      layout: the special tokens around question and context.
      share: of the rows, chosen independently.

    Rows whose question has no room for the gap and a token on each side, or whose context is hardly longer than
    the question, stay as they are.
    """
    chance, size_key, left_key, kept_key, cut_key, start_key = jax.random.split(rng, 6)
    first, length = batch["context_first"], batch["context_stop"] - batch["context_first"]
    opening, between, closing = map(len, layout.special)
    room = first - between - opening - len(gap)  # for tokens on both sides
    least = room + LONGEST_ANSWER
    chosen = (room >= 2) & (length >= least) & (jax.random.uniform(chance, first.shape) < share)

    size = jax.random.randint(size_key, first.shape, 1, LONGEST_ANSWER + 1)
    left = jax.random.randint(left_key, first.shape, 1, jnp.maximum(room, 2))
    # A uniform number squared: half of the contexts lose three quarters or more of what they can lose.
    kept = least + (jax.random.uniform(kept_key, first.shape) ** 2 * (length - least + 1)).astype(jnp.int32)
    cut = jax.random.randint(cut_key, first.shape, 0, jnp.maximum(length - kept, 0) + 1)
    start = first + jax.random.randint(start_key, first.shape, left, jnp.maximum(kept - size - room, 0) + left + 1)
    stop = first + kept
    made = {
        "tokens": _tokens(batch, gap, layout, cut=cut, stop=stop, left=left, start=start, size=size),
        "tokens_length": stop + closing,
        "context_stop": stop,
        "answer_first": start,
        "answer_last": start + size - 1,
    }
    select = lambda value, old: jnp.where(chosen.reshape(-1, *[1] * (value.ndim - 1)), value, old)
    return batch | {name: select(value, batch[name]) for name, value in made.items()}


def _tokens(batch: Batch, gap: Array, layout: Layout, **places: Int[Array, "B"]) -> Int[Array, "B T"]:
    """Lays out rows in which `cut` tokens of the context are skipped and `size` from `start` on are asked for."""
    cut, stop, left, start, size = (places[name][:, None] for name in ("cut", "stop", "left", "start", "size"))
    first, old_stop = batch["context_first"][:, None], batch["context_stop"][:, None]
    opening, between, closing = map(len, layout.special)
    place = jnp.arange(batch["tokens"].shape[1])[None]
    in_gap = place - opening - left
    in_question = (place >= opening) & (place < first - between)
    quoted = start + jnp.where(in_gap < 0, in_gap, in_gap - len(gap) + size)
    source = jnp.where(in_question, quoted + cut, jnp.where(place < first, place, place + cut))
    source = jnp.where(place >= stop, place - stop + old_stop, source)  # what closes a row
    tokens = jnp.take_along_axis(batch["tokens"], source, axis=1, mode="clip")
    asked = in_question & (in_gap >= 0) & (in_gap < len(gap))
    tokens = jnp.where(asked, gap[jnp.clip(in_gap, 0, len(gap) - 1)], tokens)
    return jnp.where(place >= stop + closing, 0, tokens)
