"""Cross-entropy over a vocabulary, in chunks (see `chunked_loss`).

Notable: the gradient of the logits is written out, softmax minus target, because autodiff of the target's
lookup is a scatter into a zero array of all logits. A prediction counts as correct when no logit
exceeds the target's: a maximum, which is needed anyway; an argmax costs XLA:CPU more than the loss.
z-loss is PaLM's (arXiv 2204.02311, section 5), label smoothing that of arXiv 1512.00567.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastlm.ops.chunked_loss import MASK, Head, chunked_loss

TARGETS = "targets"


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


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """The objective; reads `piece["targets"]`, scores as `TokenScores`.

    Attributes:
      z_loss: weight of log(Z)^2.
      label_smoothing: share of the target spread evenly over the vocabulary.
    """

    z_loss: float = 0.0
    label_smoothing: float = 0.0

    def __call__(self, logits: Array, shared: Any, piece: Mapping[str, Array]) -> tuple[Array, TokenScores]:
        """Returns (loss, scores) of each prediction."""
        del shared
        terms = _terms(logits, piece[TARGETS], self.z_loss, self.label_smoothing)
        return terms.loss, TokenScores(terms.nll, terms.correct)

    def with_gradient(self, logits: Array, shared: Any, piece: Mapping[str, Array]) -> tuple[Array, TokenScores, Array]:
        """Returns the same and the gradient by the logits."""
        del shared
        targets = piece[TARGETS]
        terms = _terms(logits, targets, self.z_loss, self.label_smoothing)
        probability = jnp.exp(logits - terms.log_z[..., None])
        if self.z_loss:
            probability = probability * (1 + 2 * self.z_loss * terms.log_z)[..., None]
        is_target = targets[..., None] == jnp.arange(logits.shape[-1], dtype=targets.dtype)
        wanted = jnp.where(is_target, 1 - self.label_smoothing, 0.0) + self.label_smoothing / logits.shape[-1]
        return terms.loss, TokenScores(terms.nll, terms.correct), probability - wanted


def token_losses(
    logits: Float[Array, "... V"], targets: Int[Array, "..."], z_loss: float = 0.0, label_smoothing: float = 0.0
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Returns (training loss, negative log-likelihood) per token, in nats and float32."""
    terms = _terms(logits.astype(jnp.float32), targets, z_loss, label_smoothing)
    return terms.loss, terms.nll


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

    Returns:
      (summed training loss, scores of every token); only the first is differentiable.
    """
    pieces = {TARGETS: targets, MASK: mask}
    return chunked_loss(CrossEntropy(z_loss, label_smoothing), head, params, hidden, (), pieces, chunk=chunk)


def chunked_scores(
    head: Head, params: Any, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"], *, chunk: int = 1024
) -> TokenScores:
    """Scores every token, without a loss."""
    return chunked_cross_entropy(head, params, hidden, targets, jnp.ones(targets.shape, jnp.float32), chunk=chunk)[1]
