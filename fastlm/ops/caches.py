"""What attention kinds remember between decoding steps.

Notable: caches are values. One `length` per row is shared by all layers, so ragged prompts are
right-padded, written at slot 0, and the length set to each prompt's own; padding beyond it is
hidden by the causal mask and overwritten by the tokens that follow.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fastlm.ops.masks import MaskSpec


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
class WindowCache:
    """The last W tokens of one layer in order of time, the latest last.

    Attributes:
      k, v: whatever the kind keeps of a token, [B, W, ...] each.
      valid: whether there is such a token, and of the document that goes on.
    """

    k: Float[Array, "B W ..."]
    v: Float[Array, "B W ..."]
    valid: Bool[Array, "B W"]

    @classmethod
    def empty(cls, batch: int, width: int, shape: tuple[int, ...], dtype: jnp.dtype) -> "WindowCache":
        """Returns a cache of `width` tokens of which none are there."""
        empty = lambda: jnp.zeros((batch, width, *shape), dtype)  # one each: a buffer cannot be donated twice
        return cls(empty(), empty(), jnp.zeros((batch, width), bool))

    def append(
        self, k: Float[Array, "B T ..."], v: Float[Array, "B T ..."], mask: MaskSpec
    ) -> tuple[Array, Array, Int[Array, "B S"], "WindowCache"]:
        """Adds T tokens behind those that are here.

        Returns:
          (keys, values, their document numbers, all of S = W + T tokens, the cache behind the last real token).
          What was here belongs to the document of the row's first token.
        """
        rows, tokens, width = *k.shape[:2], self.valid.shape[1]
        own = jnp.ones((rows, tokens), jnp.int32) if mask.key_segments is None else mask.key_segments
        keys = jnp.concatenate([self.k.astype(k.dtype), k], axis=1)
        values = jnp.concatenate([self.v.astype(v.dtype), v], axis=1)
        segments = jnp.concatenate([jnp.where(self.valid, own[:, :1], 0), own], axis=1)
        real = jnp.max(jnp.where(own != 0, jnp.arange(1, tokens + 1), 0), axis=1)
        real = real if mask.lengths is None else jnp.minimum(real, mask.lengths)
        slots = real[:, None] + jnp.arange(width)
        take = jax.vmap(lambda x, at: jnp.take(x, at, axis=0))
        kept = take(segments, slots)
        last = jnp.take_along_axis(segments, (real + width - 1)[:, None], axis=1)
        valid = (kept == last) & (kept != 0)
        return (
            keys,
            values,
            segments,
            WindowCache(take(keys, slots).astype(self.k.dtype), take(values, slots).astype(self.v.dtype), valid),
        )


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
