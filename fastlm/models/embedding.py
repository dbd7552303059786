"""From token ids to the stream that the blocks add to.

Notable: one table serves both stacks of an encoder-decoder and, tied, the head. What else an
embedding has (positions, segment types, a norm) each stack has for itself.

Dims: B batch, T time, D embed.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastlm.models import positions as position_encodings
from fastlm.models.config import Compute, ModelConfig
from fastlm.models.norms import Norm
from fastlm.models.weights import normal, weight
from fastlm.ops.contract import lookup


class Embedding(nn.Module):
    """Tokens, scaled, with positions and segment types added and a norm behind, as the config says."""

    cfg: ModelConfig
    compute: Compute

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        token_types: Int[Array, "B T"] | None = None,
        table: Float[Array, "V D"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Embeds tokens by `table`, or by a table of its own."""
        cfg, dtype = self.cfg, self.compute.jnp_residual_dtype
        if table is None:
            table = weight(self, "table", (cfg.vocab_size, cfg.width), ("vocab", "embed"), normal(cfg.init_scale))
        x = lookup(table, tokens, dtype, axes=("vocab", None))
        if cfg.embedding_scale != 1:
            x = x * jnp.asarray(cfg.embedding_scale, dtype)
        if cfg.positions == "learned":
            rows = self._rows("positions", cfg.max_length + cfg.position_offset, "position")
            x = x + lookup(rows, positions + cfg.position_offset, dtype)
        if cfg.positions == "sinusoidal":
            x = x + position_encodings.sinusoidal(positions, cfg.width).astype(dtype)
        if cfg.token_types:
            types = jnp.zeros_like(tokens) if token_types is None else token_types
            x = x + lookup(self._rows("token_types", cfg.token_types, "position"), types, dtype)
        if cfg.embedding_norm:
            x = Norm(cfg.norm, cfg.width, cfg.norm_epsilon, cfg.bias, dtype, name="norm")(x)
        return x

    def _rows(self, name: str, size: int, axis: str) -> Array:
        return weight(self, name, (size, self.cfg.width), (axis, "embed"), normal(self.cfg.init_scale))


class RelativeBias(nn.Module):
    """T5's learned bias by distance, one table for all layers of a stack (arXiv 1910.10683)."""

    cfg: ModelConfig
    heads: int
    causal: bool

    @nn.compact
    def __call__(self, query: Int[Array, "B T"], key: Int[Array, "B S"]) -> Float[Array, "B N T S"]:
        """Returns the bias for queries and keys at these positions."""
        cfg = self.cfg
        shape = (cfg.relative_buckets, self.heads)
        table = weight(self, "table", shape, ("position", "heads"), normal(cfg.init_scale))
        buckets = position_encodings.relative_buckets(
            query, key, causal=self.causal, buckets=cfg.relative_buckets, distance=cfg.relative_distance
        )
        return jnp.moveaxis(lookup(table, buckets), -1, 1)
