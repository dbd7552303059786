"""Blocks that learn each by itself: given what the teacher's block is given, to give what that one gives.

    config.init.source = "runs/lm_small"
    config.model.attention = "gated_linear"
    config.wrappers = ("distilled",)
    config.distilled.teachers = ("runs/lm_small",)
    config.distilled.terms = (("blocks", 1.0),)

The first stage of giving a trained model another attention, before it is distilled end to end.
Notable: there is one walk through the stack, the teacher's. At each layer whose attention differs the student's block
reads the same stream beside it, with the same positions, mask, bias and encoded source; so all layers learn in one
step, none sees another's mistakes, and no head of either model is computed. Rows are read alone, also in a stream. The
distance is relative to what the teacher's block adds: 0 for an equal block, 1 for one that adds nothing.
Papers: hidden states layer by layer, MOHAWK (arXiv 2408.10189); outputs of attention, LoLCATs (2410.10254); end to end
alone, T2R (2103.13076). Weights that fit are kept as in these and in The Mamba in the Llama (2408.15237).
Left out: blocks of other widths, biases of positions (alibi, relative) that only one of the two has.

Dims: B batch, T time, D embed.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastlm.compress import schedules
from fastlm.compress.features import STACKS
from fastlm.compress.setting import Setting
from fastlm.compress.teachers import Teacher
from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig
from fastlm.models import attention as attention_kinds
from fastlm.ops import paths
from fastlm.tasks.task import Read, Task

BLOCKS = "blocks"
PREFIX = f"{BLOCKS}/"
STUDENT = "student"
TRAINED = ("attention", "block")
WHERE = f"config.distilled.terms: {BLOCKS}"


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The term "blocks".

    Attributes:
      train: of the layers that differ, their "attention" alone, or the whole "block". All else is frozen.
    """

    train: str = "attention"

    def __post_init__(self) -> None:
        if self.train not in TRAINED:
            raise UserError(f"train: '{self.train}' is unknown; one of: {', '.join(TRAINED)}")


@dataclasses.dataclass(frozen=True)
class SideBySide(Model):
    """A teacher, at some of whose layers a student's block reads the same.

    Its parameters are the teacher's, and the student's under "student". It can capture "blocks": for each of `layers`
    the squared distance of the two outputs, and the square of what the teacher's block adds, [B, T] both.
    """

    student: Model = dataclasses.field(kw_only=True)
    layers: tuple[int, ...] = dataclasses.field(kw_only=True)

    captures = (*Model.captures, BLOCKS)

    def block(self, params: Any, i: int, x: Float[Array, "B T D"], **context: Any) -> tuple[Array, Any, dict]:
        """Runs both; what goes on is the teacher's. Only the student's draws with the random key."""
        rng, mask = context.pop("rng", None), context["mask"]
        context.pop("capture", None)
        y, cache, aux = super().block(params, i, x, **context)
        if i not in self.layers:
            return y, cache, aux
        if mask.packed and mask.key_segments is not None:
            attention_kinds.require(self.student.cfg.layer(i).attention, "packed")
        own, _, _ = self.student.block(params[STUDENT], i, x, rng=rng, **context)
        return y, cache, aux | {BLOCKS: (_squares(own, y), _squares(y, x))}


def wrapped(task: Task, setting: Setting, teacher: Teacher, blocks: Blocks, weight: schedules.Schedule) -> Task:
    """Returns the task of matching a teacher block by block; what `predict` says is still the whole student's.

    Raises:
      UserError: blocks that cannot be compared, or none that differ; a student that starts from nothing.
    """
    if not setting.start:
        raise UserError(
            f"{WHERE}: only what is converted learns, so all else has to be the teacher's; set config.init.source"
        )
    check(setting.model.cfg, teacher.cfg)
    modules = attention_kinds.converted(teacher.cfg, setting.model.cfg)
    layers = tuple(sorted({int(module.split("/")[1]) for module in modules}))
    alike = dataclasses.replace(teacher.cfg, dropout=0.0)
    pair = SideBySide(alike, teacher.model.compute, student=setting.model, layers=layers)
    trained = modules if blocks.train == "attention" else tuple(f"layers/{i}" for i in layers)
    return _Wrapped(task, setting.kind.make(pair, setting.tokenizer), pair, trained, weight).task(teacher)


