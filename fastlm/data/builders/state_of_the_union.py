"""State of the Union addresses, 1790-1989: the default corpus (public domain, shipped).

201 documents, 9.6 MB of text, median 37,000 characters. Split by address in order of time, so that
every period is in every split: each tenth is test (21), each tenth from the sixth on validation (20).
"""

import json
import lzma
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fastlm.data.builders import FILES, dataset_info

_HELD_OUT = {0: "test", 5: "validation"}


def addresses(split: str) -> Iterator[dict[str, Any]]:
    """Yields the split's addresses in order of time: `number` of all, `text`, `year`, `president`, `party`."""
    with lzma.open(FILES / "sotu_1790_1989.jsonl.xz", "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if _HELD_OUT.get(number % 10, "train") == split:
                address = json.loads(line)
                yield {"number": number} | {key: address[key] for key in ("text", "year", "president", "party")}


class StateOfTheUnion(tfds.core.GeneratorBasedBuilder):
    """One document per address."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return dataset_info(
            self,
            "State of the Union addresses of United States presidents, 1790-1989.",
            text=tfds.features.Text(),
            year=tfds.features.Scalar(dtype=np.int32),
            president=tfds.features.Text(),
            party=tfds.features.Text(),
        )

    def _split_generators(self, download_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in ("train", "validation", "test")}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for address in addresses(split):
            number = address.pop("number")
            yield f"{number:03d}", address
