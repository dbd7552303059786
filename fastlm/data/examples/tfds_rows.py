"""Rows of data sets prepared by TensorFlow Datasets, read from disk without TensorFlow.

Notable: every feature that is a text or a number is a field, nested ones as ``answers/text``. Of a
sequence the first element is taken (and of several texts all, see `base.every`); of an empty one "" or -1 (an
unanswerable question has no answer and starts nowhere). Images, and other whole numbers of a fixed shape, are texts of
numbers in row order, "0 255 17": the tokenizer kind "numbers" reads them. Colours become gray. Other features of
several dimensions are left out, and logged.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastlm.data.documents import check_split, digest
from fastlm.data.examples.base import Examples, Row, every
from fastlm.data.tfds_documents import open_builder
from fastlm.errors import UserError

_logger = logging.getLogger(__name__)


_GRAY = (0.299, 0.587, 0.114)  # how bright red, green and blue are (ITU-R BT.601)


class _Field(NamedTuple):
    """Where a field's value lies in a record; `empty` stands for an empty sequence's, None for a plain value."""

    path: tuple[str, ...]
    empty: str | int | None
    is_image: bool = False

    @property
    def name(self) -> str:
        return "/".join(self.path)


class TfdsExamples(Examples):
    """The rows of one split of a prepared data set."""

    def __init__(self, folder: Path, source: str, split: str) -> None:
        """Opens `split` of the data set in `folder` (which holds `dataset_info.json`).

        Raises:
          UserError: not in a format with random access, no such split, no rows, no text or number in them.
        """
        self._folder, self._split = folder, split
        self._opened: Any = None
        builder = open_builder(folder, source)
        check_split(split, builder.info.splits, source)
        info = builder.info.splits[split]
        if not info.num_examples:
            raise UserError(f"split '{split}' of '{source}' in {folder} is empty: prepare the data set again")
        self._kept = _fields(builder.info.features, source)
        self._length = info.num_examples
        self.name = f"{source}/{split}"
        self.fields = tuple(field.name for field in self._kept)
        # The builder's own name and version, not the bytes on disk: compression differs between machines.
        self.fingerprint = digest("rows", builder.info.full_name, split, f"{self._length} {info.num_bytes}")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Row:
        return self.get([index])[0]

    def get(self, indices: Sequence[int]) -> list[Row]:
        """Returns several rows, in half the time of one by one."""
        if self._opened is None:
            self._opened = open_builder(self._folder, self.name).as_data_source(split=self._split)
        records = self._opened.__getitems__(list(indices)) if len(indices) else []
        return [self._row(index, record) for index, record in zip(indices, records)]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}  # readers hold file handles

    def _row(self, index: int, record: Mapping[str, Any]) -> Row:
        try:
            row = {field.name: _value(record, field) for field in self._kept}
            lists = {field.name: _at(record, field) for field in self._kept if field.empty == ""}
            texts = {every(name): tuple(map(_plain, values)) for name, values in lists.items() if len(values) > 1}
            return row | texts
        except UnicodeDecodeError as error:
            raise UserError(
                f"record {index} of {self.name} is not valid UTF-8 at byte {error.start}: prepare the data set again"
            ) from None


def _fields(features: Any, source: str) -> list[_Field]:
    """Returns what of a data set's features can be a field, by name; logs what cannot."""
    found = list(_leaves((), features.shape, features.np_dtype))
    kept = [
        _Field(path, None if shape == () else _empty(dtype))
        for path, shape, dtype in found
        if shape in ((), (None,)) and np.dtype(dtype).kind in "OSUbiuf"
    ]
    kept += [
        _Field(path, None, is_image=True)
        for path, shape, dtype in found
        if shape and None not in shape and np.dtype(dtype).kind in "iu"
    ]
    kept.sort(key=lambda field: field.path)
    left_out = sorted({"/".join(path) for path, _, _ in found} - {field.name for field in kept})
    if not kept:
        raise UserError(f"data set '{source}' has no text or number in its rows, only {', '.join(left_out)}")
    if left_out:
        _logger.info("left out of the fields of %s, being no text or number: %s", source, ", ".join(left_out))
    return kept


def _leaves(path: tuple[str, ...], shapes: Any, dtypes: Any) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    if not isinstance(shapes, Mapping):
        yield path, shapes, dtypes
        return
    for name in shapes:
        yield from _leaves((*path, name), shapes[name], dtypes[name])


def _empty(dtype: Any) -> str | int:
    return "" if np.dtype(dtype).kind in "OSU" else -1


def number_text(values: np.ndarray) -> str:
    """Returns whole numbers as text in row order; of an image with three colours [H, W, 3] how bright each pixel is."""
    if values.ndim == 3 and values.shape[-1] == len(_GRAY):
        values = np.round(values @ np.array(_GRAY)).astype(int)
    return " ".join(map(str, values.ravel().tolist()))


def _at(record: Mapping[str, Any], field: _Field) -> Any:
    value: Any = record
    for name in field.path:
        value = value[name]
    return value


def _value(record: Mapping[str, Any], field: _Field) -> str | int | float:
    value = _at(record, field)
    if field.is_image:
        return number_text(np.asarray(value))
    if field.empty is not None:
        value = value[0] if len(value) else field.empty
    return _plain(value)


def _plain(value: Any) -> str | int | float:
    value = value.item() if isinstance(value, (np.generic, np.ndarray)) else value
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return int(value) if isinstance(value, bool) else value
