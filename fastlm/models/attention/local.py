"""Sliding-window softmax attention: a token sees the `window` latest, itself among them; an encoder's as many ahead.

Cost: time and memory O(T (window + block)): queries are taken in blocks, each with the blocks of keys that its window
touches, so nothing of size T x T exists. Decoding keeps the keys and values of a window, whatever T is.
Papers: Longformer arXiv 2004.05150, Mistral 2310.06825; as "local attention" in Long Range Arena 2011.04006.
On a TPU the splash kernel that ships with jax runs it, where its blocks fit.
Left out: windows that differ by head (Longformer's dilated heads; see the kind "dilated").

Dims: B batch, T time, D embed, C blocks, b tokens of a block, m keys that a block sees, N heads, H head dim.
"""

import dataclasses
from typing import Any

import flax.linen as nn
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
class LocalOptions:
    """Options of "local".

    Attributes:
      window: tokens seen on either side, the token itself counted.
      block: queries taken together; 0 for the fastest that was measured.
    """

    window: int = 128
    block: int = 0

    def __post_init__(self) -> None:
        if self.window < 1 or self.block < 0:
            raise UserError(
                f"local: window must be at least 1 and block not negative, got {self.window} and {self.block}"
            )


class LocalAttention(Attention):
    """See the header."""

    @staticmethod
    def seen(cfg: LayerConfig, options: LocalOptions, length: float) -> float:
        """See `Attention`."""
        whole = length / 2 if cfg.causal else length
        return min(options.window * (1 if cfg.causal else 2) - 1, whole)

    @staticmethod
    def empty_cache(cfg: LayerConfig, options: LocalOptions, batch: int, slots: int, dtype: Any) -> RingCache:
        """Returns room for the keys and values of a window."""
        return RingCache.empty(batch, options.window, slots, cfg.kv_heads, cfg.head_dim, dtype)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        mask: MaskSpec,
        bias: None = None,
        cache: RingCache | None = None,
        rng: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], RingCache | None, dict[str, Any]]:
        """See `Attention`."""
        del bias, rng
        q, k, v = self.queries_keys_values(x, context, positions)
        aux: dict[str, Any] = {"qkv": (q, k, v)} if "qkv" in self.capture else {}
        own = segments = mask.key_segments
        times = jnp.arange(q.shape[1])[None]
        if cache is not None:
            recent = cache.append(k, v, mask)
            k, v, own, segments, times = recent.k, recent.v, recent.own, recent.segments, recent.times
            cache = recent.cache
        options = self.scoring
        window, block = self.options.window, self.options.block
        if cache is not None and q.shape[1] == 1:  # keys lie in the order of their slots, all within the window
            y = attention.dot_product_attention(q, k, v, MaskSpec(False, own, segments), **options)
        elif cache is None and attention.splash_runs(q, k, mask, self.softmax):
            pattern = attention.splash_window(window - 1, 0 if mask.causal else window - 1)
            y = attention.splash(q, k, v, mask, pattern=pattern, **options)
        else:
            y = sliding_window(q, k, v, segments, window=window, causal=mask.causal, block=block, **options)
        if "attention" in self.capture:
            near = _within(jnp.arange(q.shape[1])[:, None], times[:, None], window, mask.causal)
            if segments is not None:
                near &= (own[..., None] == segments[:, None]) & (segments[:, None] != 0)
            aux["attention"] = weights_by_pair(q, k, near, **options)
        return self.output(y), cache, aux


def _within(query: Array, key: Array, window: int, causal: bool) -> Array:
    back = query - key
    return ((back >= 0) if causal else (back > -window)) & (back < window)


def sliding_window(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    segments: Int[Array, "B S"] | None,
    *,
    window: int,
    causal: bool,
    block: int = 0,
    **options: Any,
) -> Float[Array, "B T N H"]:
    """Returns attention of the last T of S tokens to their windows.

    Args:
      segments: document number of each token, 0 for padding; a token sees its own document.
      options: scale, cap and softmax, as in `attend_blocks`.
    """
    queries, past = q.shape[1], k.shape[1] - q.shape[1]
    block = min(block or best_block(window), queries)
    count = -(-queries // block)
    if count == 1:  # all keys at once: in blocks as small as a step of decoding a window would be very many
        lead, keys = past, k.shape[1]
        seen = lambda x: x[:, None]
    else:
        back = -(-(window - 1) // block)  # blocks that a window reaches back over
        width, lead = 1 + back * (1 if causal else 2), back * block
        keys = width * block

        def seen(x: Array) -> Array:
            """What the queries of each block may see, [B, C, m, ...]: keys begin `lead` tokens before the first."""
            x = jnp.pad(x, [(0, 0), (max(lead - past, 0), 0)] + [(0, 0)] * (x.ndim - 2))
            return spans(blocked(x[:, x.shape[1] - queries - lead :], block), count, width)

    first = jnp.arange(count)[None, :, None] * block
    here, there = first + jnp.arange(block), first + jnp.arange(keys) - lead
    visible = _within(here[..., None], there[..., None, :], window, causal)
    visible &= ((there >= -past) & (there < queries))[..., None, :]
    if segments is not None:
        own, other = blocked(segments[:, past:], block), seen(segments)
        visible &= (own[..., None] == other[..., None, :]) & (other != 0)[..., None, :]
    return unblocked(attend_blocks(blocked(q, block), seen(k), seen(v), visible, **options), queries)


def best_block(window: int) -> int:
    """Returns how many queries to take together: few waste less of a window, many make larger products."""
    return max(min(window, 128), 16)
