"""Values over a run: their ends, the way between them, and what cannot be one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlm.compress import schedules
from fastlm.errors import UserError

value = st.floats(0, 10, width=32)


def over(spec, steps=21):
    return np.asarray(jax.vmap(schedules.make(spec, steps, "here"))(jnp.arange(steps + 5)))


@given(st.sampled_from(sorted(schedules.SHAPES)), value, value, st.floats(0.1, 1))
def test_from_start_to_end_and_never_beyond(shape, start, end, until):
    values = over(f"{shape}(start={start}, end={end}, until={until})")
    assert values[0] == np.float32(start)
    np.testing.assert_allclose(values[20:], end, atol=1e-5)
    assert np.all(np.diff(values) * np.sign(end - start) >= -1e-5)


def test_a_switch_has_no_way_between():
    values = over("switch(start=1.0, end=0.25, until=0.5)")
    assert values.tolist() == [1.0] * 10 + [0.25] * 16
    assert over("switch(start=0, end=2)").tolist() == [0.0] * 20 + [2.0] * 6


def test_a_way_may_begin_late_and_sparsity_is_raised_fast_first():
    values = over("cubic(start=0, end=0.8, begin=0.25, until=0.75)")
    assert values[:6].tolist() == [0.0] * 6 and values[15:].tolist() == [np.float32(0.8)] * 11
    np.testing.assert_allclose(values[10], 0.8 * (1 - 0.5**3), rtol=1e-6)


def test_a_number_stays():
    assert over(0.3).tolist() == over("0.3").tolist() == [np.float32(0.3)] * 26


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("switsh(start=1, end=0)", "unknown schedule 'switsh'; did you mean 'switch'"),
        ("switch(start=1, end=0, until=0)", "begin < until"),
        ("switch(start=1, end=-1)", "must be at least 0 and finite"),
        ("cubic(start=0, end=1, begin=0.5, until=0.5)", "begin < until"),
        (float("inf"), "must be at least 0 and finite"),
    ],
)
def test_what_is_none(spec, message):
    with pytest.raises(UserError, match=message):
        schedules.make(spec, 10, "here")
