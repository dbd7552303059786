"""Reading config.json, which anyone may have written: every value is checked for its type where it is used.

Notable: a mistake in the file is one line that names file and option. `null` counts as absent, as it
does for transformers.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastlm.errors import UserError, nearest

LARGEST = 2**31 - 1
LARGEST_NUMBER = 3e38
MAX_JSON_BYTES = 50_000_000  # tokenizer_config.json of large vocabularies takes a few


class Options:
    """The options of a config.json, or of a GGUF header, with typed access.

    Attributes:
      values: as in the file.
      where: how messages call the file.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None) -> int:
        """Returns a whole number from 0; without a default it must be there."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST:
            raise self.error(key, f"must be a whole number from 0 to {LARGEST}, not {_shown(value)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Returns a number that float32 holds."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST_NUMBER:
            raise self.error(key, f"must be a number of usual size, not {_shown(value)}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Returns true or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {_shown(value)}")
        return value

    def choice(self, key: str, table: Mapping[str, Any], default: str) -> Any:
        """Returns what `table` has for the name given."""
        value = self._get(key, default)
        if not isinstance(value, str) or value not in table:
            hint = nearest(value, table) if isinstance(value, str) else ""
            raise self.error(key, f"{_shown(value)} is not supported{hint or ', only ' + ', '.join(table)}")
        return table[value]

    def section(self, key: str) -> "Options | None":
        """Returns the options inside an option, or None if it is absent or empty."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(key, f"must be an object, not {_shown(value)}")
        return Options(value, f"{self.where}: {key}") if value else None

    def require(self, accepted: Mapping[str, tuple[Any, ...]]) -> None:
        """Checks that options, where present, have one of the values we can take."""
        for key, values in accepted.items():
            value = self.values.get(key)
            if value is not None and not any(type(value) is type(other) and value == other for other in values):
                allowed = ", ".join(map(_shown, values)) or "nothing"
                raise self.error(key, f"{_shown(value)} is not supported, only {allowed}")

    def error(self, key: str, problem: str) -> UserError:
        """Returns the error for an option."""
        return UserError(f"{self.where}: option '{key}': {problem}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None and default is None:
            hint = nearest(key, self.values) or "; take config.json from the same place as the weights"
            raise UserError(f"{self.where}: option '{key}' is missing{hint}")
        return default if value is None else value


def read_json(path: Path, kind: type = dict) -> Any:
    """Returns the JSON object in a file, or the list if `kind` is that.

    Raises:
      UserError: it cannot be read, is too large, or holds anything else.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path}: too large for a description ({path.stat().st_size} bytes); name the right folder")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the name and the permissions") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: is not valid JSON; the file is damaged: download it again") from None
    if not isinstance(value, kind):
        name = "object" if kind is dict else kind.__name__
        raise UserError(f"{path}: is not a JSON {name}; the file is damaged: download it again")
    return value


def _shown(value: Any) -> str:
    text = " ".join(ascii(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
