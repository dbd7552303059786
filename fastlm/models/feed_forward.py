"""The position-wise feed-forward layer: plain (gelu, relu2 ...) or gated (swiglu, geglu; arXiv 2002.05202)."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastlm.models.config import LayerConfig
from fastlm.models.weights import normal, weight
from fastlm.ops import activations
from fastlm.ops.contract import add_bias, contract

PLAIN: dict[str, Callable[[Array], Array]] = {
    "gelu": activations.gelu,
    "gelu_exact": activations.gelu_exact,
    "relu": jax.nn.relu,
    "relu2": activations.relu2,
    "silu": activations.silu,
}
# (gate, up) -> hidden
GATED: dict[str, Callable[[Array, Array], Array]] = {"swiglu": activations.swiglu, "geglu": activations.geglu}


class FeedForward(nn.Module):
    """x [.., D] -> [.., F] -> [.., D]."""

    cfg: LayerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Applies the layer to every position on its own."""
        cfg = self.cfg
        width = cfg.feed_forward_width
        if cfg.feed_forward not in GATED:
            hidden = PLAIN[cfg.feed_forward](self._project(x, "up", width))
        elif cfg.fused:
            hidden = GATED[cfg.feed_forward](*jnp.split(self._project(x, "gate_up", 2 * width), 2, axis=-1))
        else:
            up = self._project(x, "up", width)
            hidden = GATED[cfg.feed_forward](self._project(x, "gate", width), up)
        down = weight(self, "down", (width, cfg.width), ("mlp", "embed"), normal(cfg.residual_init_scale))
        y = contract(hidden, down)
        return add_bias(y, weight(self, "down_bias", (cfg.width,), ("norm",))) if cfg.bias else y

    def _project(self, x: Array, name: str, size: int) -> Array:
        y = contract(x, weight(self, name, (self.cfg.width, size), ("embed", "mlp"), normal(self.cfg.init_scale)))
        return add_bias(y, weight(self, f"{name}_bias", (size,), ("mlp",))) if self.cfg.bias else y
