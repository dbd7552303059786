"""Numbers in eight bits."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rounded(x: Float[Array, "... H"]) -> tuple[Int[Array, "... H"], Float[Array, "... 1"]]:
    """Returns (levels, int8, scale, float32) with levels * scale within scale / 2 of x."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
    return jnp.rint(x / jnp.where(scale, scale, 1)).astype(jnp.int8), scale
