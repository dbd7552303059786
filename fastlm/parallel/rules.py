"""From the logical axes that weights and activations name to the mesh axes that carry them.

Notable: one literal table for the whole project. A name is dropped (and logged once) for an array
whose size the mesh axes do not divide; two names of one array that want the same mesh axis are a
defect of the table and refused. Optimizer and averaged state inherit the placement of the parameter
whose path theirs ends with, so no optimizer needs rules of its own.
"""

import functools
import logging
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

_logger = logging.getLogger(__name__)

RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp"),
    "length": ("sequence",),
    "hidden": (),
    # weights
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "latent": ("fsdp",),
    "waves": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "classes": (),
    "norm": (),
    "position": (),
}

Axes = tuple[str | None, ...]


@functools.lru_cache(maxsize=1024)
def _log_dropped(name: str, size: int, mesh_axes: tuple[str, ...]) -> None:
    _logger.warning("axis '%s' of size %d is not divided by mesh axes %s: replicated", name, size, mesh_axes)


def partition_spec(axes: Axes, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Returns where an array of `shape` with logical `axes` goes on `mesh`.

    Raises:
      KeyError: a logical name that `RULES` lacks.
      ValueError: two names of one array map to the same mesh axis.
    """
    placed, used = [], set()
    for name, size in zip(axes, shape, strict=True):
        mesh_axes = tuple(a for a in RULES[name] if mesh.shape[a] > 1) if name else ()
        if used & set(mesh_axes):
            raise ValueError(f"axes {axes}: '{name}' wants mesh axes {mesh_axes}, of which some are already taken")
        if size % math.prod(mesh.shape[a] for a in mesh_axes):
            _log_dropped(name, size, mesh_axes)
            mesh_axes = ()
        used |= set(mesh_axes)
        placed.append(mesh_axes or None)
    return PartitionSpec(*placed)


def constrain(x: Array, axes: Axes) -> Array:
    """Pins an activation to its logical axes under the mesh in force; without one, returns `x`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))


def shardings(tree: Any, axes: dict[str, Axes], mesh: Mesh) -> Any:
    """Returns a `NamedSharding` for each leaf of `tree`, found by the longest path suffix in `axes`.

    Where no path fits (step counts, loss scale), a leaf is replicated.

    Args:
      tree: arrays or shapes; parameters, or state that mirrors them (Adam moments, averages).
      axes: parameter path ("model/layers/3/attention/q") -> logical names.
    """

    def place(path: tuple, leaf: Any) -> NamedSharding:
        keys = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
        for start in range(len(keys)):
            names = axes.get("/".join(keys[start:]))
            if names is not None and len(names) == len(leaf.shape):
                return NamedSharding(mesh, partition_spec(names, leaf.shape, mesh))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, tree)
