"""Linformer: keys and values projected along the sequence to a few rows, which every query attends to.

    k' = E^T k,  v' = F^T v  with E, F [L, r];   y = softmax(q k'^T) v'

Cost: time O(T r), memory O(T r). E and F are learned, one row per slot up to the longest text L = `max_length`; a text
of S tokens uses the first S.
Notable: padding is zero before it is projected and thereby contributes nothing. All heads share E and F.
Paper: Linformer, arXiv 2006.04768.
Left out: E and F per head, or one for all layers; projection by pooling or convolution. Each projected row mixes all
tokens, so nothing can be hidden from some queries only: no causality, no documents packed in a row, no decoding.

Dims: B batch, T query time, S key time, D embed, N heads, K kv heads, H head dim, R projected rows.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastlm.errors import UserError
from fastlm.models.attention.projections import Attention
from fastlm.models.config import LayerConfig
from fastlm.models.weights import normal, weight
from fastlm.ops import attention
from fastlm.ops.contract import contract, dense
from fastlm.ops.layouts import transpose_in_memory
from fastlm.ops.masks import MaskSpec


@dataclasses.dataclass(frozen=True)
class LinformerOptions:
    """Options of "linformer".

    Attributes:
      rank: rows that keys and values are projected to.
      tied: project keys and values by one matrix.
    """

    rank: int = 128
    tied: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"linformer: rank must be at least 1, got {self.rank}")


class LinformerAttention(Attention):
    """See the header."""

    @staticmethod
    def seen(cfg: LayerConfig, options: LinformerOptions, length: float) -> float:
        """See `Attention`."""
        return min(2 * options.rank, length + options.rank)  # its rows are made of all keys, then looked at

    @staticmethod
    def check(cfg: LayerConfig, options: LinformerOptions) -> None:
        """See `Attention`."""
        if options.rank >= cfg.max_length:
            raise UserError(
                f"linformer: rank {options.rank} saves nothing for texts of up to max_length {cfg.max_length} tokens; "
                "give a smaller one, or use 'full'"
            )

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B S D"],
        *,
        positions: Int[Array, "B T"],
        mask: MaskSpec,
        bias: None = None,
        cache: None = None,
        rng: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], None, dict[str, Any]]:
        """See `Attention`."""
        del bias, rng
        cfg, length = self.cfg, context.shape[1]
        if length > cfg.max_length:
            raise UserError(
                f"linformer: a text of {length} tokens is longer than config.model.max_length {cfg.max_length}, for "
                "which it has rows; shorten texts or raise max_length"
            )
        q, k, v = self.queries_keys_values(x, context, positions)
        for_keys = self._rows("key_rows")[:length]
        for_values = for_keys if self.options.tied else self._rows("value_rows")[:length]
        real = mask.real(length)
        rows, everything = projected(k, for_keys, real), MaskSpec(causal=False)
        options = self.scoring
        values = projected(v, for_values, real)
        y = attention.dot_product_attention(q, rows, values, everything, form=self.compute.attention_form, **options)
        aux: dict[str, Any] = {}
        if "qkv" in self.capture:
            aux["qkv"] = (q, k, v)
        if "attention" in self.capture:
            p = attention.attention_probabilities(q, rows, everything, **options)
            p = jnp.einsum("BNTR,SR->BNTS", p, for_values)
            aux["attention"] = p if real is None else jnp.where(real[:, None, None], p, 0.0)
        return self.output(y), cache, aux

    def _rows(self, name: str) -> Float[Array, "L R"]:
        """Starts so that the rows of a full text are about as large as its keys."""
        shape = (self.cfg.max_length, self.options.rank)
        return dense(weight(self, name, shape, ("position", None), normal(shape[0] ** -0.5)))


def projected(
    x: Float[Array, "B S K H"], rows: Float[Array, "S R"], real: Array | None = None
) -> Float[Array, "B R K H"]:
    """Returns keys or values projected along the sequence.

    Args:
      real: which tokens are no padding, [B, S], or None for all.
    """
    if real is not None:
        x = jnp.where(real[..., None, None], x, 0)
    return jnp.transpose(contract(transpose_in_memory(x, (0, 2, 3, 1)), rows), (0, 3, 1, 2))
