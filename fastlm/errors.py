"""The one exception meant for the person at the keyboard.

Every mistake a user can make (a misspelt key, a missing file, a mesh that does not fit) ends as a
`UserError` whose message is one line: what is wrong, where, and what to do about it. Entry points
print it without a stack trace (`exit_on_user_error`). Anything else that escapes is a bug of ours
and keeps its stack. This module sits below every floor and imports nothing of fastlm.
"""

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator


class UserError(Exception):
    """A mistake the user can mend; `str(error)` is one line that says how."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the valid name closest to `name`, or ``""``."""
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def first_line(error: BaseException) -> str:
    """Returns the first line of what an error says, or its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Prints a `UserError` as one line on stderr and exits with status 2."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
