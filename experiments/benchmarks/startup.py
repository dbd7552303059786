"""Seconds from the start of the process to the first optimizer step, as a user waits for them.

    python -m experiments.benchmarks.startup --config configs/lm_small.py --out=startup.json

Starts `python -m fastlm.train` three times in a folder of its own: with nothing there (the data set is prepared, the
tokenizer trained, everything compiled), with the data but no compiled programs, and with everything. Goal: the last one
under 20 s. About two minutes for lm_small on two quiet cores. Each run is killed at its first step, and its folder
thrown away. Configs whose data this machine has to download or prepare first cannot start in an empty folder.
`python -X importtime -m fastlm.train ...` shows what the imports cost: under 2 s of it, no package more than 0.35.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags

from fastlm import command_line
from fastlm.errors import UserError

FLAGS = flags.FLAGS
FIRST_STEP = "step=1/"
NOTHING, DATA, ALL = "nothing", "data", "data and programs"


@dataclasses.dataclass(frozen=True)
class Start:
    """One start: what the folder held, seconds to the first line (everything is built) and to the first step."""

    cached: str
    built: float
    first_step: float


def measure(command: Sequence[str], environment: Mapping[str, str], cached: str) -> Start:
    """Runs `command` until it prints its first step, then kills it.

    Raises:
      UserError: it ended before that.
    """
    started = time.perf_counter()
    built, lines = 0.0, []
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for line in process.stdout:
            now = time.perf_counter() - started
            built = built or (now if "parameters:" in line else 0.0)
            if line.startswith(FIRST_STEP):
                return Start(cached, built, now)
            lines.append(line)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    raise UserError(f"{' '.join(command)} ended before its first step: {''.join(lines[-1:]).strip()}")


def starts(arguments: Sequence[str], folder: Path) -> list[Start]:
    """Starts training three times with an ever fuller cache in `folder`."""
    environment = os.environ | {
        "FASTLM_CACHE": str(folder / "cache"),
        "FASTLM_DATA": str(folder / "data"),
        "PYTHONUNBUFFERED": "1",
    }
    rows = []
    for cached in (NOTHING, DATA, ALL):
        if cached == DATA:
            shutil.rmtree(folder / "cache" / "compiled", ignore_errors=True)
        workdir = folder / f"run{len(rows)}"  # a fresh one, or the run would resume
        command = [sys.executable, "-m", "fastlm.train", *arguments, f"--workdir={workdir}"]
        rows.append(measure(command, environment, cached))
    return rows


def table(rows: Sequence[Start]) -> str:
    """Returns the rows as Markdown."""
    lines = ["| already there | built, s | first step, s |", "|---|---:|---:|"]
    return "\n".join(lines + [f"| {row.cached} | {row.built:.1f} | {row.first_step:.1f} |" for row in rows])


def define_flags() -> None:
    """Defines the flags; not on import, for benchmarks that stand side by side share names."""
    flags.DEFINE_string("config", "configs/lm_small.py", "what to start; override with --config.section.key=value")
    flags.DEFINE_string("out", "", "JSON file for the rows of the table")


def main() -> None:
    """Measures the three starts, prints the table and writes the rows."""
    overrides = [command_line.PREFIX + change for change in command_line.overrides()]
    with tempfile.TemporaryDirectory() as folder:
        rows = starts([f"--config={FLAGS.config}", *overrides], Path(folder))
    print(table(rows))
    if FLAGS.out:
        Path(FLAGS.out).write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    define_flags()
    command_line.main(main, overridable=True)
