"""Which split a row of the user's files belongs to.

Notable: a field `split` decides where there is one. Otherwise a hash does, of the group's name (all
rows of a film, an author, a page stay together, so that nothing about a test row can be learned from
its siblings) or, without groups, of the whole row (equal rows stay together): 10% test, 10%
validation. Adding rows moves no other row.
"""

import zlib
from collections.abc import Sequence

from fastlm.data.documents import SPLITS
from fastlm.data.examples.options import FileSpec
from fastlm.errors import UserError, nearest

FIELD = "split"
ALIASES = {split: split for split in SPLITS} | {"dev": "validation", "valid": "validation", "val": "validation"}


class Splitter:
    """Names the split of each row of one source."""

    def __init__(self, spec: FileSpec, fields: tuple[str, ...], where: str) -> None:
        """Decides by what to split rows of `fields`; `where` is the file whose fields they are.

        Raises:
          UserError: the group's field is missing, or there is a field `split` besides.
        """
        if spec.group and spec.group not in fields:
            raise UserError(
                f"{where} has no field '{spec.group}' to group by{nearest(spec.group, fields)} "
                f"(it has: {', '.join(fields)})"
            )
        if spec.group and FIELD in fields:
            raise UserError(f"{where} has a field '{FIELD}', which decides: drop 'group={spec.group}'")
        self._split = fields.index(FIELD) if FIELD in fields else None
        self._group = fields.index(spec.group) if spec.group else None

    def __call__(self, values: Sequence[object], where: str) -> str:
        """Returns the split of a row by its values, in the order of fields.

        Raises:
          UserError: its field `split` names none; `where` is its file and line.
        """
        if self._split is not None:
            return _named(str(values[self._split]), where)
        key = str(values[self._group]) if self._group is not None else "\x1f".join(map(str, values))
        return {0: "test", 1: "validation"}.get(zlib.crc32(key.encode()) % 10, "train")


def _named(value: str, where: str) -> str:
    split = ALIASES.get(value.strip().lower())
    if split is None:
        raise UserError(f"{where}: '{value:.40}' is no split{nearest(value, ALIASES)} (one of: {', '.join(ALIASES)})")
    return split
