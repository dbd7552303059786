"""Ways to tell a Transformer where its tokens stand.

sinusoidal: added to the embedding (arXiv 1706.03762; sines, then cosines, as in Marian). rotary:
rotates queries and keys, halves convention as in GPT-NeoX and Llama (arXiv 2104.09864). alibi: a bias
that falls linearly with distance (arXiv 2108.12409); heads that are no power of two get the
interleaved slopes of that paper. relative: T5's buckets for a learned bias (arXiv 1910.10683).
All take positions as an array, because packed documents restart at 0 within a row.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fastlm.ops.operators import operator


def sinusoidal(positions: Int[Array, "B T"], width: int) -> Float[Array, "B T D"]:
    """Sines in the first half of the channels, cosines in the second, wavelengths 2 pi to nearly 10,000 * 2 pi."""
    frequencies = jnp.exp(-math.log(10_000.0) * jnp.arange(0, width, 2) / width)
    angles = positions[..., None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[..., :width]


@operator
def rotary_angles(
    positions: Int[Array, "B T"], head_dim: int, base: float, scaling: tuple[float, ...] = ()
) -> tuple[Array, Array]:
    """Returns (cos, sin), each [B, T, H / 2] in float32; `scaling` as in `ModelConfig.rotary_scaling`."""
    frequencies = base ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    if scaling:
        frequencies = _stretched(frequencies, *scaling)
    angles = positions[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def _stretched(frequencies: np.ndarray, factor: float, low: float, high: float, length: float) -> np.ndarray:
    """Llama 3.1: wavelengths above length / low are multiplied by factor, below length / high kept, between blended."""
    turns = length * frequencies / (2 * math.pi)  # of each pair within the original length
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (frequencies * (kept + (1 - kept) / factor)).astype(np.float32)


def relative_buckets(
    query: Int[Array, "B T"], key: Int[Array, "B S"], *, causal: bool, buckets: int, distance: int
) -> Int[Array, "B T S"]:
    """Returns T5's bucket of each key's distance: exact when near, logarithmic up to `distance`, then one for all.

    Of a causal stack all buckets look back; otherwise half of them look each way.
    """
    ahead = key[:, None, :] - query[:, :, None]
    first = jnp.zeros_like(ahead)
    if causal:
        away = jnp.maximum(-ahead, 0)
    else:
        buckets //= 2
        first, away = jnp.where(ahead > 0, buckets, 0), jnp.abs(ahead)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(away, 1).astype(jnp.float32) / exact) / math.log(distance / exact)
    far = exact + (ratio * (buckets - exact)).astype(jnp.int32)
    return first + jnp.where(away < exact, away, jnp.minimum(far, buckets - 1))


@operator
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
