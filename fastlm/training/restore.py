"""A trained model from its workdir, without the config file that trained it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from fastlm import configuration, tasks
from fastlm.data import tokenizers
from fastlm.errors import UserError
from fastlm.models import Compute, Model, ModelConfig, abstract, fusion, rounding
from fastlm.parallel import rules
from fastlm.tasks.kind import TaskKind, Trained
from fastlm.training.checkpoints import Checkpoints


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint holds for use.

    Attributes:
      params: of the model alone (without what a compression trained beside it).
      about: the JSON description; `about["config"]` is the config that trained it.
      step: which checkpoint it is.
    """

    model: Model
    params: Any
    tokenizer: tokenizers.Tokenizer
    about: dict[str, Any]
    step: int

    def kind(self) -> TaskKind:
        """Returns the kind of task that the model was trained for.

        Raises:
          UserError: the model is none of that task.
        """
        kind = tasks.make_kind(self.about["config"].get("task", {}))
        kind.check(self.model.cfg)
        return kind

    def fused(self) -> "Restored":
        """Returns the model with fused products, which decodes faster; as it is where weights are cut over devices."""
        if not self._whole():
            return self
        cfg, params = fusion.fuse(self.model.cfg, self.params)
        return dataclasses.replace(self, model=Model(cfg, self.model.compute), params=params)

    def _whole(self) -> bool:
        return all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(self.params))

    def rounded(self) -> "Restored":
        """Returns the model with its weights in eight bits; see `models.rounding`.

        Raises:
          UserError: weights are cut over devices.
        """
        if not self._whole():
            raise UserError("--weights int8: goes with weights on one device; leave --tensor out")
        return dataclasses.replace(self, params=rounding.round_weights(self.params))

    def trained(self, kind: TaskKind, mesh: Mesh) -> Trained:
        """Returns the model as what `kind` scores and asks."""
        task = kind.make(self.model, self.tokenizer)
        return Trained(self.model, task, {"model": self.params}, self.tokenizer, mesh)


def restore(
    workdir: str | Path,
    mesh: Mesh,
    *,
    step: int | str | None = None,
    average: bool | None = None,
    dtype: str | None = None,
    cache_dtype: str | None = None,
) -> Restored:
    """Reads a checkpoint of a run onto `mesh`.

    Args:
      step: a number, "best", or None for the newest.
      average: use the averaged weights; None uses them if the run kept any.
      dtype: compute type; None is that of the run.
      cache_dtype: what decoding keeps keys and values in; None is that of the run.

    Raises:
      UserError: no, damaged, or foreign checkpoint.
    """
    files = Checkpoints(workdir, read_only=True)
    step = files.resolve(step)
    about = files.about(step)
    try:
        cfg = ModelConfig.from_json(json.dumps(about["model"]))
        tokenizer = tokenizers.from_json(about["tokenizer"])
        compute = configuration.make(Compute, "compute", about["config"].get("compute", {}))
    except UserError as error:
        raise UserError(f"checkpoint {files.folder / str(step)}: {error}") from None
    shapes, axes = abstract(cfg)
    placement = rules.shardings(shapes, axes, mesh)
    place = lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where)
    target = jax.tree.map(place, shapes, placement)
    if average is None:
        average = (files.folder / str(step) / "average").is_dir()
    params = files.restore_model(step, target, average=average)
    chosen = {"dtype": dtype, "cache_dtype": cache_dtype}
    compute = dataclasses.replace(compute, **{name: value for name, value in chosen.items() if value is not None})
    return Restored(Model(cfg, compute), params, tokenizer, about, step)
