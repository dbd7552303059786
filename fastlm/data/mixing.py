"""Rows of several sources, mixed by their shares.

Notable: which source gives a row depends only on the row's place in the global stream of rows, by the
golden-ratio sequence: shares hold closely in every batch and over the shards, whatever their number. Grain's
`mix` starts each shard at the same place of one pattern, so a batch may come from a single source.
"""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

_GOLDEN = 2654435769  # 2**32 divided by the golden ratio


def source_of(row: int, cumulative: np.ndarray) -> int:
    """Returns the source of global row number `row`, given the cumulative shares, the last of them 1."""
    return int(np.searchsorted(cumulative, (row * _GOLDEN % 2**32) / 2**32, side="right"))


class MixedRows(grain.IterDataset):
    """An endless dataset of one shard's rows."""

    def __init__(
        self, parts: Sequence[grain.IterDataset], weights: Sequence[float], *, shard: int, shards: int, rows: int
    ) -> None:
        """Mixes `parts`.

        Args:
          parts: Endless datasets of rows, one per source.
          weights: Their shares, which sum to 1.
          shard: This shard.
          shards: Of so many.
          rows: How many rows each shard gives to a batch.
        """
        super().__init__()
        self.parts, self.shard, self.shards, self.rows = tuple(parts), shard, shards, rows
        self.cumulative = np.cumsum(weights)
        self.cumulative[-1] = 1.0

    def __iter__(self) -> "_MixedRowsIterator":
        return _MixedRowsIterator(self)


class _MixedRowsIterator(grain.DatasetIterator):
    def __init__(self, dataset: MixedRows) -> None:
        self._parts = [iter(part) for part in dataset.parts]
        super().__init__(self._parts)
        self._dataset, self._given = dataset, 0

    def __next__(self) -> dict[str, np.ndarray]:
        dataset = self._dataset
        batch, row = divmod(self._given, dataset.rows)
        place = (batch * dataset.shards + dataset.shard) * dataset.rows + row
        self._given += 1
        return next(self._parts[source_of(place, dataset.cumulative)])

    def get_state(self) -> dict[str, Any]:
        return {"given": self._given, "parts": [part.get_state() for part in self._parts]}

    def set_state(self, state: dict[str, Any]) -> None:
        self._given = state["given"]
        for part, position in zip(self._parts, state["parts"]):
            part.set_state(position)
