"""What a run has to know of its task by name: which data, which head, how the end result is scored.

Notable: a kind is a frozen dataclass. Its fields are the keys of `config.task`; its methods make the
parts, each from what stands below it. The train step never sees it: it sees the `Task` made here.
Adding a task is one file and one line of `tasks.KINDS`.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from fastlm.data import pipeline, sources
from fastlm.data.documents import Documents
from fastlm.data.evaluation import evaluation_batches
from fastlm.data.settings import Data, Evaluation
from fastlm.data.tokenizers import Tokenizer
from fastlm.decoding import sample
from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig
from fastlm.parallel import multihost
from fastlm.tasks.scoring import HostBatch, evaluate_documents
from fastlm.tasks.task import Task
from fastlm.tasks.writing import Writing


@dataclasses.dataclass(frozen=True)
class Trained:
    """What is scored: a model with its weights, in `{"model": ...}`, as a task's forward pass sees them."""

    model: Model
    task: Task
    weights: Any
    tokenizer: Tokenizer
    mesh: Mesh


@dataclasses.dataclass(frozen=True)
class Scored:
    """Metrics of a split, and what the model said to read beside what was expected (JSON-able dicts)."""

    metrics: dict[str, float]
    outputs: list[dict[str, Any]] = dataclasses.field(default_factory=list)


