"""A number that belongs to a text, or to a pair of texts: a year, a rating, how similar two sentences are.

Notable: the model estimates the target less its mean, over its spread, both found in the training rows and
kept in the saved config (where it leaves fastlm, they go into its head); metrics are in the target's own unit.
Loss: mean squared error. Correlations come from moments, which add up over batches; Spearman's needs the order
of all rows, so only the final score has it. A correlation with what does not vary is 0 here.

Dims: B batch, N rows.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastlm.data.bucketing import Encode
from fastlm.data.examples import Row
from fastlm.data.settings import Data, Evaluation
from fastlm.data.tokenizers import Tokenizer
from fastlm.errors import UserError
from fastlm.measurement import statistics
from fastlm.models import Model, ModelConfig
from fastlm.tasks.kind import Scored, Trained
from fastlm.tasks.rows import Joiner, predictions, rows_by_record
from fastlm.tasks.task import Batch, Task, of_model
from fastlm.tasks.texts import TextsKind, text_logits


@dataclasses.dataclass(frozen=True)
class Regression(TextsKind):
    """The kind "regression".

    Attributes:
      target: field with the number.
      mean, scale: what of the targets the model need not learn; a scale of 0 takes both from the training rows, the
        scale as standard deviation.
    """

    target: str = "target"
    mean: float = 0.0
    scale: float = 0.0

    classes = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0 <= self.scale < float("inf")):
            raise UserError(f"config.task: mean and scale must be numbers, no scale below 0: {self.mean}, {self.scale}")

    def fields_read(self) -> tuple[str, ...]:
        """Texts and target."""
        return (*self.text_fields, self.target) if self.target else self.text_fields

    def unlabelled(self) -> "Regression":
        """Reads no target."""
        return dataclasses.replace(self, target="")

    def resolve(self, data: Data) -> "Regression":
        """Finds mean and scale in the training rows, where none are given."""
        if self.scale:
            return self
        values = []
        for rows, _ in self.load(data, data.split):
            values += [self._number(row, f"row {number} of {rows.name}") for number, row in enumerate(rows)]
        if min(values) == max(values):
            raise UserError(f"config.task.target: '{self.target}' is {values[0]} in all {len(values)} training rows")
        return dataclasses.replace(self, mean=float(np.mean(values)), scale=float(np.std(values)))

    def encoder(self, cfg: ModelConfig, tokenizer: Tokenizer, data: Data) -> Encode:
        """Returns row -> tokens, token types where the model has them, standardized target."""
        join = Joiner(tokenizer, data.length)

        def encode(row: Row) -> dict[str, Any]:
            value = self._number(row, f"the row that begins {str(row[self.text])[:40]!r}") if self.target else self.mean
            return self.encode_texts(join, row, cfg) | {"target": (value - self.mean) / self.scale}

        return encode

    def standalone(self, params: Any) -> Any:
        """Returns the weights with mean and scale in the head, which then gives the target's own unit."""
        head = params["head"]
        unit = {"kernel": head["kernel"] * self.scale, "bias": head["bias"] * self.scale + self.mean}
        return params | {"head": head | unit}

    def make(self, model: Model, tokenizer: Tokenizer) -> Task:
        """Returns the task."""
        del tokenizer
        return make(model, self.scale)

    def score(self, trained: Trained, data: Data, evaluation: Evaluation, split: str, limit: int = 0) -> Scored:
        """Returns errors and correlations with standard errors over rows, and what was said of each."""
        rows, said = self.say(trained, data, evaluation, split, limit)
        wanted = np.array([self._number(row, "a row") for row in rows])
        outputs = [
            {name: row[name] for name in self.text_fields} | {"expected": row[self.target]} | one
            for row, one in zip(rows, said)
        ]
        return Scored(score(np.array([one["said"] for one in said]), wanted), outputs)

    def say(
        self, trained: Trained, data: Data, evaluation: Evaluation, split: str, limit: int = 0
    ) -> tuple[list[Row], list[dict[str, Any]]]:
        """Returns rows, and the estimate of each in the target's unit."""
        batches = self.eval_batches(trained.model.cfg, trained.tokenizer, data, evaluation, split, limit)
        found = predictions(trained, batches)
        said = [{"said": self.mean + self.scale * float(output["said"])} for output in found.values()]
        return rows_by_record(self.load(data, split), list(found)), said

    def _number(self, row: Row, where: str) -> float:
        try:
            value = float(row[self.target])
        except ValueError:
            value = float("nan")
        if not math.isfinite(value):
            raise UserError(f"{where}: its {self.target}, {str(row[self.target])[:40]!r}, is no number")
        return value


