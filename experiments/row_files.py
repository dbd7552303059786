"""A training set that a command makes from another: JSON lines that `config.data.sources` reads, in whole files.

    FOLDER/settings.json  train-00000.jsonl  train-00001.jsonl  ...  validation.jsonl  test.jsonl

Notable: rows have the fields of the data and one named "split", which any run here understands; only training rows are
made anew, so that validation and test ask for the truth. A file appears whole or not at all: a stopped run goes on with
the next one, and a folder that holds rows of other settings is refused.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastlm.data.examples import Row
from fastlm.errors import UserError
from fastlm.training import workdir_files

SETTINGS = "settings.json"


def pieces(rows: list[Row], size: int) -> Iterator[tuple[int, list[Row]]]:
    """Yields (place of its first row, rows) of each file."""
    for start in range(0, len(rows), size):
        yield start, rows[start : start + size]


def write(
    folder: Path,
    settings: Mapping[str, Any],
    rows: list[Row],
    make: Callable[[int, list[Row]], list[Row]],
    others: Mapping[str, Callable[[], list[Row]]],
) -> int:
    """Writes what is missing; returns how many files it wrote.

    Args:
      settings: "rows_per_file", with whatever else must be the same when a folder is gone on with.
      rows: of the training split.
      make: (place of the first, rows of a file) -> the rows that are written.
      others: the other splits' rows, read only if they are not there yet; written before the training rows.

    Raises:
      UserError: the folder holds rows of other settings, or cannot be written.
    """
    check_settings(folder, settings)
    size, written = settings["rows_per_file"], 0
    for split, read in others.items():  # first: what is wrong with them should not wait for the training rows
        path = folder / f"{split}.jsonl"
        if not path.is_file():
            _save(path, split, read())
            written += 1
    for start, part in pieces(rows, size):
        path = folder / f"train-{start // size:05d}.jsonl"
        if path.is_file():
            continue
        _save(path, "train", make(start, part))
        written += 1
        print(f"{start + len(part)} of {len(rows)} rows", flush=True)
    return written


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Notes in a folder what its rows are made with.

    Raises:
      UserError: they are made with something else, or nobody knows with what.
    """
    path = folder / SETTINGS
    known = path.read_text() if path.is_file() else ""
    if known and json.loads(known) != settings:
        raise UserError(f"{path}: these rows have other settings ({known.strip()}); name another --folder")
    if not known and any(folder.glob("*.jsonl")):
        raise UserError(f"{folder}: holds rows without {SETTINGS}, made by something else; name another --folder")
    workdir_files.write_whole(path, json.dumps(settings) + "\n")


def _save(path: Path, split: str, rows: list[Row]) -> None:
    lines = (json.dumps(row | {"split": split}, ensure_ascii=False) for row in rows)
    workdir_files.write_whole(path, "".join(f"{line}\n" for line in lines))
