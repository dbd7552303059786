"""Checkpoints: saved in the background, whole or not at all, and readable without the config that made them.

A checkpoint is `<workdir>/checkpoints/<step>/` with the items
  model      the model's parameters; `models.abstract` of the saved ModelConfig is their restore target. Where
             a task exports something else than it trains (LoRA's sum), that
  average    their moving average, when the run keeps one
  training   the rest of the state, and what wrappers train beside the model
  about      JSON: model, tokenizer, data position, config, versions
Notable: Orbax writes aside and renames, so a killed run leaves the previous checkpoints whole. The
last `keep` and the best by the evaluation loss stay. Every failure to read or write becomes one
line that names the step and what remains.
Left out: storing frozen constants; they come with the compressions that have them.
"""

import contextlib
import dataclasses
import logging
import math
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from fastlm.errors import UserError, first_line
from fastlm.parallel import multihost
from fastlm.training.state import State

BEST_METRIC = "loss"
LAYERS = "layers"  # the part of a model whose own parts are alike, and many
DELETED = "deleted"  # where checkpoints that are not kept go, to be removed
ABOUT = {"model": dict, "tokenizer": str, "config": dict, "data": dict, "metrics": dict}


@dataclasses.dataclass(frozen=True)
class Preservation:
    """Keeps the newest `latest` checkpoints and the one with the lowest evaluation loss."""

    latest: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax's question: one answer per checkpoint, oldest first."""
        del context
        scored = [(c.metrics[BEST_METRIC], i) for i, c in enumerate(checkpoints) if _is_scored(c.metrics)]
        best = min(scored)[1] if scored else -1
        return [i >= len(checkpoints) - self.latest or i == best for i in range(len(checkpoints))]


def _is_scored(metrics: Any) -> bool:
    return bool(metrics) and math.isfinite(metrics.get(BEST_METRIC, math.nan))


