"""Ways to tell a Transformer where its tokens stand.

sinusoidal: added to the embedding (arXiv 1706.03762). rotary: rotates queries and keys, halves
convention as in GPT-NeoX and Llama (arXiv 2104.09864). alibi: a bias that falls linearly with
distance (arXiv 2108.12409); heads that are no power of two get the interleaved slopes of that paper.
All take positions as an array, because packed documents restart at 0 within a row.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sinusoidal(positions: Int[Array, "B T"], width: int) -> Float[Array, "B T D"]:
    """Sines in the first half of the channels, cosines in the second, wavelengths 2 pi to 10,000 * 2 pi."""
    half = (width + 1) // 2
    frequencies = jnp.exp(-math.log(10_000.0) * jnp.arange(half) / max(half - 1, 1))
    angles = positions[..., None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[..., :width]


def rotary_angles(positions: Int[Array, "B T"], head_dim: int, base: float) -> tuple[Array, Array]:
    """Returns (cos, sin), each [B, T, H / 2] in float32."""
    frequencies = base ** (-jnp.arange(0, head_dim, 2) / head_dim)
    angles = positions[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T N H"], cos: Array, sin: Array) -> Float[Array, "B T N H"]:
    """Rotates channel pairs (i, i + H/2) of `x` by the angle of their token."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def alibi_slopes(heads: int) -> list[float]:
    """The slope of each head, a geometric sequence from 2^(-8/n) to 2^-8."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    between = [2 ** (-4 * (2 * i + 1) / power) for i in range(power)]
    return slopes + between[: heads - power]


def alibi_bias(query: Int[Array, "B T"], key: Int[Array, "B S"], heads: int) -> Float[Array, "B N T S"]:
    """Returns -slope * |distance| per head."""
    distance = jnp.abs(query[:, :, None] - key[:, None, :]).astype(jnp.float32)
    return -jnp.asarray(alibi_slopes(heads), jnp.float32)[None, :, None, None] * distance[:, None]
