"""Handwritten digits: 10,000 real images of 28 x 28 gray pixels with their digit (MNIST's, shipped).

Not MNIST's split: these are ten thousand of its images, so accuracies compare with each other and with no published
figure. The images, shuffled by a fixed seed, are train (8,000), validation (1,000) and test (1,000) in that order.
"""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fastlm.data.builders import FILES, dataset_info

SIDE = 28
_SPLITS = {"train": slice(0, 8_000), "validation": slice(8_000, 9_000), "test": slice(9_000, 10_000)}


def rows(split: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of a split, shuffled."""
    with np.load(FILES / "mnist_10k.npz") as file:
        images, labels = file["images"], file["labels"]
    order = list(range(len(images)))
    random.Random(0).shuffle(order)
    for number in order[_SPLITS[split]]:
        yield {"image": images[number], "label": str(labels[number])}


class Digits(tfds.core.GeneratorBasedBuilder):
    """One row per image."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return dataset_info(
            self,
            "Ten thousand handwritten digits of MNIST.",
            image=tfds.features.Tensor(shape=(SIDE, SIDE), dtype=np.uint8, encoding="zlib"),
            label=tfds.features.Text(),
        )

    def _split_generators(self, download_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in _SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, row in enumerate(rows(split)):
            yield f"{number:05d}", row
