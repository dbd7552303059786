"""Fields of rows as documents, for what is trained on text alone: a tokenizer for both languages of pairs."""

from collections.abc import Iterator, Sequence

from fastlm.data.documents import Documents, digest
from fastlm.data.examples.base import Examples, Row
from fastlm.errors import UserError, nearest

_SAMPLED = 256
_READ_AT_ONCE = 512


class FieldTexts(Documents):
    """The texts of some fields, row by row."""

    def __init__(self, examples: Examples, fields: Sequence[str]) -> None:
        """Chooses fields of `examples`.

        Raises:
          UserError: there is no such field, or it holds numbers.
        """
        self._examples, self._fields = examples, tuple(fields)
        for field in fields:
            if field not in examples.fields:
                raise UserError(
                    f"{examples.name} has no field '{field}'{nearest(field, examples.fields)} "
                    f"(it has: {', '.join(examples.fields)})"
                )
        self.name = f"{examples.name}#{'+'.join(fields)}"
        self.fingerprint = digest(examples.fingerprint, *fields)
        # An estimate from rows spread over all; sizes decide only what is cached.
        count = len(self)
        sample = [self[index].encode() for index in range(0, count, max(1, count // _SAMPLED))]
        self.num_bytes = sum(map(len, sample)) * count // max(len(sample), 1)

    def __len__(self) -> int:
        return len(self._examples) * len(self._fields)

    def __getitem__(self, index: int) -> str:
        row, field = divmod(index, len(self._fields))
        return self._text(self._examples[row], self._fields[field])

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self._examples), _READ_AT_ONCE):
            for row in self._examples.get(range(start, min(start + _READ_AT_ONCE, len(self._examples)))):
                yield from (self._text(row, field) for field in self._fields)

    def _text(self, row: Row, field: str) -> str:
        value = row[field]
        if not isinstance(value, str):
            raise UserError(f"field '{field}' of {self._examples.name} holds numbers, no text")
        return value
