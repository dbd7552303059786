"""What each attention kind should give, from its definition: dense, slow, one function each."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fastlm.models import positions
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


def latent(pairs: Pairs) -> Array:
    """Scores of keys made of a latent plus scores of one rotated key, from the parameters."""
    params, cfg, options = pairs.params, pairs.cfg, pairs.options

    def narrowed(x: Array, name: str) -> Array:
        y = x @ params[name]
        y = y / jnp.sqrt(jnp.mean(y**2, -1, keepdims=True) + cfg.norm_epsilon)
        return y * params[f"{name}_norm"]["scale"]

    def heads(x: Array, name: str, count: int) -> Array:
        y = (x @ params[name]).reshape(*x.shape[:2], count, -1)
        return jnp.repeat(y, cfg.heads // count, axis=2)

    source = narrowed(pairs.x, "q_latent") if options.query_rank else pairs.x
    c, width = narrowed(pairs.context, "latent"), cfg.head_dim
    q, k, v = heads(source, "q", cfg.heads), heads(c, "k", cfg.kv_heads), heads(c, "v", cfg.kv_heads)
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k)
    if cfg.rotary:
        rotary = params["k_rotary"].shape[1]
        width += rotary
        angles = positions.rotary_angles(pairs.positions, rotary, cfg.rotary_base)
        turned = lambda x, name, count: positions.rotate(heads(x, name, count), *angles)
        q, k = turned(source, "q_rotary", cfg.heads), turned(pairs.context, "k_rotary", 1)
        scores += jnp.einsum("BTNP,BSNP->BNTS", q, k)
    p = pairs.softmax(jnp.where(pairs.see[:, None], scores / width**0.5, -1e30))
    return jnp.einsum("BNTS,BSNH->BTNH", p, v)
