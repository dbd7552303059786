"""The Old Testament in English and Spanish, verse by verse: translation pairs (public domain, shipped).

The rows of old_testament.py's file, with its split by book. Verse numbers are those of the English
side; a few verses are divided otherwise in Spanish and say a little more or less than their pair.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fastlm.data.builders import dataset_info, old_testament


class OldTestamentEnEs(tfds.core.GeneratorBasedBuilder):
    """One row per verse."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return dataset_info(
            self,
            "Verses of the Old Testament, World English Bible and Reina-Valera 1909.",
            book=tfds.features.Text(),
            chapter=tfds.features.Scalar(dtype=np.int32),
            verse=tfds.features.Scalar(dtype=np.int32),
            en=tfds.features.Text(),
            es=tfds.features.Text(),
        )

    def _split_generators(self, download_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in ("train", "validation", "test")}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for verse in old_testament.verses(split):
            yield f"{verse.book} {verse.chapter:03d} {verse.verse:03d}", verse._asdict()
