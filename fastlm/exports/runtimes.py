"""Models by what runs them: a workdir in XLA, or what was exported in the runtime of its format."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from fastlm.errors import UserError
from fastlm.exports import exported_model
from fastlm.exports.exported_programs import ExportedPrograms
from fastlm.measurement import ruler
from fastlm.measurement.runtimes import Jitted, Runtime
from fastlm.models import abstract
from fastlm.ops.leaf import is_whole
from fastlm.training import restore as workdirs
from fastlm.training.checkpoints import Checkpoints
from fastlm.training.restore import Restored

RUNTIMES = ("jax", "onnx", "stablehlo")


def programs(runtime: str, folder: str | Path) -> ExportedPrograms:
    """Returns the programs of an export.

    Raises:
      UserError: nothing that this runtime takes is there.
    """
    # With what each needs, which only exports do.
    if runtime == "onnx":
        from fastlm.exports import onnx_session as session
    else:
        from fastlm.exports import stablehlo_session as session
    return session.Programs(folder)


def restore(runtime: str, folder: str | Path, mesh: Mesh, *, fused: bool = False, **options: Any) -> Restored:
    """Returns the model in a folder; it scores and writes with the same code, whatever runs it.

    Args:
      runtime: one of `RUNTIMES`.
      fused: whether products are fused; those of an export are.
      options: of `training.restore.restore`, for workdirs; an export is what it is.

    Raises:
      UserError: nothing that this runtime takes is there, or options for what has none.
    """
    if runtime == "jax":
        return workdirs.restore(folder, mesh, fused=fused, **options)
    if mesh.shape["tensor"] > 1:
        raise UserError(f"--tensor: goes with --runtime jax; leave it out with --runtime {runtime}")
    for name, value in options.items():
        if value not in (None, ""):
            raise UserError(f"--{name}: was chosen when the model was exported; leave it out with --runtime {runtime}")
    return exported_model.restore(programs(runtime, folder))


def timed(runtime: str, restored: Restored, start: int | None) -> Runtime:
    """Returns a restored model as the ruler sees it.

    Args:
      start: the token that an encoder-decoder's decoder begins with.
    """
    if runtime == "jax":
        return Jitted(restored.model, restored.params, start)
    return exported_model.Timed(restored.model, restored.params, start)


def longest(runtime: str, restored: Restored) -> int:
    """Returns how many tokens a row that is read may have."""
    fixed = None if runtime == "jax" else restored.model.programs.length_of("forward")
    return restored.model.cfg.max_length if fixed is None else fixed


def sizes(runtime: str, folder: str, restored: Restored, average: bool, flops: float, length: int) -> ruler.Sizes:
    """Returns what a stored model takes.

    Args:
      flops, length: as in `ruler.Sizes`.
      average: whether it is the averaged weights that were restored.
    """
    own = restored.params if runtime == "jax" else abstract(restored.model.cfg)[0]
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(own, is_leaf=is_whole))
    if runtime == "jax":
        step = Checkpoints(folder, read_only=True).folder / str(restored.step)
        files = ruler.folder_bytes(step / ("average" if average else "model"))
        return dataclasses.replace(ruler.sizes(restored.params, flops, length, files), parameters=parameters)
    weights = restored.model.programs.weights()
    return ruler.Sizes(
        parameters=parameters,
        stored=weights.nbytes,
        gzipped=ruler.gzipped_bytes([weights]),
        files=restored.model.programs.bytes(),
        flops=flops,
        length=length,
    )
