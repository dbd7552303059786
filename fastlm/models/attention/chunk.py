"""Chunked softmax attention: rows are cut into chunks, and a token sees its own chunk and `back` whole ones before it.

A decoder's token sees its chunk up to itself; an encoder's sees all of it, and as many chunks ahead as back. Chunks
are aligned to the slots of a row and not to the positions in a document: in a packed row a document may begin in the
middle of a chunk, and then sees less of itself than it would alone.

Cost: time and memory O(T (1 + back) size). Decoding keeps the (1 + back) size latest keys and values, whatever T
is, and where in its chunk the next token falls; a row that goes on with a document goes on with its chunks.
Papers: the local ("block") attention of Image Transformer arXiv 1802.05751, the chunks of Reformer 2001.04451, the
blocks of Long Range Arena's local attention 2011.04006.
Left out: sorting tokens into chunks by what they hold (Reformer's hashing).

Dims: B batch, T time, S key time, D embed, C chunks, b tokens of a chunk, m keys that a chunk sees, N heads, K kv
heads, H head dim.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastlm.errors import UserError
from fastlm.models.attention.projections import Attention
from fastlm.models.config import LayerConfig
from fastlm.ops import attention
from fastlm.ops.blocks import attend_blocks, blocked, spans, unblocked, weights_by_pair
from fastlm.ops.caches import RingCache
from fastlm.ops.masks import MaskSpec


@dataclasses.dataclass(frozen=True)
class ChunkOptions:
    """Options of "chunk".

    Attributes:
      size: slots of a chunk.
      back: whole chunks seen before a token's own; in an encoder also behind it.
    """

    size: int = 128
    back: int = 1

    def __post_init__(self) -> None:
        if self.size < 1 or self.back < 0:
            raise UserError(f"chunk: size must be at least 1 and back not negative, got {self.size} and {self.back}")


@flax.struct.dataclass
class ChunkCache:
    """What a layer remembers.

    Attributes:
      window: the latest tokens, as many as the last token of a chunk sees, itself among them.
      place: slot of the next token in its chunk.
    """

    window: RingCache
    place: Int[Array, "B"]


class ChunkAttention(Attention):
    """See the header."""

    @staticmethod
    def seen(cfg: LayerConfig, options: ChunkOptions, length: float) -> float:
        """See `Attention`."""
        whole = length / 2 if cfg.causal else length
        return min(options.size * (options.back + 0.5 if cfg.causal else 2 * options.back + 1), whole)

    @staticmethod
    def empty_cache(cfg: LayerConfig, options: ChunkOptions, batch: int, slots: int, dtype: Any) -> ChunkCache:
        """Returns room for the keys and values of the chunks that a token sees."""
        tokens = (1 + options.back) * options.size
        window = RingCache.empty(batch, tokens, slots, cfg.kv_heads, cfg.head_dim, dtype)
        return ChunkCache(window, jnp.zeros((batch,), jnp.int32))

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        mask: MaskSpec,
        bias: None = None,
        cache: ChunkCache | None = None,
        rng: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], ChunkCache | None, dict[str, Any]]:
        """See `Attention`."""
        del bias, rng
        place = jnp.zeros((1,), jnp.int32)
        q, k, v = self.queries_keys_values(x, context, positions)
        aux: dict[str, Any] = {"qkv": (q, k, v)} if "qkv" in self.capture else {}
        own = segments = mask.key_segments
        times = jnp.arange(q.shape[1])[None]
        if cache is not None:
            recent = cache.window.append(k, v, mask)
            k, v, own, segments, times = recent.k, recent.v, recent.own, recent.segments, recent.times
            place = cache.place
            cache = ChunkCache(recent.cache, (place + _written(mask, *x.shape[:2])) % self.options.size)
        shape = {"size": self.options.size, "back": self.options.back, "causal": mask.causal}
        options = self.scoring
        asking, keys = place[:, None] + jnp.arange(q.shape[1]), place[:, None] + times
        near = lambda: _sees(asking[..., None], keys[:, None], **shape)
        if cache is not None and q.shape[1] == 1:  # keys lie in the order of their slots
            visible = MaskSpec(False, own, jnp.where(near()[:, 0], segments, 0))
            y = attention.dot_product_attention(q, k, v, visible, **options)
        else:
            y = attend_chunks(q, k, v, segments, place, **shape, **options)
        if "attention" in self.capture:
            visible = near()
            if segments is not None:
                visible &= (own[..., None] == segments[:, None]) & (segments[:, None] != 0)
            aux["attention"] = weights_by_pair(q, k, visible, **options)
        return self.output(y), cache, aux


def _written(mask: MaskSpec, rows: int, tokens: int) -> Int[Array, "B"]:
    """How many tokens of each row count, which is up to the last real one."""
    real = mask.real(tokens)
    if real is None:
        return jnp.full((rows,), tokens, jnp.int32)
    return jnp.max(jnp.where(real, jnp.arange(1, tokens + 1), 0), axis=1)


def _sees(query: Array, key: Array, size: int, back: int, causal: bool) -> Array:
    """Whether the query at one slot sees the key at another."""
    chunks = query // size - key // size
    return ((key <= query) & (chunks <= back)) if causal else (abs(chunks) <= back)


def attend_chunks(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    segments: Int[Array, "B S"] | None,
    place: Int[Array, "b"],
    *,
    size: int,
    back: int,
    causal: bool,
    **options: Any,
) -> Float[Array, "B T N H"]:
    """Returns attention of the last T of S tokens to their chunks and those around.

    Args:
      segments: document number of each token, 0 for padding; a token sees its own document.
      place: slot of the first query in its chunk, 0 if there are no keys before it.
      options: scale, cap and softmax, as in `attend_blocks`.
    """
    queries, past = q.shape[1], k.shape[1] - q.shape[1]
    if queries <= size:  # one block of all, so a step of decoding cuts nothing
        block, count, lead, keys = queries, 1, past, k.shape[1]
        seen = lambda x: x[:, None]
    else:
        # Blocks of queries are the chunks themselves unless there is a past: chunks then begin anywhere, per row.
        block, count = size, -(-queries // size)
        behind = -(-past // size) if past else back
        width = behind + 1 + (0 if causal else back)
        lead, keys = behind * size, width * size

        def seen(x: Array) -> Array:
            """What the queries of each block may see, [B, C, m, ...]: keys begin `lead` tokens before the first."""
            x = jnp.pad(x, [(0, 0), (lead - past, 0)] + [(0, 0)] * (x.ndim - 2))
            return spans(blocked(x, block), count, width)

    first = jnp.arange(count)[None, :, None] * block
    here, there = first + jnp.arange(block), first + jnp.arange(keys) - lead
    start = place[:, None, None, None]
    visible = _sees(start + here[..., None], start + there[..., None, :], size, back, causal)
    visible &= ((there >= -past) & (there < queries))[..., None, :]
    if segments is not None:
        own, other = blocked(segments[:, past:], block), seen(segments)
        visible &= (own[..., None] == other[..., None, :]) & (other != 0)[..., None, :]
    return unblocked(attend_blocks(blocked(q, block), seen(k), seen(v), visible, **options), queries)
