"""Writes a teacher's targets for the rows of a training stream.

Notable: a file is written aside and renamed, so whatever stops a writer leaves whole files only, and the same command
makes what is missing. Writers share files out by their numbers and need not know of each other; since a row's random
numbers follow from its own number (`sparse_targets.row_uniforms`), who writes it changes no byte. The teacher is one
batch ahead of the packing, so that a device works while the host does.
Left out: positions of the stream for each file. A writer reads through the batches of others, which takes the
pipeline's time (millions of tokens/s from cached tokens) and not the teacher's. Sweeping up: a writer that was killed
without a chance to clean leaves a hidden file of the part it was at, and another writer may be at the same.
"""

import dataclasses
import datetime
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.data.batch_iterator import Batch, BatchIterator
from fastlm.data.directory import create_once
from fastlm.data.targets import manifest as manifests
from fastlm.data.targets.files import Writer, rows_in
from fastlm.data.targets.manifest import FILE, Key, Manifest, Part
from fastlm.data.targets.records import Codec, hash_rows, view_of
from fastlm.errors import UserError
from fastlm.ops.sparse_targets import SparseTargets

Teacher = Callable[[Mapping[str, Any]], SparseTargets]


@dataclasses.dataclass(frozen=True)
class Report:
    """What a writer did.

    Attributes:
      rows: that it wrote.
      tokens: of them that have targets.
      bytes: that these take on disk.
      kept: files that were there already.
    """

    rows: int
    tokens: int
    bytes: int
    kept: int

    @property
    def bytes_per_token(self) -> float:
        """On disk."""
        return self.bytes / max(self.tokens, 1)


def write(
    batches: BatchIterator,
    teach: Teacher,
    folder: str | os.PathLike[str],
    key: Key,
    *,
    steps: int,
    steps_per_file: int = 16,
    slices: int = 1,
    slice_index: int = 0,
    writer_index: int = 0,
    writer_count: int = 1,
    say: Callable[[str], None] = print,
    every: float = 10.0,
) -> Report:
    """Makes the targets of the first `steps` batches, as far as they are not there yet.

    Args:
      batches: one slice of every batch, at their beginning: of one process for `slices` of 1, and otherwise of process
        `slice_index` of `slices`.
      teach: from a batch, with `row` [B] int32 (the rows' numbers in the stream) added, to the targets of its rows,
        [B, T, K] and [B, T], in arrays that this process can read. Where the batch has a `loss_mask` [B, T] of 0,
        nothing is kept.
      folder: where the files go; it may hold some of them already.
      key: what the targets are of.
      steps: batches of the run that they are for; rounded up to whole files.
      steps_per_file: batches of a file, which is what is lost when a writer stops; a folder keeps the first one's.
      slices: processes that each have a slice of every batch; must divide B.
      slice_index: this process among them.
      writer_index: which share of the files to make.
      writer_count: of so many.
      say: takes a line about how far it is.
      every: seconds between such lines.

    Raises:
      UserError: the folder has targets of something else, the disk is full, the teacher's numbers are not finite.
      ValueError: the teacher's arrays are not of the method that the key names.
      KeyboardInterrupt: Ctrl-C; whole files stay.
    """
    folder = Path(folder)
    if steps < 1 or steps_per_file < 1 or not 0 <= writer_index < writer_count or not 0 <= slice_index < slices:
        raise UserError(
            f"targets of {steps} steps, {steps_per_file} in a file, by writer {writer_index} of {writer_count} and "
            f"slice {slice_index} of {slices}: numbers must be at least 1, indices below their count"
        )
    if key.batch_size % slices:
        raise UserError(f"a batch of {key.batch_size} rows has no {slices} equal slices; change one of them")
    manifests.check_data(folder, key, batches.identity)
    manifest = _claim(folder, Manifest(key, _peek(batches), 0, steps_per_file, slices), steps)
    own = [part for part in manifest.parts(steps) if part.slice == slice_index][writer_index::writer_count]
    missing = [part for part in own if rows_in(folder / part.name) != part.rows]
    progress = _Progress(sum(part.rows for part in missing), say, every)
    stream = _Stream(batches, manifest, slice_index)
    try:
        for part in missing:
            (folder / part.name).unlink(missing_ok=True)  # one that is cut
            stream.skip_to(part.start)
            create_once(folder / part.name, lambda path, part=part: _write_part(path, part, stream, teach, progress))
            progress.finish((folder / part.name).stat().st_size)
    except KeyboardInterrupt:
        say(f"{folder}: stopped; {progress.done()}; the same command goes on")
        raise
    report = Report(progress.rows, progress.tokens, progress.bytes, len(own) - len(missing))
    say(f"{folder}: {len(own)} files of targets, {report.kept} of them from before; {progress.done()}")
    return report


def _claim(folder: Path, wanted: Manifest, steps: int) -> Manifest:
    """Makes the folder that of these targets, or goes on with it."""
    if not (folder / FILE).exists():
        wanted.save(folder)
    found = manifests.load(folder)
    manifests.check_key(folder, found.key, wanted.key)
    manifests.check_view(folder, found.view, wanted.view)
    if found.slices != wanted.slices:
        raise UserError(
            f"{folder}: the targets there are written by {found.slices} processes together, not {wanted.slices}; use "
            "as many, or another folder"
        )
    return found.extended(folder, steps)


