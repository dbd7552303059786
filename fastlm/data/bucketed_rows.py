"""The endless dataset of bucketed batches, and how one batch is laid out.

Rows are drawn in shuffled order, each epoch anew, and wait in the queue of their shape; a shape whose queue holds a
batch gives it. The position is how far each source is drawn, and what waits in the queues.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from fastlm.data.batch_iterator import Batch
from fastlm.data.bucket_shapes import Shape
from fastlm.data.encoded import EncodedExamples
from fastlm.data.mixing import source_of
from fastlm.data.records import ShuffledRecords


class Source(NamedTuple):
    """One source's rows, the number of each row's shape ([rows]), and what to add to its record numbers."""

    rows: EncodedExamples
    shapes: np.ndarray
    first_record: int


class Pick(NamedTuple):
    """A row for a batch; without `real` it only fills up, with mask 0."""

    source: int
    row: int
    epoch: int
    real: bool = True


def build_batch(sources: Sequence[Source], picks: Sequence[Pick], shape: Shape) -> Batch:
    """Lays rows of one shape under each other.

    Returns:
      Each array of the encoder [rows, its length in `shape`], padded with 0, and its `<name>_length` [rows] int32; each
      scalar [rows]; `row_mask` [rows] float32; `record` and `epoch` [rows] int32.
    """
    encoded = [sources[pick.source].rows for pick in picks]
    batch: Batch = {}
    for (name, dtype), length in zip(encoded[0].arrays.items(), shape):
        values = [rows.array(name, pick.row) for rows, pick in zip(encoded, picks)]
        batch[name] = np.zeros((len(picks), length), dtype)
        batch[f"{name}_length"] = np.array([len(value) for value in values], np.int32)
        for line, value in zip(batch[name], values):
            line[: len(value)] = value
    for name, dtype in encoded[0].scalars.items():
        batch[name] = np.array([rows.scalar(name, pick.row) for rows, pick in zip(encoded, picks)], dtype)
    records = [sources[pick.source].first_record + rows.records[pick.row] for rows, pick in zip(encoded, picks)]
    batch["row_mask"] = np.array([pick.real for pick in picks], np.float32)
    batch["record"] = np.array([record if pick.real else -1 for record, pick in zip(records, picks)], np.int32)
    batch["epoch"] = np.array([pick.epoch for pick in picks], np.int32)
    return batch


class BucketedBatches(grain.IterDataset):
    """An endless dataset of batches, of which it yields some rows."""

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        shapes: Sequence[Shape],
        *,
        batch_size: int,
        seed: int,
        own: slice,
    ) -> None:
        """Defines the batches.

        Args:
          sources: Rows, of the same fields in each.
          weights: Shares of the rows that are drawn, which sum to 1.
          shapes: What the sources' shape numbers mean.
          batch_size: B, rows of a global batch.
          seed: Of the order of rows.
          own: The rows of each global batch to yield.
        """
        super().__init__()
        self.sources, self.shapes = tuple(sources), tuple(shapes)
        self.batch_size, self.seed, self.own = batch_size, seed, own
        self.cumulative = np.cumsum(weights)
        self.cumulative[-1] = 1.0

    def __iter__(self) -> "BucketedBatchesIterator":
        return BucketedBatchesIterator(self)


class BucketedBatchesIterator(grain.DatasetIterator):
    """Draws rows until a batch is together."""

    def __init__(self, dataset: BucketedBatches) -> None:
        super().__init__()
        self._dataset = dataset
        self._orders = [
            ShuffledRecords(len(source.rows), seed=_derived_seed(dataset.seed, number))
            for number, source in enumerate(dataset.sources)
        ]
        self._drawn = [0] * len(dataset.sources)
        self._queues: list[list[Pick]] = [[] for _ in dataset.shapes]

    def __next__(self) -> Batch:
        while True:
            pick = self._draw()
            number = int(self._dataset.sources[pick.source].shapes[pick.row])
            queue = self._queues[number]
            queue.append(pick)
            if len(queue) == self._dataset.batch_size:
                self._queues[number] = []
                return build_batch(self._dataset.sources, queue[self._dataset.own], self._dataset.shapes[number])

    def get_state(self) -> dict[str, Any]:
        """Returns how many rows of each source were drawn, and the queues as flat lists of source, row, epoch."""
        queues = [[number for pick in queue for number in pick[:3]] for queue in self._queues]
        return {"drawn": list(self._drawn), "queues": queues}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a state of `get_state`."""
        self._drawn = list(state["drawn"])
        self._queues = [[Pick(*flat[i : i + 3]) for i in range(0, len(flat), 3)] for flat in state["queues"]]

    def _draw(self) -> Pick:
        number = source_of(sum(self._drawn), self._dataset.cumulative)
        order, index = self._orders[number], self._drawn[number]
        self._drawn[number] += 1
        return Pick(number, order[index], index // len(order))


def _derived_seed(seed: int, source: int) -> int:
    return int(np.random.SeedSequence((seed, source)).generate_state(1)[0])
