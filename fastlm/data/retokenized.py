"""The rows of a batch in another tokenizer's tokens, and which tokens of both stand for the same bytes.

Notable: a row is taken apart into its pieces of documents; each is spelled in bytes, encoded anew, and laid into a row
of the other tokenizer's, of one length for all batches. Where tokens of both end at the same byte a span ends, and the
next begins: the shortest stretches of text that both give a probability, after the same bytes. A piece may begin and
end inside a character: the other tokenizer reads the whole characters between. Its first token is read and not
predicted, so spans begin behind the first token of both. Start and end tokens are put where the piece has them; the
end counts as one byte more, and is a span of its own.
No spans: what a tokenizer spells otherwise than it was written (normalising ones), what does not fit the row, and
spans with a token that is not scored. A tokenizer without a start token never says where a document begins: its pieces
are all read as from the middle of one.
Left out: encoding pieces as their whole document would be, so words that a row cuts are split as they stand; rows that
go on from batch to batch, which begin anew for whoever reads the other tokens.

Dims: B batch, T tokens of a row, S tokens of a row of the other tokenizer's.
"""

import codecs
import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fastlm.data.batch_iterator import Batch, BatchIterator
from fastlm.data.tokenizers import Tokenizer

PREFIX = "other_"  # of the arrays [B, S] that a model of the other tokenizer reads
SPANS, OTHER_SPANS = "spans", "other_spans"
_INSIDE_CHARACTERS = bytes(range(0x80, 0xC0))  # what no UTF-8 character begins with


class _Piece(NamedTuple):
    """Part of a document in a row.

    Attributes:
      place: where in the row its predictions are.
      text: its whole characters.
      ends: where in the bytes of `text` each of its tokens ends, the one that is only read included.
      opens, closes: whether it has the start and the end of the document.
    """

    row: int
    place: slice
    text: str
    ends: np.ndarray
    opens: bool
    closes: bool


