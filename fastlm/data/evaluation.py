"""Evaluation batches: one pass in fixed order, every token scored exactly once.

Notable: a document longer than T is read in windows; with `overlap`, a window repeats the last tokens
of the one before as context that is not scored, so late targets are not scored with an empty past.
Windows are packed in order, several short ones in a row. Every process walks through all
windows and keeps its rows, so all of them see the same number of batches, the last padded with mask 0.
"""

import itertools
import os
from collections.abc import Iterator, Sequence

import numpy as np

from fastlm.data.batch_iterator import Batch
from fastlm.data.packing import Piece, Row, build_row, empty_row
from fastlm.data.sources import Sources, weighted_sources
from fastlm.data.tokenized import TokenizedDocuments, open_sources
from fastlm.data.tokenizers import Tokenizer
from fastlm.errors import UserError

_READ_AHEAD = 64


def evaluation_batches(
    sources: Sources,
    tokenizer: Tokenizer,
    *,
    split: str,
    length: int,
    batch_size: int,
    overlap: int = 0,
    stream: bool = False,
    limit: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    data_dir: str | os.PathLike[str] | None = None,
) -> Iterator[Batch]:
    """Returns one pass over this process's rows of the evaluation batches.

    Args:
      sources: A source spec, or pairs (spec, share) whose shares are not used: each source is read once.
      tokenizer: What gives ids.
      split: Split of every source, with an optional slice.
      length: T.
      batch_size: B, rows in a global batch.
      overlap: Tokens of context that a document's later windows repeat, less than T.
      stream: Row i of a batch goes on where row i of the batch before it ended, as in training; nothing is repeated.
      limit: At most so many batches; 0 for all.
      process_index: This process.
      process_count: Of so many; must divide B.
      data_dir: Where prepared data and caches lie.

    Returns:
      Dicts of [B / process_count, T] arrays as in `pipeline.training_batches`; `document` numbers the split's
      records, through all sources.

    Raises:
      UserError: an unknown source or split; sizes that do not fit. Raised here, before the first batch.
    """
    if not 0 <= overlap < length:
        raise UserError(f"overlap {overlap} must be at least 0 and less than the length {length}")
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"batch_size {batch_size} must be a positive multiple of the {process_count} processes")
    documents = open_sources(weighted_sources(sources), tokenizer, split, data_dir)
    if stream:
        rows = _stream_rows(documents, length, tokenizer.pad, batch_size)
    else:
        rows = _rows(documents, length, overlap, tokenizer.pad)
    return _batches(rows, length, tokenizer.pad, batch_size, limit, process_index, process_count)


def _stream_rows(documents: Sequence[TokenizedDocuments], length: int, pad: int, lanes: int) -> Iterator[Row]:
    """Yields a row of each lane in turn; a lane that is through with a document takes the next, whole ones of padding
    follow where there is none."""
    waiting = _all_documents(documents)
    reading: list[tuple[int, np.ndarray, int] | None] = [None] * lanes  # record, tokens, pairs given
    while True:
        rows = []
        for lane in range(lanes):
            parts, filled, continues = [], 0, reading[lane] is not None
            while filled < length:
                reading[lane] = reading[lane] or next(waiting, None)
                if reading[lane] is None:
                    break
                record, tokens, given = reading[lane]
                stop = min(given + length - filled, len(tokens) - 1)
                parts.append((tokens, Piece(record, given, stop)))
                filled += stop - given
                reading[lane] = (record, tokens, stop) if stop < len(tokens) - 1 else None
            rows.append(build_row(parts, length, pad) | {"reset": np.array(not continues)})
        if not any(row["segment_ids"][0] for row in rows):
            return
        yield from rows


def _all_documents(documents: Sequence[TokenizedDocuments]) -> Iterator[tuple[int, np.ndarray, int]]:
    """Yields (record, tokens, 0) of each document with something to predict."""
    first = 0
    for source in documents:
        for start in range(0, len(source), _READ_AHEAD):
            records = range(start, min(start + _READ_AHEAD, len(source)))
            for record, tokens in zip(records, source.get(records)):
                if len(tokens) > 1:
                    yield first + record, tokens, 0
        first += len(source)


def windows(record: int, pairs: int, length: int, overlap: int) -> list[tuple[Piece, int]]:
    """Returns a document's windows, each with how many of its first targets are context only."""
    if not pairs:
        return []
    result = [(Piece(record, 0, min(pairs, length)), 0)]
    while (scored := result[-1][0].stop) < pairs:
        start = scored - overlap
        result.append((Piece(record, start, min(pairs, start + length)), overlap))
    return result


def _rows(documents: Sequence[TokenizedDocuments], length: int, overlap: int, pad: int) -> Iterator[Row]:
    """Yields rows of whole windows, in order; a window that does not fit opens the next row."""
    pending: list[tuple[np.ndarray, Piece, int]] = []
    filled = 0
    for tokens, piece, context in _all_windows(documents, length, overlap):
        if filled + piece.length > length:
            yield _row(pending, length, pad)
            pending, filled = [], 0
        pending.append((tokens, piece, context))
        filled += piece.length
    if pending:
        yield _row(pending, length, pad)


def _all_windows(
    documents: Sequence[TokenizedDocuments], length: int, overlap: int
) -> Iterator[tuple[np.ndarray, Piece, int]]:
    for record, tokens, _ in _all_documents(documents):
        for piece, context in windows(record, len(tokens) - 1, length, overlap):
            yield tokens, piece, context


def _row(parts: Sequence[tuple[np.ndarray, Piece, int]], length: int, pad: int) -> Row:
    row = build_row([(tokens, piece) for tokens, piece, _ in parts], length, pad)
    filled = 0
    for _, piece, context in parts:
        row["loss_mask"][filled : filled + context] = 0.0
        filled += piece.length
    return row


def _batches(
    rows: Iterator[Row], length: int, pad: int, batch_size: int, limit: int, process_index: int, process_count: int
) -> Iterator[Batch]:
    share = batch_size // process_count
    for number in itertools.count():
        batch = [] if limit and number == limit else list(itertools.islice(rows, batch_size))
        if not batch:
            return
        batch += [empty_row(length, pad)] * (batch_size - len(batch))
        own = batch[process_index * share : (process_index + 1) * share]
        yield {name: np.stack([row[name] for row in own]) for name in own[0]}
