"""Pathfinder: do the two discs lie on one dashed path? Gray images of 32 x 32, generated.

Two long paths wind through every image among shorter ones that distract. Discs mark both ends of one long path
(label "connected") or one end of each ("apart"). Seeded, the same on every machine, as many of one label as of the
other. After Linsley et al. (arXiv 1805.08315) and Long Range Arena (2011.04006), from which come the size of image and
discs, paths of 14 dashes, five distractors of 4, and, as "paper", the number of images; the drawing is our own
(`pathfinder_scenes.py`). "small" takes minutes to make, "paper" an hour.
"""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fastlm.data.builders import dataset_info
from fastlm.data.builders.pathfinder_scenes import SIZE, Scene, render, scene_pair

ROWS = {
    "small": {"train": 8_000, "validation": 1_000, "test": 1_000},
    "paper": {"train": 160_000, "validation": 20_000, "test": 20_000},
}
LABELS = ("apart", "connected")


def scenes(split: str) -> Iterator[tuple[Scene, str]]:
    """Yields scenes and labels without end, half of them of either label; the first ones are always the same."""
    drawn = random.Random(f"pathfinder {split}")
    while True:
        yield from zip(scene_pair(drawn), LABELS)


class Pathfinder(tfds.core.GeneratorBasedBuilder):
    """One row per image."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 (the name and the type are TFDS's)
        tfds.core.BuilderConfig(name=name, description=f"{counts['train']} images to train on")
        for name, counts in ROWS.items()
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return dataset_info(
            self,
            "Two discs on one dashed path or on two, generated.",
            image=tfds.features.Tensor(shape=(SIZE, SIZE), dtype=np.uint8, encoding="zlib"),
            label=tfds.features.Text(),
        )

    def _split_generators(self, download_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in ROWS[self.builder_config.name]}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, (scene, label) in zip(range(ROWS[self.builder_config.name][split]), scenes(split)):
            yield f"{number:06d}", {"image": render(scene), "label": label}
