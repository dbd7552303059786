"""What attention kinds remember between decoding steps.

Notable: caches are values. One `length` per row is shared by all layers, so ragged prompts are
right-padded, written at slot 0, and the length set to each prompt's own; padding beyond it is
hidden by the causal mask and overwritten by the tokens that follow.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fastlm.ops.masks import MaskSpec
from fastlm.ops.operators import operator
from fastlm.ops.rounding import rounded
from fastlm.parallel.platforms import target_platform
from fastlm.parallel.rules import constrain

IN_ORDER = {"mode": "drop", "indices_are_sorted": True, "unique_indices": True}
BY_HEAD, BY_SLOT = ("batch", "kv_heads", None, None), ("batch", None, "kv_heads", None)


@operator
def written(
    slots: Float[Array, "B S ..."], new: Float[Array, "B T ..."], offset: Int[Array, "B"]
) -> Float[Array, "B S ..."]:
    """Returns slots with what is `new` at `offset[b] ... offset[b] + T - 1` of row b.

    The update of a single slice is repeated by XLA:CPU for everyone who reads the result, on copies of the whole;
    that of several is done once, in place. So one row is written there in halves, and by head below.
    """
    new, width = new.astype(slots.dtype), math.prod(slots.shape[2:])
    if _in_pieces(slots) and width % 2 == 0:
        halves = slots.reshape(*slots.shape[:2], 2, width // 2)
        places = (offset[0] + jnp.arange(new.shape[1]))[:, None], jnp.arange(2)
        return halves.at[0, *places].set(new.reshape(-1, *halves.shape[2:]), **IN_ORDER).reshape(slots.shape)
    put = lambda old, new, at: jax.lax.dynamic_update_slice_in_dim(old, new, at, 0)
    return jax.vmap(put)(slots, new, offset)


@operator
def written_by_head(
    slots: Float[Array, "B K S ..."], new: Float[Array, "B T K ..."], offset: Int[Array, "B"]
) -> Float[Array, "B K S ..."]:
    """Returns slots of each head with what is `new` at `offset[b] ... offset[b] + T - 1` of row b."""
    new = jnp.swapaxes(new, 1, 2).astype(slots.dtype)
    if _in_pieces(slots):
        places = jnp.arange(slots.shape[1])[:, None], offset[0] + jnp.arange(new.shape[2])
        return slots.at[0, *places].set(new[0], **IN_ORDER)
    return jax.vmap(lambda old, new, at: jax.lax.dynamic_update_slice_in_dim(old, new, at, 1))(slots, new, offset)


def _in_pieces(slots: Array) -> bool:
    return slots.shape[0] == 1 and target_platform() == "cpu"


@flax.struct.dataclass
class KVCache:
    """Keys and values of one layer, with heads before slots: as the products of each head read them."""

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S H"]

    @property
    def k(self) -> Float[Array, "B S K H"]:
        """Keys, as attention wants them."""
        return jnp.swapaxes(self.keys, 1, 2)

    @property
    def v(self) -> Float[Array, "B S K H"]:
        """Values, as attention wants them."""
        return jnp.swapaxes(self.values, 1, 2)

    def write(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], offset: Int[Array, "B"]) -> "KVCache":
        """Returns the cache with `k`, `v` written at slots `offset[b] ... offset[b] + T - 1` of row b.

        Over devices it is cut as the heads are that read it.
        """
        put = lambda old, new: constrain(written_by_head(old, new, offset), BY_HEAD)
        return self.replace(keys=put(self.keys, k), values=put(self.values, v))

    def kept(self, x: Float[Array, "B T K H"]) -> Float[Array, "B T K H"]:
        """Returns keys or values as they will be read once they are written."""
        return x.astype(self.keys.dtype).astype(x.dtype)


@flax.struct.dataclass
class RoundedCache:
    """Keys and values of one layer in eight bits, with a scale for each token and head: 17/64 of float32 for H = 64."""

    keys: Int[Array, "B K S H"]
    values: Int[Array, "B K S H"]
    key_scales: Float[Array, "B K S 1"]
    value_scales: Float[Array, "B K S 1"]

    @property
    def k(self) -> Float[Array, "B S K H"]:
        """Keys, as attention wants them."""
        return jnp.swapaxes(self.keys * self.key_scales, 1, 2)

    @property
    def v(self) -> Float[Array, "B S K H"]:
        """Values, as attention wants them."""
        return jnp.swapaxes(self.values * self.value_scales, 1, 2)

    def write(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], offset: Int[Array, "B"]) -> "RoundedCache":
        """See `KVCache`; rounds to the nearest of 255 levels up to the largest number of each token and head."""
        put = lambda old, new: constrain(written_by_head(old, new, offset), BY_HEAD)
        (keys, key_scales), (values, value_scales) = rounded(k), rounded(v)
        return RoundedCache(
            put(self.keys, keys),
            put(self.values, values),
            put(self.key_scales, key_scales),
            put(self.value_scales, value_scales),
        )

    def kept(self, x: Float[Array, "B T K H"]) -> Float[Array, "B T K H"]:
        """See `KVCache`."""
        levels, scales = rounded(x)
        return (levels * scales).astype(x.dtype)


def keys_and_values(batch: int, slots: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> KVCache | RoundedCache:
    """Returns a cache of zeros for `slots` tokens a row; a `RoundedCache` if the type is int8."""
    shape = (batch, kv_heads, slots, head_dim)
    keys, values = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
    if jnp.dtype(dtype) != jnp.int8:
        return KVCache(keys, values)
    scales = (*shape[:3], 1)
    return RoundedCache(keys, values, jnp.zeros(scales), jnp.zeros(scales))


@flax.struct.dataclass
class SlotCache:
    """Keys and values of one layer with slots before heads, as kinds read them that gather slots."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]

    @classmethod
    def empty(cls, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> "SlotCache":
        """Returns a cache of zeros for `slots` tokens a row."""
        shape = (batch, slots, kv_heads, head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def write(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], offset: Int[Array, "B"]) -> "SlotCache":
        """See `KVCache`."""
        put = lambda old, new: constrain(written(old, new, offset), BY_SLOT)
        return SlotCache(put(self.k, k), put(self.v, v))


@flax.struct.dataclass
class RingCache:
    """The R latest tokens of one layer, number n of a row in slot n mod R: a step writes one slot and moves none.

    Attributes:
      kept: their keys and values.
      valid: whether a slot holds a token, and of the document that goes on.
      next: slot of the next token.
    """

    kept: KVCache | RoundedCache
    valid: Bool[Array, "B R"]
    next: Int[Array, "B"]

    @classmethod
    def empty(cls, batch: int, tokens: int, slots: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> "RingCache":
        """Returns a cache of the latest `tokens`, of no more slots than a row will have; 0 if that is not known."""
        size = min(tokens, slots) if slots else tokens
        kept = keys_and_values(batch, size, kv_heads, head_dim, dtype)
        return cls(kept, jnp.zeros((batch, size), bool), jnp.zeros((batch,), jnp.int32))

    def append(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], mask: MaskSpec) -> "Recent":
        """Adds T tokens behind those that are here.

        Returns:
          the keys and values that these tokens may see, and the cache behind the last real one. What was here belongs
          to the document of the row's first token.
        """
        own = jnp.ones(k.shape[:2], jnp.int32) if mask.key_segments is None else mask.key_segments
        return self._add_one(k, v, own, mask) if k.shape[1] == 1 else self._add_several(k, v, own, mask)

    def _add_one(self, k: Array, v: Array, own: Array, mask: MaskSpec) -> "Recent":
        size, here = self.valid.shape[1], self.next[:, None]
        slots, real = jnp.arange(size), mask.real(1)
        kept, valid, after = self.kept.write(k, v, self.next), self.valid | (slots == here), (self.next + 1) % size
        segments, times = jnp.where(valid, own, 0), -((here - slots) % size)
        cache = RingCache(kept, valid, after)
        if real is not None:  # a row whose token is none stays as it was
            chosen = lambda new, old: jnp.where(real.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
            cache = jax.tree.map(chosen, cache, self)
        return Recent(kept.k, kept.v, own, segments, times, cache)

    def _add_several(self, k: Array, v: Array, own: Array, mask: MaskSpec) -> "Recent":
        (rows, count), size = k.shape[:2], self.valid.shape[1]
        in_order = (self.next[:, None] + jnp.arange(size)) % size
        ordered = lambda x: jax.vmap(lambda row, at: jnp.take(row, at, axis=0))(x, in_order)
        window = WindowCache((ordered(self.kept.k), ordered(self.kept.v)), ordered(self.valid))
        (keys, values), segments, window = window.append((k, v), mask)
        zero = jnp.zeros((rows,), jnp.int32)
        cache = RingCache(self.kept.write(*window.tokens, zero), window.valid, zero)
        return Recent(keys, values, own, segments, jnp.arange(-size, count)[None], cache)


@flax.struct.dataclass
class Recent:
    """What tokens that go into a `RingCache` may see, themselves among it.

    Attributes:
      own: document of each of the T tokens, 0 for padding.
      segments, times: of each of the S keys its document, 0 where there is none, and its time: that of the first of the
        T tokens is 0. Several tokens find their keys in order of time.
      cache: what is kept.
    """

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]
    own: Int[Array, "B T"]
    segments: Int[Array, "B S"]
    times: Int[Array, "b S"]
    cache: RingCache


@flax.struct.dataclass
class WindowCache:
    """The last W tokens of one layer in order of time, the latest last, which every step moves: for few of them.

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