def _peek(batches: BatchIterator) -> tuple[str, ...]:
    state = batches.get_state()
    view = view_of(next(batches))
    batches.set_state(state)
    return view


class _Stream:
    """This process's batches with their numbers."""

    def __init__(self, batches: BatchIterator, manifest: Manifest, slice_index: int) -> None:
        self.manifest, self._batches, self._step = manifest, batches, 0
        self._first = slice_index * manifest.rows_per_slice

    def skip_to(self, step: int) -> None:
        """Reads up to a step."""
        while self._step < step:
            next(self)

    def __next__(self) -> tuple[Batch, np.ndarray]:
        """Returns a batch and its rows' numbers."""
        batch = next(self._batches)
        first = self._step * self.manifest.key.batch_size + self._first
        self._step += 1
        return batch, np.arange(first, first + self.manifest.rows_per_slice, dtype=np.int32)


class _Progress:
    """Counts, and says so from time to time."""

    def __init__(self, total: int, say: Callable[[str], None], every: float) -> None:
        self.rows = self.tokens = self.bytes = self._sized = 0
        self._total, self._say, self._every = total, say, every
        self._start = self._said = time.perf_counter()

    def add(self, rows: int, tokens: int) -> None:
        """Counts rows that were written."""
        self.rows, self.tokens = self.rows + rows, self.tokens + tokens
        now = time.perf_counter()
        if now - self._said >= self._every:
            self._said = now
            left = (now - self._start) / self.rows * (self._total - self.rows)
            self._say(f"targets: {self.done()}, {datetime.timedelta(seconds=round(left))} left")

    def finish(self, size: int) -> None:
        """Counts a file that is whole."""
        self.bytes, self._sized = self.bytes + size, self.tokens

    def done(self) -> str:
        """Returns how much was written, and how fast."""
        pace = self.tokens / max(time.perf_counter() - self._start, 1e-9)
        size = f", {self.bytes / max(self._sized, 1):.1f} bytes/token" if self.bytes else ""
        return f"{self.rows}/{self._total} rows, {pace:.0f} tok/s{size}"


def _write_part(path: Path, part: Part, stream: _Stream, teach: Teacher, progress: _Progress) -> None:
    key, view = stream.manifest.key, stream.manifest.view
    codec = Codec(key.sampler, key.vocab_size, len(view))
    file = Writer(path)
    try:
        ahead = None
        for step in range(part.start, part.stop + 1):
            now = ahead
            if step < part.stop:
                batch, numbers = next(stream)
                ahead = batch, numbers, teach(batch | {"row": numbers})
            if now is not None:
                progress.add(*_put(file, codec, view, *now))
    finally:
        file.close()
    if rows_in(path) != part.rows:
        raise UserError(f"{path.parent / part.name}: could not be written; check space and permissions")


def _put(
    file: Writer, codec: Codec, view: tuple[str, ...], batch: Batch, numbers: np.ndarray, targets: SparseTargets
) -> tuple[int, int]:
    """Appends the rows of a batch; returns how many rows, and how many tokens of them have targets."""
    named = ((field.name, getattr(targets, field.name)) for field in dataclasses.fields(targets))
    arrays = {f"target_{name}": np.asarray(value) for name, value in named}
    _check(arrays, codec, numbers)
    mask = batch.get("loss_mask")
    kept = np.ones(arrays["target_best"].shape, bool)
    if mask is not None and mask.shape == kept.shape:
        kept = mask > 0
        arrays = {name: np.where(kept[..., None] if a.ndim == 3 else kept, a, 0) for name, a in arrays.items()}
    for index, hashes in enumerate(hash_rows(batch, view)):
        file.write(codec.encode(hashes, {name: array[index] for name, array in arrays.items()}))
    return len(numbers), int(kept.sum())


def _check(arrays: Mapping[str, np.ndarray], codec: Codec, numbers: np.ndarray) -> None:
    rows, slots, shape = len(numbers), codec.slots, arrays["target_best"].shape
    for name, array in arrays.items():
        wanted = (*shape, slots) if name in ("target_ids", "target_weights") else shape
        if array.shape != wanted or shape[:1] != (rows,):
            raise ValueError(f"the teacher gave {name} of shape {array.shape}, for {rows} rows and {slots} slots")
    highest = max(int(arrays[name].max(initial=0)) for name in ("target_ids", "target_best"))
    if highest >= codec.vocab_size:
        raise ValueError(f"the teacher gave id {highest}, the key names a vocabulary of {codec.vocab_size}")
    for name in ("target_weights", "target_entropy"):
        finite = np.isfinite(arrays[name]).reshape(rows, -1).all(axis=1)
        if not finite.all():
            raise UserError(
                f"the teacher's numbers for row {numbers[np.argmin(finite)]} of the stream are not finite ({name}); "
                "check its weights, or let it compute in float32"
            )
