"""Element-wise functions of the feed-forward layers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Gaussian error linear unit in its tanh form (arXiv 1606.08415)."""
    return jax.nn.gelu(x, approximate=True)


def relu2(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Squared ReLU (Primer, arXiv 2109.08668)."""
    return jnp.square(jax.nn.relu(x))


def silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x * sigmoid(x), the gate of SwiGLU (arXiv 2002.05202)."""
    return jax.nn.silu(x)
