"""Strided softmax attention: a token sees the `stride` latest, and every token a multiple of `stride` away.

One softmax over both; a key that is in both counts once. An encoder's token sees the same in both directions.

Cost: time and memory O(T (stride + T / stride)), least with stride near sqrt(T): rows are laid out as a table of
T / stride lines of `stride` tokens, a window is a line and the one before, and the distant keys of a token are its
column. Decoding keeps all keys and values, and a step gathers the stride + T / stride it needs.
Papers: Sparse Transformer arXiv 1904.10509 (its strided pattern, both heads of it merged into one); the dilated windows
of Longformer 2004.05150.
Left out: different patterns per head; the paper's fixed pattern, whose summary tokens an encoder with global blocks
has (see the kind "block_sparse").

Dims: B batch, T time, S key time, D embed, R lines, L lines as keys, c tokens of a line, m keys of a window, N heads,
K kv heads, G query heads per kv head, H head dim.
"""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fastlm.errors import UserError
from fastlm.models.attention.slot_pattern import SlotPatternAttention
from fastlm.models.config import LayerConfig
from fastlm.ops.attention import softcap
from fastlm.ops.blocks import blocked, spans, unblocked
from fastlm.ops.key_major_attention import MASKED
from fastlm.ops.masks import MaskSpec
from fastlm.ops.softmax import Exact, Softmax


@dataclasses.dataclass(frozen=True)
class DilatedOptions:
    """Options of "dilated".

    Attributes:
      stride: tokens of the window, and the step between distant keys; 0 for the power of two nearest to the square
        root of the model's longest context.
    """

    stride: int = 0

    def __post_init__(self) -> None:
        if self.stride < 0:
            raise UserError(f"dilated: stride must not be negative, got {self.stride}")


class DilatedAttention(SlotPatternAttention):
    """See the header."""

    @staticmethod
    def seen(cfg: LayerConfig, options: DilatedOptions, length: float) -> float:
        """See `Attention`."""
        stride, sides = options.stride or default_stride(cfg.max_length), 1 if cfg.causal else 2
        return min(sides * (stride + length / stride / 2), length / 2 * sides)

    @property
    def stride(self) -> int:
        """The stride asked for, or the one derived."""
        return self.options.stride or default_stride(self.cfg.max_length)

    def rows(self, q: Array, k: Array, v: Array, mask: MaskSpec) -> Float[Array, "B T N H"]:
        """See `SlotPatternAttention`."""
        return strided(q, k, v, mask.key_segments, stride=self.stride, causal=mask.causal, **self.scoring)

    def slots_of(self, query: Int[Array, "B T"], slots: int) -> tuple[Int[Array, "B T m"], Bool[Array, "B T m"]]:
        """See `SlotPatternAttention`."""
        return _slots_of(query, self.stride, slots)

    def pattern(self, query: Int[Array, "b T"], slots: int, causal: bool) -> Bool[Array, "b T S"]:
        """See `SlotPatternAttention`."""
        del causal
        distance = query[..., None] - jnp.arange(slots)
        return (abs(distance) < self.stride) | (distance % self.stride == 0)


def _slots_of(query: Int[Array, "B T"], stride: int, slots: int) -> tuple[Int[Array, "B T m"], Bool[Array, "B T m"]]:
    distances = jnp.concatenate([jnp.arange(min(stride, slots)), jnp.arange(stride, slots, stride)])
    keys = query[..., None] - distances
    return keys, keys >= 0


def strided(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None,
    *,
    stride: int,
    causal: bool,
    scale: float,
    cap: float = 0.0,
    softmax: Softmax = Exact(),
) -> Float[Array, "B T N H"]:
    """Returns attention of each token to its window and its column.

    Args:
      segments: document number of each token, 0 for padding; a token sees its own document.
    """
    tokens, kv_heads = q.shape[1], k.shape[2]
    stride = min(stride, tokens)
    segments = blocked(jnp.ones((1, tokens), jnp.int32) if segments is None else segments, stride)
    q = blocked(q.reshape(*q.shape[:2], kv_heads, -1, q.shape[3]), stride)  # [B, R, c, K, G, H]
    k, v = blocked(k, stride), blocked(v, stride)
    near_k, near_v, near_segments = (_windows(x, causal) for x in (k, v, segments))
    near = _product("BRcKGH,BRmKH->BRKGcm", q, near_k) * scale
    near = jnp.where(_near(segments, near_segments, causal)[:, :, None, None], softcap(near, cap), MASKED)
    far = _product("BRcKGH,BLcKH->BcKGRL", q, k) * scale
    far = jnp.where(_far(segments, causal)[:, :, None, None], softcap(far, cap), MASKED)
    far = jnp.transpose(far, (0, 4, 2, 3, 1, 5))  # [B, R, K, G, c, L]
    p = softmax(jnp.concatenate([near, far], axis=-1)).astype(v.dtype)
    near, far = p[..., : near.shape[-1]], p[..., near.shape[-1] :]
    y = jnp.transpose(_product("BRKGcm,BRmKH->BRKGcH", near, near_v), (0, 1, 4, 2, 3, 5))
    y += jnp.transpose(_product("BRKGcL,BLcKH->BcKGRH", far, v), (0, 4, 1, 2, 3, 5))
    return unblocked(y.reshape(*y.shape[:3], -1, y.shape[-1]), tokens).astype(q.dtype)


def _product(axes: str, a: Array, b: Array) -> Array:
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


def _windows(x: Array, causal: bool) -> Array:
    """What the queries of a line may see nearby, [B, R, m, ...]: the line, that before, in an encoder that behind."""
    from_one_before = jnp.pad(x, [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2))
    return spans(from_one_before, x.shape[1], 2 if causal else 3)


def _near(segments: Int[Array, "b R c"], windows: Int[Array, "b R m"], causal: bool) -> Bool[Array, "b R c m"]:
    stride = segments.shape[2]
    distance = stride + jnp.arange(stride)[:, None] - jnp.arange(windows.shape[2])
    pattern = ((distance >= 0) if causal else (distance > -stride)) & (distance < stride)
    return pattern & (segments[..., None] == windows[:, :, None]) & (windows != 0)[:, :, None]


def _far(segments: Int[Array, "b R c"], causal: bool) -> Bool[Array, "b c R L"]:
    """Which lines a token sees in its column; its own is part of the window."""
    lines, columns = jnp.arange(segments.shape[1]), jnp.swapaxes(segments, 1, 2)
    pattern = (lines < lines[:, None]) if causal else (lines != lines[:, None])
    return pattern & (columns[..., None] == columns[:, :, None]) & (columns != 0)[:, :, None]


def default_stride(max_length: int) -> int:
    """Returns the power of two nearest to the square root of the longest context, at which costs are least."""
    return 2 ** round(math.log2(max_length) / 2)
