import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlm.errors import UserError
from fastlm.measurement import classification_scores as scores

LABELS = [0, 0, 0, 1, 1, 2]
PREDICTIONS = [0, 0, 1, 1, 2, 2]


def test_by_hand():
    confusion = scores.confusion_matrix(LABELS, PREDICTIONS, classes=3)
    assert confusion.tolist() == [[2, 1, 0], [0, 1, 1], [0, 0, 1]]
    accuracy = scores.accuracy(confusion)
    assert (accuracy.value, accuracy.count) == (pytest.approx(4 / 6), 6)
    assert accuracy.error == pytest.approx((4 / 6 * 2 / 6 / 5) ** 0.5)
    # F1 = 2 right / (labelled + predicted): 4 / 5, 2 / 4, 2 / 3.
    assert scores.class_f1(confusion) == pytest.approx([4 / 5, 2 / 4, 2 / 3])
    assert scores.macro_f1(confusion).value == pytest.approx((4 / 5 + 2 / 4 + 2 / 3) / 3)


def test_classes_that_do_not_occur_do_not_count():
    three, ten = (scores.confusion_matrix(LABELS, PREDICTIONS, classes=classes) for classes in (3, 10))
    assert scores.macro_f1(ten).value == scores.macro_f1(three).value
    assert np.isnan(scores.class_f1(ten)[3:]).all()
    wrong = scores.confusion_matrix([0, 0], [0, 1], classes=2)
    assert scores.macro_f1(wrong).value == pytest.approx((2 / 3 + 0) / 2)  # predicted, never right


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40), st.integers(0, 40))
def test_matrices_add_up(pairs, cut):
    labels, predictions = np.array(pairs).T
    whole = scores.confusion_matrix(labels, predictions, classes=4)
    parts = [scores.confusion_matrix(labels[p], predictions[p], classes=4) for p in (slice(cut), slice(cut, None))]
    assert (parts[0] + parts[1] == whole).all()
    assert scores.accuracy(whole).value == pytest.approx(np.mean(labels == predictions))


def test_error_of_macro_f1_is_that_of_drawing_examples():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 300)
    predictions = np.where(generator.random(300) < 0.7, labels, generator.integers(0, 3, 300))
    confusion = scores.confusion_matrix(labels, predictions, classes=3)
    drawn = []
    for _ in range(400):
        indices = generator.integers(0, 300, 300)
        cells = scores.confusion_matrix(labels[indices], predictions[indices], classes=3)
        drawn.append(np.nanmean(scores.class_f1(cells)))
    assert scores.macro_f1(confusion).error == pytest.approx(np.std(drawn), rel=0.2)
    assert scores.macro_f1(confusion) == scores.macro_f1(confusion)


@pytest.mark.parametrize(
    "labels, predictions, says",
    [
        ([0, 3], [0, 1], "label 3 of example 1"),
        ([0, 1], [0, -1], "prediction -1 of example 1"),
        ([0, 1], [0], "one length"),
        ([0.5], [0], "no integers"),
    ],
)
def test_mistakes_are_named(labels, predictions, says):
    with pytest.raises(UserError, match=says):
        scores.confusion_matrix(labels, predictions, classes=3)


def test_nothing_to_score_is_named():
    for score in (scores.accuracy, scores.macro_f1):
        with pytest.raises(UserError, match="nothing to score"):
            score(scores.confusion_matrix([], [], classes=2))
        with pytest.raises(UserError, match="square"):
            score(np.ones((2, 3), int))
