"""Hypotheses beside references, checked: what every score of texts takes."""

from collections.abc import Sequence

from fastlm.errors import UserError

References = Sequence[str] | Sequence[Sequence[str]]
"""One reference per example, or a list of several."""


def paired_texts(hypotheses: Sequence[str], references: References) -> list[list[str]]:
    """Returns the references as one list per example.

    Raises:
      UserError: no examples, different numbers of them, an example without a reference, or something
        that is no text. An empty text is a text.
    """
    if isinstance(hypotheses, str) or isinstance(references, str):
        raise UserError("hypotheses and references are lists of texts, not one text: wrap each in a list")
    if not len(hypotheses):
        raise UserError("there is nothing to score: the list of hypotheses is empty")
    if len(hypotheses) != len(references):
        raise UserError(f"{len(hypotheses)} hypotheses but {len(references)} references: they must pair up")
    lists = [[given] if isinstance(given, str) else list(given or ()) for given in references]
    for number, (hypothesis, given) in enumerate(zip(hypotheses, lists)):
        if not given:
            raise UserError(f"example {number} has no reference: give one, or '' where nothing is the right answer")
        if not all(isinstance(text, str) for text in (hypothesis, *given)):
            raise UserError(f"example {number} is no text: hypothesis and references must be strings")
    return lists
