"""The user's JSON-lines files: one document per line, in a named field.

Notable: random access without holding the text. Opening scans for line ends only (an int64 per
line); a line is parsed when it is asked for, and a bad one is named as file:line. Compressed files have
no random access, so they are unpacked once under the data directory. Splits are by a hash of path
and line number, about 5% test and 5% validation.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.data.documents import SPLITS, Documents, check_split, digest
from fastlm.data.text_files import decode_utf8, files_digest, hashed_split, matching_files, unpacked
from fastlm.errors import UserError, nearest

_CHUNK = 1 << 24


class JsonLines(Documents):
    """Documents that are lines of JSON objects."""

    def __init__(self, pattern: str, split: str, *, field: str = "text", data_dir: Path) -> None:
        """Indexes the lines of the files that `pattern` matches.

        Raises:
          UserError: nothing matches, no line has text, or no such split.
        """
        self.name = f"jsonl:{pattern}/{split}"
        self._field = field
        check_split(split, (*SPLITS, "all"), f"jsonl:{pattern}")
        root, paths = matching_files(pattern, "jsonl")
        self._named = paths
        self._paths = [unpacked(path, data_dir) for path in paths]
        table = [_lines(path, number) for number, path in enumerate(self._paths)]
        # [documents, 4]: file number, start and stop offset, line number from 1.
        self._table = np.concatenate(table)
        if not len(self._table):
            raise UserError(f"jsonl:{pattern} matches {len(paths)} file(s) without a single line")
        if split != "all":
            keys = [path.relative_to(root).as_posix() for path in paths]
            chosen = [hashed_split(f"{keys[file]}:{line}") == split for file, _, _, line in self._table.tolist()]
            total, self._table = len(self._table), self._table[np.array(chosen)]
            if not len(self._table):
                raise UserError(
                    f"none of the {total} lines of jsonl:{pattern} falls into split '{split}': "
                    "use split 'all' with a slice, as in 'all[:10%]'"
                )
        self.num_bytes = int((self._table[:, 2] - self._table[:, 1]).sum())
        self.fingerprint = digest(field, self._table.tobytes(), files_digest(self._paths))

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> str:
        file, start, stop, line = self._table[index].tolist()
        with self._paths[file].open("rb") as lines:
            lines.seek(start)
            text = decode_utf8(lines.read(stop - start), self._named[file], start)
        return _field_of(text, self._field, f"{self._named[file]}:{line}")


def _field_of(line: str, field: str, where: str) -> str:
    record = parse_object(line, where)
    if field not in record:
        raise UserError(f"{where} has no field '{field}'{nearest(field, record)}: name another as 'jsonl:GLOB#FIELD'")
    if not isinstance(record[field], str):
        raise UserError(f"{where}: field '{field}' is no text but {type(record[field]).__name__}")
    return check_characters(record[field], field, where)


def parse_object(line: str, where: str) -> dict[str, Any]:
    """Returns the JSON object of a line.

    Raises:
      UserError: there is none; `where` is its file and line.
    """
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is no JSON ({error.msg} at column {error.colno}): mend or drop the line") from None
    if not isinstance(record, dict):
        raise UserError(f"{where} is no JSON object but a {type(record).__name__}: each line must be {{...}}")
    return record


def check_characters(text: str, field: str, where: str) -> str:
    """Returns `text` if every character of it can be encoded.

    Raises:
      UserError: JSON escapes made half a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where}: field '{field}' has half a surrogate pair (\\ud800-\\udfff), which is no character"
        ) from None
    return text


def _lines(path: Path, number: int) -> np.ndarray:
    """Returns the [lines, 4] table of one file, blank lines left out."""
    ends, offset = [], 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + offset)
            offset += len(chunk)
            last = chunk[-1:]
        stops = np.concatenate([*ends, [] if not offset or last == b"\n" else [offset]]).astype(np.int64)
    starts = np.concatenate([[0], stops[:-1] + 1]).astype(np.int64) if len(stops) else stops
    table = np.stack([np.full_like(starts, number), starts, stops, np.arange(1, len(starts) + 1)], axis=1)
    return table[stops - starts > 1]  # one byte can be no JSON object: blank, or the \r of a blank line
