"""Transformer-XL: attention with relative positions that also sees the `memory` tokens before the row.

    score(i, j) = (q_i + u) . k_j + (q_i + w) . r(i - j),   r(d) = W_r sinusoid(d)

With `data.mode = "stream"` rows go on from batch to batch, and what was computed of the last tokens is carried along
(and checkpointed): a model reads documents far longer than its rows, in training, evaluation and decoding alike.
Cost: time O(T (T + M)), M the memory; long rows go in blocks of queries, so that memory is O(T + M) a block. Decoding
keeps M tokens, whatever T is.
Paper: arXiv 1901.02860. As there, memories are hidden states that today's weights turn into keys and values, and no
gradient flows into them; decoding, whose weights stand still, keeps the keys and values beside them.
The kind brings positions of its own, so rotary angles, where other layers have them, do not rotate here.
Left out: clamped distances, one memory length for training and another for evaluation.

Dims: B batch, T time, M memory, S = M + T, b queries of a block, D embed, N heads, K kv heads, H head dim, L distances.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastlm.errors import UserError
from fastlm.models import positions as position_encodings
from fastlm.models.attention.projections import Attention
from fastlm.models.config import LayerConfig
from fastlm.models.weights import normal, weight
from fastlm.ops import attention
from fastlm.ops.caches import WindowCache
from fastlm.ops.contract import contract, dense
from fastlm.ops.masks import MaskSpec

WHOLE = 512  # tokens up to which a row goes at once
BLOCK = 128  # queries of a block otherwise
PARTS = 2  # of a causal row in blocks; each leaves out the keys behind it


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
            dense(weight(self, name, (cfg.heads, cfg.head_dim), ("heads", None))).astype(q.dtype)
            for name in ("content_bias", "position_bias")
        )
        options = {"scale": cfg.attention_scale, "softmax": self.softmax}
        block = q.shape[1] if q.shape[1] <= WHOLE else BLOCK
        filling = -q.shape[1] % block
        r = self._distances(past, filling, q.shape[1], mask.causal)
        form = self.compute.attention_form
        y = attend_in_blocks(q + u, q + w, k, v, r, mask, past=past, block=block, form=form, **options)
        aux: dict[str, Any] = {}
        if "attention" in self.capture:
            bias = by_distance(q + w, r[filling:], k.shape[1], mask.causal) * cfg.attention_scale
            aux["attention"] = attention.attention_probabilities(q + u, k, mask, bias, **options)
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

    def _distances(self, past: int, filling: int, queries: int, causal: bool) -> Float[Array, "L N H"]:
        """Returns r(d), the farthest first: `past` keys before a row of `queries`, and `filling` more queries."""
        cfg = self.cfg
        farthest_first = jnp.arange(past + queries + filling - 1, -1 if causal else -queries, -1)
        shape = (cfg.width, cfg.heads * cfg.head_dim)
        table = weight(self, "distance", shape, ("waves", "heads"), normal(cfg.init_scale))
        waves = position_encodings.sinusoidal(farthest_first[None], cfg.width)[0]
        return contract(waves.astype(self.compute.jnp_dtype), table).reshape(-1, cfg.heads, cfg.head_dim)


def attend_in_blocks(
    content: Float[Array, "B T N H"],
    position: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    r: Float[Array, "L N H"],
    mask: MaskSpec,
    *,
    past: int,
    block: int,
    scale: float,
    **options: Any,
) -> Float[Array, "B T N H"]:
    """Returns attention with the scores of the header, block by block of queries; the backward pass scores again.

    Args:
      content, position: queries for keys and for distances.
      r: of each distance, the farthest first: that of the first key to the last query, rows filled up to whole blocks.
      past: keys before the first query.
      block: queries of a block, which decides over time and memory, not over the result.
    """
    queries = content.shape[1]
    count = -(-queries // block)
    if not mask.causal or count <= PARTS:
        return _attend_part(content, position, k, v, r, mask, past, block, scale, options)
    size, filled, parts = -(-count // PARTS) * block, count * block, []
    for first in range(0, queries, size):
        last = min(first + size, queries)
        own, keys = slice(first, last), slice(past + last)
        segments = (None, None)
        if mask.query_segments is not None:
            segments = mask.query_segments[:, own], mask.key_segments[:, keys]
        here = MaskSpec(True, *segments, mask.start(1) + first)
        near = r[filled - min(first + size, filled) :]
        arrays = content[:, own], position[:, own], k[:, keys], v[:, keys], near
        parts.append(_attend_part(*arrays, here, past + first, block, scale, options))
    return jnp.concatenate(parts, axis=1)


def _attend_part(content, position, k, v, r, mask, past, block, scale, options) -> Float[Array, "B T N H"]:
    queries, keys = content.shape[1], k.shape[1]
    count = -(-queries // block)
    if mask.causal:  # what lies ahead is hidden: whatever stands there
        r = jnp.pad(r, ((0, (count - 1) * block), (0, 0), (0, 0)))
    filled = lambda x: jnp.pad(x, [(0, 0), (0, count * block - queries)] + [(0, 0)] * (x.ndim - 2))
    content, position = filled(content), filled(position)
    segments = None if mask.query_segments is None else filled(mask.query_segments)

    def attend(i):
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, i * block, block, 1)
        here = mask
        if queries != block:
            own = None if segments is None else cut(segments)
            here = MaskSpec(mask.causal, own, mask.key_segments, mask.start(1) + i * block)
        size = keys + (count * block - queries if mask.causal else block - 1)
        near = jax.lax.dynamic_slice_in_dim(r, (count - 1 - i) * block, size, 0)
        bias = by_distance(cut(position), near, keys, mask.causal) * scale
        return attention.dot_product_attention(cut(content), k, v, here, bias, scale=scale, **options)

    if queries == block:
        return attend(0)
    y = jax.lax.map(jax.checkpoint(attend), jnp.arange(count))
    return jnp.moveaxis(y, 0, 1).reshape(content.shape[0], count * block, *y.shape[3:])[:, :queries]


def by_distance(
    q: Float[Array, "B T N H"], r: Float[Array, "L N H"], keys: int, causal: bool
) -> Float[Array, "B N T S"]:
    """Returns q_i . r(distance of key j); the first of `r` is that of the first key to the last query."""
    scores = jnp.einsum("BTNH,LNH->BNTL", q, r.astype(q.dtype), preferred_element_type=jnp.float32)
    if causal:
        scores = jnp.pad(scores, ((0, 0),) * 3 + ((0, q.shape[1] - 1),))
    return shifted(scores, keys)


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
