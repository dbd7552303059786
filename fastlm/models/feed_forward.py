"""The position-wise feed-forward layer: plain (gelu, relu2) or gated (swiglu, geglu; arXiv 2002.05202)."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastlm.models.config import LayerConfig
from fastlm.models.weights import normal, weight
from fastlm.ops import activations
from fastlm.ops.contract import contract

# kind -> (activation, gated)
KINDS: dict[str, tuple[Callable[[Array], Array], bool]] = {
    "gelu": (activations.gelu, False),
    "relu2": (activations.relu2, False),
    "swiglu": (activations.silu, True),
    "geglu": (activations.gelu, True),
}


class FeedForward(nn.Module):
    """x [.., D] -> [.., F] -> [.., D]."""

    cfg: LayerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Applies the layer to every position on its own."""
        cfg, (activation, gated) = self.cfg, KINDS[self.cfg.feed_forward]
        hidden = activation(self._project(x, "gate" if gated else "up", cfg.feed_forward_width))
        if gated:
            hidden = hidden * self._project(x, "up", cfg.feed_forward_width)
        down = weight(
            self, "down", (cfg.feed_forward_width, cfg.width), ("mlp", "embed"), normal(cfg.residual_init_scale)
        )
        y = contract(hidden, down)
        return y + weight(self, "down_bias", (cfg.width,), ("norm",)).astype(y.dtype) if cfg.bias else y

    def _project(self, x: Array, name: str, size: int) -> Array:
        y = contract(x, weight(self, name, (self.cfg.width, size), ("embed", "mlp"), normal(self.cfg.init_scale)))
        if self.cfg.bias:
            y = y + weight(self, f"{name}_bias", (size,), ("mlp",)).astype(jnp.result_type(y))
        return y
