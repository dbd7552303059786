"""SQuAD's scores of short answers: exact match and F1 of words, after its normalisation (1606.05250).

Normalised: lower case, ASCII punctuation removed, articles (a, an, the) removed, runs of white space made one
space. Of several references the best counts, for each score by itself. An answer that is empty after
normalising stands for "no answer": it scores 1 against an empty reference and 0 against any other (as in
SQuAD 2.0, 1806.03822). Scale 0 to 1.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastlm.measurement.statistics import Estimate, mean
from fastlm.measurement.text_pairs import References, paired_texts

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True, eq=False)
class AnswerScores:
    """Means over questions, and each question's own score [N], 0 to 1."""

    exact_match: Estimate
    f1: Estimate
    exact_match_per_example: np.ndarray
    f1_per_example: np.ndarray


def normalize(answer: str) -> str:
    """Returns the answer without case, punctuation, articles and surplus white space."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, reference: str) -> float:
    """Returns 1 if the two are equal after normalising, else 0."""
    return float(normalize(prediction) == normalize(reference))


def f1(prediction: str, reference: str) -> float:
    """Returns the harmonic mean of precision and recall of words, counted as often as they occur."""
    predicted, wanted = normalize(prediction).split(), normalize(reference).split()
    if not predicted or not wanted:
        return float(predicted == wanted)
    common = sum((Counter(predicted) & Counter(wanted)).values())
    return 2 * common / (len(predicted) + len(wanted))


def answer_scores(predictions: Sequence[str], references: References) -> AnswerScores:
    """Returns exact match and F1 of N predictions; `references` are N texts or N lists of texts.

    Raises:
      UserError: as `paired_texts`; an unanswerable question has the reference ''.
    """
    pairs = list(zip(predictions, paired_texts(predictions, references)))
    exact = np.array([max(exact_match(prediction, text) for text in given) for prediction, given in pairs])
    overlap = np.array([max(f1(prediction, text) for text in given) for prediction, given in pairs])
    return AnswerScores(mean(exact), mean(overlap), exact, overlap)
