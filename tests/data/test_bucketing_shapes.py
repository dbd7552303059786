"""Planning of padded shapes: rows fit, shapes are few, padding is little."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlm.data.bucket_shapes import plan_shapes

BUCKETS = (4, 8, 16, 32)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 32), st.integers(0, 32)), min_size=1, max_size=60),
    most=st.integers(1, 6),
    smallest=st.integers(1, 8),
)
def test_shapes_hold_their_rows_and_are_few(lengths, most, smallest):
    lengths = np.array(lengths)
    shapes, numbers = plan_shapes(lengths, BUCKETS, most=most, smallest=smallest)
    assert (np.array(shapes)[numbers] >= lengths).all()
    assert len(shapes) == len(set(shapes)) <= most and shapes == sorted(shapes)
    assert all(length in BUCKETS for shape in shapes for length in shape)
    counts = np.bincount(numbers, minlength=len(shapes))
    assert (counts >= min(smallest, 1)).all() and (len(shapes) == 1 or (counts >= smallest).all())


@given(st.lists(st.integers(0, 32), min_size=1, max_size=60))
def test_one_array_gets_its_smallest_bucket(lengths):
    shapes, numbers = plan_shapes(np.array(lengths)[:, None], BUCKETS, most=4, smallest=1)
    smallest = [min(bucket for bucket in BUCKETS if bucket >= length) for length in lengths]
    assert [shapes[number] for number in numbers] == [(bucket,) for bucket in smallest]


@given(lengths=st.lists(st.integers(0, 32), min_size=1, max_size=60), most=st.integers(1, 4))
def test_arrays_of_one_length_add_no_shapes(lengths, most):
    once = np.array(lengths)[:, None]
    shapes, numbers = plan_shapes(once, BUCKETS, most=most, smallest=1)
    twice, numbers_twice = plan_shapes(np.repeat(once, 2, axis=1), BUCKETS, most=most, smallest=1)
    assert twice == [(length, length) for (length,) in shapes] and np.array_equal(numbers, numbers_twice)


def test_the_pair_that_adds_the_fewest_cells_is_joined():
    lengths = np.array([[4, 4]] * 30 + [[4, 8]] * 3 + [[32, 32]] * 10)
    shapes, _ = plan_shapes(lengths, BUCKETS, most=2, smallest=1)
    assert shapes == [(4, 8), (32, 32)]  # 30 rows grow by 4 cells, instead of 3 by 52
    lengths = np.array([[4, 4]] * 100 + [[16, 16]] * 3 + [[32, 32]] * 10)
    shapes, _ = plan_shapes(lengths, BUCKETS, most=2, smallest=1)
    assert shapes == [(4, 4), (32, 32)]


def test_a_union_takes_in_the_shape_it_equals():
    lengths = np.array([[4, 8]] * 5 + [[8, 4]] * 5 + [[8, 8]] * 5)
    shapes, numbers = plan_shapes(lengths, BUCKETS, most=2, smallest=1)
    assert len(shapes) == 2 and (8, 8) in shapes
    shapes, numbers = plan_shapes(lengths, BUCKETS, most=1, smallest=1)
    assert shapes == [(8, 8)] and not numbers.any()


@pytest.mark.parametrize("most", [1, 8])
def test_hundreds_of_combinations_are_planned_quickly(most):
    buckets = tuple(range(1, 9))
    lengths = np.array(list(itertools.product(buckets, repeat=3)))  # 512 combinations
    shapes, numbers = plan_shapes(lengths, buckets, most=most, smallest=1)
    assert len(shapes) <= most and (np.array(shapes)[numbers] >= lengths).all()
