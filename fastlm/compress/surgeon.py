"""Weights that stay make up for those that go: least squares on the inputs seen, for a mask that any score chose.

Notable: what SparseGPT (arXiv 2301.00774) approximates, weights updated one input after the other, is a convex problem
of its own once the mask is chosen; conjugate gradients solve it for all outputs at once, by products alone and whatever
the order of inputs (as ALPS does, 2406.07831). Damping keeps weights of inputs that were hardly seen where they were.
The score that goes with it is the "surgeon" of `importance` (Optimal Brain Surgeon's, in the layer-wise form of both).
Left out: choosing again inside a matrix once some of its weights are updated.

Dims: I inputs, O outputs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

DAMPING = 0.01  # of the mean square of inputs
TURNS = 40


def damped(products: Float[Array, "I I"]) -> Float[Array, "I I"]:
    """Returns products of inputs that can be inverted."""
    mean = jnp.trace(products) / len(products)
    return products + jnp.maximum(DAMPING * mean, 1e-20) * jnp.eye(len(products))


def update(
    w: Float[Array, "I O"], products: Float[Array, "I I"], mask: Bool[Array, "I O"], turns: int = TURNS
) -> Float[Array, "I O"]:
    """Returns weights, zero where the mask is, whose outputs are nearest to those of `w` on the inputs seen.

    Args:
      turns: of conjugate gradients, each a product [I, I] [I, O].
    """
    h = damped(products)
    scale = jnp.diagonal(h)[:, None]
    times = lambda x: jnp.where(mask, jnp.matmul(h, x, precision=jax.lax.Precision.HIGHEST), 0)
    dot = lambda a, b: jnp.sum(a * b, axis=0, keepdims=True)
    start = jnp.where(mask, w, 0)
    residual = jnp.where(mask, jnp.matmul(h, w - start, precision=jax.lax.Precision.HIGHEST), 0)

    def turn(_: int, state: tuple[Array, ...]) -> tuple[Array, ...]:
        x, r, p, old = state
        hp = times(p)
        step = old / jnp.maximum(dot(p, hp), 1e-30)
        x, r = x + step * p, r - step * hp
        z = r / scale
        new = dot(r, z)
        return x, r, z + new / jnp.maximum(old, 1e-30) * p, new

    z = residual / scale
    return jax.lax.fori_loop(0, turns, turn, (start, residual, z, dot(residual, z)))[0].astype(w.dtype)
