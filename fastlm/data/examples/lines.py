"""Lines of a user's file as text, with their places in it."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fastlm.data.examples.base import Row
from fastlm.errors import UserError

BYTE_ORDER_MARK = "\ufeff"


class ScannedRow(NamedTuple):
    """A row and its place: bytes start..stop, from line `line` (counted from 1) on."""

    start: int
    stop: int
    line: int
    row: Row


class TextLines:
    """An iterator over lines which knows how far it has read; the csv module takes lines as it needs them.

    Attributes:
      offset: Bytes read so far.
      number: Lines read so far.
    """

    def __init__(self, file: BinaryIO, shown: Path) -> None:
        """Reads `file`, which messages call `shown`."""
        self._file, self._shown = file, shown
        self.offset = self.number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        """Returns a line with its end.

        Raises:
          UserError: it is not valid UTF-8.
        """
        data = next(self._file)
        self.number += 1
        self.offset += len(data)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self._shown}:{self.number} is not valid UTF-8 at byte {error.start} of the line "
                f"(0x{data[error.start]:02x}): convert it (iconv -f LATIN1 -t UTF-8) or leave it out of the glob"
            ) from None
        return text.removeprefix(BYTE_ORDER_MARK) if self.number == 1 else text
