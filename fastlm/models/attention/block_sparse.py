"""Block-sparse softmax attention: a window of blocks, the first blocks of the row, and a few blocks drawn at random.

Rows are cut into blocks of `block` slots. A query sees the `window` blocks around its own (itself in the middle), the
row's first `global_blocks`, and `random` others; a block that is several of these counts once. In an encoder the
queries of the global blocks see everything. A decoder has the same pattern less what lies ahead, and draws random
blocks among those before the window. Blocks are aligned to the slots of a row: in a packed row the global ones are of
the first document, and the others do not see them.

Notable: the draw of query block i depends on `seed` and i alone (in an encoder also on the count of blocks), and is
made while tracing, so a pattern is a constant and decoding repeats that of whole rows, however long they are. All
heads share it; layers get different ones by a pattern of layers whose seeds differ.
Cost: time O(T block (window + global_blocks + random)), of an encoder's global queries also O(T block global_blocks).
Memory the same, on a CPU that of a few blocks of queries: their copies of keys then stay in the cache, which takes
0.6x the time. Decoding keeps all keys and values, and a step gathers the blocks it needs.
Papers: BigBird arXiv 2007.14062; Longformer 2004.05150 (random = 0).
Left out: projections of their own for global tokens (Longformer), and tokens added in front as global ones (BigBird's
ETC form): the first blocks of the row serve.
On a TPU the splash kernel that ships with jax runs it, with the pattern as its static mask, where its blocks fit.

Dims: B batch, T time, S key time, D embed, C blocks, b tokens of a block, n blocks seen by one, m keys that these
hold, N heads, K kv heads, H head dim.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fastlm.errors import UserError
from fastlm.models.attention.slot_pattern import SlotPatternAttention
from fastlm.models.config import LayerConfig
from fastlm.ops import attention
from fastlm.ops.blocks import attend_blocks, blocked, in_groups, unblocked
from fastlm.ops.masks import MaskSpec
from fastlm.parallel.platforms import target_platform

GROUP = 4  # blocks of queries that a CPU takes at a time, of all rows


@dataclasses.dataclass(frozen=True)
class BlockSparseOptions:
    """Options of "block_sparse"; the defaults are BigBird's.

    Attributes:
      block: slots of a block.
      window: blocks around a query's own, which is the middle one; odd.
      global_blocks: first blocks of the row, seen by all.
      random: blocks drawn for each block of queries.
      seed: of the draw.
    """

    block: int = 64
    window: int = 3
    global_blocks: int = 2
    random: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.block < 1:
            raise UserError(f"block_sparse: block must be at least 1, got {self.block}")
        if self.window < 1 or self.window % 2 == 0:
            raise UserError(f"block_sparse: window must be an odd number of blocks, got {self.window}")
        if min(self.global_blocks, self.random, self.seed) < 0:
            raise UserError(
                "block_sparse: global_blocks, random and seed must not be negative, got "
                f"{self.global_blocks}, {self.random} and {self.seed}"
            )


class BlockSparseAttention(SlotPatternAttention):
    """See the header."""

    @staticmethod
    def seen(cfg: LayerConfig, options: BlockSparseOptions, length: float) -> float:
        """See `Attention`."""
        near = options.window // 2 + 0.5 if cfg.causal else options.window
        blocks = near + options.global_blocks + options.random
        return min(options.block * blocks, length / 2 if cfg.causal else length)

    def rows(self, q: Array, k: Array, v: Array, mask: MaskSpec) -> Float[Array, "B T N H"]:
        """See `SlotPatternAttention`."""
        if attention.splash_runs(q, k, mask, self.softmax):
            visible = pattern_of_slots(self.options, q.shape[1], mask.causal)
            return attention.splash(q, k, v, mask, pattern=attention.splash_table(visible), **self.scoring)
        pattern = {"pattern": self.options, "causal": mask.causal}
        return attend_pattern(q, k, v, mask.key_segments, **pattern, **self.scoring)

    def slots_of(self, query: Int[Array, "B T"], slots: int) -> tuple[Int[Array, "B T m"], Bool[Array, "B T m"]]:
        """See `SlotPatternAttention`."""
        return _slots_of(query, self.options, slots)

    def pattern(self, query: Int[Array, "b T"], slots: int, causal: bool) -> Bool[Array, "b T S"]:
        """See `SlotPatternAttention`."""
        block = self.options.block
        seen = pattern_of_blocks(self.options, -(-slots // block), causal)
        return jnp.asarray(seen)[query // block][..., np.arange(slots) // block]


@functools.lru_cache
def blocks_seen(
    pattern: BlockSparseOptions, count: int, causal: bool
) -> tuple[Int[np.ndarray, "C n"], Bool[np.ndarray, "C n"]]:
    """Returns the blocks that each block of queries sees, by number, and which of these entries count."""
    here, reach = np.arange(count)[:, None], pattern.window // 2
    window = here + np.arange(-reach, 1 if causal else reach + 1)
    first = np.broadcast_to(np.arange(min(pattern.global_blocks, count)), (count, min(pattern.global_blocks, count)))
    drawn = np.full((count, pattern.random), -1)
    for i in range(count):
        before = np.arange(pattern.global_blocks, i - reach)
        behind = np.arange(max(i + reach + 1, pattern.global_blocks), count)
        others = before if causal else np.concatenate([before, behind])
        some = min(pattern.random, len(others))
        drawn[i, :some] = np.random.default_rng((pattern.seed, i)).choice(others, some, replace=False)
    outside = (first < here - reach) | ((first > here + reach) & (not causal))
    counts = np.concatenate([(window >= 0) & (window < count), outside, drawn >= 0], axis=1)
    table = np.where(counts, np.concatenate([window, first, drawn], axis=1), 0)
    used = counts.any(axis=0)
    return table[:, used], counts[:, used]


def _slots_of(
    query: Int[Array, "B T"], pattern: BlockSparseOptions, slots: int
) -> tuple[Int[Array, "B T m"], Bool[Array, "B T m"]]:
    table, counts = (jnp.asarray(x) for x in blocks_seen(pattern, -(-slots // pattern.block), True))
    own, inside = query // pattern.block, jnp.arange(pattern.block)
    keys = (table[own][..., None] * pattern.block + inside).reshape(*query.shape, -1)
    return keys, jnp.repeat(counts[own], pattern.block, axis=-1) & (keys <= query[..., None])


@functools.lru_cache
def pattern_of_blocks(pattern: BlockSparseOptions, count: int, causal: bool) -> Bool[np.ndarray, "C C"]:
    """Returns which of `count` blocks each sees."""
    table, counts = blocks_seen(pattern, count, causal)
    seen = np.zeros((count, count), bool)
    np.logical_or.at(seen, (np.arange(count)[:, None], table), counts)
    if not causal:
        seen[: pattern.global_blocks] = True
    return seen


def pattern_of_slots(pattern: BlockSparseOptions, tokens: int, causal: bool) -> Bool[np.ndarray, "T T"]:
    """Returns which slots of a row of so many each sees, of one document."""
    blocks = pattern_of_blocks(pattern, -(-tokens // pattern.block), causal)
    slots = blocks.repeat(pattern.block, axis=0).repeat(pattern.block, axis=1)[:tokens, :tokens]
    return np.tril(slots) if causal else slots


def attend_pattern(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None,
    *,
    pattern: BlockSparseOptions,
    causal: bool,
    **options: Any,
) -> Float[Array, "B T N H"]:
    """Returns attention of each block of a row to the blocks that `pattern` gives it.

    Args:
      segments: document number of each token, 0 for padding; a token sees its own document.
      options: scale, cap and softmax, as in `attend_blocks`.
    """
    tokens = q.shape[1]
    segments = jnp.ones((1, tokens), jnp.int32) if segments is None else segments
    everywhere = 0 if causal else min(pattern.global_blocks * pattern.block, tokens)
    parts = []
    if everywhere:
        visible = (segments[:, :everywhere, None] == segments[:, None]) & (segments != 0)[:, None]
        parts.append(
            attend_blocks(q[:, :everywhere][:, None], k[:, None], v[:, None], visible[:, None], **options)[:, 0]
        )
    if everywhere < tokens:
        y = _attend_table(q, k, v, segments, everywhere, pattern, causal, options)
        parts.append(unblocked(y, tokens - everywhere))
    return jnp.concatenate(parts, axis=1)


def _attend_table(q, k, v, segments, skipped, pattern, causal, options) -> Float[Array, "B C b N H"]:
    """Attention of the blocks of queries behind the first `skipped` slots."""
    block = min(pattern.block, q.shape[1])
    own = blocked(segments, block)
    first, count = skipped // block, own.shape[1]
    k, v = blocked(k, block), blocked(v, block)

    def attend(q, mine, table, counts, numbers):
        gathered = lambda x: (
            x.at[:, table].get(mode="promise_in_bounds").reshape(x.shape[0], *table.shape[:1], -1, *x.shape[3:])
        )
        other = gathered(own)
        visible = jnp.repeat(counts, block, axis=1)[:, None] & (mine[..., None] == other[:, :, None])
        visible &= (other != 0)[:, :, None]
        if causal:
            slots = lambda blocks: (blocks[..., None] * block + np.arange(block)).reshape(len(table), -1)
            visible &= slots(table)[:, None] <= slots(numbers)[..., None]
        return attend_blocks(q, gathered(k), gathered(v), visible, **options)

    q, mine = blocked(q, block)[:, first:], own[:, first:]
    arrays = (*(x[first:] for x in blocks_seen(pattern, count, causal)), np.arange(first, count))
    if target_platform() != "cpu":
        return attend(q, mine, *arrays)
    return in_groups(attend, (q, mine), arrays, max(1, GROUP // q.shape[0]))
