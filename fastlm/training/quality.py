"""Scores of a restored model by its task's own measure: on the split that its config ends with, or on any source."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import Mesh

from fastlm import configuration
from fastlm.data.settings import Data, Evaluation
from fastlm.errors import UserError
from fastlm.tasks.kind import Scored, TaskKind
from fastlm.tasks.scoring import to_device
from fastlm.tasks.task import Batch
from fastlm.training.restore import Restored

USER_FILES = ("text", "jsonl", "tsv", "csv")


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is scored, and how; whatever is left out is as in training.

    Attributes:
      sources: specs of data; empty for those of the run.
      split: of them; "" for the config's final one, or all of a user's file.
      length: context in tokens; 0 for that of training.
      overlap: tokens repeated, unscored, per window; below 0 for the config's.
      batch_size: rows, rounded up to a multiple of the devices.
      batches: score only so many; 0 scores all.
    """

    sources: Sequence[str] = ()
    split: str = ""
    length: int = 0
    overlap: int = -1
    batch_size: int = 16
    batches: int = 0


def data_of(restored: Restored, asked: Asked) -> tuple[Data, Evaluation, str]:
    """Returns the run's settings with the sources that are asked for, and the split."""
    config = restored.about["config"]
    data = configuration.make(Data, "data", config["data"])
    evaluation = configuration.make(Evaluation, "evaluation", config.get("evaluation", {}))
    sources = tuple((source, 1.0) for source in asked.sources) or data.sources
    user_files = asked.sources and asked.sources[0].partition(":")[0] in USER_FILES
    split = asked.split or ("all" if user_files else evaluation.final_split or "test")
    return dataclasses.replace(data, sources=sources), evaluation, split


def score(restored: Restored, mesh: Mesh, asked: Asked) -> Scored:
    """Scores a model.

    Raises:
      UserError: rows longer than the model's context, or data that is not there.
    """
    kind, data, evaluation, split = _read_as(restored, mesh, asked)
    return kind.score(restored.trained(kind, mesh), data, evaluation, split, asked.batches)


def read(restored: Restored, mesh: Mesh, asked: Asked) -> None:
    """Has a model read a split as in training, targets too, whatever its task scores; what it says is dropped.

    Raises:
      UserError: as `score`.
    """
    trained, carry = restored.trained(restored.kind(), mesh), None
    predict = jax.jit(trained.task.predict)
    for on_device in batches(restored, mesh, asked):
        carry = trained.task.carry(next(iter(on_device.values())).shape[0]) if carry is None else carry
        carry, _ = jax.block_until_ready(predict(trained.weights, trained.task.constants, carry, on_device))


def batches(restored: Restored, mesh: Mesh, asked: Asked) -> Iterator[Batch]:
    """Yields a split in batches as a model of its task reads them, with targets, on the devices.

    Raises:
      UserError: there is no data, or as `score`.
    """
    kind, data, evaluation, split = _read_as(restored, mesh, asked)
    if not data.sources:
        raise UserError("this model came without data; name some with --source")
    for batch in kind.eval_batches(restored.model.cfg, restored.tokenizer, data, evaluation, split, asked.batches):
        yield to_device(batch, mesh)


def _read_as(restored: Restored, mesh: Mesh, asked: Asked) -> tuple[TaskKind, Data, Evaluation, str]:
    data, evaluation, split = data_of(restored, asked)
    length, context = asked.length or data.length, restored.model.cfg.max_length
    if length > context:
        raise UserError(f"--length: {length} is more than the model's context of {context} tokens (model.max_length)")
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    evaluation = dataclasses.replace(
        evaluation,
        batch_size=-(-asked.batch_size // devices) * devices,
        overlap=asked.overlap if asked.overlap >= 0 else evaluation.overlap,
    )
    return restored.kind(), dataclasses.replace(data, length=length), evaluation, split
