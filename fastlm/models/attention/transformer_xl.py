"""Transformer-XL: attention with relative positions that also sees the `memory` tokens before the row.

    score(i, j) = (q_i + u) . k_j + (q_i + w) . r(i - j),   r(d) = W_r sinusoid(d)

With `data.mode = "stream"` rows go on from batch to batch, and what was computed of the last tokens is carried along
(and checkpointed): a model reads documents far longer than its rows, in training, evaluation and decoding alike.
Cost: time and memory O(T (T + M)), M the memory. Decoding keeps M tokens, whatever T is.
Paper: arXiv 1901.02860. As there, memories are hidden states that today's weights turn into keys and values, and no
gradient flows into them; decoding, whose weights stand still, keeps the keys and values beside them.
The kind brings positions of its own, so rotary angles, where other layers have them, do not rotate here.
Left out: clamped distances, one memory length for training and another for evaluation.

Dims: B batch, T time, M memory, S = M + T, D embed, N heads, K kv heads, H head dim, L distances.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastlm.errors import UserError
from fastlm.models import positions as position_encodings
from fastlm.models.attention.projections import Attention
from fastlm.models.config import LayerConfig
from fastlm.models.weights import normal, weight
from fastlm.ops import attention
from fastlm.ops.caches import WindowCache
from fastlm.ops.masks import MaskSpec


@dataclasses.dataclass(frozen=True)
class TransformerXLOptions:
    """Options of "transformer_xl".

    Attributes:
      memory: tokens seen before those of the row.
    """

    memory: int = 256

    def __post_init__(self) -> None:
        if self.memory < 1:
            raise UserError(f"transformer_xl: memory must be at least 1 token, got {self.memory}")


@flax.struct.dataclass
class Remembered:
    """What a layer keeps of a token: what it read, and the keys and values that it made of that."""

    hidden: Float[Array, "B M D"]
    keys: Float[Array, "B M K H"]
    values: Float[Array, "B M K H"]


class TransformerXLAttention(Attention):
    """See the header."""

    @staticmethod
    def seen(cfg: LayerConfig, options: TransformerXLOptions, length: float) -> float:
        """See `Attention`."""
        own = length / 2 if cfg.causal else length
        return 1.5 * (own + options.memory)  # distances have scores of their own

    @staticmethod
    def check(cfg: LayerConfig, options: TransformerXLOptions) -> None:
        """Refuses a soft-cap."""
        if cfg.attention_softcap:
            raise UserError(
                "transformer_xl: a soft-cap would have to bend two terms at once; set attention_softcap to 0"
            )

    @staticmethod
    def empty_cache(cfg: LayerConfig, options: TransformerXLOptions, batch: int, slots: int, dtype: Any) -> WindowCache:
        """Returns an empty memory."""
        zeros = lambda *shape: jnp.zeros((batch, options.memory, *shape), dtype)
        heads = (cfg.kv_heads, cfg.head_dim)
        return WindowCache(
            Remembered(zeros(cfg.width), zeros(*heads), zeros(*heads)), jnp.zeros((batch, options.memory), bool)
        )

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        mask: MaskSpec,
        bias: None = None,
        cache: WindowCache | None = None,
        rng: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], WindowCache | None, dict[str, Any]]:
        """See `Attention`."""
        del positions, bias, rng
        cfg, past = self.cfg, 0
        q = self.heads(x, "q", cfg.heads, "heads", None)
        if cache is None:
            k, v = self._keys_values(context)
        else:
            past = self.options.memory
            k, v, segments, cache = self._remember(context, cache, mask)
            mask = MaskSpec(mask.causal, segments[:, past:], segments, jnp.full((x.shape[0],), past, jnp.int32))
        u, w = (
            weight(self, name, (cfg.heads, cfg.head_dim), ("heads", None)).astype(q.dtype)
            for name in ("content_bias", "position_bias")
        )
        by_distance = self._by_distance(q + w, past, mask.causal) * cfg.attention_scale
        options = {"scale": cfg.attention_scale, "softmax": self.softmax}
        form = self.compute.attention_form
        y = attention.dot_product_attention(q + u, k, v, mask, by_distance, form=form, **options)
        aux: dict[str, Any] = {}
        if "attention" in self.capture:
            aux["attention"] = attention.attention_probabilities(q + u, k, mask, by_distance, **options)
        if "qkv" in self.capture:
            aux["qkv"] = (q, k, v)
        return self.output(y), cache, aux

    def _remember(
        self, x: Array, cache: WindowCache, mask: MaskSpec
    ) -> tuple[Array, Array, Int[Array, "B S"], WindowCache]:
        """Returns keys, values and documents of memory and row, and the memory behind the row."""
        if mask.key_segments is None:
            everything, segments, cache = cache.append(Remembered(x, *self._keys_values(x)), mask)
            return everything.keys, everything.values, segments, cache
        # In training: what was remembered, seen with the weights of this step.
        k, v = self._keys_values(jnp.concatenate([cache.tokens.hidden.astype(x.dtype), x], axis=1))
        past = self.options.memory
        _, segments, cache = cache.append(Remembered(x, k[:, past:], v[:, past:]), mask)
        return k, v, segments, cache

    def _keys_values(self, x: Array) -> tuple[Array, Array]:
        cfg = self.cfg
        return self.heads(x, "k", cfg.kv_heads, "kv_heads", None), self.project(x, "v", cfg.kv_heads, "kv_heads")

    def _by_distance(self, q: Float[Array, "B T N H"], past: int, causal: bool) -> Float[Array, "B N T S"]:
        """Returns q_i . r(i - j) for keys that begin `past` tokens before the first query."""
        cfg, queries = self.cfg, q.shape[1]
        keys = past + queries
        farthest_first = jnp.arange(keys - 1, -1 if causal else -queries, -1)
        shape = (cfg.width, cfg.heads * cfg.head_dim)
        table = weight(self, "distance", shape, ("embed", "heads"), normal(cfg.init_scale))
        waves = position_encodings.sinusoidal(farthest_first[None], cfg.width)[0]
        r = (waves @ table).reshape(-1, cfg.heads, cfg.head_dim).astype(q.dtype)
        by_distance = jnp.einsum("BTNH,LNH->BNTL", q, r, preferred_element_type=jnp.float32)
        if causal:  # what lies ahead is hidden: whatever stands there
            by_distance = jnp.pad(by_distance, ((0, 0),) * 3 + ((0, queries - 1),))
        return shifted(by_distance, keys)


def shifted(by_distance: Float[Array, "B N T L"], keys: int) -> Float[Array, "B N T S"]:
    """Returns entry [i, T - 1 - i + j] of each [T, L = S + T - 1] as entry [i, j]: distances become keys.

    Rows of L numbers read as rows of L - 1 start one further to the right each, which is the shift (the paper,
    appendix B).
    """
    *lead, queries, distances = by_distance.shape
    if queries == 1:
        return by_distance
    flat = by_distance.reshape(*lead, -1)[..., queries - 1 :]
    return flat[..., : queries * (distances - 1)].reshape(*lead, queries, distances - 1)[..., :keys]
