"""What each attention kind should give, from its definition: dense, slow, one function each."""

import jax.numpy as jnp
from jaxtyping import Array

from tests.models.attention.bench import Pairs


def full(pairs: Pairs) -> Array:
    """Softmax over all that is visible."""
    return pairs.attend(pairs.see)


def local(pairs: Pairs) -> Array:
    """Softmax over the window."""
    return pairs.attend(pairs.see & (abs(pairs.distance) < pairs.options.window))


def kernel(pairs: Pairs, feature_q: Array, feature_k: Array) -> Array:
    """Weights phi(q) . phi(k), normalized; features [B, T, N, P]."""
    weights = jnp.where(pairs.see[:, None], jnp.einsum("BTNP,BSNP->BNTS", feature_q, feature_k), 0)
    total = jnp.maximum(jnp.sum(weights, -1, keepdims=True), 1e-6)  # of padding, which sees nothing
    return jnp.einsum("BNTS,BSNH->BTNH", weights / total, pairs.v)


def linear(pairs: Pairs) -> Array:
    """phi(x) = elu(x) + 1."""
    feature = lambda x: jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))
    return kernel(pairs, feature(pairs.q), feature(pairs.k))
