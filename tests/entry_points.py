"""Commands as a user types them, run in this process: executed as `__main__`, their flags removed afterwards."""

import contextlib
import io
import re
import runpy
import sys
import threading
from typing import NamedTuple

from absl import flags

NOTICE = re.compile(r"I\d{4} .*(tokenizing|preparing) ")


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


def call(entry, *arguments):
    """Runs `python -m fastlm.<entry> <arguments>`, or `python -m experiments.<name> ...`, in this process."""
    module = entry if entry.startswith("experiments.") else f"fastlm.{entry}"
    out, err = io.StringIO(), io.StringIO()
    defined, argv, status = set(flags.FLAGS), sys.argv, 0
    hooks = sys.unraisablehook, threading.excepthook
    sys.argv = [entry, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.argv = argv
        sys.unraisablehook, threading.excepthook = hooks
        for name in set(flags.FLAGS) - defined:
            if re.search(rf"experiments[./]|fastlm/{entry}\.py$", flags.FLAGS.find_module_defining_flag(name)):
                delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
    return Outcome(status, out.getvalue(), err.getvalue())


def refuses(message, entry, *arguments):
    """Asserts that a command ends in one error line that contains `message`."""
    outcome = call(entry, *arguments)
    lines = [line for line in outcome.err.splitlines() if line.strip() and not NOTICE.match(line)]
    assert outcome.status == 2, outcome
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert message in lines[0]
