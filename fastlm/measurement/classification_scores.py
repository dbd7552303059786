"""Accuracy and macro-F1 from a confusion matrix, with standard errors.

The matrix is all that has to be kept while evaluating: it adds up over batches and hosts. Macro-F1 is
the plain mean of the classes' F1 over classes that occur as label or as prediction (a class that was
predicted but never right has F1 0; one that never occurs has none). Its error is a bootstrap: drawing
examples is drawing cells of the matrix.
"""

import numpy as np

from fastlm.errors import UserError
from fastlm.measurement.statistics import Estimate


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, *, classes: int) -> np.ndarray:
    """Returns counts [classes, classes]: rows are labels, columns predictions.

    Args:
      labels: integers [N], 0 to classes - 1.
      predictions: the same.
      classes: how many there are.

    Raises:
      UserError: different lengths, no integers, or a class outside the range.
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.shape != predictions.shape or labels.ndim != 1:
        raise UserError(f"labels {labels.shape} and predictions {predictions.shape} must be two lists of one length")
    for name, values in (("label", labels), ("prediction", predictions)):
        _check_range(name, values, classes)
    cells = labels.astype(np.int64) * classes + predictions.astype(np.int64)
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def _check_range(name: str, values: np.ndarray, classes: int) -> None:
    if len(values) and not np.issubdtype(values.dtype, np.integer):
        raise UserError(f"{name}s are no integers but {values.dtype}: give the numbers of classes")
    outside = np.flatnonzero((values < 0) | (values >= classes))
    if len(outside):
        first = outside[0]
        raise UserError(f"{name} {values[first]} of example {first} is no class: there are {classes}, numbered from 0")


def accuracy(confusion: np.ndarray) -> Estimate:
    """Returns the share of right predictions, 0 to 1.

    Raises:
      UserError: the matrix is empty or none.
    """
    count = _count(confusion)
    share = float(np.trace(confusion) / count)
    error = float(np.sqrt(share * (1 - share) / (count - 1))) if count > 1 else float("nan")
    return Estimate(share, error, count)


def class_f1(confusion: np.ndarray) -> np.ndarray:
    """Returns each class's F1 [classes], 0 to 1, NaN where it is neither label nor prediction."""
    occurrences = confusion.sum(0) + confusion.sum(1)
    return np.divide(
        2.0 * np.diag(confusion), occurrences, out=np.full(len(confusion), np.nan), where=occurrences > 0
    )  # fmt: skip


def macro_f1(confusion: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Returns the mean F1 of the classes that occur, 0 to 1, with a bootstrapped error.

    Raises:
      UserError: the matrix is empty or none.
    """
    count = _count(confusion)
    shares = confusion.ravel() / count
    drawn = np.random.default_rng(seed).multinomial(count, shares, size=resamples)
    values = [np.nanmean(class_f1(cells.reshape(confusion.shape))) for cells in drawn]
    error = float(np.std(values, ddof=1)) if count > 1 else float("nan")
    return Estimate(float(np.nanmean(class_f1(confusion))), error, count)


def _count(confusion: np.ndarray) -> int:
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1]:
        raise UserError(f"a confusion matrix is square, not of shape {confusion.shape}")
    count = int(confusion.sum())
    if not count:
        raise UserError("there is nothing to score: the confusion matrix counts no example")
    return count
