"""Sums of losses of logits, without an array of predictions x vocabulary.

Notable: predictions are cut into chunks; when a gradient is asked for, the forward pass computes each
chunk's gradient at once (the loss is a scalar, so its cotangent is one number that scales the
stored result). Logits live for one chunk only and are never computed twice: memory grows with
`chunk x V`, not with `B x T x V` (the idea of fused linear cross-entropy, arXiv 2410.10989).
What is done with the logits is an `Objective`: cross-entropy with the right token, the distance from a teacher's
distribution, or a weighted sum of several on the same logits. What an objective reads beside the logits, a
teacher's weights among it, has no gradient by construction.

Dims: B batch, T predictions of a row, D embed, V what is chosen from.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Head = Callable[[Any, Array], Array]
Scores = Any
MASK = "mask"


class Objective(Protocol):
    """What a loss makes of the logits of a chunk; hashable.

    `shared` is the same for all chunks; `piece` holds arrays cut to the chunk, [B, c, ...] each.
    """

    def __call__(
        self, logits: Float[Array, "B c V"], shared: Any, piece: Mapping[str, Array]
    ) -> tuple[Float[Array, "B c"], Scores]:
        """Returns (loss of each prediction, what else is reported of each, arrays [B, c, ...])."""

    def with_gradient(
        self, logits: Float[Array, "B c V"], shared: Any, piece: Mapping[str, Array]
    ) -> tuple[Float[Array, "B c"], Scores, Float[Array, "B c V"]]:
        """Returns the same, and the gradient of the sum of the losses by the logits."""


def differentiated(objective: Objective, logits: Array, shared: Any, piece: Mapping[str, Array]) -> tuple:
    """An objective's `with_gradient` by automatic differentiation."""

    def summed(logits: Array) -> tuple[Array, Any]:
        loss, scores = objective(logits, shared, piece)
        return jnp.sum(loss), (loss, scores)

    gradient, (loss, scores) = jax.grad(summed, has_aux=True)(logits)
    return loss, scores, gradient


def _split(chunk: int, tree: Any) -> Any:
    """[B, T, ...] -> [pieces, B, c, ...], zeros at the end: chunks along time keep the batch sharded as it was."""
    batch, length = jax.tree.leaves(tree)[0].shape[:2]
    pieces = -(-length // max(1, min(length, chunk // batch)))
    size = -(-length // pieces)
    unused = pieces * size - length

    def cut(a: Array) -> Array:
        if unused:
            a = jnp.pad(a, [(0, 0), (0, unused)] + [(0, 0)] * (a.ndim - 2))
        return jnp.swapaxes(a.reshape(batch, pieces, size, *a.shape[2:]), 0, 1)

    return jax.tree.map(cut, tree)


def _join(tree: Any, length: int) -> Any:
    """[pieces, B, c, ...] -> [B, T, ...]."""

    def joined(a: Array) -> Array:
        a = jnp.swapaxes(a, 0, 1)
        return a.reshape(a.shape[0], -1, *a.shape[3:])[:, :length]

    return jax.tree.map(joined, tree)


def _head_scale(dtype: jnp.dtype) -> float:
    """A power of two that keeps small probabilities, as gradients of logits, above float16's least number."""
    return 1024.0 if dtype == jnp.float16 else 1.0


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _summed(objective, head, chunk, params, hidden, shared, pieces):
    def body(total, cut):
        hidden_piece, piece = cut
        loss, scores = objective(head(params, hidden_piece).astype(jnp.float32), shared, piece)
        return total + jnp.sum(loss * piece[MASK]), scores

    total, scores = jax.lax.scan(body, jnp.zeros((), jnp.float32), _split(chunk, (hidden, pieces)))
    return total, _join(scores, hidden.shape[1])


def _forward(objective, head, chunk, params, hidden, shared, pieces):
    def body(carry, cut):
        hidden_piece, piece = cut
        logits, pull_back = jax.vjp(head, params, hidden_piece)
        loss, scores, d_logits = objective.with_gradient(logits.astype(jnp.float32), shared, piece)
        # The loss scale of the step reaches only what is differentiated after this: the head needs its own.
        d_logits = d_logits * (piece[MASK] * _head_scale(hidden.dtype))[..., None]
        d_params, d_hidden = pull_back(d_logits.astype(logits.dtype))
        carry = jax.tree.map(jnp.add, carry, (jnp.sum(loss * piece[MASK]), d_params))
        return carry, (scores, d_hidden)

    start = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    (total, d_params), (scores, d_hidden) = jax.lax.scan(body, start, _split(chunk, (hidden, pieces)))
    length = hidden.shape[1]
    return (total, _join(scores, length)), (d_params, _join(d_hidden, length))


def _backward(objective, head, chunk, residuals, cotangent):
    d_params, d_hidden = residuals
    g = cotangent[0] / _head_scale(d_hidden.dtype)  # the scores are reported, not differentiated
    return jax.tree.map(lambda d: d * g.astype(d.dtype), d_params), d_hidden * g.astype(d_hidden.dtype), None, None


_summed.defvjp(_forward, _backward)


def chunked_loss(
    objective: Objective,
    head: Head,
    params: Any,
    hidden: Float[Array, "B T D"],
    shared: Any,
    pieces: Mapping[str, Any],
    *,
    chunk: int = 1024,
) -> tuple[Float[Array, ""], Scores]:
    """Sums an objective of `head(params, hidden)` over the predictions where the mask is 1.

    Args:
      head: `(params, hidden [..., D]) -> logits [..., V]`; best in float32 (`contract(..., dtype=float32)`);
        must be hashable (a bound method of a frozen object is).
      params: only what `head` reads: its gradient is added up chunk by chunk.
      shared: what the objective reads in every chunk; not differentiated.
      pieces: arrays [B, T, ...] that the objective reads cut to the chunk, with "mask" [B, T]; not differentiated.
      chunk: predictions whose logits exist at a time, over the whole batch.

    Returns:
      (summed loss, scores of every prediction); only the first is differentiable.
    """
    pieces = {**pieces, MASK: pieces[MASK].astype(jnp.float32)}
    return _summed(objective, head, chunk, params, hidden, shared, pieces)