@dataclasses.dataclass(frozen=True)
class Retokenizer:
    """Adds to batches what a model with another tokenizer reads of them.

    Attributes:
      own: the tokenizer of the batches.
      other: the other one.
      length: S.
    """

    own: Tokenizer
    other: Tokenizer
    length: int

    def __call__(self, batch: Mapping[str, np.ndarray]) -> Batch:
        """Returns the batch and what is added.

        `other_tokens`, `other_targets`, `other_segment_ids`, `other_positions`, `other_loss_mask` [B, S], as in
        `data.pipeline`; `spans` [B, T] and `other_spans` [B, S] int32: the number of the span that each prediction is
        of, from 1 to at most T in each row, or 0.
        """
        rows, length = batch["tokens"].shape
        spans = np.zeros((rows, length), np.int32)
        added = _Rows(rows, self.length, self.other.pad)
        pieces = [piece for row in range(rows) for piece in self._pieces(batch, row)]
        for piece, ids in zip(pieces, self.other.encode_batch([piece.text for piece in pieces])):
            tokens, ends = self._placed(piece, ids, added.room(piece.row))
            if len(tokens) < 2:
                continue
            borders = np.intersect1d(piece.ends, ends)
            first = added.spans_in(piece.row)
            spans[piece.row, piece.place] = _numbered(borders, piece.ends[1:], first)
            added.append(piece.row, tokens, _numbered(borders, ends[1:], first), len(borders))
        _drop_unscored(spans, added.arrays[OTHER_SPANS], batch["loss_mask"])
        return {**batch, **added.arrays, SPANS: spans}

    def _pieces(self, batch: Mapping[str, np.ndarray], row: int) -> list[_Piece]:
        tokens, targets, segments = (batch[name][row] for name in ("tokens", "targets", "segment_ids"))
        borders = [0, *(np.flatnonzero(np.diff(segments)) + 1).tolist(), len(segments)]
        parts = [slice(start, stop) for start, stop in itertools.pairwise(borders) if segments[start]]
        return [self._piece(row, part, np.append(tokens[part], targets[part.stop - 1])) for part in parts]

    def _piece(self, row: int, place: slice, ids: np.ndarray) -> _Piece:
        content, ends = spelled(self.own, ids)
        opens = self.own.bos is not None and int(ids[0]) == self.own.bos
        closes = int(ids[-1]) == self.own.eos
        before = len(content) - len(content.lstrip(_INSIDE_CHARACTERS))
        if opens:
            before = int(self.own.opens_with_space and content.startswith(b" "))
            ends = np.maximum(ends, before)  # the start token ends where the text begins
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            text = decoder.decode(content[before:])
        except UnicodeDecodeError:  # pieces of a tokenizer that leaves characters out
            text = ""
        whole = not decoder.getstate()[0]
        ends = ends - before + np.where(np.arange(len(ids)) == len(ids) - 1, int(closes), 0)
        return _Piece(row, place, text, ends, opens, closes and whole and bool(text))

    def _placed(self, piece: _Piece, ids: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the other tokens of a piece, one more than `room` at most, and where in its bytes each ends."""
        content, ends = spelled(self.other, ids)
        wanted = piece.text.encode()
        if self.other.opens_with_space and content == b" " + wanted:
            ends = np.maximum(ends - 1, 0)
        elif content != wanted:
            return ids[:0], ends[:0]
        opening = [self.other.bos] if piece.opens and self.other.bos is not None else []
        closing = [self.other.eos] if piece.closes else []
        tokens = np.concatenate([opening, ids, closing]).astype(np.int32)
        ends = np.concatenate([[0] * len(opening), ends, [len(wanted) + 1] * len(closing)]).astype(np.int64)
        return tokens[: room + 1], ends[: room + 1]


class _Rows:
    """Rows of the other tokenizer's, filled piece by piece."""

    def __init__(self, rows: int, length: int, pad: int) -> None:
        whole = lambda value: np.full((rows, length), value, np.int32)
        self.arrays = {f"{PREFIX}{name}": whole(pad) for name in ("tokens", "targets")}
        self.arrays |= {f"{PREFIX}{name}": whole(0) for name in ("segment_ids", "positions")}
        self.arrays |= {f"{PREFIX}loss_mask": np.zeros((rows, length), np.float32), OTHER_SPANS: whole(0)}
        self._filled, self._pieces, self._spans = [0] * rows, [0] * rows, [0] * rows

    def room(self, row: int) -> int:
        return self.arrays[OTHER_SPANS].shape[1] - self._filled[row]

    def spans_in(self, row: int) -> int:
        return self._spans[row]

    def append(self, row: int, tokens: np.ndarray, spans: np.ndarray, borders: int) -> None:
        place = slice(self._filled[row], self._filled[row] + len(spans))
        self._pieces[row] += 1
        values = {
            "tokens": tokens[:-1],
            "targets": tokens[1:],
            "segment_ids": self._pieces[row],
            "positions": np.arange(len(spans)),
            "loss_mask": 1.0,
        }
        for name, value in values.items():
            self.arrays[f"{PREFIX}{name}"][row, place] = value
        self.arrays[OTHER_SPANS][row, place] = spans
        self._filled[row] = place.stop
        self._spans[row] += max(borders - 1, 0)


class Retokenized:
    """A `BatchIterator` whose batches have the other tokens too; its position is that of the batches.

    They are made when asked for, while the device is at the steps before.
    """

    def __init__(self, batches: BatchIterator, retokenizer: Retokenizer) -> None:
        """Joins them; `batches` are closed with this iterator."""
        self._batches, self._retokenizer = batches, retokenizer
        self.identity = batches.identity

    def __iter__(self) -> "Retokenized":
        return self

    def __next__(self) -> Batch:
        return self._retokenizer(next(self._batches))

    def get_state(self) -> dict[str, Any]:
        """Returns what the next batch needs, as `BatchIterator.get_state` does."""
        return self._batches.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a state of `get_state`."""
        self._batches.set_state(state)

    def close(self) -> None:
        """Closes the batches."""
        self._batches.close()


def spelled(tokenizer: Tokenizer, ids: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Returns the bytes that tokens join to, and where in them each token ends, int64 [tokens]."""
    pieces = [tokenizer.pieces[token] for token in ids.tolist()]
    return b"".join(pieces), np.cumsum([len(piece) for piece in pieces], dtype=np.int64)


def _numbered(borders: np.ndarray, ends: np.ndarray, first: int) -> np.ndarray:
    """Returns for tokens that end at `ends` the number of their span, counted on from `first`; 0 outside of all."""
    place = np.searchsorted(borders, ends)
    return np.where((place > 0) & (place < len(borders)), place + first, 0)


def _drop_unscored(spans: np.ndarray, other: np.ndarray, mask: np.ndarray) -> None:
    """Sets to 0 the spans of which not all is scored."""
    dropped = np.zeros((len(spans), spans.shape[1] + 1), bool)
    rows, places = np.nonzero(mask == 0)
    dropped[rows, spans[rows, places]] = True
    for numbers in (spans, other):
        numbers[np.take_along_axis(dropped, numbers, axis=1)] = 0
