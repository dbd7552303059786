"""Cross-entropy with targets that are a few ids with weights (see `sparse_targets`).

Notable: weights need not sum to 1, so the gradient is sum(weights) softmax - weights, and not softmax - weights. It is
written out, because that of a look-up is a scatter into an array of zeros as large as the logits.
Left out: temperatures, under which a sample drawn at temperature 1 is no longer unbiased.

Dims: V vocabulary, K slots.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.custom_vjp
def sparse_cross_entropy(
    logits: Float[Array, "... V"], ids: Int[Array, "... K"], weights: Float[Array, "... K"]
) -> Float[Array, "..."]:
    """Returns -sum_k weights[k] log softmax(logits)[ids[k]], in nats and float32.

    Only the logits have a gradient.
    """
    return _value(logits, ids, weights)[0]


def sparse_cross_entropy_and_gradient(
    logits: Float[Array, "... V"], ids: Int[Array, "... K"], weights: Float[Array, "... K"]
) -> tuple[Float[Array, "..."], Float[Array, "... V"]]:
    """Returns `sparse_cross_entropy` and the gradient of its sum by the logits, in float32."""
    value, log_z = _value(logits, ids, weights)
    return value, _gradient(logits, ids, weights, log_z)


def _value(logits: Array, ids: Array, weights: Array) -> tuple[Array, Array]:
    wide = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(wide, axis=-1)
    log_q = jnp.take_along_axis(wide, ids, axis=-1) - log_z[..., None]
    # A slot that is not in use must not look at the logit of token 0, which may be -inf.
    return -jnp.sum(jnp.where(weights != 0, weights * log_q, 0.0), axis=-1), log_z


def _gradient(logits: Array, ids: Array, weights: Array, log_z: Array) -> Array:
    probabilities = jnp.exp(logits.astype(jnp.float32) - log_z[..., None])
    gradient = jnp.sum(weights, axis=-1, keepdims=True) * probabilities
    return jnp.vectorize(lambda one, at, w: one.at[at].add(-w), signature="(v),(k),(k)->(v)")(gradient, ids, weights)


def _forward(logits: Array, ids: Array, weights: Array) -> tuple[Array, tuple[Array, ...]]:
    value, log_z = _value(logits, ids, weights)
    return value, (logits, ids, weights, log_z)


def _backward(residuals: tuple[Array, ...], cotangent: Array) -> tuple[Array, None, None]:
    logits, ids, weights, log_z = residuals
    return _gradient(logits, ids, weights * cotangent[..., None], log_z).astype(logits.dtype), None, None


sparse_cross_entropy.defvjp(_forward, _backward)
