"""Gated DeltaNet: a state that forgets at a rate the token chooses and replaces what it holds under the token's key.

    S_t = a_t (I - b_t k_t k_t^T) S_(t-1) + b_t k_t v_t^T,   y_t = q_t S_t
    a_t = exp(-exp(A) softplus(x_t W_a + d)),   b_t = sigmoid(x_t W_b),   output = out(rms_norm(y) * silu(x W))
    q, k of norm 1; q, k and v pass a short causal convolution and a SiLU before

Cost: time O(T (c + H) H), memory O(T (c + H)), c the chunk. Decoding keeps one H x H state per head and the last
conv - 1 tokens before the convolution, whatever T is.
Papers: Gated Delta Networks, arXiv 2412.06464; chunks of the delta rule 2406.06484; the decay is Mamba-2's 2405.21060.
Notable: nothing rotates, the order of tokens is in the recurrence. The output norm takes away whatever scales q . k.
In an encoder half of the heads reads backwards, and their convolution looks ahead.
Left out: values wider than keys, as head_dim is one number here; b_t up to 2, which allows negative eigenvalues.

Dims: B batch, T time, D embed, N heads, K kv heads, P width of keys, H head dim, W width of the convolution.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastlm.errors import UserError
from fastlm.models.attention.recurrent import RecurrentAttention, heads_first, where_real
from fastlm.models.config import LayerConfig
from fastlm.models.weights import normal, weight
from fastlm.ops.activations import silu
from fastlm.ops.caches import WindowCache
from fastlm.ops.contract import contract, dense
from fastlm.ops.masks import MaskSpec
from fastlm.ops.recurrence import delta_recurrence, scaled, sum_rows
from fastlm.ops.short_convolution import short_convolution

EPSILON = 1e-6  # of the mean squares of q and k


@dataclasses.dataclass(frozen=True)
class GatedDeltaOptions:
    """Options of "gated_delta".

    Attributes:
      conv: tokens that the convolution of q, k and v takes together, the token itself counted; 0 for none.
    """

    conv: int = 4

    def __post_init__(self) -> None:
        if self.conv < 0 or self.conv == 1:
            raise UserError(f"gated_delta: conv must be 0 (none) or at least 2 tokens, got {self.conv}")


@flax.struct.dataclass
class DeltaCache:
    """What a layer remembers.

    Attributes:
      state: of the document so far.
      recent: queries and keys, and values, that the convolution still needs, as they go into it.
    """

    state: Float[Array, "B N P H"]
    recent: WindowCache | None = None


class GatedDeltaAttention(RecurrentAttention):
    """See the header."""

    @staticmethod
    def seen(cfg: LayerConfig, options: GatedDeltaOptions, length: float) -> float:
        """See `Attention`."""
        return 1.5 * cfg.head_dim  # what a key had stored is read once more before it is written

    @staticmethod
    def empty_cache(cfg: LayerConfig, options: GatedDeltaOptions, batch: int, slots: int, dtype: Any) -> DeltaCache:
        """Returns an empty state, and no tokens."""
        state, width = RecurrentAttention.empty_state(cfg, batch), options.conv - 1
        if not options.conv:
            return DeltaCache(state)
        zeros = lambda heads: jnp.zeros((batch, width, heads, cfg.head_dim), dtype)
        recent = WindowCache((zeros(cfg.heads + cfg.kv_heads), zeros(cfg.kv_heads)), jnp.zeros((batch, width), bool))
        return DeltaCache(state, recent)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        mask: MaskSpec,
        bias: None = None,
        cache: DeltaCache | None = None,
        rng: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], DeltaCache | None, dict[str, Any]]:
        """See `Attention`."""
        del positions, bias, rng
        cfg, aux = self.cfg, {}
        q = self.heads(x, "q", cfg.heads, "heads", None)
        k = self.heads(context, "k", cfg.kv_heads, "kv_heads", None)
        v = self.project(context, "v", cfg.kv_heads, "kv_heads")
        recent = None
        if self.options.conv:
            q, k, v, recent = self._convolved(q, k, v, mask, None if cache is None else cache.recent)
        q, k, v = unit(silu(q)), unit(silu(k)), silu(v)
        if "qkv" in self.capture:
            aux["qkv"] = (q, k, v)
        real = mask.real(x.shape[1])
        q, k, v, *gates = map(heads_first, (q, self.repeated(k), self.repeated(v), *self._gates(context)))
        arrays = (q, k, v, *(where_real(real, gate) for gate in gates))
        y, state = self.read(delta_recurrence, arrays, mask, None if cache is None else cache.state)
        if "attention" in self.capture:
            aux["attention"] = self.weights_of_values(delta_recurrence, arrays, mask)
        return self.gated_output(y, x), None if cache is None else DeltaCache(state, recent), aux

    def _gates(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T N"], Float[Array, "B T N"]]:
        """Returns the logarithm of the decay and how much of a value is written, float32."""
        heads, init = self.cfg.heads, normal(self.cfg.init_scale)
        logits = lambda name: contract(
            x, weight(self, name, (x.shape[-1], heads), ("embed", "heads"), init), dtype=jnp.float32
        )
        step = jax.nn.softplus(logits("decay") + weight(self, "decay_bias", (heads,), ("heads",), step_bias))
        speed = jnp.exp(weight(self, "decay_log", (heads,), ("heads",), log_speed))
        return -speed * step, jax.nn.sigmoid(logits("rate"))

    def _convolved(
        self, q: Array, k: Array, v: Array, mask: MaskSpec, recent: WindowCache | None
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T k H"], Float[Array, "B T k H"], WindowCache | None]:
        """Returns q, k and v through their convolutions, and what the next tokens will need.

        In an encoder there are k and v for each query head then, as heads that share them read in both directions.
        """
        segments, tokens = mask.key_segments, q.shape[1]
        if recent is not None:
            (qk, v), segments, recent = recent.append((jnp.concatenate([q, k], axis=2), v), mask)
            q, k = qk[:, :, : q.shape[2]], qk[:, :, q.shape[2] :]
        named = (("q", q, "heads"), ("k", k, "kv_heads"), ("v", v, "kv_heads"))
        q, k, v = (self._convolve(name, x, axis, segments)[:, -tokens:] for name, x, axis in named)
        return q, k, v, recent

    def _convolve(
        self, name: str, x: Float[Array, "B T K H"], axis: str, segments: Int[Array, "B T"] | None
    ) -> Float[Array, "B T k H"]:
        width, (_, _, heads, size) = self.options.conv, x.shape
        init = normal((3 * width) ** -0.5)  # as wide as the uniform one that is common
        w = dense(weight(self, f"{name}_conv", (width, heads * size), (None, axis), init))
        merged = lambda x: x.reshape(*x.shape[:2], -1)
        if self.cfg.causal:
            return short_convolution(merged(x), w, segments).reshape(x.shape)
        x, w = self.repeated(x), merged(self.repeated(w.reshape(1, width, heads, size)))[0]
        half = w.shape[1] // 2
        forwards = short_convolution(merged(x)[..., :half], w[:, :half], segments)
        backwards = short_convolution(merged(x)[..., half:], w[:, half:], segments, ahead=True)
        return jnp.concatenate([forwards, backwards], axis=-1).reshape(x.shape)


def unit(x: Float[Array, "... H"]) -> Float[Array, "... H"]:
    """Returns x divided by its norm over the last axis."""
    wide = x.astype(jnp.float32)
    return scaled(wide, jax.lax.rsqrt(sum_rows(wide * wide) + EPSILON * x.shape[-1])).astype(x.dtype)


def log_speed(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Mamba-2's start: exp(A) between 1 and 16."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))


def step_bias(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Mamba-2's start: softplus of it between 0.001 and 0.1, evenly in its logarithm."""
    step = jnp.exp(jax.random.uniform(key, shape, dtype, jnp.log(0.001), jnp.log(0.1)))
    return step + jnp.log(-jnp.expm1(-step))
