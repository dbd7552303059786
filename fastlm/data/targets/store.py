"""Targets of any row, read from their files.

Notable: all files that a run will need are opened once before it starts, for the number of their rows, so that a
cache that was cut short is refused then and not on the second day. While reading, only files of the current steps
stay open.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from fastlm.data.targets import files
from fastlm.data.targets import manifest as manifests
from fastlm.data.targets.manifest import Key, Part
from fastlm.data.targets.records import Codec, Row
from fastlm.errors import UserError


class Store:
    """Random access to the targets of a stream's rows.

    Attributes:
      manifest: what they are of.
      steps: global batches that they are for.
      bytes: that their files take.
    """

    def __init__(self, folder: str | os.PathLike[str], key: Key, steps: int = 0) -> None:
        """Opens the targets that `write` left in a folder.

        Args:
          folder: that of `write`.
          key: what they must be of.
          steps: batches that will be asked for; 0 for all that there are.

        Raises:
          UserError: there are none, they are of something else, too few for `steps`, or files are missing or broken.
        """
        self.folder = Path(folder)
        self.manifest = manifests.load(folder)
        manifests.check_key(folder, self.manifest.key, key)
        self.steps = steps or self.manifest.steps
        if self.steps > self.manifest.steps:
            raise UserError(
                f"{folder}: the cached targets are for {self.manifest.steps} steps, {self.steps} are needed; write the "
                "rest into the same folder, or train for fewer steps"
            )
        self.bytes = self._check_files()
        self._codec = Codec(key.sampler, key.vocab_size, len(self.manifest.view))
        self._open: dict[Part, ArrayRecordReader] = {}

    def __len__(self) -> int:
        """Returns the number of rows; they are counted from 0."""
        return self.steps * self.manifest.key.batch_size

    def get(self, rows: Sequence[int]) -> tuple[np.ndarray, list[Row]]:
        """Returns hashes [rows, view] uint64, and the targets of each row (`records.NAMES` without the batch axis).

        Raises:
          UserError: there is no such row, or its file is broken.
        """
        for row in rows:
            if not 0 <= row < len(self):
                raise UserError(
                    f"{self.folder}: the cached targets end with step {self.steps}, row {row} is beyond; write more "
                    "into the same folder, or train for fewer steps"
                )
        places = [self.manifest.place(row) for row in rows]
        self._keep({part for part, _ in places})
        found = [self._read(part, index) for part, index in places]
        return np.stack([hashes for hashes, _ in found]), [row for _, row in found]

    def close(self) -> None:
        """Closes all files; they are opened again when needed."""
        self._keep(set())

    def _read(self, part: Part, index: int) -> tuple[np.ndarray, Row]:
        path = self.folder / part.name
        try:
            if part not in self._open:
                self._open[part] = files.reader(path)
            (record,) = self._open[part].read([index])
            return self._codec.decode(record)
        except files.ERRORS as error:
            raise UserError(
                f"{path}: row {index} of {part.rows} cannot be read ({files.first_line(error)}); delete the file and "
                "write the targets again, which makes only what is missing"
            ) from None

    def _keep(self, parts: set[Part]) -> None:
        for part in self._open.keys() - parts:
            self._open.pop(part).close()

    def _check_files(self) -> int:
        """Returns the size of all files that are needed."""
        parts = self.manifest.parts(self.steps)
        counts = [files.rows_in(self.folder / part.name) for part in parts]
        short = [number for number, (part, rows) in enumerate(zip(parts, counts)) if rows != part.rows]
        if short:
            first = parts[short[0]]
            there, needed = sum(counts), sum(part.rows for part in parts)
            raise UserError(
                f"{self.folder}: the cached targets are cut short: {there} of {needed} rows are there; {first.name} "
                f"has {counts[short[0]]} of its {first.rows}; write them again, which makes only what is missing"
            )
        return sum((self.folder / part.name).stat().st_size for part in parts)
