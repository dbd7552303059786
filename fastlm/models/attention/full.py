"""Softmax attention over all visible keys: multi-head, grouped-query or multi-query.

Cost: time O(T S), memory O(T S) in the plain form and O(T) in the fused ones.
Papers: arXiv 1706.03762; grouped queries 2305.13245; QK-norm 2302.05442.
Left out: dropout on the probabilities, which fused kernels cannot do and recent recipes do not use.

Dims: B batch, T query time, S key time, D embed, N heads, K kv heads, H head dim.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastlm.models import positions as position_encodings
from fastlm.models.config import Compute, LayerConfig
from fastlm.models.norms import Norm
from fastlm.models.weights import normal, weight
from fastlm.ops import attention
from fastlm.ops.caches import KVCache
from fastlm.ops.contract import add_bias, contract
from fastlm.ops.masks import MaskSpec


class FullAttention(nn.Module):
    """See the header; the call signature is the contract of every attention kind."""

    cfg: LayerConfig
    compute: Compute
    capture: frozenset[str] = frozenset()

    @staticmethod
    def empty_cache(cfg: LayerConfig, batch: int, slots: int, dtype: Any) -> KVCache:
        """Returns what one layer remembers before the first token."""
        return KVCache.empty(batch, slots, cfg.kv_heads, cfg.head_dim, dtype)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B S D"] | None,
        *,
        positions: Int[Array, "B T"],
        mask: MaskSpec,
        bias: Float[Array, "b N T S"] | None = None,
        cache: KVCache | None = None,
        rng: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None, dict[str, Any]]:
        """Attends from `x` to `context` (the same array for self-attention).

        With a cache, `context` is written behind what is there; without context (cross-attention after
        the first step) the cache is read as it is.
        """
        del rng  # nothing here is random
        cfg = self.cfg
        angles = None
        if cfg.rotary:
            angles = position_encodings.rotary_angles(positions, cfg.head_dim, cfg.rotary_base, cfg.rotary_scaling)
        q = self._heads(x, "q", cfg.heads, "heads", angles)
        if context is not None:
            k = self._heads(context, "k", cfg.kv_heads, "kv_heads", angles)
            v = self._project(context, "v", cfg.kv_heads, "kv_heads")
            if cache is not None:
                start = jnp.zeros((x.shape[0],), jnp.int32) if mask.offset is None else mask.offset
                cache = cache.write(k, v, start)
        if cache is not None:
            k, v = cache.k.astype(q.dtype), cache.v.astype(q.dtype)
        options = {"scale": cfg.attention_scale, "cap": cfg.attention_softcap}
        y = attention.dot_product_attention(q, k, v, mask, bias, form=self.compute.attention_form, **options)
        aux: dict[str, Any] = {}
        if "attention" in self.capture:
            aux["attention"] = attention.attention_probabilities(q, k, mask, bias, **options)
        if "qkv" in self.capture:
            aux["qkv"] = (q, k, v)
        return self._output(y.reshape(*y.shape[:2], cfg.heads * cfg.head_dim)), cache, aux

    def _heads(self, x: Array, name: str, heads: int, axis: str, angles: tuple[Array, Array] | None) -> Array:
        """Queries or keys: projected, normalized, rotated."""
        cfg, y = self.cfg, self._project(x, name, heads, axis)
        if cfg.qk_norm:
            y = Norm("rms_norm", cfg.head_dim, cfg.norm_epsilon, name=f"{name}_norm")(y)
        return y if angles is None else position_encodings.rotate(y, *angles)

    def _project(self, x: Array, name: str, heads: int, axis: str) -> Array:
        cfg = self.cfg
        shape = (cfg.width, heads * cfg.head_dim)
        y = contract(x, weight(self, name, shape, ("embed", axis), normal(cfg.init_scale)))
        if cfg.qkv_bias:
            y = add_bias(y, weight(self, f"{name}_bias", shape[1:], (axis,)))
        return y.reshape(*y.shape[:2], heads, cfg.head_dim)

    def _output(self, y: Array) -> Array:
        cfg = self.cfg
        shape = (cfg.heads * cfg.head_dim, cfg.width)
        y = contract(y, weight(self, "out", shape, ("heads", "embed"), normal(cfg.residual_init_scale)))
        return add_bias(y, weight(self, "out_bias", (cfg.width,), ("norm",))) if cfg.bias else y
