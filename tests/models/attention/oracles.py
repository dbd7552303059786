"""What each attention kind should give, from its definition: dense, slow, one function each."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fastlm.models.attention.lsh import rotations
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


def lsh(pairs: Pairs) -> Array:
    """Softmax over the union of what the rounds show, token pair by token pair; a token itself where that is nothing.

    Padding sees nothing and is seen by nobody, so it is sorted behind all others.
    """
    _, t, n, h = pairs.q.shape
    options, real = pairs.options, jnp.diagonal(pairs.see, axis1=1, axis2=2)
    count, chunk = options.buckets_of(t), min(options.chunk, t)
    union = jnp.zeros((pairs.q.shape[0], n, t, t), bool)
    for rotation in rotations(None, h, options.rounds, count):
        near = pairs.q @ rotation
        bucket = jnp.argmax(jnp.concatenate([near, -near], -1), -1) if count > 1 else jnp.zeros(near.shape[:-1], int)
        bucket = jnp.swapaxes(jnp.where(real[..., None], bucket, count), 1, 2)
        place = jnp.argsort(jnp.argsort(bucket, axis=-1, stable=True), axis=-1) // chunk
        back = place[..., :, None] - place[..., None, :]
        union |= (bucket[..., :, None] == bucket[..., None, :]) & ((back == 0) | (back == 1))
    own = jnp.eye(t, dtype=bool)
    union &= pairs.see[:, None] & ~own
    scores = jnp.where(union, pairs.scores(), -1e30)
    p = jnp.where(union.any(-1, keepdims=True), jax.nn.softmax(scores, -1), own)
    return jnp.einsum("BNTS,BSNH->BTNH", p, pairs.v)


def hierarchical(pairs: Pairs) -> Array:
    """One softmax over near tokens, and over means of what a token may see of the runs farther away.

    Runs of level l are the tokens of 2^l blocks, cut into `means` pieces. A block looks at those whose parent (two of
    them make one of the next level) is its own parent or beside it, and that are not beside it themselves.
    """
    block, means, t = pairs.options.block, pairs.options.means, pairs.see.shape[1]
    slots = np.arange(t)
    near = abs(slots[:, None] // block - slots // block) <= 1
    members, lookers = [], []
    for level in range(t.bit_length()):
        group = block << level
        for j in range(-(-t // group)):
            here = slots // group
            looks = (abs(here - j) > 1) & (abs(here // 2 - j // 2) <= 1)
            for part in range(means):
                members.append((slots // group == j) & (slots % group * means // group == part))
                lookers.append(looks)
    members, lookers = np.stack(members), np.stack(lookers, 1)
    assert ((near + lookers.astype(int) @ members) == 1).all()  # every token is seen exactly once, from everywhere
    part = pairs.see[:, :, None] & members & lookers[..., None]  # [B, T, runs, S]
    count = part.sum(-1)
    share = part / jnp.maximum(count, 1)[..., None]
    k, v = (jnp.einsum("BTRS,BSNH->BTRNH", share, x) for x in (pairs.k, pairs.v))
    far = (
        jnp.einsum("BTNH,BTRNH->BNTR", pairs.q, k) * pairs.cfg.attention_scale + jnp.log(jnp.maximum(count, 1))[:, None]
    )
    scores = jnp.concatenate(
        [jnp.where((pairs.see & near)[:, None], pairs.scores(), -1e30), jnp.where((count > 0)[:, None], far, -1e30)], -1
    )
    p = pairs.softmax(scores)
    return jnp.einsum("BNTS,BSNH->BTNH", p[..., :t], pairs.v) + jnp.einsum("BNTR,BTRNH->BTNH", p[..., t:], v)
