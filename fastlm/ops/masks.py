"""Which key each query may see, as a description instead of a matrix.

Notable: `MaskSpec` travels from the stack to whichever attention kind a layer uses; a fused kernel
reads its fields, a plain one calls `dense`. Packed rows hold several documents: attention never
crosses from one segment into another, and segment 0 is padding that nobody sees.
"""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@flax.struct.dataclass
class MaskSpec:
    """Visibility of keys (S of them) for queries (T of them).

    Attributes:
      causal: a query sees no later slot. Static.
      packed: a row may hold several documents; where it is False, segments only say what is padding. Static.
      query_segments, key_segments: [B, T] and [B, S] document numbers within a row, or None.
      offset: [B] slot of the first query when keys come from a cache, or None when a query's own row is all there is.
      lengths: [B] how many of the queries are real when they go into a cache, or None for all. A cache by slot may
        ignore it, since what lies behind a row's length is hidden and overwritten; a state must not.
    """

    causal: bool = flax.struct.field(pytree_node=False, default=True)
    query_segments: Int[Array, "B T"] | None = None
    key_segments: Int[Array, "B S"] | None = None
    offset: Int[Array, "B"] | None = None
    lengths: Int[Array, "B"] | None = None
    packed: bool = flax.struct.field(pytree_node=False, default=True)

    def dense(self, queries: int, keys: int) -> Bool[Array, "b 1 T S"] | None:
        """Returns the matrix [B or 1, 1, T, S] of visible pairs, or None when all are visible."""
        mask = None
        if self.causal:
            query_slot = jnp.arange(queries)[None, :]
            if self.offset is not None:
                query_slot = query_slot + self.offset[:, None]
            mask = (jnp.arange(keys)[None, None, :] <= query_slot[:, :, None])[:, None]
        if self.query_segments is not None:
            same = self.query_segments[:, :, None] == self.key_segments[:, None, :]
            same = (same & (self.key_segments[:, None, :] != 0))[:, None]
            mask = same if mask is None else mask & same
        return mask

    def start(self, rows: int) -> Int[Array, "B"]:
        """Returns the slot of the first query: `offset`, or 0 in so many rows."""
        return jnp.zeros((rows,), jnp.int32) if self.offset is None else self.offset

    def real(self, keys: int) -> Bool[Array, "b S"] | None:
        """Returns which keys are no padding, [B, S], or None when all are real."""
        if self.key_segments is not None:
            return self.key_segments != 0
        return None if self.lengths is None else jnp.arange(keys) < self.lengths[:, None]

    def starts(self, keys: int) -> Bool[Array, "b S"]:
        """Returns which keys begin a document that is not the row's first, [B or 1, S]; padding never does."""
        if self.key_segments is None:
            return jnp.zeros((1, keys), bool)
        changes = (self.key_segments[:, 1:] != self.key_segments[:, :-1]) & (self.key_segments[:, 1:] != 0)
        return jnp.pad(changes, ((0, 0), (1, 0)))
