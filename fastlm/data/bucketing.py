"""Batches of rows of fields, each padded to one of a few static shapes.

Notable: a task turns rows into arrays by a function of its own; they are cached (`encoded.py`), get the few shapes
that pad little (`bucket_shapes.py`) and are batched with rows of their shape (`bucketed_rows.py`). In
training every row comes exactly once in each epoch and none is filling: what an epoch leaves over
begins the batches of the next, and `epoch` says which epoch each row belongs to. In a mixture the golden-ratio
sequence decides which source the next row is drawn from. All processes draw all rows, which is cheap, and take their
slice of each batch, so the global batch does not depend on their number, and any one's position restores all.
Left out: packing several rows into one, which would need a mask per pair of rows.
"""

import itertools
import os
from collections.abc import Iterator, Sequence

import numpy as np

from fastlm.data.batch_iterator import Batch, BatchIterator
from fastlm.data.bucket_shapes import Shape, check_buckets, plan_shapes
from fastlm.data.bucketed_rows import BucketedBatches, Pick, Source, build_batch
from fastlm.data.directory import data_directory
from fastlm.data.encoded import Encode, EncodedExamples, log_once
from fastlm.data.examples import Examples
from fastlm.errors import UserError

__all__ = ["Encode", "evaluation_batches", "training_batches"]

Mixture = Examples | Sequence[tuple[Examples, float]]
"""Rows of one source, or of several with their shares of the rows, as `examples.load_mixture` gives them."""


def training_batches(
    examples: Mixture,
    encode: Encode,
    *,
    encoder_fingerprint: str,
    batch_size: int,
    buckets: Sequence[int],
    most_shapes: int = 8,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    data_dir: str | os.PathLike[str] | None = None,
    prefetch: int = 2,
) -> BatchIterator:
    """Returns an endless iterator over this process's rows of the training batches.

    Args:
      examples: The rows, or pairs (rows, share).
      encode: From a row to 1-D arrays and scalars by name, the same names for every row (and what of it was cut, see
        `encoded.CUT`); None drops the row.
      encoder_fingerprint: Names what `encode` does: another one encodes anew.
      batch_size: B, rows in a global batch, over all processes.
      buckets: Rising lengths that arrays are padded to; the last must hold every array.
      most_shapes: At most so many combinations of padded lengths, each of which is compiled once.
      seed: Of all shuffling, at least 0.
      process_index: This process.
      process_count: Of so many; must divide B.
      data_dir: Where caches lie.
      prefetch: Batches made ahead by a background thread; 0 for none.

    Returns:
      An iterator of dicts: each array of the encoder as [B / process_count, L] int32 or float32, padded with 0, and its
      `<name>_length` [B / process_count] int32; each scalar [B / process_count]; `row_mask` float32 (all 1);
      `record` int32, the number of the example, through all sources; `epoch` int32.

    Raises:
      UserError: sizes or shares that do not fit, an array above the last bucket, no row left by the encoder.
      ValueError: the encoder's rows do not agree in names and kinds.
    """
    _check(batch_size, process_count, most_shapes)
    if seed < 0 or prefetch < 0:
        raise UserError(f"seed {seed} and prefetch {prefetch} must be at least 0")
    weighted = _weighted(examples)
    rows = _encoded([source for source, _ in weighted], encode, encoder_fingerprint, data_dir)
    sources, shapes = _bucketed(rows, check_buckets(buckets), most_shapes, batch_size)
    dataset = BucketedBatches(
        sources,
        [share for _, share in weighted],
        shapes,
        batch_size=batch_size,
        seed=seed,
        own=_own(batch_size, process_index, process_count),
    )
    identity = {
        "examples": [[source.name, share] for source, share in weighted],
        "rows": [source.fingerprint for source, _ in weighted],
        "encoder": encoder_fingerprint,
        "batch_size": batch_size,
        "buckets": list(buckets),
        "most_shapes": most_shapes,
        "seed": seed,
    }
    # One shard only: every process is at the same position.
    return BatchIterator({0: dataset}, identity, prefetch)


def evaluation_batches(
    examples: Mixture,
    encode: Encode,
    *,
    encoder_fingerprint: str,
    batch_size: int,
    buckets: Sequence[int],
    most_shapes: int = 8,
    limit: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    data_dir: str | os.PathLike[str] | None = None,
) -> Iterator[Batch]:
    """Returns one pass over this process's rows, by shape and within a shape by length.

    Args:
      examples: The rows, or pairs (rows, share) whose shares are not used: each source is read once.
      encode: As in `training_batches`.
      encoder_fingerprint: As in `training_batches`.
      batch_size: B, rows in a global batch.
      buckets: As in `training_batches`.
      most_shapes: As in `training_batches`.
      limit: At most so many batches, evenly spread over the pass, so over all lengths; 0 for all.
      process_index: This process.
      process_count: Of so many; must divide B.
      data_dir: Where caches lie.

    Returns:
      Dicts as in `training_batches`; every process gets the same number. Where a shape's rows run out, copies of the
      batch's first row fill up (of a real row, lest a mask leaves nothing to attend to), with `row_mask` 0 and
      `record` -1.

    Raises:
      UserError: as in `training_batches`. Raised here, before the first batch.
    """
    _check(batch_size, process_count, most_shapes)
    rows = _encoded([source for source, _ in _weighted(examples)], encode, encoder_fingerprint, data_dir)
    sources, shapes = _bucketed(rows, check_buckets(buckets), most_shapes, batch_size)
    plan = _pass(sources, len(shapes), batch_size)
    if 0 < limit < len(plan):
        plan = [plan[i] for i in np.linspace(0, len(plan) - 1, limit).round().astype(int)]
    own = _own(batch_size, process_index, process_count)
    return (build_batch(sources, picks[own], shapes[number]) for number, picks in plan)


