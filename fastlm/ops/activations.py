"""Element-wise functions of the feed-forward layers, computed in float32 whatever the type of x.

Notable: `gelu` (tanh form, arXiv 1606.08415) is written with the logistic function it is equal to,
0.5 (1 + tanh(u / 2)) = sigmoid(u), which costs one exponential, and has its derivative by hand. The
barrier in the backward pass keeps XLA from storing the float32 exponential of the forward pass for
it, so that only `x`, in its own type, lives from one pass to the other.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastlm.ops.operators import operator

SLOPE = 1.5957691216057308  # 2 sqrt(2 / pi)
CUBIC = 0.044715


@operator
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Gaussian error linear unit in its tanh form, in the type of `x`."""
    return _gelu(x)


@jax.custom_vjp
def _gelu(x: Array) -> Array:
    h = x.astype(jnp.float32)
    return (h / (1 + jnp.exp(-SLOPE * (h + CUBIC * h * h * h)))).astype(x.dtype)


def _gelu_backward(x: Array, g: Array) -> tuple[Array]:
    h = jax.lax.optimization_barrier(x).astype(jnp.float32)
    gate = 1 / (1 + jnp.exp(-SLOPE * (h + CUBIC * h * h * h)))
    slope = gate + h * gate * (1 - gate) * (SLOPE + 3 * SLOPE * CUBIC * h * h)
    return ((g.astype(jnp.float32) * slope).astype(x.dtype),)


_gelu.defvjp(lambda x: (_gelu(x), x), _gelu_backward)


@operator
def gelu_exact(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x times the Gaussian distribution function, as BERT has it (arXiv 1606.08415), in the type of `x`."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


@operator
def silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x times its logistic function (arXiv 1702.03118), in the type of `x`."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


def relu2(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Squared ReLU (Primer, arXiv 2109.08668)."""
    return jnp.square(jax.nn.relu(x))


def geglu(gate: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """gelu(gate) * x (arXiv 2002.05202)."""
    return gelu(gate) * x


@operator
def swiglu(gate: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """silu(gate) * x (arXiv 2002.05202), in the type of `x`."""
    return _swiglu(gate, x)


@jax.custom_vjp
def _swiglu(gate: Array, x: Array) -> Array:
    h = gate.astype(jnp.float32)
    return (h / (1 + jnp.exp(-h)) * x.astype(jnp.float32)).astype(x.dtype)


def _swiglu_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    gate, x = residuals
    h, y = (a.astype(jnp.float32) for a in jax.lax.optimization_barrier(residuals))
    open_ = 1 / (1 + jnp.exp(-h))
    g = g.astype(jnp.float32)
    return (g * y * open_ * (1 + h * (1 - open_))).astype(gate.dtype), (g * h * open_).astype(x.dtype)


_swiglu.defvjp(lambda gate, x: (_swiglu(gate, x), (gate, x)), _swiglu_backward)
