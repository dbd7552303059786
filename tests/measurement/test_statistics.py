import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.errors import UserError
from fastlm.measurement import statistics

numbers = st.floats(-1e3, 1e3)


def test_mean_by_hand():
    # Deviations -1, 0, 1: variance 1 over two degrees of freedom, so the error of the mean is 1 / sqrt(3).
    estimate = statistics.mean([1.0, 2.0, 3.0])
    assert (estimate.value, estimate.count) == (2.0, 3)
    assert estimate.error == pytest.approx(1 / math.sqrt(3))
    assert str(estimate) == "2 ± 0.58"


def test_error_of_one_example_is_unknown():
    for estimate in (
        statistics.mean([3.0]),
        statistics.ratio_of_sums([3.0], [2.0]),
        statistics.bootstrap(lambda i: 3.0, 1),
    ):
        assert math.isnan(estimate.error) and estimate.count == 1


def test_ratio_of_sums_by_hand():
    # Ratio 6 / 4; residuals 1 - 1.5 = -0.5 and 5 - 4.5 = 0.5; sqrt(2 / 1 * 0.5) / 4.
    estimate = statistics.ratio_of_sums([1.0, 5.0], [1.0, 3.0])
    assert estimate.value == 1.5
    assert estimate.error == pytest.approx(0.25)


@given(st.lists(numbers, min_size=2, max_size=30))
def test_ratio_over_equal_denominators_is_the_mean(values):
    ratio, mean = statistics.ratio_of_sums(values, np.ones(len(values))), statistics.mean(values)
    assert ratio.value == pytest.approx(mean.value, abs=1e-9)
    assert ratio.error == pytest.approx(mean.error, abs=1e-9)


def test_nothing_scored_is_no_division_by_zero():
    assert statistics.ratio_of_sums([0.0, 0.0], [0.0, 0.0]).value == 0.0


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=30), numbers)
def test_paired_difference_ignores_what_both_share(pairs, shift):
    first, second = np.array(pairs).T
    plain, shifted = statistics.paired_difference(first, second), statistics.paired_difference(first + shift, second)
    assert shifted.value == pytest.approx(plain.value + shift, abs=1e-8)
    assert shifted.error == pytest.approx(plain.error, abs=1e-8)


def test_bootstrap_of_a_mean_agrees_with_its_formula():
    values = np.random.default_rng(1).normal(5, 2, 400)
    drawn = statistics.bootstrap(lambda i: values[i].mean(), len(values), resamples=2000)
    by_formula = statistics.mean(values)
    assert drawn.value == pytest.approx(by_formula.value)
    assert drawn.error == pytest.approx(by_formula.error, rel=0.06)  # four of its own errors
    assert drawn.low == pytest.approx(by_formula.value - 1.96 * by_formula.error, abs=0.3 * by_formula.error)
    assert drawn.high == pytest.approx(by_formula.value + 1.96 * by_formula.error, abs=0.3 * by_formula.error)


def test_bootstrap_is_a_function_of_its_seed():
    values = np.arange(10.0)
    drawn = [statistics.bootstrap(lambda i: values[i].mean(), 10, resamples=50, seed=seed) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_pairing_finds_a_difference_that_the_single_errors_hide():
    generator = np.random.default_rng(0)
    hard = generator.normal(0, 10, 200)
    first, second = hard + 0.5 + generator.normal(0, 1, 200), hard + generator.normal(0, 1, 200)
    paired = statistics.paired_bootstrap(lambda i: first[i].mean(), lambda i: second[i].mean(), 200)
    assert paired.value == pytest.approx(first.mean() - second.mean())
    assert paired.error < 0.15 < statistics.mean(first).error
    assert paired.error == pytest.approx(statistics.paired_difference(first, second).error, rel=0.1)
    assert paired.p_value < 0.01 and paired.low > 0


def test_p_value_of_a_system_against_itself_is_one():
    values = np.arange(20.0)

    def score(indices):
        return values[indices].mean()

    assert statistics.paired_bootstrap(score, score, 20, resamples=100).p_value == 1.0


def test_p_value_is_right_under_the_null():
    # 100 comparisons of equal systems: about one in ten below 0.1.
    generator = np.random.default_rng(2)
    below = 0
    for _ in range(100):
        difference = generator.normal(size=50)
        paired = statistics.paired_bootstrap(lambda i, d=difference: d[i].mean(), lambda i: 0.0, 50, resamples=100)
        below += paired.p_value < 0.1
    assert 3 <= below <= 20


@pytest.mark.parametrize(
    "call",
    [
        lambda: statistics.mean([]),
        lambda: statistics.mean(np.ones((2, 2))),
        lambda: statistics.ratio_of_sums([1.0], [1.0, 2.0]),
        lambda: statistics.paired_difference([], []),
        lambda: statistics.bootstrap(lambda i: 0.0, 0),
        lambda: statistics.bootstrap(lambda i: 0.0, 5, resamples=1),
    ],
)
def test_mistakes_are_named(call):
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_differences_over_seeds_and_examples():
    """Without noise between seeds it is the paired difference; seeds that disagree widen the interval."""
    generator = np.random.default_rng(0)
    base = generator.normal(size=200)
    gain = 0.1 + 0.05 * generator.normal(size=200)
    alike = statistics.paired_over_seeds(np.tile(base + gain, (3, 1)), np.tile(base, (3, 1)), np.ones(200))
    plain = statistics.paired_difference(base + gain, base)
    assert alike.value == pytest.approx(plain.value)
    assert alike.error == pytest.approx(plain.error)
    assert alike.low > 0.085
    shifts = np.array([[-0.2], [0.0], [0.2]])
    apart = statistics.paired_over_seeds(base + gain + shifts, np.tile(base, (3, 1)), np.ones(200))
    assert apart.value == pytest.approx(plain.value)
    assert apart.low < 0 < apart.high
    assert apart.high - apart.low > 2 * 4 * 0.2 / np.sqrt(3)  # Student's quantile of two degrees of freedom is 4.3
    one = statistics.paired_over_seeds(base[None] + gain, base[None], np.ones(200))
    assert one.error == pytest.approx(plain.error)


def test_differences_of_ratios_count_examples_by_their_weight():
    bits, others, sizes = np.array([[30.0, 400.0]]), np.array([[20.0, 420.0]]), np.array([10.0, 200.0])
    assert statistics.paired_over_seeds(bits, others, sizes).value == pytest.approx(-10 / 210)
    with pytest.raises(UserError, match=r"two arrays \[seeds, 2 examples\], not \(1, 2\) and \(2, 2\)"):
        statistics.paired_over_seeds(bits, np.zeros((2, 2)), sizes)


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_intervals_over_seeds_cover_what_they_should(seed):
    """Of 40 experiments with a true difference of 0, three seeds each, about one in twenty excludes it."""
    generator = np.random.default_rng(seed)
    inside = 0
    for _ in range(40):
        noise = generator.normal(size=(2, 3, 50)) + generator.normal(size=(2, 3, 1)) * 0.3
        found = statistics.paired_over_seeds(noise[0], noise[1], np.ones(50))
        inside += found.low < 0 < found.high
    assert inside >= 32
