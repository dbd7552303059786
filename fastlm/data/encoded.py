"""Rows of fields as arrays: encoded once by a task's function, and memory-mapped.

Notable: what a row becomes (which fields, which special tokens, what is cut off) is the task's affair; it
gives a function and that function's fingerprint. The arrays of all rows lie in one flat file per field, named
by the fingerprints of rows and encoder, so that a second start reads nothing but offsets; how many rows were cut
lies beside them, and is said at every start. Left out: threads.
Tokenizing 20,000 short pairs takes two seconds of one core; two threads gained a tenth.
"""

import collections
import contextlib
import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastlm.data.directory import create_once
from fastlm.data.documents import digest
from fastlm.data.examples import Examples, Row
from fastlm.errors import UserError

Encode = Callable[[Row], Mapping[str, Any] | None]
"""From a row to 1-D arrays and scalars by name, always the same names, and `CUT`; None drops the row."""

CUT = "cut"
"""Where an encoder may say what of a row did not fit: one text for each limit. They are counted, and not kept."""

ADDED = ("row_mask", "record", "epoch")
"""Names that batches add, which no encoder may use (nor a name ending in `_length`)."""

_FORMAT = "encoded rows 1"
_READ_AT_ONCE = 512
_MANIFEST = "fields.json"
_logger = logging.getLogger(__name__)


@functools.cache
def log_once(message: str, level: int = logging.INFO) -> None:
    """Logs a message the first time; each evaluation opens the same rows again."""
    _logger.log(level, message)


class EncodedExamples:
    """Random access to encoded rows; rows that were dropped are not among them.

    Attributes:
      name: Of the examples.
      fingerprint: Hex digest of examples and encoder.
      arrays: Names of the 1-D arrays, sorted, with their types (int32 or float32).
      scalars: Names of the scalars, sorted, with their types.
      records: [rows] int64, the number of the example that each row was.
      dropped: How many examples the encoder dropped.
      total: How many examples there were.
      cut: How many rows the encoder cut, by limit; empty too if the cache is from before that was counted.
    """

    def __init__(self, examples: Examples, encode: Encode, encoder_fingerprint: str, data_dir: Path) -> None:
        """Opens the cache of these rows, encoding them first if there is none.

        Raises:
          UserError: the encoder dropped every row, or the cache cannot be written.
          ValueError: the encoder gave something else than equally named 1-D arrays and scalars of numbers.
        """
        self.name, self.total = examples.name, len(examples)
        self.fingerprint = digest(_FORMAT, examples.fingerprint, encoder_fingerprint)
        self._folder = data_dir / "encoded" / self.fingerprint
        create_once(self._folder, lambda folder: _write(folder, examples, encode))
        self._open()
        if self.dropped:
            log_once(f"{self.name}: {self.dropped} of {self.total} rows dropped by the encoder")
        if self.cut:
            told = (f"{count} of {self.total} rows are cut: {limit}" for limit, count in self.cut.items())
            log_once(f"{self.name}: {'; '.join(told)}", logging.WARNING)

    def __len__(self) -> int:
        return len(self.records)

    def array(self, name: str, row: int) -> np.ndarray:
        """Returns a row's array, [length], as a view of the mapped file."""
        offsets = self._offsets[name]
        return self._values[name][offsets[row] : offsets[row + 1]]

    def scalar(self, name: str, row: int) -> np.generic:
        """Returns a row's scalar."""
        return self._values[name][row]

    @property
    def lengths(self) -> np.ndarray:
        """[rows, arrays] int64: the length of each array, in the order of `arrays`."""
        return np.stack([np.diff(self._offsets[name]) for name in self.arrays], axis=1)

    def _open(self) -> None:
        fields = json.loads((self._folder / _MANIFEST).read_text())
        self.arrays: dict[str, str] = fields["arrays"]
        self.scalars: dict[str, str] = fields["scalars"]
        self.cut: dict[str, int] = fields.get("cut", {})
        self.records = np.load(self._folder / "records.npy")
        self.dropped = self.total - len(self.records)
        self._values = {
            name: _mapped(self._folder / _file(number), dtype)
            for number, (name, dtype) in enumerate((self.arrays | self.scalars).items())
        }
        self._offsets = {
            name: np.concatenate([[0], np.cumsum(np.load(self._folder / _lengths_file(number)), dtype=np.int64)])
            for number, name in enumerate(self.arrays)
        }


