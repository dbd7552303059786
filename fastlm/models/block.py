"""One layer of any family: self-attention, cross-attention where the layer has it, feed-forward.

Dims: B batch, T time, S source time, D embed.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastlm.models import attention as attention_kinds
from fastlm.models.config import Compute, LayerConfig
from fastlm.models.feed_forward import FeedForward
from fastlm.models.norms import Norm


def dropout(x: Array, rate: float, rng: Array | None) -> Array:
    """Zeroes a share `rate` of `x` and rescales the rest; without a key, returns `x`."""
    if rng is None or not rate:
        return x
    keep = jax.random.bernoulli(rng, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


class Block(nn.Module):
    """Sublayers with residuals; norms before ("pre") or after ("post") each.

    A cache is what the attention kind keeps, and with cross-attention a pair of that and the keys
    and values of the source.
    """

    cfg: LayerConfig
    compute: Compute
    capture: frozenset[str] = frozenset()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions,
        mask,
        bias=None,
        memory=None,
        memory_mask=None,
        cache=None,
        rng=None,
    ) -> tuple[Float[Array, "B T D"], Any, dict[str, Any]]:
        """Returns (x, cache, captured values)."""
        cfg = self.cfg
        keys = (
            (None,) * 5 if rng is None else (*jax.random.split(rng, 3), *(jax.random.fold_in(rng, i) for i in (3, 4)))
        )
        own, other = cache if cfg.cross and cache is not None else (cache, None)

        h = self._before("attention_norm", x)
        attend = attention_kinds.make(cfg.attention, cfg, self.compute, self.capture, name="attention")
        h, own, aux = attend(h, h, positions=positions, mask=mask, bias=bias, cache=own, rng=keys[0])
        x = self._after("attention_norm", x, h, keys[1])

        if cfg.cross:
            h = self._before("cross_attention_norm", x)
            source = None if memory is None else memory.astype(self.compute.jnp_dtype)
            key = "cross_attention"
            look = attention_kinds.make(cfg.cross_attention, cfg.across, self.compute, self.capture, key=key, name=key)
            h, other, cross_aux = look(h, source, positions=positions, mask=memory_mask, cache=other, rng=keys[4])
            aux |= {f"cross_{name}": value for name, value in cross_aux.items()}
            x = self._after("cross_attention_norm", x, h, keys[3])

        h = FeedForward(cfg, name="feed_forward")(self._before("feed_forward_norm", x))
        return self._after("feed_forward_norm", x, h, keys[2]), ((own, other) if cfg.cross else own), aux

    def _before(self, norm: str, x: Array) -> Array:
        """What a sublayer reads."""
        inner = self.compute.jnp_dtype
        return self._norm(norm, x, inner) if self.cfg.norm_place == "pre" else x.astype(inner)

    def _after(self, norm: str, x: Array, h: Array, rng: Array | None) -> Array:
        """The stream with a sublayer's result added."""
        x = x + dropout(h, self.cfg.dropout, rng).astype(x.dtype)
        return x if self.cfg.norm_place == "pre" else self._norm(norm, x, x.dtype)

    def _norm(self, name: str, x: Array, dtype: Any) -> Array:
        return Norm(self.cfg.norm, self.cfg.width, self.cfg.norm_epsilon, self.cfg.bias, dtype, name=name)(x)
