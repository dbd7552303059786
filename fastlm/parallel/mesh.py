"""The only place that makes a device mesh.

Axes: `data` (replicated weights), `fsdp` (weights cut along their embedding axis, batch cut too),
`tensor` (heads, feed-forward and vocabulary cut), `sequence` (activations cut along time). All are
Auto axes: the compiler propagates shardings from the constraints that the model and state carry.
Left out: pipeline stages, which come with the scale work.
"""

import math

import jax
from jax.sharding import AxisType, Mesh

from fastlm.errors import UserError

AXES = ("data", "fsdp", "tensor", "sequence")


def make(*, data: int = -1, fsdp: int = 1, tensor: int = 1, sequence: int = 1) -> Mesh:
    """Returns a mesh over all devices; one axis may be -1, meaning "what is left".

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    sizes = [data, fsdp, tensor, sequence]
    devices = jax.device_count()
    named = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"config.mesh: {named}: sizes are positive, and at most one may be -1 (what is left)")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if devices % known:
            raise UserError(f"config.mesh: {named}: {known} does not divide the {devices} devices; change the sizes")
        sizes[sizes.index(-1)] = devices // known
    elif known != devices:
        raise UserError(f"config.mesh: {named} needs {known} devices but there are {devices}; set one size to -1")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def alone() -> Mesh:
    """Returns a mesh of one device: what is exported from there runs on any number of them."""
    shape, kinds = (1,) * len(AXES), (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=kinds, devices=jax.local_devices()[:1])


def share_weights(tensor: int) -> Mesh:
    """Returns a mesh over all devices in which `tensor` of them share each weight: what --tensor asks for.

    Raises:
      UserError: the number of devices is no multiple of it.
    """
    devices = jax.device_count()
    if devices % tensor:
        raise UserError(f"--tensor {tensor}: does not divide the {devices} devices; give a divisor of their number")
    return make(tensor=tensor)
