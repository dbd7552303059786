"""Sparse attention of new tokens to a cache by slot, whatever the pattern.

Notable: few queries, a step of decoding first of all, gather the keys that their pattern names, so a step costs what
the pattern costs. Many, a prompt, are put at their slots instead, and the pattern's form for whole rows does them: a
row's prompt may begin at any slot, where blocks cut from the prompt itself would not be those of the row.

Dims: B batch, T new tokens, S slots of the cache, m keys that a query sees, N heads, K kv heads, H head dim.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fastlm.ops.blocks import attend_blocks

SlotsOf = Callable[[Int[Array, "B T"]], tuple[Int[Array, "B T m"], Bool[Array, "B T m"]]]
Rows = Callable[..., Float[Array, "B S N H"]]


def attend_cached(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    start: Int[Array, "B"],
    slots_of: SlotsOf,
    rows: Rows,
    **options: Any,
) -> Float[Array, "B T N H"]:
    """Returns a causal pattern's attention of new tokens to a cache that holds them already.

    Args:
      start: slot of the first query.
      slots_of: from the slots of queries, the slots they look at and whether each of these is there to be seen.
      rows: `rows(q, k, v)`, the pattern over rows as long as the cache.
      options: scale, cap and softmax, as in `attend_blocks`.
    """
    (batch, tokens), slots = q.shape[:2], k.shape[1]
    looked_at, there = slots_of(start[:, None] + jnp.arange(tokens))
    if tokens * looked_at.shape[2] <= slots:
        take = jax.vmap(lambda x, at: jnp.take(x, at, axis=0, mode="clip"))
        keys, values = take(k, looked_at), take(v, looked_at)
        return attend_blocks(q[:, :, None], keys, values, there[:, :, None], **options)[:, :, 0]
    put = jax.vmap(lambda empty, new, at: jax.lax.dynamic_update_slice(empty, new, (at, 0, 0)))
    y = rows(put(jnp.zeros((batch, slots, *q.shape[2:]), q.dtype), q, start), k, v)
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, tokens))(y, start)
