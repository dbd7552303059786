"""What kinds share whose pattern goes by slots of a row and whose cache keeps all keys and values.

Dims: B batch, T time, S key time, D embed, N heads, K kv heads, H head dim, m keys that a query sees.
"""

import functools
from abc import abstractmethod
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fastlm.models.attention.projections import Attention
from fastlm.models.config import LayerConfig
from fastlm.ops.blocks import weights_by_pair
from fastlm.ops.cached_patterns import attend_cached
from fastlm.ops.caches import SlotCache
from fastlm.ops.masks import MaskSpec


class SlotPatternAttention(Attention):
    """Base of these kinds, which say three times what their pattern is: for rows, for a step, and as a matrix."""

    @staticmethod
    def empty_cache(cfg: LayerConfig, options: Any, batch: int, slots: int, dtype: Any) -> SlotCache:
        """Returns room for the keys and values of `slots` tokens."""
        return SlotCache.empty(batch, slots, cfg.kv_heads, cfg.head_dim, dtype)

    @abstractmethod
    def rows(self, q: Array, k: Array, v: Array, mask: MaskSpec) -> Float[Array, "B T N H"]:
        """Returns the attention of whole rows to themselves."""

    @abstractmethod
    def slots_of(self, query: Int[Array, "B T"], slots: int) -> tuple[Int[Array, "B T m"], Bool[Array, "B T m"]]:
        """Returns where tokens at these slots of rows of so many look back, and whether each is there to be seen."""

    @abstractmethod
    def pattern(self, query: Int[Array, "b T"], slots: int, causal: bool) -> Bool[Array, "b T S"]:
        """Returns which slots these see, whatever the documents and the order of time are."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        mask: MaskSpec,
        bias: None = None,
        cache: SlotCache | None = None,
        rng: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], SlotCache | None, dict[str, Any]]:
        """See `Attention`."""
        del bias, rng
        q, k, v = self.queries_keys_values(x, context, positions)
        aux: dict[str, Any] = {"qkv": (q, k, v)} if "qkv" in self.capture else {}
        rows = functools.partial(self.rows, mask=mask)
        if cache is not None:
            cache = cache.write(k, v, mask.start(x.shape[0]))
        if mask.offset is None:  # no cache, or an empty one
            y = rows(q, k, v)
        else:
            k, v = cache.k.astype(q.dtype), cache.v.astype(q.dtype)
            slots_of = functools.partial(self.slots_of, slots=k.shape[1])
            y = attend_cached(q, k, v, mask.start(x.shape[0]), slots_of, rows, **self.scoring)
        if "attention" in self.capture:
            query = mask.start(1)[:, None] + jnp.arange(q.shape[1])
            seen, allowed = self.pattern(query, k.shape[1], mask.causal), mask.dense(q.shape[1], k.shape[1])
            seen = seen if allowed is None else seen & allowed[:, 0]
            aux["attention"] = weights_by_pair(q, k, seen, **self.scoring)
        return self.output(y), cache, aux