class _Writer:
    """Appends rows to one file per field; the first row says which fields there are."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self.arrays: dict[str, str] = {}
        self.scalars: dict[str, str] = {}
        self._cut: collections.Counter[str] = collections.Counter()
        self._files: dict[str, BinaryIO] = {}
        self._lengths: dict[str, list[int]] = {}

    def add(self, row: Mapping[str, Any], where: str) -> None:
        self._cut.update(row.get(CUT, ()))
        named = sorted((name, value) for name, value in row.items() if name != CUT)
        values = {name: _number_array(value, f"{where}: '{name}'") for name, value in named}
        if not self._files:
            self._begin(values, where)
        if values.keys() != self._files.keys():
            raise ValueError(f"{where}: the encoder gave {sorted(values)}, but {sorted(self._files)} before")
        for name, value in values.items():
            expected = self.arrays.get(name) or self.scalars[name]
            # An empty list has no type of its own; a whole number may stand where fractions do.
            fits = not value.size or value.dtype.name in (expected, "int32")
            if value.ndim != (name in self.arrays) or not fits:
                raise ValueError(f"{where}: '{name}' is {value.ndim}-D {value.dtype}, but was {expected} before")
            self._files[name].write(value.astype(expected).tobytes())
            if value.ndim:
                self._lengths[name].append(len(value))

    def finish(self, records: list[int]) -> None:
        """Writes what is known at the end."""
        for number, name in enumerate(self.arrays):
            np.save(self._folder / _lengths_file(number), np.array(self._lengths[name], np.int32))
        np.save(self._folder / "records.npy", np.array(records, np.int64))
        fields = {"arrays": self.arrays, "scalars": self.scalars, "cut": self._cut}
        (self._folder / _MANIFEST).write_text(json.dumps(fields))

    def _begin(self, values: Mapping[str, np.ndarray], where: str) -> None:
        taken = [name for name in values if name in ADDED or name.endswith("_length")]
        if taken:
            raise ValueError(f"{where}: batches add names like {taken[0]!r} themselves: rename the encoder's")
        if not any(value.ndim for value in values.values()):
            raise ValueError(f"{where}: the encoder gave {sorted(values)}, with no 1-D array among them")
        self.arrays = {name: value.dtype.name for name, value in values.items() if value.ndim}
        self.scalars = {name: value.dtype.name for name, value in values.items() if not value.ndim}
        names = self.arrays | self.scalars
        paths = [self._folder / _file(number) for number in range(len(names))]
        self._files = {name: self._stack.enter_context(path.open("wb")) for name, path in zip(names, paths)}
        self._lengths = {name: [] for name in self.arrays}


def _write(folder: Path, examples: Examples, encode: Encode) -> None:
    _logger.info("encoding %s (%d rows), once", examples.name, len(examples))
    folder.mkdir()
    records = []
    with contextlib.ExitStack() as stack:
        writer = _Writer(folder, stack)
        for record, row in _numbered(examples):
            encoded = encode(row)
            if encoded is not None:
                writer.add(encoded, f"row {record} of {examples.name}")
                records.append(record)
    if not records:
        raise UserError(f"the encoder dropped all {len(examples)} rows of {examples.name}: check the fields it reads")
    writer.finish(records)


def _numbered(examples: Examples) -> Iterator[tuple[int, Row]]:
    for start in range(0, len(examples), _READ_AT_ONCE):
        numbers = range(start, min(start + _READ_AT_ONCE, len(examples)))
        yield from zip(numbers, examples.get(numbers))


def _number_array(value: Any, where: str) -> np.ndarray:
    """Returns a value as an int32 or float32 array of at most one axis."""
    array = np.asarray(value)
    if array.ndim > 1 or array.dtype.kind not in "biuf":
        raise ValueError(f"{where} is {array.ndim}-D {array.dtype}, and neither a number nor a 1-D array of numbers")
    if array.dtype.kind == "f" and (array.size or isinstance(value, np.ndarray)):
        return array.astype(np.float32)
    if array.size and (array.min() < -(1 << 31) or array.max() >= 1 << 31):
        raise ValueError(f"{where} has a number beyond 32 bits")
    return array.astype(np.int32)


def _mapped(path: Path, dtype: str) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.asarray(np.memmap(path, dtype, mode="r")) if path.stat().st_size else np.empty(0, dtype)


def _file(number: int) -> str:
    return f"values_{number}.bin"


def _lengths_file(number: int) -> str:
    return f"lengths_{number}.npy"
