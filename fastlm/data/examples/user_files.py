"""Rows of the user's files, by random access without holding them.

Notable: opening reads every row once, so whatever is wrong with a file is said before training starts,
and keeps the rows' places (32 bytes each); a row is parsed again when it is asked for. `.gz`, `.bz2` and
`.xz` are unpacked once under the data directory.
"""

import array
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from fastlm.data.documents import SPLITS, check_split, digest
from fastlm.data.examples.base import Examples, Row
from fastlm.data.examples.delimited import DelimitedFormat
from fastlm.data.examples.json_rows import JsonFormat
from fastlm.data.examples.lines import ScannedRow
from fastlm.data.examples.options import FileSpec
from fastlm.data.examples.splitting import Splitter
from fastlm.data.text_files import decode_utf8, files_digest, matching_files, unpacked
from fastlm.errors import UserError


class RowFormat(Protocol):
    """How one kind of file holds rows."""

    fields: tuple[str, ...]

    def scan(self, path: Path, shown: Path) -> Iterator[ScannedRow]:
        """Yields all rows of a file, checked."""

    def parse(self, text: str, where: str) -> Row:
        """Returns the row that the text of a place holds."""


class FileExamples(Examples):
    """The rows of one split of the user's files."""

    def __init__(self, spec: FileSpec, split: str, data_dir: Path) -> None:
        """Reads through the files that the spec's pattern matches.

        Raises:
          UserError: nothing matches, no such split or no row in it, or a row is bad; the message names file and line.
        """
        self.name = f"{spec.label}/{split}"
        check_split(split, (*SPLITS, "all"), spec.label)
        _, self._named = matching_files(spec.pattern, spec.kind)
        self._paths = [unpacked(path, data_dir) for path in self._named]
        self._format: RowFormat = JsonFormat() if spec.kind == "jsonl" else DelimitedFormat(spec)
        total, self._table = self._places(spec, split)
        self._check_some(spec, split, total)
        self.fields = self._format.fields
        self.fingerprint = digest(spec.kind, *self.fields, self._table.tobytes(), files_digest(self._paths))

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Row:
        return self.get([index])[0]

    def get(self, indices: Sequence[int]) -> list[Row]:
        """Returns several rows, opening each file once."""
        rows = []
        with contextlib.ExitStack() as stack:
            files: dict[int, BinaryIO] = {}
            for number, start, stop, line in self._table[list(indices)].tolist():
                if number not in files:
                    files[number] = stack.enter_context(self._paths[number].open("rb"))
                files[number].seek(start)
                text = decode_utf8(files[number].read(stop - start), self._named[number], start)
                rows.append(self._format.parse(text, f"{self._named[number]}:{line}"))
        return rows

    def _places(self, spec: FileSpec, split: str) -> tuple[int, np.ndarray]:
        """Returns how many rows there are, and [rows of the split, 4]: file number, start, stop, line."""
        total, places = 0, array.array("q")
        split_of: Splitter | None = None
        for number, (path, shown) in enumerate(zip(self._paths, self._named)):
            for start, stop, line, row in self._format.scan(path, shown):
                total += 1
                split_of = split_of or Splitter(spec, self._format.fields, str(shown))
                values = [row[name] for name in self._format.fields]
                if split_of(values, f"{shown}:{line}") == split or split == "all":
                    places.extend((number, start, stop, line))
        return total, np.frombuffer(places, np.int64).reshape(-1, 4)

    def _check_some(self, spec: FileSpec, split: str, total: int) -> None:
        if not total:
            raise UserError(f"{spec.label} matches {len(self._paths)} file(s) without a single row")
        if not len(self._table):
            raise UserError(
                f"none of the {total} rows of {spec.label} falls into split '{split}': "
                "use split 'all' with a slice, as in 'all[:10%]'"
            )
