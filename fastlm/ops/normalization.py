"""Layer and root-mean-square normalization; statistics always in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def layer_norm(x: Float[Array, "... D"], scale: Array, bias: Array | None, epsilon: float) -> Float[Array, "... D"]:
    """Layer normalization (arXiv 1607.06450) over the last axis, in the type of `x`."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + epsilon) * scale
    return (y if bias is None else y + bias).astype(x.dtype)


def rms_norm(x: Float[Array, "... D"], scale: Array | None, epsilon: float) -> Float[Array, "... D"]:
    """Root-mean-square normalization (arXiv 1910.07467) over the last axis, in the type of `x`."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + epsilon)
    return (y if scale is None else y * scale).astype(x.dtype)