class TaskKind(ABC):
    """See the header. `head` is what the model needs on top, `families` what it may be."""

    head: str
    families: tuple[str, ...]

    def resolve(self, data: Data) -> "TaskKind":
        """Returns this kind with what only the data can say filled in (names of labels); kept in the config.

        Raises:
          UserError: the data lacks a field, or cannot be what the config says.
        """
        del data
        return self

    def going_on_from(self, task: Mapping[str, Any]) -> "TaskKind":
        """Returns this kind with what a model that was trained for `task` (a config's section) expects of another."""
        del task
        return self

    @abstractmethod
    def documents(self, data: Data) -> Sequence[Documents]:
        """Returns the training texts, for a tokenizer to be trained on."""

    def fit(self, cfg: ModelConfig, tokenizer: Tokenizer, data: Data) -> ModelConfig:
        """Returns the architecture with what follows from the task filled in.

        Raises:
          UserError: the architecture cannot do the task.
        """
        del tokenizer, data
        if cfg.family not in self.families:
            raise UserError(
                f"config.model.family: '{cfg.family}' cannot do this task; one of: {', '.join(self.families)}"
            )
        return dataclasses.replace(cfg, head=self.head)

    def check_scoring(self, model: Model) -> None:
        """Checks that the final score can be computed with a model that is to be trained.

        Raises:
          UserError: it cannot, which would be said after hours.
        """
        del model

    def check(self, cfg: ModelConfig) -> None:
        """Checks that a restored model is one of this task.

        Raises:
          UserError: another family or head; a model from elsewhere may have none that any task reads.
        """
        if cfg.family not in self.families or cfg.head != self.head:
            raise UserError(
                f"the model is of family '{cfg.family}' with head '{cfg.head}', but its task needs "
                f"{' or '.join(self.families)} with head '{self.head}'; convert it with --head, or fine-tune it"
            )

    def difference(self, other: "TaskKind") -> str:
        """Returns in what another kind's answers are not about the same as this one's; "" where they are."""
        ours, others = type(self).__name__, type(other).__name__
        return "" if ours == others else f"{others}, where this is {ours}"

    def standalone(self, params: Any) -> Any:
        """Returns the model's weights such that its outputs alone are the answer, for readers that know no kinds."""
        return params

    @abstractmethod
    def make(self, model: Model, tokenizer: Tokenizer) -> Task:
        """Returns the task."""

    @abstractmethod
    def train_batches(self, cfg: ModelConfig, tokenizer: Tokenizer, data: Data, seed: int) -> Any:
        """Returns an endless, resumable iterator over this process's batches (see `data.batch_iterator`)."""

    @abstractmethod
    def eval_batches(
        self, cfg: ModelConfig, tokenizer: Tokenizer, data: Data, evaluation: Evaluation, split: str, limit: int
    ) -> Iterator[HostBatch]:
        """Returns one pass over a split, its first `limit` batches if that is not 0."""

    @abstractmethod
    def score(self, trained: Trained, data: Data, evaluation: Evaluation, split: str, limit: int = 0) -> Scored:
        """Scores a split as its literature does, with a standard error over examples where there is one."""

    @abstractmethod
    def first_example(self, data: Data, split: str) -> list[str]:
        """Returns the texts that a split's first example consists of: one, or each of the fields that are read."""

    def completed(self, trained: Trained, data: Data, texts: Sequence[str]) -> list[str]:
        """Returns the texts of one example with what the model itself adds to them, a target that is not given.

        Raises:
          UserError: fewer or more texts than an example has.
        """
        del trained, data
        if len(texts) != 1:
            raise UserError(f"--text: this task reads one text, got {len(texts)}")
        return list(texts)

    @abstractmethod
    def inputs(self, trained: Trained, data: Data, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns what the model reads of one completed example, cut to the lengths of `data`.

        "tokens" int32 [T], and "token_types" [T] or an encoder-decoder's "source" [S] where it reads them.
        """

    def answers(
        self, trained: Trained, data: Data, evaluation: Evaluation, split: str, limit: int = 0
    ) -> list[dict[str, Any]]:
        """Returns what the model says of each row or text, which need no right answers beside them.

        Raises:
          UserError: this task answers nothing.
        """
        del trained, data, evaluation, split, limit
        raise UserError("a model of this task continues texts and answers none; use fastlm.generate")

    def writing(self, cfg: ModelConfig, tokenizer: Tokenizer) -> Writing:
        """Returns how a trained model of this task is asked for text.

        Raises:
          UserError: it writes none.
        """
        del cfg, tokenizer
        raise UserError("a model of this task writes no text; fastlm.predict shows what it says")


class TextKind(TaskKind):
    """A task on running text: documents, tokenized and packed into rows."""

    def documents(self, data: Data) -> Sequence[Documents]:
        """Returns the documents of the training split."""
        return [sources.load(spec, data.split, data_dir=data.data_dir) for spec, _ in data.sources]

    def first_example(self, data: Data, split: str) -> list[str]:
        """Returns the first document of a split."""
        spec, _ = sources.weighted_sources(data.sources)[0]
        return [sources.load(spec, split, data_dir=data.data_dir)[0]]

    def inputs(self, trained: Trained, data: Data, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns a document's tokens behind the start token, where there is one."""
        return {"tokens": np.array(sample.prompt_ids(trained.tokenizer, texts[0])[: data.length], np.int32)}

    def train_batches(self, cfg: ModelConfig, tokenizer: Tokenizer, data: Data, seed: int) -> pipeline.BatchIterator:
        """Returns packed or streamed rows."""
        del cfg
        names = ("sources", "split", "length", "batch_size", "mode", "packing", "shards", "prefetch", "data_dir")
        arguments = {name: getattr(data, name) for name in names}
        return pipeline.training_batches(tokenizer=tokenizer, seed=seed, **arguments, **multihost.this_process())

    def eval_batches(
        self, cfg: ModelConfig, tokenizer: Tokenizer, data: Data, evaluation: Evaluation, split: str, limit: int
    ) -> Iterator[HostBatch]:
        """Returns rows in which every token of the split is scored once; rows that go on, for a model that does."""
        return evaluation_batches(
            data.sources,
            tokenizer,
            split=split,
            length=data.length,
            batch_size=evaluation.batch_size or data.batch_size,
            overlap=evaluation.overlap,
            stream=data.mode == "stream" and Model(cfg).empty_carry(1) is not None,
            limit=limit,
            data_dir=data.data_dir,
            **multihost.this_process(),
        )

    def score(self, trained: Trained, data: Data, evaluation: Evaluation, split: str, limit: int = 0) -> Scored:
        """Scores every token, with the standard error over documents; outputs are each document's sums."""
        cfg, tokenizer = trained.model.cfg, trained.tokenizer
        batches = self.eval_batches(cfg, tokenizer, data, evaluation, split, limit)
        predict = jax.jit(trained.task.predict)
        return Scored(*evaluate_documents(predict, trained.task, trained.weights, batches, trained.mesh))
