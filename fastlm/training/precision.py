"""Loss scaling, which float16 needs and the other types do not.

Notable: both forms answer the same three questions, so the train step has no branch. A float16
gradient below 6e-8 is lost; the loss is multiplied by a large scale and gradients divided by it.
Losses here are sums over tokens, so their gradients are thousands of times those of a mean, and the
scale starts lower than the customary 2^15.
The scale halves on overflow and doubles after `GROWTH_INTERVAL` good steps (arXiv 1710.03740).
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array

GROWTH_INTERVAL = 2000


@flax.struct.dataclass
class LossScale:
    """No scaling: for float32 and bfloat16, whose exponents reach as far as the gradients do."""

    def scale(self, loss: Array) -> Array:
        """Returns the loss to differentiate."""
        return loss

    def unscale(self, grads: Any) -> Any:
        """Returns the gradients of the unscaled loss."""
        return grads

    def adjust(self, finite: Array) -> "LossScale":
        """Returns the scale for the next step, given whether this one's gradients were finite."""
        del finite
        return self

    def metrics(self) -> dict[str, Array]:
        """What to log."""
        return {}


@flax.struct.dataclass
class DynamicLossScale(LossScale):
    """A power of two that follows the gradients.

    Attributes:
      value: the scale, float32.
      good_steps: finite steps since it last changed, int32.
    """

    value: Array
    good_steps: Array

    @classmethod
    def create(cls, value: float = 2.0**7) -> "DynamicLossScale":
        """Returns a fresh scale."""
        return cls(jnp.asarray(value, jnp.float32), jnp.zeros((), jnp.int32))

    def scale(self, loss: Array) -> Array:
        """See `LossScale`."""
        return loss * self.value

    def unscale(self, grads: Any) -> Any:
        """See `LossScale`."""
        return jax.tree.map(lambda g: g / self.value, grads)

    def adjust(self, finite: Array) -> "DynamicLossScale":
        """See `LossScale`."""
        grow = finite & (self.good_steps + 1 >= GROWTH_INTERVAL)
        factor = jnp.where(finite, jnp.where(grow, 2.0, 1.0), 0.5)
        value = jnp.clip(self.value * factor, 1.0, 2.0**24)
        return DynamicLossScale(value, jnp.where(finite & ~grow, self.good_steps + 1, 0))

    def metrics(self) -> dict[str, Array]:
        """See `LossScale`."""
        return {"loss_scale": self.value}


def loss_scale_for(dtype: str) -> LossScale:
    """Returns the loss scale that a compute type needs."""
    return DynamicLossScale.create() if dtype == "float16" else LossScale()
