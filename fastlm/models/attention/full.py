"""Softmax attention over all visible keys: multi-head, grouped-query or multi-query.

Cost: time O(T S), memory O(T S) in the plain form and O(T) in the fused ones.
Papers: arXiv 1706.03762; grouped queries 2305.13245; QK-norm 2302.05442.
Left out: dropout on the probabilities, which fused kernels cannot do and recent recipes do not use.

Dims: B batch, T query time, S key time, D embed, N heads, K kv heads, H head dim.
"""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float, Int

from fastlm.models.attention.projections import Attention
from fastlm.models.config import LayerConfig
from fastlm.ops import attention
from fastlm.ops.caches import KVCache, RoundedCache, keys_and_values
from fastlm.ops.masks import MaskSpec


class FullAttention(Attention):
    """See the header."""

    @staticmethod
    def empty_cache(cfg: LayerConfig, options: Any, batch: int, slots: int, dtype: Any) -> KVCache | RoundedCache:
        """Returns room for the keys and values of `slots` tokens; in eight bits if the type is int8."""
        return keys_and_values(batch, slots, cfg.kv_heads, cfg.head_dim, dtype)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B S D"] | None,
        *,
        positions: Int[Array, "B T"],
        mask: MaskSpec,
        bias: Float[Array, "b N T S"] | None = None,
        cache: KVCache | RoundedCache | None = None,
        rng: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | RoundedCache | None, dict[str, Any]]:
        """Attends from `x` to `context` (the same array for self-attention).

        With a cache, `context` is written behind what is there; without context (cross-attention after
        the first step) the cache is read as it is. An empty cache (no `mask.offset`) is only written.
        """
        del rng  # nothing here is random
        cfg = self.cfg
        if context is None:
            q = self.heads(x, "q", cfg.heads, "heads", self.angles(positions))
        else:
            q, k, v = self.queries_keys_values(x, context, positions)
            if cache is not None:
                cache = cache.write(k, v, mask.start(x.shape[0]))
                k, v = cache.kept(k), cache.kept(v)
        if context is None or mask.offset is not None:
            k, v = cache.k.astype(q.dtype), cache.v.astype(q.dtype)
        options = self.scoring
        y = attention.dot_product_attention(q, k, v, mask, bias, form=self.compute.attention_form, **options)
        aux: dict[str, Any] = {}
        if "attention" in self.capture:
            aux["attention"] = attention.attention_probabilities(q, k, mask, bias, **options)
        if "qkv" in self.capture:
            aux["qkv"] = (q, k, v)
        return self.output(y), cache, aux
