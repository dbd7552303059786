"""Normalization modules over `ops.normalization`."""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from fastlm.models.weights import weight
from fastlm.ops import normalization


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis of size `size`.

    Attributes:
      kind: "layer_norm" or "rms_norm".
      bias: LayerNorm only.
      axis: logical name of what is normalized: "norm" is the residual stream, None something within a layer.
      dtype: of the result; None keeps that of `x`.
    """

    kind: str
    size: int
    epsilon: float
    bias: bool = False
    dtype: Any = None
    axis: str | None = "norm"

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalizes `x`."""
        scale = weight(self, "scale", (self.size,), (self.axis,), nn.initializers.ones)
        if self.kind == "rms_norm":
            return normalization.rms_norm(x, scale, self.epsilon, self.dtype)
        bias = weight(self, "bias", (self.size,), (self.axis,)) if self.bias else None
        return normalization.layer_norm(x, scale, bias, self.epsilon, self.dtype)
