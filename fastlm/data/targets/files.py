"""The array_record files that targets lie in: one record a row, compressed one by one, read in any order.

Notable: a file is padded to blocks of 64 KiB and its index takes another, so small files waste what large ones do not:
a megabyte or more is a good size.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from fastlm.errors import UserError

# A level of 3 takes a third of the time and 2% more room, one of 19 ten times the time and 4% less.
_WRITE = "group_size:1,zstd:9"
_READ = "readahead_buffer_size:0,max_parallelism:0"
ERRORS = (OSError, RuntimeError, ValueError, IndexError)
"""What array_record raises."""


def reader(path: Path) -> ArrayRecordReader:
    """Opens a file; what is wrong with it is said when it is read or closed, by one of `ERRORS`."""
    return ArrayRecordReader(str(path), _READ)


def rows_in(path: Path) -> int:
    """Returns how many rows can be read from a file, 0 if it is missing or cut."""
    if not path.exists():
        return 0
    try:
        opened = reader(path)
        rows = opened.num_records()
        opened.close()
        return rows
    except ERRORS:
        return 0


class Writer:
    """Writes a file; a full disk is a `UserError`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer = self._tried(lambda: ArrayRecordWriter(str(path), _WRITE))

    def write(self, record: bytes) -> None:
        """Appends a record."""
        self._tried(lambda: self._writer.write(record))

    def close(self) -> None:
        """Writes the index; a file without it cannot be read."""
        self._tried(self._writer.close)

    def _tried(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except ERRORS as error:
            raise UserError(
                f"{self._path.parent}: could not be written ({first_line(error)}); check space and permissions"
            ) from None


def first_line(error: Exception) -> str:
    """Returns what an error says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
