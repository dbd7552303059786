"""What the attention kinds share: fields, projections into queries, keys and values, and out of the heads.

Dims: B batch, T time, D embed, N heads, K kv heads, H head dim.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastlm.models import positions as position_encodings
from fastlm.models.config import Compute, LayerConfig
from fastlm.models.norms import Norm
from fastlm.models.weights import Initializer, normal, weight
from fastlm.ops.contract import add_bias, contract
from fastlm.ops.softmax import Softmax
from fastlm.ops.softmax import make as make_softmax


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """Of kinds that have none."""


class Attention(nn.Module):
    """Base of the kinds. A kind adds `__call__`, and `check` if it can be asked too much.

    If it decodes, also `empty_cache(cfg, options, batch, slots, dtype)`, a static method: what one layer remembers
    before the first token, arrays of zeros that lead with B.

    `__call__(x, context, *, positions, mask, bias, cache, rng) -> (y, cache, aux)`, the contract of every kind:
      x [B, T, D] asks; context [B, S, D] is looked at: the same array in self-attention. None, in cross-attention,
        for a source that the cache has seen. positions [B, T]: of each token in its document.
      mask: a `MaskSpec`. bias [b, N, T, S]: added to scores, for kinds that take one.
      cache: what `empty_cache` made or an earlier call returned; x and context then go on from there. In a row that is
        packed (segments and a cache), only its first document does, and the cache returned is of its last.
      rng: key of a training step, or None; a kind that draws then draws from a fixed seed.
      y [B, T, D]; aux: what `capture` names: "qkv" (after norms and rotation), "attention" [B, N, T, S], the weight of
        each value in each output, however the kind really computes it.
    """

    cfg: LayerConfig
    compute: Compute
    capture: frozenset[str] = frozenset()
    options: Any = NoOptions()

    @staticmethod
    def check(cfg: LayerConfig, options: Any) -> None:
        """Raises a `UserError` for a layer that this kind cannot be."""
        del cfg, options

    @staticmethod
    def seen(cfg: LayerConfig, options: Any, length: float) -> float:
        """Returns how many keys a token of a row of `length` is compared with on average, for counting FLOPs.

        Kinds with a state give the width of their keys: reading and writing it costs as much as so many pairs.
        """
        del options
        return length / 2 if cfg.causal else length

    @staticmethod
    def two_ways(cfg: LayerConfig) -> bool:
        """Whether the first half of the heads reads forwards and the second backwards."""
        del cfg
        return False

    @property
    def softmax(self) -> Softmax:
        """How scores become probabilities here."""
        return make_softmax(self.cfg.softmax)

    @property
    def scoring(self) -> dict[str, Any]:
        """How q . k becomes probabilities, as the functions of `ops` take it."""
        return {"scale": self.cfg.attention_scale, "cap": self.cfg.attention_softcap, "softmax": self.softmax}

    def angles(self, positions: Int[Array, "B T"]) -> tuple[Array, Array] | None:
        """Returns the rotation of each position, or None where positions do not rotate."""
        cfg = self.cfg
        if not cfg.rotary:
            return None
        return position_encodings.rotary_angles(positions, cfg.head_dim, cfg.rotary_base, cfg.rotary_scaling)

    def heads(
        self, x: Float[Array, "B T D"], name: str, count: int, axis: str, angles: tuple[Array, Array] | None
    ) -> Float[Array, "B T N H"]:
        """Returns queries or keys: projected, normalized, rotated."""
        return self.finished(self.project(x, name, count, axis), name, angles)

    def finished(
        self, y: Float[Array, "B T N H"], name: str, angles: tuple[Array, Array] | None
    ) -> Float[Array, "B T N H"]:
        """Returns projected queries or keys normalized and rotated."""
        cfg = self.cfg
        if cfg.qk_norm:
            y = Norm("rms_norm", cfg.head_dim, cfg.norm_epsilon, axis=None, name=f"{name}_norm")(y)
        return y if angles is None else position_encodings.rotate(y, *angles)

    def project(self, x: Float[Array, "B T D"], name: str, count: int, axis: str | None) -> Float[Array, "B T N H"]:
        """Returns `x` through the weight `name`, cut into `count` heads."""
        y = self.product(x, name, count * self.cfg.head_dim, axis, bias=self.cfg.qkv_bias)
        return y.reshape(*y.shape[:2], count, self.cfg.head_dim)

    def product(
        self,
        x: Float[Array, "B T D"],
        name: str,
        width: int,
        axis: str | None,
        *,
        bias: bool = False,
        init: Initializer | None = None,
        read: str = "embed",
    ) -> Float[Array, "B T O"]:
        """Returns `x` through the weight `name` [D, O = width], whose logical axes are (read, axis)."""
        shape = (x.shape[-1], width)
        y = contract(x, weight(self, name, shape, (read, axis), init or normal(self.cfg.init_scale)))
        return add_bias(y, weight(self, f"{name}_bias", shape[1:], (axis,))) if bias else y

    def queries_keys_values(
        self, x: Float[Array, "B T D"], context: Float[Array, "B S D"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Returns (q, k, v) of self-attention, or of cross-attention without rotation."""
        cfg, angles = self.cfg, self.angles(positions)
        if cfg.fused:
            parts = self.project(x, "qkv", cfg.heads + 2 * cfg.kv_heads, None)
            q, k, v = jnp.split(parts, (cfg.heads, cfg.heads + cfg.kv_heads), axis=2)
            return self.finished(q, "q", angles), self.finished(k, "k", angles), v
        q = self.heads(x, "q", cfg.heads, "heads", angles)
        k = self.heads(context, "k", cfg.kv_heads, "kv_heads", angles)
        return q, k, self.project(context, "v", cfg.kv_heads, "kv_heads")

    def output(self, y: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """Returns the heads' results joined and projected into the residual stream."""
        cfg, y = self.cfg, y.reshape(*y.shape[:2], -1)
        y = contract(y, weight(self, "out", (y.shape[-1], cfg.width), ("heads", "embed"), self._out_init()))
        return add_bias(y, weight(self, "out_bias", (cfg.width,), ("norm",))) if cfg.bias else y

    def _out_init(self) -> Initializer:
        return normal(self.cfg.residual_init_scale)

    def repeated(self, k: Float[Array, "B S K H"]) -> Float[Array, "B S N H"]:
        """Returns keys or values once per query head."""
        return jnp.repeat(k, self.cfg.heads // k.shape[2], axis=2)
