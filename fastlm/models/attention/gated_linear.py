"""Gated linear attention: a sum of k v^T that forgets each channel of the keys at a rate the token chooses.

    S_t = diag(a_t) S_(t-1) + k_t v_t^T,   y_t = q_t S_t,   a_t = sigmoid(x_t W_1 W_2 + b)^(1 / temperature)
    output = out(rms_norm(y) * silu(x W))

Cost: time O(T (c + H) H), memory O(T H), c the chunk. Decoding keeps one H x H state per head, whatever T is.
Paper: Gated Linear Attention Transformers, arXiv 2312.06635.
Notable: nothing rotates, the order of tokens is in the recurrence. The output norm takes away whatever scales q . k.
A decay below e^-4 (a gate's logit below -64) is taken as e^-4, see `ops.recurrence.LEAST_LOG_DECAY`. In an encoder
half of the heads reads backwards.
Left out: keys of half the values' width, as head_dim is one number here.

Dims: B batch, T time, D embed, N heads, R rank of the gate, P width of keys, H head dim.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastlm.errors import UserError
from fastlm.models.attention.recurrent import RecurrentAttention, State, heads_first, where_real
from fastlm.models.config import LayerConfig
from fastlm.models.weights import normal, weight
from fastlm.ops.contract import contract
from fastlm.ops.masks import MaskSpec
from fastlm.ops.recurrence import LEAST_LOG_DECAY, gated_recurrence


@dataclasses.dataclass(frozen=True)
class GatedLinearOptions:
    """Options of "gated_linear".

    Attributes:
      rank: of the two matrices that make the decays of all channels.
      temperature: what the logarithm of the sigmoid is divided by; large ones forget slowly.
    """

    rank: int = 16
    temperature: float = 16.0

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.temperature < float("inf"):
            raise UserError(
                f"gated_linear: rank must be at least 1 and temperature positive, got {self.rank} and "
                f"{self.temperature}"
            )


class GatedLinearAttention(RecurrentAttention):
    """See the header."""

    @staticmethod
    def seen(cfg: LayerConfig, options: GatedLinearOptions, length: float) -> float:
        """See `Attention`."""
        return cfg.head_dim

    @staticmethod
    def empty_cache(cfg: LayerConfig, options: GatedLinearOptions, batch: int, slots: int, dtype: Any) -> State:
        """Returns an empty state."""
        return State(RecurrentAttention.empty_state(cfg, batch))

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        mask: MaskSpec,
        bias: None = None,
        cache: State | None = None,
        rng: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], State | None, dict[str, Any]]:
        """See `Attention`."""
        del positions, bias, rng
        cfg, aux = self.cfg, {}
        q = self.heads(x, "q", cfg.heads, "heads", None)
        k = self.heads(context, "k", cfg.kv_heads, "kv_heads", None)
        v = self.project(context, "v", cfg.kv_heads, "kv_heads")
        if "qkv" in self.capture:
            aux["qkv"] = (q, k, v)
        q, k, v, log_decay = map(heads_first, (q, self.repeated(k), self.repeated(v), self._log_decay(context)))
        real = mask.real(k.shape[2])
        arrays = (q, where_real(real, k), v, where_real(real, log_decay))
        y, state = self.read(gated_recurrence, arrays, mask, None if cache is None else cache.state)
        if "attention" in self.capture:
            aux["attention"] = self.weights_of_values(gated_recurrence, arrays, mask)
        return self.gated_output(y, x), None if cache is None else State(state), aux

    def _log_decay(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N P"]:
        """Returns the logarithms of the decays, float32."""
        cfg, options = self.cfg, self.options
        width, init = cfg.heads * cfg.head_dim, normal(cfg.init_scale)
        low = self.product(x, "decay_in", options.rank, None)
        logits = contract(
            low, weight(self, "decay_out", (options.rank, width), (None, "heads"), init), dtype=jnp.float32
        )
        logits = logits + weight(self, "decay_bias", (width,), ("heads",))
        log_decay = jnp.maximum(jax.nn.log_sigmoid(logits) / options.temperature, LEAST_LOG_DECAY)
        return log_decay.reshape(*x.shape[:2], cfg.heads, cfg.head_dim)
