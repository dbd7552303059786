"""What each attention kind should give, from its definition: dense, slow, one function each."""

import jax.numpy as jnp
from jaxtyping import Array

from fastlm.models.attention.performer import fixed_directions
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


def performer(pairs: Pairs) -> Array:
    """phi(x) = exp(w . x - |x|^2 / 2) of x times the root of the scale; the w of the seed."""
    options, width = pairs.options, pairs.cfg.head_dim
    w = fixed_directions(options.seed, options.count(width), width, options.orthogonal)

    def feature(x: Array) -> Array:
        x = x * pairs.cfg.attention_scale**0.5
        return jnp.exp(x @ w.T - jnp.sum(x**2, -1, keepdims=True) / 2) / len(w) ** 0.5

    return kernel(pairs, feature(pairs.q), feature(pairs.k))


def linformer(pairs: Pairs) -> Array:
    """Softmax over sums of keys and of values, each sum with its own weight for each real token."""
    params, real = pairs.params, jnp.any(pairs.see, axis=1)
    weights = lambda name: jnp.where(real[..., None], params[name][: real.shape[1]], 0)
    k = jnp.einsum("BSNH,BSR->BRNH", pairs.k, weights("key_rows"))
    v = jnp.einsum("BSNH,BSR->BRNH", pairs.v, weights("key_rows" if pairs.options.tied else "value_rows"))
    scores = jnp.einsum("BTNH,BRNH->BNTR", pairs.q, k) * pairs.cfg.attention_scale
    if pairs.cfg.attention_softcap:
        scores = pairs.cfg.attention_softcap * jnp.tanh(scores / pairs.cfg.attention_softcap)
    return jnp.einsum("BNTR,BRNH->BTNH", pairs.softmax(scores), v)
