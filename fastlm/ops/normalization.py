"""Layer and root-mean-square normalization; statistics always float32, backward written by hand.

Notable: the backward pass recomputes the normalized values from x and two numbers per row (mean,
reciprocal deviation) instead of reading float32 copies back, and sums the gradients of scale and
bias over one merged row axis (over several, XLA:CPU makes a slow reduce-window). The row sums take the
scaled gradient and its product with the normalized values in one pass each.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastlm.ops.operators import operator


def _statistics(x: Array, epsilon: float, centred: bool) -> tuple[Array, Array]:
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True) if centred else jnp.zeros((*x.shape[:-1], 1), jnp.float32)
    return mean, jax.lax.rsqrt(jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True) + epsilon)


def _normalize(x, scale, bias, epsilon, centred, dtype):
    mean, inverse = _statistics(x, epsilon, centred)
    y = (x.astype(jnp.float32) - mean) * inverse
    y = y if scale is None else y * scale
    return (y if bias is None else y + bias).astype(dtype), (x, scale, bias, mean, inverse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _norm(x, scale, bias, epsilon, centred, dtype):
    return _normalize(x, scale, bias, epsilon, centred, dtype)[0]


def _norm_backward(epsilon, centred, dtype, residuals, g):
    x, scale, bias, mean, inverse = residuals
    y = (x.astype(jnp.float32) - mean) * inverse
    g = g.astype(jnp.float32)
    rows = lambda t: jnp.sum(t.reshape(-1, t.shape[-1]), axis=0)
    d_scale = None if scale is None else rows(g * y).astype(scale.dtype)
    d_bias = None if bias is None else rows(g).astype(bias.dtype)
    g = g if scale is None else g * scale
    d_x = g - y * jnp.mean(g * y, axis=-1, keepdims=True)
    if centred:
        d_x = d_x - jnp.mean(g, axis=-1, keepdims=True)
    return (d_x * inverse).astype(x.dtype), d_scale, d_bias


_norm.defvjp(_normalize, _norm_backward)


@operator
def layer_norm(
    x: Float[Array, "... D"], scale: Array | None, bias: Array | None, epsilon: float, dtype: jnp.dtype | None = None
) -> Float[Array, "... D"]:
    """Layer normalization (arXiv 1607.06450) over the last axis, in the type `dtype` (default: that of `x`)."""
    return _norm(x, scale, bias, epsilon, True, jnp.dtype(dtype or x.dtype))


@operator
def rms_norm(
    x: Float[Array, "... D"], scale: Array | None, epsilon: float, dtype: jnp.dtype | None = None
) -> Float[Array, "... D"]:
    """Root-mean-square normalization (arXiv 1910.07467) over the last axis, in the type `dtype`."""
    return _norm(x, scale, None, epsilon, False, jnp.dtype(dtype or x.dtype))


def layer_norm_plain(x: Array, scale: Array | None, bias: Array | None, epsilon: float) -> Array:
    """The oracle of `layer_norm`, differentiated by jax."""
    return _normalize(x, scale, bias, epsilon, True, x.dtype)[0]


def rms_norm_plain(x: Array, scale: Array | None, epsilon: float) -> Array:
    """The oracle of `rms_norm`, differentiated by jax."""
    return _normalize(x, scale, None, epsilon, False, x.dtype)[0]
