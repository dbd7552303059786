"""Linear attention: softmax replaced by the kernel phi(q) . phi(k) with phi(x) = elu(x) + 1.

    y_i = sum_j phi(q_i) . phi(k_j) v_j / sum_j phi(q_i) . phi(k_j)

Cost: time O(T (c + H) H), memory O(T H), c the chunk. Decoding keeps one H x (H + 1) sum per head, whatever T is.
On a TPU a Pallas kernel adds up (`ops.linear_kernel`).
Paper: Transformers are RNNs, arXiv 2006.16236.
Left out: rotation of the features instead of queries and keys (RoFormer), which lets the denominator change sign.

Dims: B batch, T time, S key time, D embed, N heads, P width of features, H head dim.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastlm.models.attention.projections import Attention
from fastlm.models.config import LayerConfig
from fastlm.ops import linear_kernel
from fastlm.ops.masks import MaskSpec
from fastlm.ops.recurrence import linear_recurrence
from fastlm.parallel.platforms import target_platform

FLOOR = 1e-6  # of a denominator: rows that see nothing become 0


@flax.struct.dataclass
class Sums:
    """What a layer remembers: the sum of phi(k) [v, 1]^T over the document so far."""

    state: Float[Array, "B N P H1"]


def features(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """elu(x) + 1, positive; e^x where x < 0, as adding 1 to e^x - 1 would round small weights to 0."""
    x = x.astype(feature_dtype(x))
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


def feature_dtype(x: Array) -> Any:
    """Returns the type of features: float32 where float16 could not hold their sums."""
    return jnp.float32 if x.dtype == jnp.float16 else x.dtype


class LinearAttention(Attention):
    """See the header. Other kernels differ in `map_features`, and in `floor` where their sums may be small."""

    floor = FLOOR

    @staticmethod
    def seen(cfg: LayerConfig, options: Any, length: float) -> float:
        """See `Attention`."""
        return cfg.head_dim

    @staticmethod
    def empty_cache(cfg: LayerConfig, options: Any, batch: int, slots: int, dtype: Any) -> Sums:
        """Returns sums over nothing, in float32 whatever `dtype`: they add up over a whole text."""
        return Sums(jnp.zeros((batch, cfg.heads, cfg.head_dim, cfg.head_dim + 1), jnp.float32))

    def map_features(self, q: Array, k: Array, rng: Array | None) -> tuple[Array, Array]:
        """Returns the features of queries and keys [B, N, T, H] as [B, N, T, P]."""
        del rng
        return features(q), features(k)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B S D"] | None,
        *,
        positions: Int[Array, "B T"],
        mask: MaskSpec,
        bias: None = None,
        cache: Sums | None = None,
        rng: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], Sums | None, dict[str, Any]]:
        """See `Attention`."""
        del bias
        cfg, aux = self.cfg, {}
        if context is None:  # cross-attention whose source is in the sums
            q = self.heads(x, "q", cfg.heads, "heads", None)
            q, _ = self.map_features(*(jnp.swapaxes(q, 1, 2),) * 2, rng)
            total = jnp.einsum("BNTP,BNPH->BNTH", q, cache.state.astype(q.dtype), preferred_element_type=jnp.float32)
            return self._normalized(total), cache, aux
        q, k, v = self.queries_keys_values(x, context, positions)
        if "qkv" in self.capture:
            aux["qkv"] = (q, k, v)
        q, k, v = (jnp.swapaxes(t, 1, 2) for t in (q, self.repeated(k), self.repeated(v)))
        q, k = self.map_features(q, k, rng)
        real = mask.real(k.shape[2])
        if real is not None:
            k = jnp.where(real[:, None, :, None], k, 0)
        v = v.astype(feature_dtype(v))
        ones = jnp.ones((*v.shape[:-1], 1), v.dtype)
        total, state = kernel_sums(q, k, jnp.concatenate([v, ones], -1), mask, None if cache is None else cache.state)
        if "attention" in self.capture:
            aux["attention"] = _matrix(q, k, mask, self.floor)
        return self._normalized(total), None if cache is None else Sums(state), aux

    def _normalized(self, total: Float[Array, "B N T H1"]) -> Float[Array, "B T D"]:
        y = total[..., :-1] / jnp.maximum(total[..., -1:], self.floor)
        return self.output(jnp.swapaxes(y, 1, 2).astype(self.compute.jnp_dtype))


def kernel_sums(
    q: Float[Array, "B N T P"],
    k: Float[Array, "B N S P"],
    v: Float[Array, "B N S H"],
    mask: MaskSpec,
    state: Float[Array, "B N P H"] | None,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N P H"]]:
    """Returns sum_j (q_i . k_j) v_j over the j that i may see, and the sum behind the last token.

    Args:
      k: zero where padding.
      state: to go on from, or None.
    """
    if state is None:
        state = jnp.zeros((*k.shape[:2], k.shape[-1], v.shape[-1]), jnp.float32)
    starts = mask.starts(k.shape[2])
    if mask.causal:
        return past_sums(q, k, v, starts, state)

    def together(q, k, v):
        added = jnp.einsum("BNSP,BNSH->BNPH", k, v, preferred_element_type=jnp.float32)
        y = jnp.einsum("BNTP,BNPH->BNTH", q, added.astype(q.dtype), preferred_element_type=jnp.float32)
        return y, state + added

    def apart(q, k, v):
        """Everything up to a token, and everything from it on, less the token itself."""
        ends = jnp.flip(jnp.roll(starts, -1, axis=1), axis=1)
        back = lambda t: jnp.flip(t, axis=2)
        before, last = past_sums(q, k, v, starts, state)
        after, _ = past_sums(back(q), back(k), back(v), ends, jnp.zeros_like(state))
        own = jnp.sum(q * k, axis=-1, keepdims=True).astype(jnp.float32) * v
        return before + back(after) - own, last

    if mask.query_segments is None or not mask.packed or q.shape[2] != k.shape[2]:
        return together(q, k, v)
    one_document = jnp.all(mask.key_segments <= 1)
    return jax.lax.cond(one_document, together, apart, q, k, v)


def past_sums(q: Array, k: Array, v: Array, starts: Array, state: Array) -> tuple[Array, Array]:
    """Returns `kernel_sums` of a causal mask, by the kernel for this platform."""
    if target_platform() == "tpu" and q.shape[2] >= linear_kernel.CHUNK:
        return linear_kernel.linear_sums(q, k, v, starts, state)
    return linear_recurrence(q, k, v, jnp.zeros((1, 1, q.shape[2])), starts, state)


def _matrix(q: Array, k: Array, mask: MaskSpec, floor: float) -> Float[Array, "B N T S"]:
    weights = jnp.einsum("BNTP,BNSP->BNTS", q, k, preferred_element_type=jnp.float32)
    visible = mask.dense(q.shape[2], k.shape[2])
    weights = weights if visible is None else jnp.where(visible, weights, 0.0)
    return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), floor)
