"""What attention kinds remember between decoding steps.

Notable: caches are values. One `length` per row is shared by all layers, so ragged prompts are
right-padded, written at slot 0, and the length set to each prompt's own; padding beyond it is
hidden by the causal mask and overwritten by the tokens that follow.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fastlm.ops.masks import MaskSpec
from fastlm.ops.operators import operator
from fastlm.parallel.rules import constrain

KEPT = ("batch", None, "kv_heads", None)  # logical axes of keys and values


@operator
def written(
    slots: Float[Array, "B S ..."], new: Float[Array, "B T ..."], offset: Int[Array, "B"]
) -> Float[Array, "B S ..."]:
    """Returns slots with what is `new` at `offset[b] ... offset[b] + T - 1` of row b."""
    put = lambda old, new, at: jax.lax.dynamic_update_slice_in_dim(old, new, at, 0)
    return jax.vmap(put)(slots, new.astype(slots.dtype), offset)


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
        """Returns the cache with `k`, `v` written at slots `offset[b] ... offset[b] + T - 1` of row b.

        Over devices it is cut as the heads are that read it.
        """
        return KVCache(constrain(written(self.k, k, offset), KEPT), constrain(written(self.v, v, offset), KEPT))


@flax.struct.dataclass
class WindowCache:
    """The last W tokens of one layer in order of time, the latest last.

    Attributes:
      tokens: whatever the kind keeps of a token: a tree of arrays [B, W, ...].
      valid: whether there is such a token, and of the document that goes on.
    """

    tokens: Any
    valid: Bool[Array, "B W"]

    @classmethod
    def empty(cls, batch: int, width: int, shapes: Sequence[tuple[int, ...]], dtype: jnp.dtype) -> "WindowCache":
        """Returns a cache of `width` tokens, a tuple of arrays of `shapes` each, of which none are there."""
        zeros = tuple(jnp.zeros((batch, width, *shape), dtype) for shape in shapes)
        return cls(zeros, jnp.zeros((batch, width), bool))

    def append(self, tokens: Any, mask: MaskSpec) -> tuple[Any, Int[Array, "B S"], "WindowCache"]:
        """Adds T tokens behind those that are here.

        Returns:
          (what is kept of all S = W + T tokens, their document numbers, the cache behind the last real token).
          What was here belongs to the document of the row's first token.
        """
        rows, count = jax.tree.leaves(tokens)[0].shape[:2]
        width = self.valid.shape[1]
        own = jnp.ones((rows, count), jnp.int32) if mask.key_segments is None else mask.key_segments
        everything = jax.tree.map(
            lambda old, new: jnp.concatenate([old.astype(new.dtype), new], 1), self.tokens, tokens
        )
        segments = jnp.concatenate([jnp.where(self.valid, own[:, :1], 0), own], axis=1)
        real = jnp.max(jnp.where(own != 0, jnp.arange(1, count + 1), 0), axis=1)
        real = real if mask.lengths is None else jnp.minimum(real, mask.lengths)
        slots = real[:, None] + jnp.arange(width)
        kept = jnp.take_along_axis(segments, slots, axis=1)
        last = jnp.take_along_axis(segments, (real + width - 1)[:, None], axis=1)
        latest = jax.vmap(lambda x, at: jnp.take(x, at, axis=0))
        after = jax.tree.map(lambda x, old: latest(x, slots).astype(old.dtype), everything, self.tokens)
        return everything, segments, WindowCache(after, (kept == last) & (kept != 0))


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

    def emptied(self, rows: Bool[Array, "B"]) -> "Cache":
        """Returns the cache with nothing in these rows: zeros, which is how every cache begins."""
        return jax.tree.map(lambda x: jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), jnp.zeros_like(x), x), self)


@flax.struct.dataclass
class Memory:
    """An encoded source: the encoder's last hidden states, and which of them are real (segment 0 is padding)."""

    hidden: Float[Array, "B S D"]
    segments: Int[Array, "B S"]
