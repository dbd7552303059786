"""What a user's file spec says: ``tsv:GLOB#columns=split,group,en,de``, ``csv:GLOB#group=movie_name``."""

from typing import NamedTuple

from fastlm.errors import UserError, nearest

KINDS = ("tsv", "csv", "jsonl")


class FileSpec(NamedTuple):
    """A parsed spec.

    Attributes:
      kind: One of `KINDS`.
      pattern: The glob.
      group: Field whose value decides a row's split, or "".
      columns: Names of the columns of files without a header row, or nothing.
    """

    kind: str
    pattern: str
    group: str = ""
    columns: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"{self.kind}:{self.pattern}"


def parse_file_spec(spec: str) -> FileSpec | None:
    """Returns the parts of a spec of the user's files, or None for a data set's name.

    Raises:
      UserError: an option after ``#`` is unknown or malformed.
    """
    kind, separator, rest = spec.partition(":")
    if not separator or kind not in KINDS:
        return None
    pattern, _, text = rest.partition("#")
    valid = ("group",) if kind == "jsonl" else ("group", "columns")
    options = {}
    for option in filter(None, text.split("&")):
        name, _, value = option.partition("=")
        if name not in valid or not value:
            raise UserError(
                f"'{option}' in '{spec}' is not understood{nearest(name, valid)} (write "
                f"{kind}:GLOB#{'&'.join(f'{known}=...' for known in valid)})"
            )
        options[name] = value
    columns = tuple(options.get("columns", "").split(",")) if "columns" in options else ()
    if columns:
        check_names(columns, f"'{spec}'")
    return FileSpec(kind, pattern, options.get("group", ""), columns)


def check_names(names: tuple[str, ...], where: str) -> None:
    """Checks names of columns.

    Raises:
      UserError: one is empty or there twice; `where` opens the message.
    """
    for number, name in enumerate(names):
        if not name.strip():
            raise UserError(f"{where}: column {number + 1} of {len(names)} has no name: name every column")
        if name in names[:number]:
            raise UserError(f"{where}: two columns are called '{name}': name every column once")
