"""What recurrent kinds with a state of their own share: reading in two directions, the output norm and gate.

In an encoder the first half of the heads reads forwards and the second half backwards, so looking ahead costs nothing.
The heads' results are normalized, as their size grows with what the state holds, and gated by the token.

Dims: B batch, T time, D embed, N heads, P width of keys, H head dim.
"""

from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fastlm.errors import UserError
from fastlm.models.attention.projections import Attention
from fastlm.models.config import LayerConfig
from fastlm.models.norms import Norm
from fastlm.ops.activations import swiglu
from fastlm.ops.masks import MaskSpec
from fastlm.ops.recurrence import Recurrence, both_ways


@flax.struct.dataclass
class State:
    """What a layer remembers of the document so far."""

    state: Float[Array, "B N P H"]


class RecurrentAttention(Attention):
    """Base of these kinds; see the header."""

    @staticmethod
    def check(cfg: LayerConfig, options: Any) -> None:
        """Raises a `UserError` for heads that two directions cannot share."""
        if RecurrentAttention.two_ways(cfg) and cfg.heads % 2:
            raise UserError(
                f"'{cfg.attention}' in an encoder reads with half of its heads in either direction, but there are "
                f"{cfg.heads}; give an even number of heads"
            )

    @staticmethod
    def two_ways(cfg: LayerConfig) -> bool:
        """See `Attention`."""
        return not cfg.causal

    @staticmethod
    def empty_state(cfg: LayerConfig, batch: int) -> Float[Array, "B N P H"]:
        """Returns the state before the first token, float32: it adds up over a whole text."""
        return jnp.zeros((batch, cfg.heads, cfg.head_dim, cfg.head_dim), jnp.float32)

    def read(
        self, recurrence: Recurrence, arrays: tuple[Array, ...], mask: MaskSpec, state: Array | None
    ) -> tuple[Float[Array, "B N T H"], Float[Array, "B N P H"] | None]:
        """Returns (what the heads read, the state behind the last token).

        Args:
          arrays: (q, k, v, ...) as `recurrence` takes them, [B, N, T, ...] each.
          state: to go on from, or None.
        """
        q, _, v = arrays[:3]
        rows, heads, tokens, width = q.shape
        starts = mask.starts(tokens)
        empty = lambda heads: jnp.zeros((rows, heads, width, v.shape[-1]), jnp.float32)
        if mask.causal:
            return recurrence(*arrays, starts, empty(heads) if state is None else state)
        return both_ways(lambda *half: recurrence(*half, empty(heads // 2)), arrays, starts), None

    def weights_of_values(
        self, recurrence: Recurrence, arrays: tuple[Array, ...], mask: MaskSpec
    ) -> Float[Array, "B N T S"]:
        """Returns the weight of each value in what the heads read: what they would read were the values one-hot."""
        q, k, v, *gates = arrays
        one_hot = jnp.broadcast_to(jnp.eye(v.shape[2]), (*v.shape[:3], v.shape[2]))
        return self.read(recurrence, (q, k, one_hot, *gates), mask, None)[0]

    def gated_output(self, y: Float[Array, "B N T H"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns the heads' results, each normalized and gated by silu(x W), through the out projection."""
        cfg, y = self.cfg, jnp.swapaxes(y, 1, 2)
        dtype = self.compute.jnp_dtype
        norm = Norm("rms_norm", cfg.head_dim, cfg.norm_epsilon, dtype=dtype, axis=None, name="out_norm")
        gate = self.product(x, "gate", cfg.heads * cfg.head_dim, "heads", bias=cfg.bias)
        return self.output(swiglu(gate.reshape(y.shape), norm(y)))


def heads_first(x: Float[Array, "B T N ..."]) -> Float[Array, "B N T ..."]:
    """Returns x as the recurrences take it."""
    return jnp.swapaxes(x, 1, 2)


def where_real(real: Bool[Array, "B T"] | None, x: Float[Array, "B N T ..."]) -> Float[Array, "B N T ..."]:
    """Returns x, 0 at padding: there keys and logarithms of decays of 0 leave the state as it is."""
    if real is None:
        return x
    return jnp.where(real.reshape(real.shape[0], 1, real.shape[1], *(1,) * (x.ndim - 3)), x, 0)
