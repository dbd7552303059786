"""What each attention kind should give, from its definition: dense, slow, one function each."""

import jax.numpy as jnp
import numpy as np
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


def transformer_xl(pairs: Pairs) -> Array:
    """(q + u) . k + (q + w) . r(distance), softmax over all that is visible."""
    params, (heads, width) = pairs.params, (pairs.cfg.heads, pairs.cfg.width)
    frequencies = 10_000.0 ** (-jnp.arange(0, width, 2) / width)
    angles = pairs.distance[..., None] * frequencies
    r = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1) @ params["distance"]
    r = r.reshape(*pairs.distance.shape, heads, -1)
    content = jnp.einsum("BTNH,BSNH->BNTS", pairs.q + params["content_bias"], pairs.k)
    position = jnp.einsum("BTNH,TSNH->BNTS", pairs.q + params["position_bias"], r)
    scores = jnp.where(pairs.see[:, None], (content + position) * pairs.cfg.attention_scale, -1e30)
    return jnp.einsum("BNTS,BSNH->BTNH", pairs.softmax(scores), pairs.v)


def chunk(pairs: Pairs) -> Array:
    """Softmax over the token's own chunk of slots and `back` chunks around; causality has cut what lies ahead."""
    of = np.arange(pairs.see.shape[1]) // pairs.options.size
    return pairs.attend(pairs.see & (abs(of[:, None] - of) <= pairs.options.back))


def dilated(pairs: Pairs) -> Array:
    """Softmax over all that is less than a stride away, or a multiple of it."""
    distance, stride = abs(pairs.distance), pairs.options.stride
    return pairs.attend(pairs.see & ((distance < stride) | (distance % stride == 0)))


def block_sparse(pairs: Pairs) -> Array:
    """Softmax over blocks: near ones, the first ones, drawn ones; an encoder's first ones see all."""
    options, causal = pairs.options, pairs.cfg.causal
    of = np.arange(pairs.see.shape[1]) // options.block
    near, first = abs(of[:, None] - of) <= options.window // 2, of < options.global_blocks
    seen = near | first | ((not causal) & first[:, None])
    for i in range(of[-1] + 1):
        others = {j for j in range(of[-1] + 1) if abs(i - j) > options.window // 2 and j >= options.global_blocks}
        others = sorted(j for j in others if j < i or not causal)
        drawn = np.random.default_rng((options.seed, i)).choice(others, min(options.random, len(others)), replace=False)
        seen |= (of == i)[:, None] & np.isin(of, drawn)
    return pairs.attend(pairs.see & seen)
