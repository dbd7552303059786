"""What is learned: losses, metrics and predictions over a model. `KINDS` names what a config may choose."""

import dataclasses
from typing import Any

from fastlm import configuration
from fastlm.errors import UserError, nearest
from fastlm.tasks.classification import Classification
from fastlm.tasks.code_generation import CodeGeneration
from fastlm.tasks.embedding import Embedding
from fastlm.tasks.kind import TaskKind
from fastlm.tasks.language_modeling import LanguageModeling
from fastlm.tasks.masked_language_modeling import MaskedLanguageModeling
from fastlm.tasks.question_answering import QuestionAnswering
from fastlm.tasks.regression import Regression
from fastlm.tasks.sequence_to_sequence import SequenceToSequence

KINDS: dict[str, type[TaskKind]] = {
    "classification": Classification,
    "code_generation": CodeGeneration,
    "embedding": Embedding,
    "language_modeling": LanguageModeling,
    "masked_language_modeling": MaskedLanguageModeling,
    "question_answering": QuestionAnswering,
    "regression": Regression,
    "sequence_to_sequence": SequenceToSequence,
}


def make_kind(values: dict[str, Any]) -> TaskKind:
    """Returns the task kind that the section `config.task` describes.

    Raises:
      UserError: an unknown name or key.
    """
    rest = dict(values)
    name = rest.pop("name", "language_modeling")
    if name not in KINDS:
        raise UserError(f"config.task.name: unknown '{name}'{nearest(name, KINDS) or '; one of: ' + ', '.join(KINDS)}")
    return configuration.make(KINDS[name], "task", rest)


def describe_kind(kind: TaskKind) -> dict[str, Any]:
    """Returns the values that make `kind` again."""
    name = next(name for name, made in KINDS.items() if type(kind) is made)
    return {"name": name, **dataclasses.asdict(kind)}
