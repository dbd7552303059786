import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.errors import UserError
from fastlm.training import schedules


def values(steps, **options):
    """The whole schedule in one vectorised call; every shape is element-wise."""
    return np.asarray(jax.vmap(schedules.make(steps=steps, **options))(np.arange(steps + 1)))


def test_values_at_key_points():
    cosine = values(100, name="cosine", peak=2.0, warmup=9, final=0.1)
    assert cosine[0] == pytest.approx(0.2)
    assert cosine[9] == pytest.approx(2.0)
    assert cosine[100] == pytest.approx(0.2)
    linear = values(100, name="linear", peak=1.0, final=0.5)
    np.testing.assert_allclose(linear[[0, 50, 100]], [1.0, 0.75, 0.5], rtol=1e-6)
    np.testing.assert_array_equal(values(10, name="constant", peak=0.3), np.full(11, 0.3, np.float32))


@pytest.mark.parametrize(("shape", "half"), [("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5)), ("cosine", 0.5)])
def test_wsd_is_flat_and_then_cools_down(shape, half):
    rates = values(100, name="wsd", peak=1.0, warmup=10, decay_fraction=0.2, decay_shape=shape)
    np.testing.assert_array_equal(rates[10:81], 1.0)
    assert rates[81] < 1.0
    assert rates[90] == pytest.approx(half, abs=1e-6)
    assert rates[100] == pytest.approx(0.0, abs=1e-6)


def test_rsqrt_with_the_timescale_of_the_warmup_is_peak_sqrt_warmup_over_step():
    rates = values(1000, name="rsqrt", peak=1.0, warmup=100, timescale=100, final=0.4)
    steps = np.arange(100, 1001)
    np.testing.assert_allclose(rates[100:], np.maximum(np.sqrt(100 / steps), 0.4), rtol=1e-5)
    assert rates[-1] == pytest.approx(0.4)


def test_fraction_and_steps_mean_the_same():
    fraction = values(200, name="wsd", peak=1.0, warmup=0.05, decay_fraction=0.25)
    steps = values(200, name="wsd", peak=1.0, warmup=10, decay_fraction=50)
    np.testing.assert_array_equal(fraction, steps)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(schedules.SHAPES)),
    shape=st.sampled_from(sorted(schedules.COOLDOWNS)),
    warmup=st.floats(0, 0.5),
    decay=st.floats(0, 0.5),
    final=st.floats(0, 1),
    peak=st.floats(1e-5, 1),
)
def test_rises_then_falls_without_jumps_and_stays_between_final_and_peak(name, shape, warmup, decay, final, peak):
    steps = 40
    rates = values(steps, name=name, peak=peak, warmup=warmup, final=final, decay_fraction=decay, decay_shape=shape)
    warm, tiny = round(warmup * steps), 1e-5 * peak
    assert np.all(rates > -tiny)
    assert rates.max() == pytest.approx(peak, rel=1e-5)
    assert np.all(np.diff(rates[: warm + 1]) > 0)
    assert np.all(np.diff(rates[warm:]) <= tiny)
    assert rates[warm:].min() >= final * peak - tiny
    # The rise is even, and arrives: the join is no jump.
    np.testing.assert_allclose(np.diff(rates[: warm + 1]), peak / (warm + 1), rtol=1e-3)


def test_stays_at_the_end_after_the_last_step():
    for name in ("linear", "cosine", "wsd"):
        after = schedules.make(name=name, peak=1.0, steps=20, warmup=5, final=0.25)(30)
        assert float(after) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "cosin"}, "did you mean 'cosine'"),
        ({"name": "wsd", "decay_shape": "sqr"}, "did you mean 'sqrt'"),
        ({"peak": 0.0}, "peak > 0"),
        ({"peak": math.nan}, "peak > 0"),
        ({"steps": 0}, "steps > 0"),
        ({"final": 1.5}, "final <= 1"),
        ({"warmup": 2.5}, "schedule.warmup: 2.5"),
        ({"warmup": -1}, "schedule.warmup: -1"),
        ({"name": "wsd", "warmup": 60, "decay_fraction": 0.5}, "longer than the run"),
    ],
)
def test_mistakes_are_one_line(change, message):
    with pytest.raises(UserError, match=message) as caught:
        schedules.make(**{"name": "cosine", "peak": 1.0, "steps": 100, **change})
    assert "\n" not in str(caught.value)
