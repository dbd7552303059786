"""How models declare weights.

Notable: `weight` is the only way. While a module initialises it makes a parameter with logical axis
names; afterwards it reads whatever stands there (an array today, any leaf class later) and checks
the shape itself, so that a checkpoint that does not fit the config is one clear line.
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from fastlm.errors import UserError

Initializer = Callable[..., Array]


def normal(scale: float) -> Initializer:
    """Normal with standard deviation `scale`; zeros when `scale` is 0."""
    return nn.initializers.normal(scale) if scale else nn.initializers.zeros


def weight(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init: Initializer = nn.initializers.zeros,
) -> Array:
    """Declares or reads the float32 weight `name` of `module`.

    Raises:
      UserError: the stored weight is missing or has another shape than the config says.
    """
    if module.is_initializing():
        return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
    where = "/".join((*module.scope.path, name))
    if not module.has_variable("params", name):
        raise UserError(f"weight {where}: missing from the parameters; they belong to another model config")
    leaf = module.get_variable("params", name)
    if tuple(leaf.shape) != tuple(shape):
        raise UserError(
            f"weight {where}: stored shape {tuple(leaf.shape)}, but the model config asks for {tuple(shape)}"
        )
    return leaf