def make(model: Model, scale: float) -> Task:
    """Returns the task; `predict` gives the standardized estimate, said [B]."""

    def loss(weights, constants, carry, batch, step, rng):
        del constants, step
        said = text_logits(model, weights, batch, rng)[:, 0]
        wanted, mask = batch["target"], batch["row_mask"]
        error = said - wanted
        moments = {"said": said, "wanted": wanted, "said2": said**2, "wanted2": wanted**2, "product": said * wanted}
        terms = {"squared": error**2, "absolute": jnp.abs(error)} | moments
        sums = {name: jnp.sum(values * mask) for name, values in terms.items()} | {"rows": jnp.sum(mask)}
        return sums["squared"], sums["rows"], (carry, {"sums": sums})

    def predict(weights: Any, constants: Any, carry: Any, batch: Batch) -> tuple[Any, dict[str, jax.Array]]:
        del constants
        return carry, {"said": text_logits(model, weights, batch, None)[:, 0]}

    return of_model(
        model.cfg,
        loss=loss,
        summarize=lambda sums: summarize(sums, scale),
        predict=predict,
    )


def summarize(sums: dict[str, Any], scale: float) -> dict[str, float]:
    """Returns loss (mean squared error over scale squared), errors in the target's unit, Pearson's correlation."""
    rows = max(float(sums["rows"]), 1.0)
    mean = {name: float(value) / rows for name, value in sums.items()}
    covariance = mean["product"] - mean["said"] * mean["wanted"]
    variances = (mean["said2"] - mean["said"] ** 2) * (mean["wanted2"] - mean["wanted"] ** 2)
    return {
        "loss": mean["squared"],
        "mean_absolute_error": scale * mean["absolute"],
        "root_mean_squared_error": scale * math.sqrt(mean["squared"]),
        "pearson": covariance / math.sqrt(variances) if variances > 0 else 0.0,
    }


def score(said: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Returns errors and correlations of estimates and targets, float64 [N] each, with standard errors.

    Those of the correlations are bootstrapped (of Spearman's with the ranks among all rows); that of the root is
    by linearisation.

    Raises:
      UserError: there are no rows.
    """
    absolute, squared = statistics.mean(np.abs(said - wanted)), statistics.mean((said - wanted) ** 2)
    root = math.sqrt(squared.value)
    found = {
        "mean_absolute_error": absolute,
        "root_mean_squared_error": statistics.Estimate(root, squared.error / (2 * root) if root else 0.0, len(said)),
        "pearson": _bootstrapped(said, wanted),
        "spearman": _bootstrapped(ranks(said), ranks(wanted)),
    }
    metrics = {}
    for name, estimate in found.items():
        metrics |= {name: estimate.value, f"{name}_error": estimate.error}
    return metrics | {"rows": float(len(said))}


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Returns Pearson's correlation of two [N]; 0 if one of them does not vary."""
    if not np.ptp(first) or not np.ptp(second):
        return 0.0
    first, second = first - np.mean(first), second - np.mean(second)
    return float(first @ second / np.sqrt((first @ first) * (second @ second)))


def ranks(values: np.ndarray) -> np.ndarray:
    """Returns the rank of each value from 1 on, [N]; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def _bootstrapped(first: np.ndarray, second: np.ndarray) -> statistics.Bootstrap:
    return statistics.bootstrap(lambda rows: correlation(first[rows], second[rows]), len(first))
