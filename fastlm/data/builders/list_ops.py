"""ListOps: nested operations on digits, written one character per symbol; the label is the result.

    X29N47]0]    is what the papers write    [MAX 2 9 [MIN 4 7 ] 0 ]    and its label is 9

Generated, seeded, the same on every machine. As in Long Range Arena (arXiv 2011.04006, after ListOps, 1804.06028): at
most ten arguments an operation, nested at most ten deep, an argument a digit three times out of four, lengths kept
within bounds. "short" (64 to 512 symbols) is made for small machines; "paper" has the paper's lengths and numbers of
rows. Always saying one digit is right 0.15 of the time (0.18 on the short test split), knowing nothing but the
outermost operation 0.34.
Left out: FIRST and the brackets for binary trees, which Long Range Arena drops too.
"""

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from fastlm.data.builders import dataset_info

OPERATIONS = {
    "N": min,
    "X": max,
    "D": lambda values: int(_median(values)),
    "S": lambda values: sum(values) % 10,
}
"""What opens a list: minimum, maximum, median (rounded down), sum modulo ten; "]" closes it."""

DEEPEST = 10
MOST_ARGUMENTS = 10
_DIGIT_SHARE = 0.75
_NAMES = "".join(OPERATIONS)


class Size(NamedTuple):
    """Fewest and most symbols of a row, and rows per split."""

    shortest: int
    longest: int
    rows: dict[str, int]


SIZES = {
    "short": Size(64, 512, {"train": 40_000, "validation": 2_000, "test": 2_000}),
    "paper": Size(500, 2_000, {"train": 96_000, "validation": 2_000, "test": 2_000}),
}


def rows(size: Size, split: str) -> Iterator[dict[str, str]]:
    """Yields the rows of a split without end; the first ones are always the same."""
    drawn = random.Random(f"list_ops {size.shortest} {size.longest} {split}")
    while True:
        symbols: list[str] = []
        value = _grow(drawn.random, 1, size.longest, symbols)
        if size.shortest <= len(symbols) <= size.longest:
            yield {"text": "".join(symbols), "label": str(value)}


def _grow(draw: Any, depth: int, longest: int, symbols: list[str]) -> int:
    """Appends a digit or a list to `symbols` and returns its value; gives up, with any value, above `longest`."""
    if depth >= DEEPEST or (depth > 1 and draw() < _DIGIT_SHARE) or len(symbols) > longest:
        value = int(draw() * 10)
        symbols.append(str(value))
        return value
    name = _NAMES[int(draw() * len(_NAMES))]
    symbols.append(name)
    count = 2 + int(draw() * (MOST_ARGUMENTS - 1))
    values = [_grow(draw, depth + 1, longest, symbols) for _ in range(count)]
    symbols.append("]")
    return OPERATIONS[name](values)


def _median(values: list[int]) -> float:
    middle, ordered = len(values) // 2, sorted(values)
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


class ListOps(tfds.core.GeneratorBasedBuilder):
    """One row per expression."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 (the name and the type are TFDS's)
        tfds.core.BuilderConfig(name=name, description=f"{size.shortest} to {size.longest} symbols")
        for name, size in SIZES.items()
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return dataset_info(
            self,
            "Nested operations on digits, generated.",
            text=tfds.features.Text(),
            label=tfds.features.Text(),
        )

    def _split_generators(self, download_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in ("train", "validation", "test")}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        size = SIZES[self.builder_config.name]
        for number, row in zip(range(size.rows[split]), rows(size, split)):
            yield f"{number:06d}", row