def versions() -> dict[str, str]:
    """Returns the versions that wrote a checkpoint."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, workdir: str | Path, *, keep: int = 2, read_only: bool = False):
        """Opens (and, unless `read_only`, creates) `<workdir>/checkpoints`.

        Raises:
          UserError: `read_only` and there is none.
        """
        for name in ("absl", "asyncio"):  # Orbax reports every file, and failures twice
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self.folder = Path(workdir).absolute() / "checkpoints"
        if read_only and not self.folder.is_dir():
            raise UserError(f"{workdir}: no checkpoints folder there; give --workdir of a run of fastlm.train")
        with self._reporting("open"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=Preservation(keep),
                    # Without it the metrics are not written, and a resumed run would forget its best.
                    best_fn=lambda metrics: metrics[BEST_METRIC],
                    best_mode="min",
                    create=False,
                    cleanup_tmp_directories=not read_only,
                    # A checkpoint goes in one rename: killed halfway, a deletion must not leave half a checkpoint.
                    todelete_subdir=DELETED,
                    enable_async_checkpointing=True,
                ),
            )
        if not read_only:
            self._empty_deleted()

    def _empty_deleted(self) -> None:
        if multihost.is_primary():
            shutil.rmtree(self.folder / DELETED, ignore_errors=True)

    def steps(self) -> list[int]:
        """Returns the steps that can be restored, oldest first."""
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """Returns the step with the lowest evaluation loss, or None if none was evaluated."""
        scored = [(m[BEST_METRIC], step) for step in self.steps() if _is_scored(m := self._manager.metrics(step))]
        return min(scored)[1] if scored else None

    def save(
        self,
        step: int,
        state: State,
        about: dict[str, Any],
        metrics: dict[str, float] | None = None,
        exported: Any = None,
    ) -> None:
        """Starts saving in the background; a step that exists already is left as it is.

        Args:
          exported: the model for use, where it is not `state.params["model"]` itself (see `Task.export`).

        Raises:
          UserError: this or the previous save could not be written (a full disk, say).
        """
        if step in self._manager.all_steps():
            return
        items = {
            **{name: ocp.args.StandardSave(part) for name, part in _parts(state, exported).items()},
            "about": ocp.args.JsonSave(about),
        }
        self.wait()  # as Orbax would; what is removed here must not be in use by the save before
        with self._reporting("write", step):
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def about(self, step: int) -> dict[str, Any]:
        """Returns the JSON description of a checkpoint, which has the keys of `ABOUT`.

        Raises:
          UserError: damaged, or not written by this program.
        """
        with self._reporting("read", step):
            about = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
        fields = about if isinstance(about, dict) else {}
        missing = [name for name, kind in ABOUT.items() if not isinstance(fields.get(name), kind)]
        if missing:
            raise UserError(
                f"checkpoint {self.folder / str(step)}: written by another program, or damaged: its description "
                f"lacks {', '.join(missing)}"
            )
        return fields

    def restore(self, step: int, target: State, *, exports: bool = False) -> State:
        """Returns the state at `step`, placed as `target` (shapes with shardings) says.

        Args:
          exports: whether it was saved with `exported`.

        Raises:
          UserError: damaged, or of another shape than `target`.
        """
        if exports:
            return self._restore(step, {"training": target})["training"]
        found = self._restore(step, _parts(target))
        rest = found["training"]
        average = () if "average" not in found else {**rest.average, "model": found["average"]}
        return rest.replace(params={**rest.params, "model": found["model"]}, average=average)

    def restore_model(self, step: int, target: Any, *, average: bool = False) -> Any:
        """Returns the model's parameters at `step`, or their average, without what was trained beside them."""
        self._require_average(step, average)
        name = "average" if average else "model"
        return self._restore(step, {name: target})[name]

    def _require_average(self, step: int, average: bool) -> None:
        if average and not (self.folder / str(step) / "average").is_dir():
            raise UserError(f"{self.folder / str(step)}: the run kept no averaged weights; drop --average")

    def restore_parts(self, step: int, target: Any, change: Callable[[Any], Any], *, average: bool = False) -> Any:
        """Returns what `change` makes of the model's parameters, of which one layer at a time is read.

        Args:
          change: from a part of the parameters (one layer, or something else at the top of the tree) to another tree,
            which has the same names there.
        """
        self._require_average(step, average)
        name, made = "average" if average else "model", {}
        for part in _one_at_a_time(target):
            item = _with_placeholders(target, part)
            arguments = ocp.args.PyTreeRestore(item=item, restore_args=jax.tree.map(_restore_args, item))
            with self._reporting("read", step):
                read = self._manager.restore(step, args=ocp.args.Composite(**{name: arguments}))[name]
            _put(made, jax.block_until_ready(change(_without_placeholders(read, part))))
        return made

    def _restore(self, step: int, parts: dict[str, Any]) -> Any:
        with self._reporting("read", step):
            arguments = {name: ocp.args.StandardRestore(part) for name, part in parts.items()}
            return self._manager.restore(step, args=ocp.args.Composite(**arguments))

    def resolve(self, step: int | str | None) -> int:
        """Returns the step meant by a number (also as text), "best", or None or "" (the newest).

        Raises:
          UserError: there is no such checkpoint; the message lists those there are.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.folder}: holds no complete checkpoint; train there first")
        if isinstance(step, str) and step.isdecimal():
            step = int(step)
        wanted = self.best() if step == "best" else steps[-1] if step in (None, "") else step
        if wanted is None:
            raise UserError(f"{self.folder}: no checkpoint was evaluated, so none is best; choose from {steps}")
        if wanted not in steps:
            raise UserError(f"{self.folder}: no checkpoint at step {wanted}; choose from {steps}, or 'best'")
        return wanted

    def wait(self) -> None:
        """Returns when everything saved is on disk.

        Raises:
          UserError: it could not be written.
        """
        with self._reporting("write"):
            self._manager.wait_until_finished()
        self._empty_deleted()

    def close(self) -> None:
        """Waits and lets go of the folder."""
        self.wait()
        self._manager.close()

    @contextlib.contextmanager
    def _reporting(self, verb: str, step: int | None = None) -> Iterator[None]:
        place = self.folder if step is None else self.folder / str(step)
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            # Orbax, TensorStore and the file system each raise their own kinds here.
            others = [s for s in self._complete() if s != step]
            raise UserError(
                f"checkpoint {place}: could not {verb} it ({first_line(error)[:300]}); {_advice(verb, others)}"
            ) from error

    def _complete(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdigit())


def _parts(state: State, exported: Any = None) -> dict[str, Any]:
    """Cuts a state into the items of a checkpoint, so that the model can be read alone."""
    if exported is not None:
        return {"model": exported, "training": state}
    beside = lambda params: {name: tree for name, tree in params.items() if name != "model"}
    averages = bool(jax.tree.leaves(state.average))
    rest = state.replace(params=beside(state.params), average=beside(state.average) if averages else ())
    parts = {"model": state.params["model"], "training": rest}
    return parts | ({"average": state.average["model"]} if averages else {})


def _one_at_a_time(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the parts of a tree of parameters: each of its layers, and whatever else stands at the top."""
    for name, inner in tree.items():
        if name == LAYERS:
            yield from ({LAYERS: {number: layer}} for number, layer in inner.items())
        else:
            yield {name: inner}


def _with_placeholders(tree: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Returns a tree in which all but a part is left out, as Orbax is told so: the rest still has to be in the file."""
    left_out = jax.tree.map(lambda leaf: ocp.PLACEHOLDER, tree)
    _put(left_out, part)
    return left_out


def _without_placeholders(tree: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Returns of a tree what stands where `part` does."""
    kept = {name: tree[name] for name in part}
    if LAYERS in part:
        kept[LAYERS] = {number: tree[LAYERS][number] for number in part[LAYERS]}
    return kept


def _put(tree: dict[str, Any], part: dict[str, Any]) -> None:
    """Puts a part into a tree, in place."""
    for name, inner in part.items():
        if name == LAYERS:
            tree.setdefault(LAYERS, {}).update(inner)
        else:
            tree[name] = inner


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    if leaf is ocp.PLACEHOLDER:
        return ocp.RestoreArgs()
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)


def _advice(verb: str, others: list[int]) -> str:
    rest = f"intact there: {others}" if others else "no other checkpoint is there"
    if verb == "read":
        return f"it is damaged or belongs to another model; {rest}, choose one with --step"
    return f"check space and permissions, then run the same command again to resume; {rest}"
