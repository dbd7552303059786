"""Cross-entropy over a vocabulary without an array of tokens x vocabulary.

Notable: tokens are cut into chunks; when a gradient is asked for, the forward pass computes each
chunk's gradient at once (the loss is a scalar, so its cotangent is one number that scales the
stored result). Logits live for one chunk only and are never computed twice: memory grows with
`chunk x V`, not with `B x T x V` (the idea of fused linear cross-entropy, arXiv 2410.10989).
The gradient of the logits is written out, softmax minus target, because autodiff of the target's
lookup is a scatter into a zero array of all logits. A prediction counts as correct when no logit
exceeds the target's: a maximum, which is needed anyway; an argmax costs XLA:CPU more than the loss.
z-loss is PaLM's (arXiv 2204.02311, section 5), label smoothing that of arXiv 1512.00567.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Head = Callable[[Any, Array], Array]


@flax.struct.dataclass
class TokenScores:
    """What a model made of each target: nll in nats, and whether it was the likeliest; float32."""

    nll: Float[Array, "B T"]
    correct: Float[Array, "B T"]


class _Terms(NamedTuple):
    loss: Array
    nll: Array
    correct: Array
    log_z: Array


def _terms(logits: Array, targets: Array, z_loss: float, label_smoothing: float) -> _Terms:
    """Returns per-token float32 terms of logits [..., V]."""
    top = jnp.max(logits, axis=-1)
    log_z = top + jnp.log(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1))
    target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = nll = log_z - target_logit
    if label_smoothing:
        loss = (1 - label_smoothing) * nll + label_smoothing * (log_z - jnp.mean(logits, axis=-1))
    if z_loss:
        loss = loss + z_loss * jnp.square(log_z)
    return _Terms(loss, nll, (target_logit >= top).astype(jnp.float32), log_z)


def _logits_gradient(logits, targets, mask, log_z, z_loss, label_smoothing) -> Array:
    probability = jnp.exp(logits - log_z[..., None])
    if z_loss:
        probability = probability * (1 + 2 * z_loss * log_z)[..., None]
    is_target = targets[..., None] == jnp.arange(logits.shape[-1], dtype=targets.dtype)
    wanted = jnp.where(is_target, 1 - label_smoothing, 0.0) + label_smoothing / logits.shape[-1]
    return (probability - wanted) * mask[..., None]


def token_losses(
    logits: Float[Array, "... V"], targets: Int[Array, "..."], z_loss: float = 0.0, label_smoothing: float = 0.0
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Returns (training loss, negative log-likelihood) per token, in nats and float32."""
    terms = _terms(logits.astype(jnp.float32), targets, z_loss, label_smoothing)
    return terms.loss, terms.nll


def _split(chunk: int, *arrays: Array) -> tuple[Array, ...]:
    """[B, T, ...] -> [pieces, B, c, ...], zeros at the end: chunks along time keep the batch sharded as it was."""
    batch, length = arrays[0].shape[:2]
    pieces = -(-length // max(1, min(length, chunk // batch)))
    size = -(-length // pieces)
    unused = pieces * size - length

    def cut(a: Array) -> Array:
        if unused:
            a = jnp.pad(a, [(0, 0), (0, unused)] + [(0, 0)] * (a.ndim - 2))
        return jnp.swapaxes(a.reshape(batch, pieces, size, *a.shape[2:]), 0, 1)

    return tuple(cut(a) for a in arrays)


def _join(pieces: Array, length: int) -> Array:
    """[pieces, B, c, ...] -> [B, T, ...]."""
    pieces = jnp.swapaxes(pieces, 0, 1)
    return pieces.reshape(pieces.shape[0], -1, *pieces.shape[3:])[:, :length]


def _joined(scores: TokenScores, targets: Array) -> TokenScores:
    return jax.tree.map(lambda pieces: _join(pieces, targets.shape[1]), scores)


def _head_scale(dtype: jnp.dtype) -> float:
    """A power of two that keeps small probabilities, as gradients of logits, above float16's least number."""
    return 1024.0 if dtype == jnp.float16 else 1.0


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _summed(head, chunk, z_loss, label_smoothing, params, hidden, targets, mask):
    def body(total, piece):
        hidden_piece, targets_piece, mask_piece = piece
        terms = _terms(head(params, hidden_piece).astype(jnp.float32), targets_piece, z_loss, label_smoothing)
        return total + jnp.sum(terms.loss * mask_piece), TokenScores(terms.nll, terms.correct)

    total, scores = jax.lax.scan(body, jnp.zeros((), jnp.float32), _split(chunk, hidden, targets, mask))
    return total, _joined(scores, targets)


def _forward(head, chunk, z_loss, label_smoothing, params, hidden, targets, mask):
    def body(carry, piece):
        hidden_piece, targets_piece, mask_piece = piece
        logits, pull_back = jax.vjp(head, params, hidden_piece)
        wide = logits.astype(jnp.float32)
        terms = _terms(wide, targets_piece, z_loss, label_smoothing)
        d_logits = _logits_gradient(wide, targets_piece, mask_piece, terms.log_z, z_loss, label_smoothing)
        # The loss scale of the step reaches only what is differentiated after this: the head needs its own.
        d_params, d_hidden = pull_back((d_logits * _head_scale(hidden.dtype)).astype(logits.dtype))
        carry = jax.tree.map(jnp.add, carry, (jnp.sum(terms.loss * mask_piece), d_params))
        return carry, (TokenScores(terms.nll, terms.correct), d_hidden)

    start = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    (total, d_params), (scores, d_hidden) = jax.lax.scan(body, start, _split(chunk, hidden, targets, mask))
    return (total, _joined(scores, targets)), (d_params, _join(d_hidden, targets.shape[1]))


def _backward(head, chunk, z_loss, label_smoothing, residuals, cotangent):
    d_params, d_hidden = residuals
    g = cotangent[0] / _head_scale(d_hidden.dtype)  # the scores are reported, not differentiated
    return jax.tree.map(lambda d: d * g.astype(d.dtype), d_params), d_hidden * g.astype(d_hidden.dtype), None, None


_summed.defvjp(_forward, _backward)


def chunked_cross_entropy(
    head: Head,
    params: Any,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    chunk: int = 1024,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Float[Array, ""], TokenScores]:
    """Sums the loss of `head(params, hidden)` against `targets` over the tokens where `mask` is 1.

    Args:
      head: `(params, hidden [..., D]) -> logits [..., V]`; best in float32 (`contract(..., dtype=float32)`);
        must be hashable (a bound method of a frozen object is).
      params: only what `head` reads: its gradient is added up chunk by chunk.
      chunk: tokens whose logits exist at a time, over the whole batch.

    Returns:
      (summed training loss, scores of every token); only the first is differentiable.
    """
    return _summed(head, chunk, z_loss, label_smoothing, params, hidden, targets, mask.astype(jnp.float32))


def chunked_scores(
    head: Head, params: Any, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"], *, chunk: int = 1024
) -> TokenScores:
    """Scores every token, without a loss."""
    return _summed(head, chunk, 0.0, 0.0, params, hidden, targets, jnp.ones(targets.shape, jnp.float32))[1]
