"""Softmax attention in detail to what is near and to means of what is far, the coarser the farther away.

A token sees the tokens of its own block and of those beside it one by one. Level l groups 2^l blocks; of each level a
block sees the groups whose parent is its own parent or beside it, less its own and those beside it: at most two groups
on either side, and all levels together cover every other token exactly once. A group stands as `means` keys and values,
the means over runs of block / means 2^l tokens. One softmax goes over tokens and means; the score against a mean is
raised by the logarithm of how many tokens it stands for, as if each had it.

Cost: time and memory O(T (block + means log T)). Decoding reads 2 block + 2 means log T entries a step, and keeps all
keys and values and, in float32, the sums of all groups, of which there are 2 means / block as many.
Notable: packed documents are exact. Of a group that lies behind a query, the query's document can only be the one that
the group's last token belongs to (documents are in one piece: one that began earlier and goes on to the query covers
the group's end, one that begins after it has no token there), so each group pools the tokens of that document, and
shows to it alone. Of one that lies ahead it is that of the first token.
Papers: after H-Transformer-1D, arXiv 2107.11906, and the fast multipole method's lists of groups.
Left out: coarse queries (H-Transformer-1D pools them like keys, which saves the logarithm and has neighbours share what
they see of the far); learned pooling; forgetting keys outside the near blocks while decoding.

Dims: B batch, T time, S slots of a cache, D embed, C blocks, b tokens of a block, w near tokens that a block sees,
E runs of a level, N heads, K kv heads, H head dim, P = 2 H numbers of a key and its value.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fastlm.errors import UserError
from fastlm.models.attention.projections import Attention
from fastlm.models.config import LayerConfig
from fastlm.ops.blocks import attend_blocks, blocked, spans, unblocked
from fastlm.ops.caches import SlotCache
from fastlm.ops.key_major_attention import MASKED
from fastlm.ops.masks import MaskSpec

BEHIND, AHEAD = (-3, -2), (2, 3)  # groups of a level that a block may look at, from its own


@dataclasses.dataclass(frozen=True)
class HierarchicalOptions:
    """Options of "hierarchical".

    Attributes:
      block: tokens of a block; a token sees its own and the neighbouring ones in detail.
      means: keys that stand for one group of blocks.
    """

    block: int = 64
    means: int = 4

    def __post_init__(self) -> None:
        if self.block < 1 or self.means < 1 or self.block % self.means:
            raise UserError(
                f"hierarchical: block and means must be at least 1 and means divide block, got {self.block} and "
                f"{self.means}"
            )

    def levels(self, count: int) -> int:
        """Returns how many levels `count` blocks need: two groups away there must be another."""
        return max((count - 1).bit_length() - 1, 0)

    def run(self, level: int) -> int:
        """Returns how many tokens a mean of this level stands for."""
        return (self.block // self.means) << level


@flax.struct.dataclass
class HierarchicalCache:
    """Keys and values by slot, and per level the sums of each run of them in float32.

    Sums are taken anew from what they consist of whenever part of it is written, so runs that held padding are mended
    by the tokens that replace it; a query looks only at runs that are full.
    """

    tokens: SlotCache
    sums: tuple[Float[Array, "B E K P"], ...]


class HierarchicalAttention(Attention):
    """See the header."""

    @staticmethod
    def seen(cfg: LayerConfig, options: HierarchicalOptions, length: float) -> float:
        """See `Attention`."""
        levels = max(math.log2(max(length / options.block, 1)), 0)
        sides = 0.5 if cfg.causal else 1
        return min(sides * (3 * options.block + 3 * options.means * levels), sides * length)

    @staticmethod
    def empty_cache(
        cfg: LayerConfig, options: HierarchicalOptions, batch: int, slots: int, dtype: Any
    ) -> HierarchicalCache:
        """Returns room for whole blocks, at least `slots` tokens, and for the groups that will be full."""
        count = -(-slots // options.block)
        tokens = SlotCache.empty(batch, count * options.block, cfg.kv_heads, cfg.head_dim, dtype)
        runs = [(count >> level) * options.means for level in range(options.levels(count))]
        return HierarchicalCache(
            tokens, tuple(jnp.zeros((batch, n, cfg.kv_heads, 2 * cfg.head_dim), jnp.float32) for n in runs)
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
        cache: HierarchicalCache | None = None,
        rng: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], HierarchicalCache | None, dict[str, Any]]:
        """See `Attention`."""
        del bias, rng
        options = self.options
        q, k, v = self.queries_keys_values(x, context, positions)
        look = self.scoring
        start = mask.start(x.shape[0])
        if cache is not None:
            cache = write(cache, k, v, start, options)
        if mask.offset is None:  # no cache, or an empty one
            attend = lambda v: near_and_far(q, k, v, mask.key_segments, causal=mask.causal, options=options, **look)
            y = attend(v)
        else:
            zero = jnp.zeros((x.shape[0],), jnp.int32)
            y = attend_cached(q, cache, start, options, **look)
            k, v = (t.astype(q.dtype) for t in (cache.tokens.k, cache.tokens.v))
            attend = lambda v: attend_cached(q, write(cache, k, v, zero, options), start, options, **look)
        aux: dict[str, Any] = {"qkv": (q, k, v)} if "qkv" in self.capture else {}
        if "attention" in self.capture:
            aux["attention"] = _matrix(attend, v)
        return self.output(y), cache, aux


def _matrix(attend: Any, v: Float[Array, "B S K H"]) -> Float[Array, "B N T S"]:
    """What values were weighted with: results are linear in them, so those of the unit vectors are the weights."""
    s, h = v.shape[1], v.shape[-1]
    units = jnp.pad(jnp.eye(s, dtype=v.dtype), ((0, 0), (0, -s % h))).reshape(s, -1, h)
    parts = [attend(jnp.broadcast_to(units[:, i, None], v.shape)) for i in range(units.shape[1])]
    return jnp.swapaxes(jnp.concatenate(parts, axis=-1)[..., :s], 1, 2).astype(jnp.float32)


# --- a row at once --------------------------------------------------------------------------------------------------


@flax.struct.dataclass
class Runs:
    """The runs of one level.

    Attributes:
      sums: of keys and values of the tokens of `document` in each run.
      document: to which a run shows, 0 for none.
      count: how many tokens those are.
    """

    sums: Float[Array, "B E K P"]
    document: Int[Array, "b E"]
    count: Int[Array, "b E"]


def near_and_far(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None,
    *,
    causal: bool,
    options: HierarchicalOptions,
    **look: Any,
) -> Float[Array, "B T N H"]:
    """Returns attention of a row to itself.

    Args:
      segments: document number of each token, 0 for padding; a token sees its own document.
      look: scale, cap and softmax, as in `attend_blocks`.
    """
    length, block = q.shape[1], min(options.block, q.shape[1])
    count = -(-length // block)
    segments = jnp.ones((1, length), jnp.int32) if segments is None else segments
    own = blocked(segments, block)
    beside = lambda x: spans(jnp.pad(x, [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2)), count, 2 if causal else 3)
    visible = (own[..., None] == beside(own)[:, :, None]) & (own != 0)[..., None]
    if causal:
        visible &= jnp.arange(2 * block) <= jnp.arange(block)[:, None] + block
    keys, values = [beside(blocked(k, block))], [beside(blocked(v, block))]
    raised = [jnp.where(visible, 0.0, MASKED)]
    both = jnp.concatenate([k, v], axis=-1)
    for offsets, last in ((BEHIND, True),) if causal else ((BEHIND, True), (AHEAD, False)):
        for level, runs in enumerate(pyramid(both, segments, options, count, last)):
            means, added = _seen_groups(runs, own, level, offsets, options.means)
            _append(keys, values, means.astype(q.dtype))
            raised.append(added)
    keys, values = (jnp.concatenate(x, axis=2) for x in (keys, values))
    return unblocked(attend_blocks(blocked(q, block), keys, values, jnp.concatenate(raised, axis=3), **look), length)


def _append(keys: list[Array], values: list[Array], both: Float[Array, "B C m K P"]) -> None:
    for found, half in zip((keys, values), jnp.split(both, 2, axis=-1)):
        found.append(half)


def pyramid(
    both: Float[Array, "B T K P"], segments: Int[Array, "b T"], options: HierarchicalOptions, count: int, last: bool
) -> list[Runs]:
    """Returns the runs of every level, finest first.

    Args:
      count: blocks of the row.
      last: whether a run pools the document of its last real token, or of its first.
    """
    found: list[Runs] = []
    for level in range(options.levels(count)):
        if not found:
            x, documents = (blocked(t, options.run(0)) for t in (both, segments))
            counts = (documents != 0).astype(jnp.int32)
        else:
            finer = found[-1]
            x, documents, counts = (blocked(t, 2) for t in (finer.sums, finer.document, finer.count))
        runs = -(-count >> level) * options.means
        x, documents, counts = (_lengthened(t, runs) for t in (x, documents, counts))
        found.append(_pool(x, documents, counts, last))
    return found


def _lengthened(x: Array, length: int) -> Array:
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


def _pool(
    x: Float[Array, "B E s K P"], documents: Int[Array, "b E s"], counts: Int[Array, "b E s"], last: bool
) -> Runs:
    """Sums over the s parts of each run that belong to its last or first document."""
    places = jnp.arange(documents.shape[2])
    real = documents != 0
    at = jnp.max(jnp.where(real, places, 0), 2) if last else jnp.argmax(real, 2)
    document = jnp.take_along_axis(documents, at[..., None], axis=2)
    kept = real & (documents == document)
    kept_in_row = jnp.broadcast_to(kept.astype(x.dtype), x.shape[:3])
    sums = jnp.einsum("BEs,BEsKP->BEKP", kept_in_row, x, preferred_element_type=jnp.float32)
    return Runs(sums, document[..., 0], jnp.sum(jnp.where(kept, counts, 0), 2))


def _seen_groups(
    runs: Runs, own: Int[Array, "b C s"], level: int, offsets: tuple[int, int], means: int
) -> tuple[Float[Array, "B C m K P"], Float[Array, "b C s m"]]:
    """Returns the means of the groups at these two offsets from each block's own, and what scores are raised by."""
    count = own.shape[1]

    def groups(x: Array) -> Array:
        x = blocked(x, means)
        number, first = x.shape[1], offsets[0]
        x = jnp.pad(x, [(0, 0), (max(-first, 0), 0)] + [(0, 0)] * (x.ndim - 2))[:, max(first, 0) :]
        return jnp.repeat(spans(x, number, 2), 1 << level, axis=1)[:, :count]

    tokens = groups(runs.count)
    pooled = groups(runs.sums / jnp.maximum(runs.count, 1)[..., None, None])
    listed = jnp.repeat(_listed(jnp.arange(count) >> level, offsets), means, axis=-1)
    visible = (own[..., None] == groups(runs.document)[:, :, None]) & (own != 0)[..., None] & listed[:, None]
    return pooled, jnp.where(visible, jnp.log(jnp.maximum(tokens, 1))[:, :, None], MASKED)


