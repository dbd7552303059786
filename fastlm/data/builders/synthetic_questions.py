"""Extractive question answering on State of the Union addresses: real text, SYNTHETIC questions.

One or two rows per context of a few sentences (`question_rules.py`): `context`, `question`, `answer` and
`answer_start` as in SQuAD (arXiv 1606.05250), the `kind` of answer, the address's `year`, and `synthetic`, which is
1 in every row: no person wrote or checked the questions, so scores on them say how well a model finds
a span that a rule chose, and compare with no other data set. Split by address, as state_of_the_union.py does.
"""

import itertools
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fastlm.data.builders import dataset_info, state_of_the_union
from fastlm.data.builders.question_rules import contexts, make_questions

_MOST_CONTEXTS = 40  # addresses differ in length by twenty times; none should prevail


def rows(split: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of a split, in order of addresses."""
    for address in state_of_the_union.addresses(split):
        made = [questions for run in contexts(address["text"]) if (questions := make_questions(run))]
        made.sort(key=lambda questions: zlib.crc32(questions[0].context.encode()))
        for question in itertools.chain(*made[:_MOST_CONTEXTS]):
            yield {**question._asdict(), "year": address["year"], "synthetic": 1}


class SyntheticQuestions(tfds.core.GeneratorBasedBuilder):
    """One row per question, made by rule."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return dataset_info(
            self,
            "Synthetic: questions made by rule from real text, sentences of State of the Union addresses.",
            context=tfds.features.Text(),
            question=tfds.features.Text(),
            answer=tfds.features.Text(),
            answer_start=tfds.features.Scalar(dtype=np.int32),
            kind=tfds.features.Text(),
            year=tfds.features.Scalar(dtype=np.int32),
            synthetic=tfds.features.Scalar(dtype=np.int32),
        )

    def _split_generators(self, download_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in ("train", "validation", "test")}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, row in enumerate(rows(split)):
            yield f"{number:06d}", row
