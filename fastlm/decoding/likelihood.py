"""How likely a model finds given continuations: what multiple-choice benchmarks ask.

Notable: requests are sorted by length and padded to powers of two, so that few programs are compiled;
the vocabulary is computed in chunks. A text longer than the context keeps its end, and how many did is logged;
of a continuation that is longer by itself only that end is scored.

Dims: B batch, T time.
"""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fastlm.errors import UserError
from fastlm.models import Model, attention
from fastlm.ops.cross_entropy import chunked_scores

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Of one continuation: log-probability in nats, and whether every token of it was the likeliest."""

    log_probability: float
    greedy: bool


@functools.partial(jax.jit, static_argnums=0)
def _score(
    model: Model,
    params: Any,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    real: Int[Array, "B T"],
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Returns summed log-probabilities and how many targets were not the likeliest; `real` is 0 for padding."""
    hidden, _ = model.features(params, tokens, segment_ids=real, packed=False)
    scores = chunked_scores(model.head, model.head_params(params), hidden, targets, chunk=model.compute.loss_chunk)
    return -jnp.sum(scores.nll * mask, axis=1), jnp.sum((1 - scores.correct) * mask, axis=1)


def likelihoods(
    model: Model, params: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_size: int = 8
) -> list[Likelihood]:
    """Returns the likelihood of each continuation after its context.

    Args:
      pairs: (context, continuation) as token ids; a context has at least one token.

    Raises:
      UserError: a context without a token.
    """
    room = model.cfg.max_length
    for number, (context, _) in enumerate(pairs):
        if not len(context):
            raise UserError(f"request {number}: a context needs at least one token; give the start token")
    _say_what_is_cut(pairs, room)
    # Kinds that cannot decode may group tokens by the length of the row (LSH), so theirs must not depend on the batch.
    grouped = not all(attention.kind(model.cfg.layer(i).attention).decode for i in model.cfg.stack)
    lengths = [len(context) + len(continuation) for context, continuation in pairs]
    order = sorted(range(len(pairs)), key=lambda i: -lengths[i])
    found: list[Likelihood] = [Likelihood(0.0, True)] * len(pairs)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = _rows([pairs[i] for i in chosen], batch_size, room, least=room if grouped else 16)
        sums, misses = jax.device_get(_score(model, params, *batch))
        for row, i in enumerate(chosen):
            found[i] = Likelihood(float(sums[row]), bool(misses[row] == 0))
    return found


def _rows(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], rows: int, room: int, least: int
) -> tuple[np.ndarray, ...]:
    """Returns tokens, targets, mask and what is real, [rows, T], T a power of two or the model's context."""
    whole = [np.concatenate([context, continuation]).astype(np.int32)[-room - 1 :] for context, continuation in pairs]
    longest = max(len(ids) for ids in whole) - 1
    width = min(room, max(least, 1 << (longest - 1).bit_length()))
    tokens, targets = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.int32)
    mask, real = np.zeros((rows, width), np.float32), np.zeros((rows, width), np.int32)
    for row, (ids, (_, continuation)) in enumerate(zip(whole, pairs)):
        tokens[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
        mask[row, max(0, len(ids) - 1 - len(continuation)) : len(ids) - 1] = 1
        real[row, : len(ids) - 1] = 1
    return tokens, targets, mask, real


def _say_what_is_cut(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], room: int) -> None:
    cut = sum(len(context) + len(continuation) > room + 1 for context, continuation in pairs)
    longer = sum(len(continuation) > room for _, continuation in pairs)
    if cut:
        _logger.warning(
            "%d of %d texts are cut at their beginning to the model's context of %d tokens (model.max_length); of %d "
            "of them the continuation alone is longer, and scored by its last %d tokens",
            *(cut, len(pairs), room, longer, room),
        )


def windows(ids: Sequence[int], start: int, room: int) -> list[tuple[list[int], list[int]]]:
    """Cuts a text into (context, continuation) pairs that score every token of it once, the first after `start`."""
    ids, pairs = list(ids), []
    for begin in range(0, len(ids), room):
        part = ids[begin : begin + room]
        # All of the window is scored; the token before it is its context.
        pairs.append(([ids[begin - 1] if begin else start], part))
    return pairs