def _listed(here: Int[Array, "..."], offsets: tuple[int, int]) -> Bool[Array, "... 2"]:
    """Whether the groups at these offsets are this one's to look at: whether the parents are the same or neighbours."""
    there = here[..., None] + jnp.array(offsets)
    return (there >= 0) & (abs((there >> 1) - (here >> 1)[..., None]) <= 1)


# --- with a cache ---------------------------------------------------------------------------------------------------


def write(
    cache: HierarchicalCache,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    start: Int[Array, "B"],
    options: HierarchicalOptions,
) -> HierarchicalCache:
    """Returns the cache with T tokens written from slot `start` on, and the sums of the runs they lie in."""
    tokens, sums = cache.tokens.write(k, v, start), []
    for level, old in enumerate(cache.sums):
        parts, size = (2, options.run(level)) if level else (options.run(0), options.run(0))
        touched = min((k.shape[1] + size - 2) // size + 1, old.shape[1])
        first = jnp.minimum(start // size, old.shape[1] - touched)
        below = sums[-1:] or [tokens.k, tokens.v]
        sums.append(jax.vmap(_summed, (0, 0, 0, None, None))(old, below, first, touched, parts))
    return HierarchicalCache(tokens, tuple(sums))


def _summed(old: Array, below: list[Array], first: Array, touched: int, parts: int) -> Float[Array, "E K P"]:
    """One row's sums of a level with `touched` of them from `first` on added up anew."""
    found = [jax.lax.dynamic_slice_in_dim(x, first * parts, touched * parts) for x in below]
    new = [jnp.sum(x.reshape(touched, parts, *x.shape[1:]), axis=1, dtype=jnp.float32) for x in found]
    return jax.lax.dynamic_update_slice_in_dim(old, jnp.concatenate(new, axis=-1), first, 0)


def attend_cached(
    q: Float[Array, "B T N H"],
    cache: HierarchicalCache,
    start: Int[Array, "B"],
    options: HierarchicalOptions,
    **look: Any,
) -> Float[Array, "B T N H"]:
    """Returns attention of the tokens at slots `start` ... to those up to each, which the cache holds already."""
    queries, here = _by_block(q, start, options.block)
    own = here[:, :, 0] // options.block
    near = own[..., None] + jnp.array((-1, 0))
    there = (near[..., None] * options.block + jnp.arange(options.block)).reshape(*own.shape, 1, -1)
    found = [_blocks_at(x, options.block, near).astype(q.dtype) for x in (cache.tokens.k, cache.tokens.v)]
    keys, values = [found[0]], [found[1]]
    raised = [jnp.where((there >= 0) & (there <= here[..., None]), 0.0, MASKED)]
    for level, sums in enumerate(cache.sums):
        groups, run = own >> level, options.run(level)
        means = _blocks_at(sums, options.means, groups[..., None] + jnp.array(BEHIND)) / run
        _append(keys, values, means.astype(q.dtype))
        listed = jnp.repeat(_listed(groups, BEHIND), options.means, axis=-1)[:, :, None]
        raised.append(jnp.broadcast_to(jnp.where(listed, jnp.log(run), MASKED), (*here.shape, listed.shape[-1])))
    keys, values = (jnp.concatenate(x, axis=2) for x in (keys, values))
    y = attend_blocks(queries, keys, values, jnp.concatenate(raised, axis=3), **look)
    first = start - here[:, 0, 0]
    take = jax.vmap(lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, q.shape[1]))
    return take(y.reshape(y.shape[0], -1, *y.shape[3:]), first)


def _by_block(
    q: Float[Array, "B T N H"], start: Int[Array, "B"], block: int
) -> tuple[Float[Array, "B C s N H"], Int[Array, "B C s"]]:
    """Lays queries out by the blocks of slots that they lie in; a single one is a block by itself.

    Returns:
      the queries, zeros before and behind them, and the slot of each.
    """
    length = q.shape[1]
    if length == 1:
        return q[:, None], start[:, None, None]
    inside, count = start % block, (length + block - 2) // block + 1
    room = jnp.zeros((q.shape[0], count * block, *q.shape[2:]), q.dtype)
    room = jax.vmap(lambda x, new, at: jax.lax.dynamic_update_slice_in_dim(x, new, at, 0))(room, q, inside)
    return blocked(room, block), blocked((start - inside)[:, None] + jnp.arange(count * block), block)


def _blocks_at(x: Array, size: int, numbers: Int[Array, "B C 2"]) -> Array:
    """Returns two blocks of x [B, S, ...] for each of C, joined: [B, C, 2 size, ...]."""
    found = jax.vmap(lambda x, i: jnp.take(x, i, axis=0, mode="clip"))(blocked(x, size), numbers)
    return found.reshape(*numbers.shape[:2], 2 * size, *x.shape[2:])
