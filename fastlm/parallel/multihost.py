"""One process or many: joining them, building global batches, agreeing on small values.

Notable: `initialize` leaves cluster detection to JAX when Slurm runs several tasks or FASTLM_MULTIHOST=1
(which `launch/tpu_pod.sh` sets); on bare machines the variables FASTLM_COORDINATOR, FASTLM_PROCESSES
and FASTLM_PROCESS name the run. Nothing here is
done at home that `jax.distributed` or `multihost_utils` already does.
"""

import json
import os
import zlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from fastlm.errors import UserError
from fastlm.parallel import rules


def initialize() -> None:
    """Joins the processes of this run, when the environment says that there are several.

    Raises:
      UserError: the variables are missing or no numbers, or the processes do not find each other.
    """
    coordinator = os.environ.get("FASTLM_COORDINATOR")
    if coordinator:
        try:
            count, index = int(os.environ["FASTLM_PROCESSES"]), int(os.environ["FASTLM_PROCESS"])
        except (KeyError, ValueError) as error:
            raise UserError(
                "FASTLM_COORDINATOR is set, so FASTLM_PROCESSES and FASTLM_PROCESS must be numbers "
                f"(how many processes, and which one this is): {error}"
            ) from None
        _join(coordinator, count, index)
    elif os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1" or os.environ.get("FASTLM_MULTIHOST") == "1":
        _join()


def _join(*arguments: Any) -> None:
    try:
        jax.distributed.initialize(*arguments)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"could not join the other processes: {' '.join(str(error).split())[:300]}") from None


def is_primary() -> bool:
    """Whether this process writes files and prints."""
    return jax.process_index() == 0


def this_process() -> dict[str, int]:
    """Returns process_index and process_count, as the data pipelines take them."""
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Joins each process's rows ([rows, ...] arrays) into global arrays cut along the batch axis."""

    def join(rows: np.ndarray) -> jax.Array:
        shape = (rows.shape[0] * jax.process_count(), *rows.shape[1:])
        cut = mesh.shape["data"] * mesh.shape["fsdp"]
        if jax.process_count() > 1 and shape[0] % cut:
            raise UserError(f"a batch of {shape[0]} rows is not divided by the {cut} devices of data x fsdp; change it")
        names = ("batch", "length")[: rows.ndim] + (None,) * (rows.ndim - 2)
        sharding = NamedSharding(mesh, rules.partition_spec(names, shape, mesh))
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return {name: join(rows) for name, rows in batch.items()}


def require_same(value: Any, what: str) -> None:
    """Checks that a JSON-able value is the same on all processes.

    Raises:
      UserError: it is not; `what` says what differs and what to do.
    """
    if jax.process_count() == 1:
        return
    number = np.array([zlib.crc32(json.dumps(value, sort_keys=True).encode())], np.uint32)
    if len(np.unique(multihost_utils.process_allgather(number))) > 1:
        raise UserError(what)


def gather_json(value: dict[str, Any]) -> dict[str, Any]:
    """Merges a small JSON-able dict of each process into one, the same on all of them."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([text.size]))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    merged: dict[str, Any] = {}
    for row, size in zip(rows, np.ravel(sizes)):
        merged.update(json.loads(bytes(row[: int(size)]).decode()))
    return merged
