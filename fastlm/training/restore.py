"""A trained model from its workdir, without the config file that trained it."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from fastlm import configuration, tasks
from fastlm.data import tokenizers
from fastlm.errors import UserError
from fastlm.models import Compute, Model, ModelConfig, abstract, formats, fusion, rounding
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
    fused: bool = False,
    weights: str | None = None,
) -> Restored:
    """Reads a checkpoint of a run onto `mesh`.

    Args:
      step: a number, "best", or None for the newest.
      average: use the averaged weights; None uses them if the run kept any.
      dtype: compute type; None is that of the run.
      cache_dtype: what decoding keeps keys and values in; None is that of the run.
      fused: whether to fuse products, which decodes faster; weights that are cut over devices stay as they are.
      weights: "int8" for weights in eight bits (see `models.rounding`); None leaves them as they are stored.

    Raises:
      UserError: no, damaged, or foreign checkpoint; weights to be rounded that are cut over devices.
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
    stored, cfg = cfg, cfg.in_use()
    about = about | {"model": about["model"] | {"formats": list(map(list, cfg.formats))}}
    whole = all(where.is_fully_replicated for where in jax.tree.leaves(placement))
    if weights and not whole:
        raise UserError("--weights int8: goes with weights on one device; leave --tensor out")
    fuse = functools.partial(fusion.fuse, cfg) if fused and whole else lambda params: (cfg, params)
    if weights:  # a layer at a time, so that there is never much more in memory than what stays
        rewrite = lambda part: rounding.round_weights(fuse(formats.opened(part))[1])
        params = files.restore_parts(step, target, rewrite, average=average)
        cfg = dataclasses.replace(cfg, fused=cfg.fused or (fused and whole))
    else:
        params = files.restore_model(step, target, average=average)
        if stored != cfg:
            params = jax.jit(formats.opened, out_shardings=rules.shardings(*abstract(cfg), mesh))(params)
        cfg, params = fuse(params)
    chosen = {"dtype": dtype, "cache_dtype": cache_dtype}
    compute = dataclasses.replace(compute, **{name: value for name, value in chosen.items() if value is not None})
    return Restored(Model(cfg, compute), params, tokenizer, about, step)
