"""Depthwise convolution over the few tokens before each: how recurrent kinds of attention look at neighbours.

Notable: a sum of shifted copies that does not reach into another document. The backward pass, by hand, is the same
convolution in the other direction, and stores no shifted copy.

Dims: B batch, T time, D channels, W width.
"""

import functools

import jax
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
    return _convolve(x, w, segments, ahead)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _convolve(x: Array, w: Array, segments: Array | None, ahead: bool) -> Array:
    near = (_near(x, segments, i, ahead).astype(jnp.float32) * weights for i, weights in enumerate(w))
    return sum(near).astype(x.dtype)


def _forward(x: Array, w: Array, segments: Array | None, ahead: bool) -> tuple[Array, tuple]:
    return _convolve(x, w, segments, ahead), (x, w, segments)


def _backward(ahead: bool, residuals: tuple, g: Array) -> tuple[Array, Array, None]:
    x, w, segments = residuals
    rows = lambda t: t.reshape(-1, t.shape[-1]).astype(jnp.float32)
    d_w = [jnp.sum(rows(_near(x, segments, i, ahead)) * rows(g), axis=0) for i in range(w.shape[0])]
    return _convolve(g, w, segments, not ahead), jnp.stack(d_w).astype(w.dtype), None


_convolve.defvjp(_forward, _backward)


def _near(x: Array, segments: Array | None, by: int, ahead: bool) -> Array:
    """Returns for each token the one `by` places away, zeros where that is of another document."""
    near = _shifted(x, by, ahead)
    if segments is None or not by:
        return near
    return jnp.where((segments == _shifted(segments, by, ahead))[..., None], near, 0)


def _shifted(x: Array, by: int, ahead: bool) -> Array:
    """Returns x [B, T, ...] with each token `by` places later, or earlier if `ahead`, zeros where nothing comes in."""
    by = min(by, x.shape[1])
    kept = x[:, by:] if ahead else x[:, : x.shape[1] - by]
    return jnp.pad(kept, [(0, 0), (0, by) if ahead else (by, 0)] + [(0, 0)] * (x.ndim - 2))
