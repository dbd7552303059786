"""Packed rows: documents cut to pieces of at most T tokens, shuffled, and packed into rows of T.

Notable: pieces are shuffled, not documents, so neighbouring rows do not come from one long text.
This works in blocks: take documents in shuffled order until a block's worth of tokens is there (small
data sets: the whole epoch), cut them, shuffle the pieces, plan the rows. A plan is a pure function of
(epoch, cursor, carry), which makes the state three numbers and a few references, exact and quick to restore.
A document longer than T starts with a piece of random length, so that borders move between epochs. A
piece of exactly T is a row by itself; only shorter ones are combined:
  concat     joined end to end and split at T: no padding, some pieces are cut once more
  first_fit  each put whole into the first open row with room: no further cut, some padding
Left out: Grain's ConcatThenSplit and FirstFitPack. They pack in the order documents come, read data again to
restore, and the state of the former compares tuples with ``==``, which lists from JSON fail.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from fastlm.data.records import ShuffledRecords
from fastlm.data.tokenized import TokenizedDocuments
from fastlm.errors import UserError

Row = dict[str, np.ndarray]
_READ_AT_ONCE = 64  # enough documents for a tokenizer to use all cores


class Piece(NamedTuple):
    """Pairs (input, target) number start..stop of a document; pair i is tokens i and i + 1."""

    record: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        """How many tokens of a row it takes."""
        return self.stop - self.start


class Plan(NamedTuple):
    """The rows of one block, and the pieces left for the next."""

    rows: list[list[Piece]]
    carry: list[Piece]


def build_row(pieces: Sequence[tuple[np.ndarray, Piece]], length: int, pad: int, first_record: int = 0) -> Row:
    """Lays pieces side by side in one row.

    Args:
      pieces: Each with its document's tokens.
      length: T.
      pad: Token id of what stays empty.
      first_record: Added to record numbers (sources of a mixture are numbered through).

    Returns:
      `tokens`, `targets`, `segment_ids`, `positions`, `document` int32 and `loss_mask` float32, all [T].
    """
    row = empty_row(length, pad)
    filled = 0
    for segment, (tokens, piece) in enumerate(pieces, start=1):
        span = slice(filled, filled + piece.length)
        row["tokens"][span] = tokens[piece.start : piece.stop]
        row["targets"][span] = tokens[piece.start + 1 : piece.stop + 1]
        row["loss_mask"][span] = 1.0
        row["segment_ids"][span] = segment
        row["positions"][span] = np.arange(piece.length)
        row["document"][span] = first_record + piece.record
        filled += piece.length
    return row


def empty_row(length: int, pad: int) -> Row:
    """Returns a row of padding: mask and segment 0, document -1."""
    return {
        "tokens": np.full(length, pad, np.int32),
        "targets": np.full(length, pad, np.int32),
        "loss_mask": np.zeros(length, np.float32),
        "segment_ids": np.zeros(length, np.int32),
        "positions": np.zeros(length, np.int32),
        "document": np.full(length, -1, np.int32),
    }


def cut(record: int, pairs: int, length: int, first: int) -> list[Piece]:
    """Cuts a document of `pairs` pairs: one piece if it fits, else `first` pairs and then `length` each."""
    if pairs <= length:
        return [Piece(record, 0, pairs)] if pairs else []
    borders = [0, *range(first, pairs, length), pairs]
    return [Piece(record, start, stop) for start, stop in itertools.pairwise(borders)]


def concat(pieces: Sequence[Piece], length: int, carry: Sequence[Piece]) -> Plan:
    """Joins pieces after `carry` and splits at `length`; what is short of a row becomes the carry."""
    rows, open_row = [], list(carry)
    room = length - sum(piece.length for piece in open_row)
    for piece in pieces:
        if piece.length == length:
            rows.append([piece])
            continue
        if piece.length >= room:
            rows.append([*open_row, piece._replace(stop=piece.start + room)])
            open_row, piece, room = [], piece._replace(start=piece.start + room), length
        if piece.length:
            open_row.append(piece)
            room -= piece.length
    return Plan(rows, open_row)


def first_fit(pieces: Sequence[Piece], length: int, carry: Sequence[Piece]) -> Plan:
    """Puts each piece into the first row with room; every row of the block is closed at its end."""
    assert not carry, "first_fit leaves nothing over"
    rows: list[list[Piece]] = []
    room = np.zeros(len(pieces), np.int64)
    for piece in pieces:
        # Rows not opened yet have no room; `argmax` gives the first that has enough.
        place = int(np.argmax(room[: len(rows)] >= piece.length)) if rows else 0
        if not rows or room[place] < piece.length:
            place = len(rows)
            rows.append([])
            room[place] = length
        rows[place].append(piece)
        room[place] -= piece.length
    return Plan(rows, [])


PACKINGS: dict[str, Callable[[Sequence[Piece], int, Sequence[Piece]], Plan]] = {
    "concat": concat,
    "first_fit": first_fit,
}


class PackedRows(grain.IterDataset):
    """An endless dataset of packed rows from the records of one shard."""

    def __init__(
        self,
        documents: TokenizedDocuments,
        records: ShuffledRecords,
        *,
        length: int,
        pad: int,
        packing: str,
        seed: int,
        first_record: int = 0,
    ) -> None:
        """Builds the dataset.

        Args:
          documents: Random access to tokens.
          records: The shard's record numbers, in another order each epoch.
          length: T.
          pad: Token id of padding.
          packing: A key of `PACKINGS`.
          seed: Of cuts and of the order of pieces.
          first_record: Added to the record numbers in `document`.
        """
        super().__init__()
        self.documents, self.records = documents, records
        self.length, self.pad, self.seed, self.first_record = length, pad, seed, first_record
        self.pack = PACKINGS[packing]

    def __iter__(self) -> "PackedRowsIterator":
        return PackedRowsIterator(self)


class PackedRowsIterator(grain.DatasetIterator):
    """Yields rows block by block; its state names the block and the row in it."""

    def __init__(self, dataset: PackedRows) -> None:
        super().__init__()
        self._dataset = dataset
        self._epoch = self._cursor = self._row = 0
        self._carry: list[Piece] = []
        self._plan: Plan | None = None
        self._records_without_text = 0  # in a row; all of a shard's would be an endless loop

    def __next__(self) -> Row:
        while self._plan is None or self._row == len(self._plan.rows):
            self._next_block()
        pieces = self._plan.rows[self._row]
        self._row += 1
        dataset = self._dataset
        parts = [(self._tokens[piece.record], piece) for piece in pieces]
        return build_row(parts, dataset.length, dataset.pad, dataset.first_record)

    def get_state(self) -> dict[str, Any]:
        """Returns the block (epoch, cursor, carried pieces) and the next row in it."""
        carry = [list(piece) for piece in self._carry]
        return {"epoch": self._epoch, "cursor": self._cursor, "carry": carry, "row": self._row}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a state of `get_state`; the block is planned again from it."""
        self._epoch, self._cursor, self._row = state["epoch"], state["cursor"], state["row"]
        self._carry = [Piece(*piece) for piece in state["carry"]]
        self._plan = None
        if self._row:
            self._make_plan()

    def _next_block(self) -> None:
        if self._plan is not None:
            self._carry = self._plan.carry
            self._cursor += self._records_in_block
            self._row = 0
            if self._cursor == len(self._dataset.records):
                self._epoch, self._cursor = self._epoch + 1, 0
        self._make_plan()

    def _make_plan(self) -> None:
        dataset = self._dataset
        block = self._read_block()
        self._records_in_block = len(block)
        self._tokens = dict(block)
        rng = np.random.default_rng((dataset.seed, self._epoch, self._cursor))
        firsts = rng.integers(1, dataset.length, size=len(block), endpoint=True).tolist()
        pieces = [
            piece
            for (record, tokens), first in zip(block, firsts)
            for piece in cut(record, max(len(tokens) - 1, 0), dataset.length, first)
        ]
        self._check_text(len(block), len(pieces))
        order = rng.permutation(len(pieces)).tolist()
        self._plan = dataset.pack([pieces[index] for index in order], dataset.length, self._carry)
        missing = sorted({piece.record for piece in self._carry} - self._tokens.keys())
        self._tokens.update(zip(missing, dataset.documents.get(missing)))

    def _check_text(self, records: int, pieces: int) -> None:
        self._records_without_text = 0 if pieces else self._records_without_text + records
        if self._records_without_text >= len(self._dataset.records):
            raise UserError(
                f"no text in the documents of this shard of {self._dataset.documents.name}: "
                "use fewer shards or more text"
            )

    def _read_block(self) -> list[tuple[int, np.ndarray]]:
        """Reads documents from the cursor on, until the block is full or the epoch ends."""
        dataset = self._dataset
        records, count = dataset.records, len(dataset.records)
        block: list[tuple[int, np.ndarray]] = []
        tokens = 0
        position = self._cursor
        while position < count and tokens < dataset.documents.block_tokens:
            stop = min(position + _READ_AT_ONCE, count)
            chosen = [records[self._epoch * count + index] for index in range(position, stop)]
            read = dataset.documents.get(chosen)
            block += zip(chosen, read)
            tokens += sum(map(len, read))
            position += len(chosen)
        return block
