"""Numbers with their standard errors: means, ratios of sums, paired differences, the bootstrap.

Every function takes values of independent examples (documents, sentences, questions, seeds). An error
of one single example is unknown and comes as NaN. The bootstrap (Efron 1979) is seeded, so that a report
can be repeated; the paired one draws the same examples for both systems (Koehn 2004), and its p-value is
two-sided, of the differences centred on their mean (Riezler and Maxwell 2005), which is what
sacrebleu reports too. Left out: the bias-corrected bootstrap; scores here are close to unbiased.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from fastlm.errors import UserError

Values = Sequence[float] | np.ndarray
Statistic = Callable[[np.ndarray], float]
"""Takes the indices of examples [n], drawn with replacement, and returns the score of those."""


@dataclass(frozen=True)
class Estimate:
    """A value, its standard error in the same unit (NaN if unknown), and the number of examples."""

    value: float
    error: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.error:.2g}"


@dataclass(frozen=True)
class Difference(Estimate):
    """A difference with its 95% interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Bootstrap(Estimate):
    """An estimate by resampling, with its 95% percentile interval."""

    low: float
    high: float


@dataclass(frozen=True)
class PairedBootstrap(Bootstrap):
    """A difference by resampling; `p_value` is the chance of one as large if there were none (two-sided)."""

    p_value: float


def mean(values: Values) -> Estimate:
    """Returns the mean of values [N] and its standard error.

    Raises:
      UserError: there are no values.
    """
    values = _checked(values)
    count = len(values)
    error = float(np.std(values, ddof=1) / np.sqrt(count)) if count > 1 else float("nan")
    return Estimate(float(np.mean(values)), error, count)


def ratio_of_sums(numerators: Values, denominators: Values) -> Estimate:
    """Returns sum(numerators) / sum(denominators) over examples, both [N], and its standard error.

    The error is by linearisation: examples count by their denominator (a document by its length), as
    they do in the ratio itself. A sum of denominators below 1 counts as 1: nothing was scored.

    Raises:
      UserError: there are no examples, or the lengths differ.
    """
    numerators, denominators = _checked(numerators), _checked(denominators)
    count = _same_length(numerators, denominators)
    total = max(float(denominators.sum()), 1.0)
    ratio = float(numerators.sum()) / total
    if count == 1:
        return Estimate(ratio, float("nan"), count)
    residuals = numerators - ratio * denominators
    error = float(np.sqrt(count / (count - 1) * np.sum(residuals**2)) / total)
    return Estimate(ratio, error, count)


def paired_difference(first: Values, second: Values) -> Estimate:
    """Returns mean(first - second) over the same examples [N], and its standard error.

    Raises:
      UserError: there are no examples, or the lengths differ.
    """
    first, second = _checked(first), _checked(second)
    _same_length(first, second)
    return mean(first - second)


def bootstrap(statistic: Statistic, count: int, *, resamples: int = 1000, seed: int = 0) -> Bootstrap:
    """Returns the statistic of all examples, with error and interval from resampling them.

    Args:
      statistic: score of the examples with the given indices [count].
      count: number of examples.
      resamples: how often to draw; the error is good to about 1 / sqrt(2 * resamples) of itself.
      seed: of the draws.

    Raises:
      UserError: there are no examples, or fewer than two resamples.
    """
    drawn = np.array([statistic(indices) for indices in _draws(count, resamples, seed)])
    return Bootstrap(float(statistic(np.arange(count))), *_spread(drawn, count))


def paired_bootstrap(
    first: Statistic, second: Statistic, count: int, *, resamples: int = 1000, seed: int = 0
) -> PairedBootstrap:
    """Returns first - second on the same examples, with error, interval and p-value from resampling.

    Arguments and errors are those of `bootstrap`.
    """
    drawn = np.array([first(indices) - second(indices) for indices in _draws(count, resamples, seed)])
    everything = np.arange(count)
    difference = float(first(everything) - second(everything))
    as_large = np.sum(np.abs(drawn - drawn.mean()) >= abs(difference))
    p_value = float((as_large + 1) / (resamples + 1))  # never zero: the sample itself is one of the draws
    return PairedBootstrap(difference, *_spread(drawn, count), p_value)


def paired_over_seeds(first: np.ndarray, second: np.ndarray, weights: Values) -> Difference:
    """Returns the difference of two systems, each trained from several seeds and scored on the same examples.

    A system's score is a ratio of sums: of its values over the weights, over examples, its mean over seeds. The
    error is that of other examples (by linearisation) and of other seeds (seed s of the one is paired with seed s
    of the other); the interval has Student's quantile at the degrees of freedom of Welch and Satterthwaite, so
    that few seeds which disagree make it wide. With one seed only examples count.

    Args:
      first, second: summed scores [S, N] by seed and example.
      weights: what each example counts for [N]: 1, or its bytes where scores are bits.

    Raises:
      UserError: there are fewer than two examples, or the shapes differ.
    """
    first, second, weights = np.asarray(first, np.float64), np.asarray(second, np.float64), _checked(weights)
    if first.shape != second.shape or first.ndim != 2 or first.shape[1] != len(weights) or min(first.shape) < 1:
        raise UserError(
            f"paired differences need two arrays [seeds, {len(weights)} examples], not {first.shape} and {second.shape}"
        )
    seeds, count = first.shape
    if count < 2:
        raise UserError("paired differences need at least two examples")
    differences, total = first - second, weights.sum()
    value = float(differences.mean(axis=0).sum() / total)
    residuals = differences.mean(axis=0) - value * weights
    of_examples = count / (count - 1) * float(np.sum(residuals**2)) / total**2
    of_seeds = float(np.var(differences.sum(axis=1) / total, ddof=1)) / seeds if seeds > 1 else 0.0
    error = math.sqrt(of_examples + of_seeds)
    freedom = of_examples**2 / (count - 1) + (of_seeds**2 / (seeds - 1) if seeds > 1 else 0.0)
    quantile = float(stats.t.ppf(0.975, error**4 / freedom)) if error else 0.0
    return Difference(value, error, count, value - quantile * error, value + quantile * error)


def _draws(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    if count < 1 or resamples < 2:
        raise UserError(
            f"a bootstrap of {count} examples, {resamples} times: both must be there, and two draws at least"
        )
    generator = np.random.default_rng(seed)
    return (generator.integers(0, count, size=count) for _ in range(resamples))


def _spread(drawn: np.ndarray, count: int) -> tuple[float, int, float, float]:
    low, high = np.percentile(drawn, [2.5, 97.5])
    error = float(np.std(drawn, ddof=1)) if count > 1 else float("nan")
    return error, count, float(low), float(high)


def _checked(values: Values) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise UserError(f"statistics need a list of at least one value, not an array of shape {values.shape}")
    return values


def _same_length(first: np.ndarray, second: np.ndarray) -> int:
    if len(first) != len(second):
        raise UserError(f"two lists over the same examples differ in length: {len(first)} and {len(second)}")
    return len(first)
