"""What each attention kind should give, from its definition: dense, slow, one function each."""

import jax.numpy as jnp
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
