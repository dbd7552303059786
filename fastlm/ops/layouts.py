"""Transposes that XLA:CPU really carries out before a product.

Notable: XLA takes a transpose as a change of layout. Its bfloat16 product on CPU looks at that
layout before anything is moved, finds the contracted axis not innermost, widens both operands to
float32 and runs at half speed. A reshape in between gives the operand its default layout back; a
trivial reshape is removed again, one that merges two axes which the transpose has moved is not.
"""

import jax.numpy as jnp
from jaxtyping import Array


def transpose_in_memory(x: Array, axes: tuple[int, ...]) -> Array:
    """Returns `jnp.transpose(x, axes)`, with the axis that ends up last cut in two for the move.

    An odd length cannot be cut: the result is the same then, the product after it slower.
    """
    last, shape = axes[-1], x.shape
    if shape[last] % 2:
        return jnp.transpose(x, axes)
    cut = x.reshape(*shape[:last], 2, shape[last] // 2, *shape[last + 1 :])
    moved = [axis + (axis > last) for axis in axes]
    return jnp.transpose(cut, (*moved, last + 1)).reshape([shape[axis] for axis in axes])


def rows_last(x: Array) -> Array:
    """Returns x [..., I] as [I, M], all leading axes merged into M and innermost in memory."""
    if x.ndim == 2 or x.shape[0] == 1:  # nothing to merge: cut instead
        return transpose_in_memory(x.reshape(-1, x.shape[-1]), (1, 0))
    axes = (x.ndim - 1, *range(x.ndim - 1))
    return jnp.transpose(x, axes).reshape(x.shape[-1], -1)
