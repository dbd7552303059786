"""What attention kinds remember between decoding steps.

Notable: caches are values. One `length` per row is shared by all layers, so ragged prompts are
right-padded, written at slot 0, and the length set to each prompt's own; padding beyond it is
hidden by the causal mask and overwritten by the tokens that follow.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@flax.struct.dataclass
class KVCache:
    """Keys and values of one layer, [B, S, K, H] each."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]

    @classmethod
    def empty(cls, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> "KVCache":
        """Returns a cache of zeros for `slots` tokens a row."""
        shape = (batch, slots, kv_heads, head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def write(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], offset: Int[Array, "B"]) -> "KVCache":
        """Returns the cache with `k`, `v` written at slots `offset[b] ... offset[b] + T - 1` of row b."""
        put = jax.vmap(lambda old, new, at: jax.lax.dynamic_update_slice(old, new, (at, 0, 0)))
        return KVCache(put(self.k, k.astype(self.k.dtype), offset), put(self.v, v.astype(self.v.dtype), offset))


@flax.struct.dataclass
class Cache:
    """Everything a stack remembers.

    Attributes:
      length: tokens seen per row.
      layers: each layer's own memory, by number; its arrays lead with B.
      source_segments: of an encoder-decoder's source, 0 where it is padded.
      slots: room in tokens.
    """

    length: Int[Array, "B"]
    layers: dict[str, Any]
    source_segments: Int[Array, "B S"] | None = None
    slots: int = flax.struct.field(pytree_node=False, default=0)


@flax.struct.dataclass
class Memory:
    """An encoded source: the encoder's last hidden states, and which of them are real (segment 0 is padding)."""

    hidden: Float[Array, "B S D"]
    segments: Int[Array, "B S"]
