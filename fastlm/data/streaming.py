"""Stream mode: row i of a batch continues row i of the batch before, for models that carry memory.

Notable: each row is a lane that reads one document after another; a lane that is through takes the
next document of its shard's queue, so lanes stay busy however unequal documents are. In a mixture the
queue takes from the source whose share of tokens lies furthest behind. The state is, per lane, a document and
an offset, and per source how far its queue is.
Recurrence over segments: Transformer-XL, arXiv 1901.02860.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from fastlm.data.packing import Piece, Row, build_row
from fastlm.data.records import ShuffledRecords
from fastlm.data.tokenized import TokenizedDocuments
from fastlm.errors import UserError


class Source(NamedTuple):
    """One source of a shard's queue; `weight` is its share of tokens, `first_record` is added to record numbers."""

    documents: TokenizedDocuments
    records: ShuffledRecords
    weight: float
    first_record: int


class StreamRows(grain.IterDataset):
    """An endless dataset of [lanes, T] batches whose rows continue each other."""

    def __init__(self, sources: Sequence[Source], *, lanes: int, length: int, pad: int) -> None:
        super().__init__()
        self.sources, self.lanes, self.length, self.pad = tuple(sources), lanes, length, pad

    def __iter__(self) -> "StreamRowsIterator":
        return StreamRowsIterator(self)


class _Lane(NamedTuple):
    """Where a lane is: `offset` pairs of a source's record were given."""

    source: int
    record: int
    offset: int


class StreamRowsIterator(grain.DatasetIterator):
    """Yields one batch of all lanes at a time."""

    def __init__(self, dataset: StreamRows) -> None:
        super().__init__()
        self._dataset = dataset
        self._lanes: list[_Lane | None] = [None] * dataset.lanes
        self._tokens: list[np.ndarray] = [np.empty(0, np.int32)] * dataset.lanes
        self._taken = [0] * len(dataset.sources)  # documents taken from each source's queue
        self._dealt = [0] * len(dataset.sources)  # tokens in them

    def __next__(self) -> Row:
        rows = [self._next_row(lane) for lane in range(self._dataset.lanes)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def get_state(self) -> dict[str, Any]:
        """Returns the lanes and the queues."""
        lanes = [list(lane) if lane else None for lane in self._lanes]
        return {"lanes": lanes, "taken": list(self._taken), "dealt": list(self._dealt)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a state of `get_state`, reading the documents that lanes are in."""
        self._lanes = [_Lane(*lane) if lane else None for lane in state["lanes"]]
        self._taken, self._dealt = list(state["taken"]), list(state["dealt"])
        for number, lane in enumerate(self._lanes):
            if lane:
                self._tokens[number] = self._dataset.sources[lane.source].documents[lane.record]

    def _next_row(self, number: int) -> Row:
        length, sources = self._dataset.length, self._dataset.sources
        continues = self._pairs_left(number) > 0
        parts, filled = [], 0
        while filled < length:
            if not self._pairs_left(number):
                self._take_document(number)
            lane = self._lanes[number]
            stop = lane.offset + min(self._pairs_left(number), length - filled)
            # Numbered through over the sources here, since one row may hold several of them.
            record = sources[lane.source].first_record + lane.record
            parts.append((self._tokens[number], Piece(record, lane.offset, stop)))
            filled += stop - lane.offset
            self._lanes[number] = lane._replace(offset=stop)
        return build_row(parts, length, self._dataset.pad) | {"reset": np.array(not continues)}

    def _pairs_left(self, number: int) -> int:
        lane = self._lanes[number]
        return len(self._tokens[number]) - 1 - lane.offset if lane else 0

    def _take_document(self, number: int) -> None:
        """Gives the lane the next document that has a token to predict."""
        for _ in range(2 * sum(len(source.records) for source in self._dataset.sources)):
            shares = [dealt / source.weight for dealt, source in zip(self._dealt, self._dataset.sources)]
            chosen = int(np.argmin(shares))
            source = self._dataset.sources[chosen]
            record = source.records[self._taken[chosen]]
            tokens = source.documents[record]
            self._taken[chosen] += 1
            # At least 1, lest a source without text is asked for ever.
            self._dealt[chosen] += max(len(tokens) - 1, 1)
            if len(tokens) > 1:
                self._lanes[number], self._tokens[number] = _Lane(chosen, record, 0), tokens
                return
        names = ", ".join(source.documents.name for source in self._dataset.sources)
        raise UserError(f"no text in the documents of this shard of {names}: use fewer shards or more text")
