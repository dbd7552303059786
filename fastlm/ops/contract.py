"""The verbs by which models use weights: `contract`, `lookup`, `dense`.

Notable: a contraction is one 2-D product over the input axis (heads flattened), so everything that
will ever replace a plain array (packed, factorised, masked weights) has one place to plug in.
Operands have the compute type of `x`, sums are float32: on CPU that is the fast bfloat16 path, on
TPU and GPU it is how the matrix units accumulate anyway. Weights are stored float32 and cast here.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def contract(x: Float[Array, "... I"], w: Array, *, transpose: bool = False) -> Float[Array, "... O"]:
    """Returns `x @ w` (`w` [I, O]) or, with `transpose`, `x @ w.T` (`w` [O, I], e.g. a tied embedding).

    The result has the type of `x`, except that float32 sums are rounded to it only once.
    """
    axis = 1 if transpose else 0
    product = jax.lax.dot_general(
        x, w.astype(x.dtype), (((x.ndim - 1,), (axis,)), ((), ())), preferred_element_type=jnp.float32
    )
    return product.astype(x.dtype)


def lookup(w: Array, ids: Int[Array, "..."], dtype: jnp.dtype = jnp.float32) -> Float[Array, "... D"]:
    """Returns the rows `ids` of the table `w` [V, D] in the compute type."""
    return jnp.take(w, ids, axis=0, mode="clip").astype(dtype)


def dense(w: Array) -> Array:
    """Returns the weight as one plain float array [I, O]."""
    return w
