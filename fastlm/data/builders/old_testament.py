"""The Old Testament, World English Bible and Reina-Valera 1909 (public domain, shipped).

One document per chapter, a verse a line; a configuration per language. Split by book; the books
that retell each other (Samuel, Kings, Chronicles, Isaiah; Ezra, Nehemiah) all stay in train.
The file is verse-aligned: old_testament_pairs.py makes translation pairs of it.
"""

import itertools
import lzma
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from fastlm.data.builders import FILES, dataset_info

_TEST = ("Judges", "Ruth", "Ecclesiastes", "Song of Solomon", "Daniel", "Hosea", "Micah")
_VALIDATION = ("Joshua", "Esther", "Lamentations", "Joel", "Amos", "Zechariah")
_HELD_OUT = dict.fromkeys(_TEST, "test") | dict.fromkeys(_VALIDATION, "validation")
_LANGUAGES = {"en": "World English Bible", "es": "Reina-Valera 1909"}


class Verse(NamedTuple):
    """One verse in both languages."""

    book: str
    chapter: int
    verse: int
    en: str
    es: str


def verses(split: str) -> Iterator[Verse]:
    """Yields the verses of the split's books, in order."""
    with lzma.open(FILES / "bible_en_es_ot.tsv.xz", "rt", encoding="utf-8", newline="\n") as lines:
        for line in lines:
            book, chapter, verse, en, es = line.rstrip("\n").split("\t")
            if _HELD_OUT.get(book, "train") == split:
                yield Verse(book, int(chapter), int(verse), en, es)


class OldTestament(tfds.core.GeneratorBasedBuilder):
    """One document per chapter, in the language of the configuration."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 (the name and the type are TFDS's)
        tfds.core.BuilderConfig(name=code, description=title) for code, title in _LANGUAGES.items()
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return dataset_info(
            self,
            "The Old Testament by chapter.",
            text=tfds.features.Text(),
            book=tfds.features.Text(),
            chapter=tfds.features.Scalar(dtype=np.int32),
        )

    def _split_generators(self, download_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in ("train", "validation", "test")}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for (book, chapter), group in itertools.groupby(verses(split), key=lambda verse: verse[:2]):
            text = "\n".join(getattr(verse, self.builder_config.name) for verse in group)
            yield f"{book} {chapter:03d}", {"text": text, "book": book, "chapter": chapter}
