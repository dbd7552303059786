"""What a weight may be instead of an array: a class that says how it multiplies.

Notable: models call the verbs of `ops.contract` and never look at the class; a compression puts a leaf
in the place of an array, and every model, loss and decoder works on. Leaves are pytrees
(`flax.struct.dataclass`), so gradients, placement and checkpoints see their parts.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array


class Leaf(ABC):
    """A weight [I, O] that is stored in another form.

    Attributes:
      factored: whether its parts are weights themselves, to be trained, scored, cut and adapted one by one.
      stored: whether it is for disk alone: what is read has an array there.
    """

    factored: ClassVar[bool] = False
    stored: ClassVar[bool] = False

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the array it stands for."""

    @abstractmethod
    def contract(self, x: Array, transpose: bool, dtype: jnp.dtype) -> Array:
        """Returns `x @ w`, or `x @ w.T`, in the type `dtype`."""

    @abstractmethod
    def lookup(self, ids: Array, dtype: jnp.dtype, axes: tuple[str | None, ...]) -> Array:
        """Returns the rows `ids`."""

    @abstractmethod
    def dense(self) -> Array:
        """Returns the array it stands for."""


def is_whole(node: Any) -> bool:
    """Says whether a tree of weights ends here, at a leaf whose parts mean nothing alone: `is_leaf` of walks."""
    return isinstance(node, Leaf) and not node.factored
