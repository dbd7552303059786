"""TSV and CSV files: rows under a header that names the fields.

Notable: CSV is as Python's csv module and every spreadsheet write it: fields in double quotes may hold
commas, quotes and line ends. TSV has no quoting: a tab always separates, a line end always ends the
row. Every value is text. Files without a header get their names from the spec, ``#columns=a,b``.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from fastlm.data.examples.base import Row
from fastlm.data.examples.lines import BYTE_ORDER_MARK, ScannedRow, TextLines
from fastlm.data.examples.options import FileSpec, check_names
from fastlm.data.examples.splitting import ALIASES
from fastlm.errors import UserError

# The module's own limit of 128 KiB is less than a long document; there is no limit per reader.
csv.field_size_limit(max(csv.field_size_limit(), 1 << 26))


class DelimitedFormat:
    """Reads one source's TSV or CSV files.

    Attributes:
      fields: Names of the columns; empty until the first header is read.
    """

    def __init__(self, spec: FileSpec) -> None:
        self._spec = spec
        self.fields = spec.columns

    def scan(self, path: Path, shown: Path) -> Iterator[ScannedRow]:
        """Yields the rows of a file that messages call `shown`.

        Raises:
          UserError: no UTF-8, a bad header, one that differs from another file's, a row of another length.
        """
        with path.open("rb") as file:
            lines = TextLines(file, shown)
            rows = _READERS[self._spec.kind](lines)
            header_is_due = not self._spec.columns
            while True:
                start, where = lines.offset, f"{shown}:{lines.number + 1}"
                line = lines.number + 1
                values = _next(rows, where)
                if values is None:
                    return
                if not values:
                    continue  # a blank line
                if header_is_due:
                    self._read_header(tuple(values), where)
                    header_is_due = False
                else:
                    yield ScannedRow(start, lines.offset, line, self._row(values, where))

    def parse(self, text: str, where: str) -> Row:
        """Returns the row that `text` holds, which is a row's place read again."""
        values = _next(_READERS[self._spec.kind](iter([text.removeprefix(BYTE_ORDER_MARK)])), where)
        return self._row(values or [], where)

    def _row(self, values: list[str], where: str) -> Row:
        if len(values) != len(self.fields):
            raise UserError(
                f"{where}: {len(values)} values for the {len(self.fields)} columns {', '.join(self.fields)}: "
                "mend or drop the row"
            )
        return dict(zip(self.fields, values))

    def _read_header(self, names: tuple[str, ...], where: str) -> None:
        data = next((name for name in names if name in ALIASES), None)
        if data:
            raise UserError(
                f"{where}: '{data}' is a row's value and no header: name the columns, "
                f"as in '{self._spec.label}#columns=split,source,target'"
            )
        check_names(names, where)
        if len(names) == 1 and any(separator in names[0] for separator in ";\t"):
            raise UserError(f"{where}: one single column '{names[0]:.60}': separate by commas (csv:) or tabs (tsv:)")
        if self.fields and names != self.fields:
            raise UserError(
                f"{where}: columns {', '.join(names)} differ from those of the file before, {', '.join(self.fields)}"
            )
        self.fields = names


def _csv_rows(lines: Iterator[str]) -> Iterator[list[str]]:
    # Strict: else a quote left open would swallow the rest of the file as one field.
    return csv.reader(lines, strict=True)


def _tsv_rows(lines: Iterator[str]) -> Iterator[list[str]]:
    for line in lines:
        line = line.removesuffix("\n").removesuffix("\r")
        yield line.split("\t") if line else []


_READERS = {"tsv": _tsv_rows, "csv": _csv_rows}


def _next(rows: Iterator[list[str]], where: str) -> list[str] | None:
    try:
        return next(rows, None)
    except csv.Error as error:
        raise UserError(f"{where} is no CSV row ({error}): mend its quotes, or use tsv: if it has none") from None
