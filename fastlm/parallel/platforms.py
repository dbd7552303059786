"""Which kind of machine the program being traced is for."""

import jax


def target_platform() -> str:
    """Returns "tpu", "cpu" or "gpu": of the mesh in force, which may be one that this machine only compiles for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        platform = jax.default_backend()
        return platform if platform in ("cpu", "tpu") else "gpu"
    kind = device.device_kind.lower()  # "cpu", "TPU v5 lite", "NVIDIA H100 80GB HBM3"
    return next((platform for platform in ("cpu", "tpu") if kind.startswith(platform)), "gpu")
