"""JSON-lines files: one object a line, the same fields in each.

Notable: nested objects are flattened (``answers/text``), a list gives its first element (see `base.every`), true and
false become 1 and 0. What a row cannot hold (null, an empty list) is an error that names the line.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastlm.data.examples.base import Row, every
from fastlm.data.examples.lines import BYTE_ORDER_MARK, ScannedRow, TextLines
from fastlm.data.json_lines import check_characters, parse_object
from fastlm.errors import UserError


class JsonFormat:
    """Reads one source's JSON-lines files.

    Attributes:
      fields: Names of the fields of the first row; empty until it is read.
    """

    def __init__(self) -> None:
        self.fields: tuple[str, ...] = ()

    def scan(self, path: Path, shown: Path) -> Iterator[ScannedRow]:
        """Yields the rows of a file that messages call `shown`.

        Raises:
          UserError: no UTF-8, no JSON object, other fields than the first row's, a value no row can hold.
        """
        with path.open("rb") as file:
            lines = TextLines(file, shown)
            start = 0
            for text in lines:
                if text.strip():
                    row = self.parse(text, f"{shown}:{lines.number}")
                    yield ScannedRow(start, lines.offset, lines.number, row)
                start = lines.offset

    def parse(self, text: str, where: str) -> Row:
        """Returns the row that a line holds.

        Raises:
          UserError: as `scan`.
        """
        row = flatten(parse_object(text.removeprefix(BYTE_ORDER_MARK), where), where)
        lists = {name: row.pop(name) for name, value in list(row.items()) if isinstance(value, tuple)}
        self.fields = self.fields or tuple(row)
        if row.keys() != set(self.fields):
            raise UserError(
                f"{where} has the fields {', '.join(row) or '(none)'}, but the first row has "
                f"{', '.join(self.fields)}: give every row the same"
            )
        return {name: row[name] for name in self.fields} | lists


def flatten(record: Mapping[str, Any], where: str) -> Row:
    """Returns a nested record as a row: ``a/b`` for field b of a, the first element of a list, and `every` text of it.

    Raises:
      UserError: a value is null, no number or an empty list, or two fields get one name; `where` opens the message.
    """
    row: Row = {}
    for name, value in _leaves("", record, where):
        if name in row:
            raise UserError(f"{where}: two fields are called '{name}': rename one")
        row[name] = value
    return row


def _leaves(name: str, value: Any, where: str) -> Iterator[tuple[str, str | int | float | tuple[str, ...]]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(f"{name}/{key}" if name else key, inner, where)
    elif isinstance(value, list) and value:
        yield from _leaves(name, value[0], where)
        if len(value) > 1 and all(isinstance(text, str) for text in value):
            yield every(name), tuple(check_characters(text, name, where) for text in value)
    else:
        yield name, _scalar(name, value, where)


def _scalar(name: str, value: Any, where: str) -> str | int | float:
    if isinstance(value, str):
        return check_characters(value, name, where)
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    shown = {None: "null"}.get(value, value) if not isinstance(value, list) else "an empty list"
    raise UserError(f"{where}: field '{name}' is {shown}: give every row a text or a number")
