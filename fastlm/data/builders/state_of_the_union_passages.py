"""Passages of State of the Union addresses, with when they were said and by whom.

Real text with real labels that need no annotation: `year` to estimate, `era` (a quarter of a century)
or `party` to classify. At most forty passages an address, spread over it; split by address, as
state_of_the_union.py does, so that no passage shares its address with a test passage.
"""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fastlm.data.builders import dataset_info, state_of_the_union

WORDS = 80
MOST = 40
_FIRST, _YEARS = 1790, 25


def era(year: int) -> str:
    """Returns the quarter of a century that a year lies in, as "1815-1839"."""
    start = _FIRST + (year - _FIRST) // _YEARS * _YEARS
    return f"{start}-{start + _YEARS - 1}"


def sentences(text: str) -> list[str]:
    """Returns the sentences of a text, white space between words made one space."""
    return [" ".join(part.split()) for part in re.split(r"(?<=[a-z)][.!?])\s+(?=[A-Z])", text)]


def passages(text: str) -> list[str]:
    """Returns whole sentences joined to at least `WORDS` words each, in order; what is left over is dropped."""
    found, current = [], []
    for sentence in sentences(text):
        current.extend(sentence.split())
        if len(current) >= WORDS:
            found.append(" ".join(current))
            current = []
    return found


def rows(split: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of a split, in order of addresses."""
    for address in state_of_the_union.addresses(split):
        whole = passages(address["text"])
        chosen = np.unique(np.linspace(0, len(whole) - 1, min(MOST, len(whole))).astype(int))
        about = {"year": address["year"], "era": era(address["year"]), "party": address["party"]}
        for index in chosen:
            yield {"text": whole[index], **about, "president": address["president"]}


class StateOfTheUnionPassages(tfds.core.GeneratorBasedBuilder):
    """One row per passage."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return dataset_info(
            self,
            "Passages of State of the Union addresses with year, era, party and president.",
            text=tfds.features.Text(),
            year=tfds.features.Scalar(dtype=np.int32),
            era=tfds.features.Text(),
            party=tfds.features.Text(),
            president=tfds.features.Text(),
        )

    def _split_generators(self, download_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in ("train", "validation", "test")}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, row in enumerate(rows(split)):
            yield f"{number:06d}", row
