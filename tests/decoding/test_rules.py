"""Rules: what may be written where; sampling keeps to them too, and reads sources."""

import numpy as np
import pytest

from fastlm.decoding import rules, sample
from fastlm.decoding.sample import Sampling
from fastlm.errors import UserError
from tests.decoding.small_models import build


def allowed(written, **options):
    scores = rules.make(5, 9, **options).allow(np.zeros((2, 7), np.float32), written)
    assert (np.asarray(scores)[0] == np.asarray(scores)[1]).all()
    return np.flatnonzero(np.asarray(scores)[0, :5] > rules.NEGATIVE).tolist()


def test_what_is_allowed_when():
    assert allowed(0) == [0, 1, 2, 3, 4]
    assert allowed(0, end=2, min_tokens=2) == allowed(1, end=2, min_tokens=2) == [0, 1, 3, 4]
    assert allowed(2, end=2, min_tokens=2) == [0, 1, 2, 3, 4]
    assert allowed(3, forbidden=[0, 4]) == [1, 2, 3]
    assert allowed(0, forbidden=[0, 4], forced_first=4) == [4]
    assert allowed(1, forbidden=[0, 4], forced_first=4) == [1, 2, 3]


def test_scores_that_stay_keep_their_value_and_a_forced_token_costs_nothing():
    scores = np.array([-1.0, -2.0, -3.0, -4.0, -5.0], np.float32)
    made = rules.make(5, 9, forbidden=[1], forced_first=2)
    np.testing.assert_array_equal(made.allow(scores, 0), np.float32([-1e30, -1e30, 0.0, -1e30, -1e30]))
    np.testing.assert_array_equal(made.allow(scores, 1), np.float32([-1.0, -1e30, -3.0, -4.0, -5.0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"end": 5}, "end: token 5 is outside"),
        ({"forced_first": -1}, "forced_first: token -1 is outside"),
        ({"forbidden": [0, 7]}, "forbidden: token 7 is outside"),
        ({"forbidden": range(5)}, "forbidden: no token of the vocabulary of 5 is left"),
        ({"forbidden": range(4), "end": 4, "min_tokens": 1}, "forbidden: no token of the vocabulary of 5 is left"),
        ({"min_tokens": -1}, "min_tokens: must lie between 0 and max_tokens"),
        ({"min_tokens": 10}, "min_tokens: must lie between 0 and max_tokens"),
    ],
)
def test_rules_that_cannot_be_kept_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        rules.make(5, 9, **options)


def test_sampling_reads_sources_and_keeps_to_rules():
    model, params = build("marian")
    options = {"max_tokens": 12, "start": 1, "how": Sampling(temperature=1.5), "chunk": 4}
    run = lambda rows, **more: np.concatenate(list(sample.generate(model, params, rows, **options, **more)), axis=1)
    free, ruled = run([[3, 1], [1, 0, 3]]), run([[3, 1], [1, 0, 3]], forbidden=(6, 7), forced_first=7)
    assert {6, 7} & set(free.ravel().tolist())
    assert ruled[:, 0].tolist() == [7, 7]
    assert set(ruled[:, 1:].ravel().tolist()).isdisjoint({6, 7})
    other = run([[3, 1], [7, 8, 9, 10, 3, 4, 5]])
    assert (other[0] == free[0]).all()
    assert (other[1] != free[1]).any(), "the source should be seen"
