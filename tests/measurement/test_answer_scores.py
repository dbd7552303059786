import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlm.errors import UserError
from fastlm.measurement import answer_scores

answers = st.text("aA.b the,", max_size=12)


@pytest.mark.parametrize(
    "given_answer, plain",
    [
        ("The  Eiffel\tTower.", "eiffel tower"),
        ("an apple a day", "apple day"),
        ("theatre", "theatre"),
        ("U.S.-based", "usbased"),
        ("a.m.", "am"),
        ("The", ""),
        ("", ""),
        ("Über-Straße!", "überstraße"),
    ],
)
def test_normalization(given_answer, plain):
    assert answer_scores.normalize(given_answer) == plain


@pytest.mark.parametrize(
    "prediction, reference, expected",
    [
        ("the cat sat", "cat", 2 / 3),  # one of two words, one of one
        ("cat cat", "cat", 2 / 3),  # a word counts as often as it occurs
        ("cat", "dog", 0.0),
        ("The Cat!", "cat", 1.0),
        ("", "", 1.0),
        ("the", "", 1.0),
        ("cat", "", 0.0),
        ("", "cat", 0.0),
    ],
)
def test_f1_by_hand(prediction, reference, expected):
    assert answer_scores.f1(prediction, reference) == pytest.approx(expected)


@given(answers, answers)
def test_laws(first, second):
    assert answer_scores.normalize(answer_scores.normalize(first)) == answer_scores.normalize(first)
    assert 0 <= answer_scores.exact_match(first, second) <= answer_scores.f1(first, second) <= 1
    assert answer_scores.f1(first, second) == answer_scores.f1(second, first)


def test_each_score_takes_its_best_reference():
    scores = answer_scores.answer_scores(
        ["in 1990", "Paris", "blue"], [["1990", "the year 1990 or so"], ["paris"], "red"]
    )
    assert scores.exact_match_per_example.tolist() == [0, 1, 0]
    assert scores.f1_per_example.tolist() == pytest.approx([2 / 3, 1, 0])
    assert scores.exact_match.value == pytest.approx(1 / 3)
    assert scores.f1.value == pytest.approx(5 / 9)
    assert scores.f1.error == pytest.approx((((1 / 9) ** 2 + (4 / 9) ** 2 + (5 / 9) ** 2) / 6) ** 0.5)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="empty"):
        answer_scores.answer_scores([], [])
    with pytest.raises(UserError, match="example 0 has no reference"):
        answer_scores.answer_scores(["x"], [[]])
