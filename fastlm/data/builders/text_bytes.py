"""Long passages of State of the Union addresses, read byte by byte: in which quarter of a century was it said?

Stands where Long Range Arena (arXiv 2011.04006) has film reviews as bytes: real text of a thousand to four thousand
bytes. At most forty passages an address; split by address, as state_of_the_union.py does. `party` is there to be
classified too.
"""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fastlm.data.builders import dataset_info, state_of_the_union
from fastlm.data.builders.state_of_the_union_passages import era, sentences

SHORTEST, LONGEST = 1_000, 4_000
MOST = 40


def long_passages(text: str, drawn: random.Random, shortest: int, longest: int) -> Iterator[str]:
    """Yields whole sentences joined to a drawn number of bytes, in order.

    What is left over is dropped, and so is a passage above `longest` (a list without a full stop).
    """
    current, wanted = "", 0
    for sentence in sentences(text):
        wanted = wanted or shortest + int(drawn.random() * (longest - shortest) * 0.75)
        current = f"{current} {sentence}".strip()
        if len(current.encode()) >= wanted:
            if len(current.encode()) <= longest:
                yield current
            current, wanted = "", 0


def rows(split: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of a split, in order of addresses."""
    for address in state_of_the_union.addresses(split):
        drawn = random.Random(f"text_bytes {address['number']}")
        whole = list(long_passages(address["text"], drawn, SHORTEST, LONGEST))
        for index in np.unique(np.linspace(0, len(whole) - 1, min(MOST, len(whole))).astype(int)):
            yield {"text": whole[index], "era": era(address["year"]), "party": address["party"]}


class TextBytes(tfds.core.GeneratorBasedBuilder):
    """One row per passage."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return dataset_info(
            self,
            "Long passages of State of the Union addresses with era and party.",
            text=tfds.features.Text(),
            era=tfds.features.Text(),
            party=tfds.features.Text(),
        )

    def _split_generators(self, download_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in ("train", "validation", "test")}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, row in enumerate(rows(split)):
            yield f"{number:06d}", row
