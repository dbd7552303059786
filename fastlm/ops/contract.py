"""The verbs by which models use weights: `contract`, `add_bias`, with backward products for each platform.

Notable, measured on XLA:CPU (jax 0.10): its fast bfloat16 kernel takes bfloat16 operands, gives
float32, and accepts a product only if both contracted axes are where it wants them: the last one of
the left operand, the first or last matrix axis of the right one, innermost in memory on the left.
The gradient of a weight, x^T g, is not of that form: left to autodiff, both operands are widened to
float32 and the product takes twice the time. `weight_product` moves the narrower operand for real
(`rows_last`). Never transpose a bfloat16 product's result directly: XLA rewrites that as a product
of the swapped operands, for which it has no kernel at all; hence the barrier.
Matrix units of TPU and GPU take every orientation, so the plain product is kept there.
Weights are stored float32 and cast here; XLA hoists the cast out of a loop over microbatches.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from fastlm.ops.layouts import rows_last
from fastlm.ops.leaf import Leaf
from fastlm.ops.operators import operator
from fastlm.parallel.platforms import target_platform
from fastlm.parallel.rules import Axes, constrain

PRODUCT = "product"


def product(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Returns the product over one axis of each operand, float32 sums."""
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


def weight_product(x: Float[Array, "... I"], g: Float[Array, "... O"]) -> Float[Array, "I O"]:
    """Returns the sum over all leading axes of the outer products of x and g, float32."""
    flat_x, flat_g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    if target_platform() != "cpu":
        return product(flat_x, flat_g, 0, 0)
    if x.shape[-1] <= g.shape[-1]:
        return product(rows_last(x), flat_g, 1, 0)
    return jax.lax.optimization_barrier(product(rows_last(g), flat_x, 1, 0)).T


def _forward_product(x: Array, w: Array, transpose: bool, dtype: jnp.dtype) -> Array:
    y = product(x, w.astype(x.dtype), x.ndim - 1, 1 if transpose else 0).astype(dtype)
    # Rematerialisation stores what is named, so it keeps this rounded result and not the wide sum before it.
    return checkpoint_name(y, PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _contract(x: Array, w: Array, transpose: bool, dtype: jnp.dtype) -> Array:
    return _forward_product(x, w, transpose, dtype)


def _contract_forward(x: Array, w: Array, transpose: bool, dtype: jnp.dtype) -> tuple[Array, tuple[Array, Array]]:
    return _forward_product(x, w, transpose, dtype), (x, w)


def _contract_backward(
    transpose: bool, dtype: jnp.dtype, residuals: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    del dtype
    x, w = residuals
    g = g.astype(x.dtype)  # both backward products run in the compute type, as the forward one did
    d_x = _forward_product(g, w, not transpose, x.dtype)
    d_w = weight_product(g, x) if transpose else weight_product(x, g)
    return d_x, d_w.astype(w.dtype)


_contract.defvjp(_contract_forward, _contract_backward)


@operator
def contract(
    x: Float[Array, "... I"], w: Array | Leaf, *, transpose: bool = False, dtype: jnp.dtype | None = None
) -> Float[Array, "... O"]:
    """Returns `x @ w` (`w` [I, O]) or, with `transpose`, `x @ w.T` (`w` [O, I], e.g. a tied embedding).

    The result has the type `dtype` (default: that of `x`), rounded once from float32 sums; the gradient
    of `w` is a float32 sum in the type of `w`.
    """
    if isinstance(w, Leaf):
        return w.contract(x, transpose, jnp.dtype(dtype or x.dtype))
    return _contract(x, w, transpose, jnp.dtype(dtype or x.dtype))


@operator
def add_bias(x: Float[Array, "... O"], bias: Float[Array, "O"]) -> Float[Array, "... O"]:
    """Returns `x + bias` in the type of `x`; the gradient of `bias` is summed in float32."""
    return _add_bias(x, bias)


@jax.custom_vjp
def _add_bias(x: Array, bias: Array) -> Array:
    return x + bias.astype(x.dtype)


def _add_bias_backward(bias: Array, g: Array) -> tuple[Array, Array]:
    # XLA:CPU turns a sum over several axes into a slow reduce-window: a fifth of a step's time before this.
    rows = g.reshape(-1, g.shape[-1])
    return g, jnp.sum(rows, axis=0, dtype=jnp.float32).astype(bias.dtype)


_add_bias.defvjp(lambda x, bias: (_add_bias(x, bias), bias), _add_bias_backward)


@operator
def lookup(
    w: Array | Leaf, ids: Int[Array, "..."], dtype: jnp.dtype = jnp.float32, axes: Axes = (None, None)
) -> Float[Array, "... D"]:
    """Returns the rows `ids` of the table `w` [V, D] in the compute type.

    Args:
      axes: logical axes by which the table stays cut for the gather; one cut on both of its axes would
        be rematerialised whole on every device.
    """
    if isinstance(w, Leaf):
        return w.lookup(ids, dtype, axes)
    return jnp.take(constrain(w, axes), ids, axis=0, mode="clip").astype(dtype)


def dense(w: Array | Leaf) -> Array:
    """Returns the weight as one plain float array [I, O]."""
    return w.dense() if isinstance(w, Leaf) else w