def check(student: ModelConfig, teacher: ModelConfig) -> None:
    """Checks that two models can be compared block by block, and differ in their attention.

    Raises:
      UserError: other sizes, other positions that are biases, or nothing to convert.
    """
    shape = lambda cfg: (cfg.width, cfg.layers, cfg.encoder_layers)
    if shape(student) != shape(teacher):
        said = [f"{cfg.total_layers} of width {cfg.width}" for cfg in (student, teacher)]
        raise UserError(
            f"{WHERE}: the student's layers are {said[0]}, the teacher's {said[1]}; they are compared one by one, so "
            "give it as many, as wide"
        )
    if student.positions != teacher.positions and {student.positions, teacher.positions} & {"alibi", "relative"}:
        raise UserError(
            f"{WHERE}: the student's positions are '{student.positions}', the teacher's '{teacher.positions}', and one "
            "of these is a bias of attention; make them alike"
        )
    if not attention_kinds.converted(teacher, student):
        raise UserError(
            f"{WHERE}: nothing to convert, all layers have the teacher's attention ({teacher.attention!r}); name "
            "another, config.model.attention"
        )


@dataclasses.dataclass(frozen=True)
class _Wrapped:
    """A task, the same around both models, which of the student's parameters learn, and the functions of these."""

    inner: Task
    beside: Task
    pair: SideBySide
    trained: tuple[str, ...]
    weight: schedules.Schedule

    def task(self, teacher: Teacher) -> Task:
        """Returns the task."""
        learns = lambda path: paths.inside(path, [f"model/{part}" for part in self.trained])
        held = tuple(re.escape(path) for path in self.inner.axes if path.startswith("model/") and not learns(path))
        return dataclasses.replace(
            self.inner,
            loss=self._loss,
            summarize=self._summarize,
            constants={**self.inner.constants, BLOCKS: teacher.constants},
            frozen=self.inner.frozen + held,
            predictions=None,
            remarks=lambda metrics: (),
        )

    def _loss(self, weights, constants, carry, batch, step, rng):
        theirs = constants[BLOCKS]
        params = jax.lax.stop_gradient(theirs["weights"]["model"]) | {STUDENT: self._held(weights["model"])}
        read = self.beside.predictions.read({"model": params}, theirs["task"], (), batch, rng, (BLOCKS,))
        rows = jnp.any(read.documents[""] > 0, axis=1)
        sums = {f"{PREFIX}layer_{i}": jnp.sum(distance * rows) for i, distance in self._distances(read)}
        total = self.weight(step) * sum(sums.values()) / len(sums)
        count = jnp.sum(rows.astype(jnp.float32))
        return total, count, (carry, {"sums": sums | {f"{PREFIX}rows": count}})

    def _held(self, model: Any) -> Any:
        """The student's weights, of which only those that learn have a gradient."""
        hold = lambda path, leaf: leaf if paths.inside(path, self.trained) else jax.lax.stop_gradient(leaf)
        return paths.map_with_path(hold, model)

    def _distances(self, read: Read) -> Iterator[tuple[int, Float[Array, "B"]]]:
        """Yields each layer with its distance in every row; 0 for a row without a token."""
        cfg = self.pair.cfg
        for stack in STACKS:
            numbers = [i for i in self.pair.layers if i in (cfg.encoder_stack if stack else cfg.stack)]
            found = read.captured.get(f"{stack}_{BLOCKS}" if stack else BLOCKS, [])
            for i, (missed, added) in zip(numbers, found, strict=True):
                over_row = lambda x, real=read.documents[stack] > 0: jnp.sum(jnp.where(real, x, 0.0), axis=1)
                yield i, over_row(missed) / jnp.maximum(over_row(added), 1e-12)

    def _summarize(self, sums: dict[str, Any]) -> dict[str, float]:
        """Returns the mean distance as "loss" and that of each layer; of predictions, what the task makes of them."""
        ours = {name.removeprefix(PREFIX): float(sums[name]) for name in sums if name.startswith(PREFIX)}
        if not ours:
            return self.inner.summarize(sums)
        rows = max(ours.pop("rows"), 1.0)
        layers = {name: value / rows for name, value in ours.items()}
        return {"loss": sum(layers.values()) / len(layers)} | layers


def _squares(x: Float[Array, "B T D"], y: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    """Returns the squared distance of each token."""
    return jnp.sum(jnp.square(x.astype(jnp.float32) - y.astype(jnp.float32)), axis=-1)
