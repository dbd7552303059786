"""Pairs of passages, read byte by byte: are both of the same State of the Union address?

Stands where Long Range Arena (arXiv 2011.04006) asks whether one paper cites the other. Every passage is the first of
two pairs, one of each label, and the seconds of both labels are of the same addresses, each as often, so neither half
alone says anything. Split by address, as state_of_the_union.py does. The two share one row, about 1,200 to 4,000 bytes
together; Long Range Arena encodes each alone. Left out: pairs of neighbouring passages, which a sentence running on
would give away.
"""

import random
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from fastlm.data.builders import dataset_info, state_of_the_union
from fastlm.data.builders.text_bytes import long_passages

SHORTEST, LONGEST = 600, 2_000
MOST = 40
FEWEST = 4  # passages of an address, so that there is one that is no neighbour of the first


def rows(split: str) -> Iterator[dict[str, str]]:
    """Yields the rows of a split: of each passage a pair with its own address, and one with another."""
    drawn = random.Random(f"retrieval_bytes {split}")
    addresses = []
    for address in state_of_the_union.addresses(split):
        passages = list(long_passages(address["text"], drawn, SHORTEST, LONGEST))
        addresses += [passages] if len(passages) >= FEWEST else []
    firsts = [
        (number, place)
        for number, passages in enumerate(addresses)
        for place in sorted(drawn.sample(range(len(passages)), min(MOST, len(passages))))
    ]
    others = exchanged([number for number, _ in firsts], drawn)
    for (number, place), other in zip(firsts, others):
        first, apart = addresses[number][place], [p for at, p in enumerate(addresses[number]) if abs(at - place) > 1]
        for label, second in (("same", drawn.choice(apart)), ("different", drawn.choice(addresses[other]))):
            yield {"first": first, "second": second, "label": label}


def exchanged(numbers: list[int], drawn: random.Random) -> list[int]:
    """Returns the numbers in an order drawn so that none stands where it stood.

    Raises:
      ValueError: one of them is more than half of all, so that there is no such order.
    """
    if 2 * max(map(numbers.count, set(numbers))) > len(numbers):
        raise ValueError("more than half of the numbers are the same")
    order = drawn.sample(numbers, len(numbers))
    for here, number in enumerate(numbers):
        while order[here] == number:  # exchange with a place that wants neither
            there = drawn.randrange(len(numbers))
            if number not in (numbers[there], order[there]):
                order[here], order[there] = order[there], order[here]
    return order


class RetrievalBytes(tfds.core.GeneratorBasedBuilder):
    """One row per pair."""

    VERSION = tfds.core.Version("1.1.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return dataset_info(
            self,
            "Pairs of passages of the same or of different State of the Union addresses.",
            first=tfds.features.Text(),
            second=tfds.features.Text(),
            label=tfds.features.Text(),
        )

    def _split_generators(self, download_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in ("train", "validation", "test")}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, row in enumerate(rows(split)):
            yield f"{number:06d}", row