def _pass(sources: Sequence[Source], shapes: int, batch_size: int) -> list[tuple[int, list[Pick]]]:
    """Returns the batches of one pass: number of the shape, and B picks."""
    sizes = [source.rows.lengths.sum(axis=1) for source in sources]
    plan = []
    for shape in range(shapes):
        members = [
            (number, row) for number, s in enumerate(sources) for row in np.flatnonzero(s.shapes == shape).tolist()
        ]
        members.sort(key=lambda member: sizes[member[0]][member[1]])
        for start in range(0, len(members), batch_size):
            picks = [Pick(number, row, 0) for number, row in members[start : start + batch_size]]
            plan.append((shape, picks + [picks[0]._replace(real=False)] * (batch_size - len(picks))))
    return plan


def _check(batch_size: int, process_count: int, most_shapes: int) -> None:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"batch_size {batch_size} must be a positive multiple of the {process_count} processes")
    if most_shapes < 1:
        raise UserError(f"most_shapes must be at least 1, not {most_shapes}")


def _own(batch_size: int, process_index: int, process_count: int) -> slice:
    share = batch_size // process_count
    return slice(process_index * share, (process_index + 1) * share)


def _weighted(examples: Mixture) -> list[tuple[Examples, float]]:
    pairs = [(examples, 1.0)] if isinstance(examples, Examples) else list(examples)
    if not pairs:
        raise UserError("no examples are named: give a source or pairs (source, share)")
    for source, share in pairs:
        if not (0 < share < float("inf")):
            raise UserError(f"the share of {source.name} must be positive, not {share}: drop the source instead")
    total = sum(share for _, share in pairs)
    return [(source, share / total) for source, share in pairs]


def _encoded(
    sources: Sequence[Examples], encode: Encode, fingerprint: str, data_dir: str | os.PathLike[str] | None
) -> list[EncodedExamples]:
    folder = data_directory(data_dir)
    encoded = [EncodedExamples(source, encode, fingerprint, folder) for source in sources]
    for rows in encoded[1:]:
        if (rows.arrays, rows.scalars) != (encoded[0].arrays, encoded[0].scalars):
            raise ValueError(
                f"the encoder gave {rows.arrays | rows.scalars} for {rows.name}, "
                f"but {encoded[0].arrays | encoded[0].scalars} for {encoded[0].name}"
            )
    return encoded


def _bucketed(
    encoded: Sequence[EncodedExamples], buckets: tuple[int, ...], most_shapes: int, batch_size: int
) -> tuple[list[Source], list[Shape]]:
    for rows in encoded:
        _check_lengths(rows, buckets[-1])
    lengths = np.concatenate([rows.lengths for rows in encoded])
    shapes, numbers = plan_shapes(lengths, buckets, most=most_shapes, smallest=batch_size)
    _log_shapes(encoded, shapes, numbers, lengths)
    borders = list(itertools.accumulate((len(rows) for rows in encoded), initial=0))
    firsts = itertools.accumulate((rows.total for rows in encoded), initial=0)
    return [
        Source(rows, numbers[start:stop], first)
        for rows, start, stop, first in zip(encoded, borders, borders[1:], firsts)
    ], shapes


def _check_lengths(rows: EncodedExamples, longest: int) -> None:
    over = (rows.lengths > longest).any(axis=1)
    if over.any():
        row, column = np.unravel_index(int(rows.lengths.argmax()), rows.lengths.shape)
        raise UserError(
            f"{int(over.sum())} of {len(rows)} rows of {rows.name} are longer than the last bucket {longest} (row "
            f"{rows.records[row]}: '{list(rows.arrays)[column]}' has {rows.lengths[row, column]}): add a bucket, or "
            "truncate when encoding"
        )


def _log_shapes(
    encoded: Sequence[EncodedExamples], shapes: Sequence[Shape], numbers: np.ndarray, lengths: np.ndarray
) -> None:
    counts = np.bincount(numbers, minlength=len(shapes)).tolist()
    cells = sum(count * sum(shape) for count, shape in zip(counts, shapes))
    listed = ", ".join(f"{'x'.join(map(str, shape))}: {count}" for count, shape in zip(counts, shapes))
    log_once(
        f"{', '.join(rows.name for rows in encoded)}: rows by shape ({' x '.join(encoded[0].arrays)}): {listed}; "
        f"{1 - lengths.sum() / max(cells, 1):.0%} padding"
    )
