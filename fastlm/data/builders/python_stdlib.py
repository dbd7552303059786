"""The standard library of the running interpreter: code that is always there (PSF licence).

One document per `.py` file, tests and site-packages left out. Split by file: crc32 of the relative
path modulo 10 is 0 for test and 1 for validation, so a file keeps its split across versions. The
configuration carries the interpreter's version: two interpreters never share a folder.
"""

import platform
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from fastlm.data.builders import dataset_info

_HELD_OUT = {0: "test", 1: "validation"}
_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


def split_of(relative_path: str) -> str:
    """Returns the split of a file of the standard library, by its path with forward slashes."""
    return _HELD_OUT.get(zlib.crc32(relative_path.encode()) % 10, "train")


def files(split: str) -> Iterator[tuple[str, str]]:
    """Yields the relative path and the source of each file of a split, in order of path."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _LEFT_OUT.isdisjoint(relative.parts) and split_of(relative.as_posix()) == split:
            with tokenize.open(path) as file:  # honours the file's coding line
                yield relative.as_posix(), file.read()


class PythonStdlib(tfds.core.GeneratorBasedBuilder):
    """One document per file."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 (the name and the type are TFDS's)
        tfds.core.BuilderConfig(
            name=f"{platform.python_implementation().lower()}-{platform.python_version()}",
            description="The standard library of this very interpreter.",
        )
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return dataset_info(
            self,
            "Source files of the Python standard library.",
            text=tfds.features.Text(),
            path=tfds.features.Text(),
        )

    def _split_generators(self, download_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in ("train", "validation", "test")}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, str]]]:
        for path, text in files(split):
            if text:
                yield path, {"text": text, "path": path}
