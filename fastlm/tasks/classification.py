"""Which of a few labels a text, or a pair of texts, has.

Notable: the names of the labels are part of the saved config, found in the training rows unless given,
so a checkpoint knows what it says. Metrics: accuracy and macro-F1 (each label counts the same).

Dims: B batch, T time, C classes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fastlm.data.bucketing import Encode
from fastlm.data.examples import Row
from fastlm.data.settings import Data, Evaluation
from fastlm.data.tokenizers import Tokenizer
from fastlm.errors import UserError, nearest
from fastlm.measurement import classification_scores
from fastlm.models import Model, ModelConfig
from fastlm.ops.chunked_loss import MASK
from fastlm.ops.cross_entropy import TARGETS, CrossEntropy
from fastlm.tasks.kind import Scored, TaskKind, Trained
from fastlm.tasks.rows import Joiner, predictions, rows_by_record
from fastlm.tasks.task import Batch, Task, of_model, through_head
from fastlm.tasks.texts import TextsKind, read_texts, text_logits

MOST_LABELS = 1000


@dataclasses.dataclass(frozen=True)
class Classification(TextsKind):
    """The kind "classification".

    Attributes:
      label: field with the label, text or a number.
      labels: the labels in the order of classes; empty for those of the training rows, sorted.
      label_smoothing: share of the target spread evenly over the labels (arXiv 1512.00567).
    """

    label: str = "label"
    labels: tuple[str, ...] = ()
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"config.task.label_smoothing: must lie in [0, 1), got {self.label_smoothing}")
        if len(set(self.labels)) != len(self.labels):
            raise UserError(f"config.task.labels: a label is named twice in {self.labels}")

    @property
    def classes(self) -> int:
        """As many as there are labels."""
        return len(self.labels)

    def fields_read(self) -> tuple[str, ...]:
        """Texts and label."""
        return (*self.text_fields, self.label) if self.label else self.text_fields

    def unlabelled(self) -> "Classification":
        """Reads no label."""
        return dataclasses.replace(self, label="")

    def resolve(self, data: Data) -> "Classification":
        """Finds the labels in the training rows, where none are given."""
        if self.labels:
            return self
        found: set[str] = set()
        for rows, _ in self.load(data, data.split):
            found |= {str(row[self.label]) for row in rows}
            if len(found) > MOST_LABELS:
                raise UserError(
                    f"config.task.label: field '{self.label}' of {rows.name} has more than {MOST_LABELS} values; "
                    "is it the label? If so, list config.task.labels"
                )
        if len(found) < 2:
            raise UserError(f"config.task.label: field '{self.label}' has one value only in the training rows: {found}")
        return dataclasses.replace(self, labels=tuple(sorted(found)))

    def encoder(self, cfg: ModelConfig, tokenizer: Tokenizer, data: Data) -> Encode:
        """Returns row -> tokens, token types where the model has them, label number."""
        join, number = Joiner(tokenizer, data.length), {label: i for i, label in enumerate(self.labels)}

        def encode(row: dict[str, Any]) -> dict[str, Any]:
            label = str(row[self.label]) if self.label else self.labels[0]
            if label not in number:
                raise UserError(
                    f"config.task.labels: a row has the unknown {self.label} '{label}'{nearest(label, number)}; "
                    f"known are {', '.join(self.labels[:10])}"
                )
            return self.encode_texts(join, row, cfg) | {"label": number[label]}

        return encode

    def difference(self, other: TaskKind) -> str:
        """Labels have to be the same, in the same order."""
        others = getattr(other, "labels", self.labels)
        if others == self.labels:
            return super().difference(other)
        return f"its labels are {', '.join(others[:10])}, here {', '.join(self.labels[:10])}; set config.task.labels"

    def make(self, model: Model, tokenizer: Tokenizer) -> Task:
        """Returns the task."""
        del tokenizer
        return make(model, self.label_smoothing)

    def score(self, trained: Trained, data: Data, evaluation: Evaluation, split: str, limit: int = 0) -> Scored:
        """Returns accuracy and macro-F1 with standard errors over rows, and what was said of each row."""
        rows, said = self.say(trained, data, evaluation, split, limit)
        labels = np.array([self.labels.index(str(row[self.label])) for row in rows])
        guesses = np.array([self.labels.index(one["said"]) for one in said])
        confusion = classification_scores.confusion_matrix(labels, guesses, classes=len(self.labels))
        accuracy, macro_f1 = classification_scores.accuracy(confusion), classification_scores.macro_f1(confusion)
        metrics = {
            "accuracy": accuracy.value,
            "accuracy_error": accuracy.error,
            "macro_f1": macro_f1.value,
            "macro_f1_error": macro_f1.error,
            "rows": float(len(labels)),
        }
        outputs = [
            {name: row[name] for name in self.text_fields} | {"label": self.labels[label]} | one
            for row, label, one in zip(rows, labels, said)
        ]
        return Scored(metrics, outputs)

    def say(
        self, trained: Trained, data: Data, evaluation: Evaluation, split: str, limit: int = 0
    ) -> tuple[list[Row], list[dict[str, Any]]]:
        """Returns rows, and of each the likeliest label and its probability."""
        batches = self.eval_batches(trained.model.cfg, trained.tokenizer, data, evaluation, split, limit)
        found = predictions(trained, batches)
        said = []
        for output in found.values():
            chances = np.exp(output["logits"] - np.max(output["logits"]))
            best = int(np.argmax(chances))
            said.append({"said": self.labels[best], "probability": float(chances[best] / np.sum(chances))})
        return rows_by_record(self.load(data, split), list(found)), said


@dataclasses.dataclass(frozen=True)
class LabelCrossEntropy(CrossEntropy):
    """Cross-entropy with the right label, which also reports the likeliest one."""

    def __call__(self, logits: Array, shared: Any, piece: Mapping[str, Array]) -> tuple[Array, Any]:
        """Returns (loss, (nll, likeliest label)) of each prediction."""
        loss, scores = super().__call__(logits, shared, piece)
        return loss, (scores.nll, jnp.argmax(logits, axis=-1))

    def with_gradient(self, logits: Array, shared: Any, piece: Mapping[str, Array]) -> tuple[Array, Any, Array]:
        """Returns the same and the gradient by the logits."""
        loss, scores, gradient = super().with_gradient(logits, shared, piece)
        return loss, (scores.nll, jnp.argmax(logits, axis=-1)), gradient


def make(model: Model, label_smoothing: float = 0.0) -> Task:
    """Returns the task; `predict` gives logits [B, C]."""

    def read(weights, constants, carry, batch, rng, capture):
        del constants
        found = read_texts(model, weights, batch, rng, capture)
        return found._replace(pieces=found.pieces | {TARGETS: batch["label"][:, None]}, carry=carry)

    def sums(scores, pieces, constants):
        del constants
        (nll, said), mask = scores, pieces[MASK]
        one_hot = lambda labels: jax.nn.one_hot(labels, model.cfg.classes)
        confusion = jnp.einsum("bpi,bpj,bp->ij", one_hot(pieces[TARGETS]), one_hot(said), mask)
        return {"nll": jnp.sum(nll * mask), "confusion": confusion}

    def predict(weights: Any, constants: Any, carry: Any, batch: Batch) -> tuple[Any, dict[str, jax.Array]]:
        del constants
        return carry, {"logits": text_logits(model, weights, batch, None)}

    return of_model(
        model.cfg,
        predictions=through_head(model, read, LabelCrossEntropy(label_smoothing=label_smoothing), sums),
        summarize=summarize,
        predict=predict,
    )


def summarize(sums: dict[str, Any]) -> dict[str, float]:
    """Returns loss (nats per row), accuracy and macro-F1 from the confusion matrix [label, said]."""
    confusion = np.asarray(sums["confusion"])
    rows = max(float(confusion.sum()), 1.0)
    known = classification_scores.class_f1(confusion)
    known = known[~np.isnan(known)]
    return {
        "loss": float(sums["nll"]) / rows,
        "accuracy": float(np.trace(confusion)) / rows,
        "macro_f1": float(np.mean(known)) if len(known) else 0.0,
    }
