"""Depthwise convolution over the few tokens before each: how recurrent kinds of attention look at neighbours.

Notable: a sum of shifted copies, a handful of multiplications a number, that neither reaches into another document
nor needs a layout of its own. Rows are flat where they meet the weights: XLA:CPU sums a gradient fast over one axis.

Dims: B batch, T time, D channels, W width.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def short_convolution(
    x: Float[Array, "B T D"], w: Float[Array, "W D"], segments: Int[Array, "B T"] | None, *, ahead: bool = False
) -> Float[Array, "B T D"]:
    """Returns sum_i w_i x_(t - i), in the type of `x`; what is of another document, or before the row, counts as 0.

    Args:
      segments: document number of each token, or None for one document.
      ahead: look at the tokens behind instead, x_(t + i).
    """
    total = jnp.zeros((x.shape[0] * x.shape[1], x.shape[2]), jnp.float32)
    for i, weights in enumerate(w):
        near = _shifted(x, i, ahead)
        if segments is not None and i:
            near = jnp.where((segments == _shifted(segments, i, ahead))[..., None], near, 0)
        total += near.reshape(total.shape).astype(jnp.float32) * weights
    return total.reshape(x.shape).astype(x.dtype)


def _shifted(x: Array, by: int, ahead: bool) -> Array:
    """Returns x [B, T, ...] with each token `by` places later, or earlier if `ahead`, zeros where nothing comes in."""
    by = min(by, x.shape[1])
    kept = x[:, by:] if ahead else x[:, : x.shape[1] - by]
    return jnp.pad(kept, [(0, 0), (0, by) if ahead else (by, 0)] + [(0, 0)] * (x.ndim - 2))
