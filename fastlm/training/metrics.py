"""Where the numbers of a run go: a JSON-lines file always, TensorBoard and Weights & Biases on request.

Notable: after a resume nothing is doubled. The JSONL file is cut back to the resumed step (which also
drops a line torn by a kill), TensorBoard gets a purge mark, and Weights & Biases continues the run
whose id lies in the working directory. Only process 0 writes. TensorBoard goes through tensorboardX,
which needs no TensorFlow; both packages are imported only when asked for.
Left out: histograms, images, other trackers.
"""

import contextlib
import importlib
import json
import math
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax

from fastlm.errors import UserError

JSONL_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
WANDB_ID_FILE = "wandb_run_id"


class MetricsWriter(Protocol):
    """A place for metrics."""

    def write(self, step: int, metrics: Mapping[str, float], prefix: str = "train") -> None:
        """Records `metrics` of `step` under "<prefix>/<name>"."""

    def close(self) -> None:
        """Brings everything to its place; nothing may be written afterwards."""


def make(
    workdir: str | os.PathLike[str],
    *,
    tensorboard: bool = True,
    wandb: str = "",
    resume_step: int = 0,
    config: Mapping[str, Any] | None = None,
) -> MetricsWriter:
    """Returns the writers of a run as one.

    Args:
      workdir: gets the files; made if it is not there.
      wandb: project name, "" for none.
      resume_step: last step whose metrics count, 0 for a fresh start, which drops what is there.
      config: shown by Weights & Biases.

    Raises:
      UserError: a package that is asked for is not installed, or `workdir` cannot be written.
    """
    if jax.process_index() != 0:
        return CombinedWriter(())
    workdir = Path(workdir)
    with _disk_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    # The optional packages first: when one is missing, no file has been touched.
    modules = [_import("tensorboardX", "logging.tensorboard", "False")] if tensorboard else []
    if wandb:
        _import("wandb", "logging.wandb", "''")
    writers: list[MetricsWriter] = [JsonlWriter(workdir / JSONL_FILE, resume_step)]
    if modules:
        writers.append(TensorBoardWriter(workdir / TENSORBOARD_FOLDER, resume_step))
    if wandb:
        writers.append(WandbWriter(workdir, wandb, resume_step, config or {}))
    return CombinedWriter(writers)


class JsonlWriter:
    """One JSON object a line: step, time (seconds since 1970), then the metrics; flushed each time.

    Numbers that JSON lacks (NaN, infinity) become null.
    """

    def __init__(self, path: Path, resume_step: int = 0):
        self._path = path
        with _disk_errors(path):
            _cut_back(path, resume_step)
            self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float], prefix: str = "train") -> None:
        """See `MetricsWriter`."""
        record: dict[str, Any] = {"step": int(step), "time": round(time.time(), 3)}
        for name, value in metrics.items():
            number = float(value)
            record[f"{prefix}/{name}"] = number if math.isfinite(number) else None
        with _disk_errors(self._path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        """See `MetricsWriter`."""
        with _disk_errors(self._path):
            self._file.close()


class TensorBoardWriter:
    """Event files that TensorBoard reads."""

    def __init__(self, folder: Path, resume_step: int = 0):
        tensorboardx = _import("tensorboardX", "logging.tensorboard", "False")
        self._folder = folder
        purge = resume_step + 1 if resume_step else 0
        # File names go by the second: without a suffix a quick resume would overwrite the file before it.
        suffix = f".{secrets.token_hex(4)}"
        with _disk_errors(folder):
            self._writer = tensorboardx.SummaryWriter(str(folder), purge_step=purge, filename_suffix=suffix)

    def write(self, step: int, metrics: Mapping[str, float], prefix: str = "train") -> None:
        """See `MetricsWriter`."""
        with _disk_errors(self._folder):
            for name, value in metrics.items():
                self._writer.add_scalar(f"{prefix}/{name}", float(value), int(step))
            # A kill must not lose steps that the next checkpoint counts as done.
            self._writer.flush()

    def close(self) -> None:
        """See `MetricsWriter`."""
        with _disk_errors(self._folder):
            self._writer.close()


class WandbWriter:
    """A Weights & Biases run; its id is kept in the working directory so that a resume continues it."""

    def __init__(self, workdir: Path, project: str, resume_step: int, config: Mapping[str, Any]):
        wandb = _import("wandb", "logging.wandb", "''")
        id_file = workdir / WANDB_ID_FILE
        with _disk_errors(id_file):
            if not (resume_step and id_file.exists()):
                id_file.write_text(secrets.token_hex(8), encoding="utf-8")
            run_id = id_file.read_text(encoding="utf-8").strip()
        self._run = wandb.init(project=project, id=run_id, resume="allow", dir=str(workdir), config=dict(config))
        # Its own counter only ever grows, but a resumed run writes some steps a second time.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float], prefix: str = "train") -> None:
        """See `MetricsWriter`."""
        self._run.log({"step": int(step)} | {f"{prefix}/{name}": float(value) for name, value in metrics.items()})

    def close(self) -> None:
        """See `MetricsWriter`."""
        self._run.finish()


class CombinedWriter:
    """Several writers as one; none is fine too."""

    def __init__(self, writers: Sequence[MetricsWriter]):
        self._writers = tuple(writers)

    def write(self, step: int, metrics: Mapping[str, float], prefix: str = "train") -> None:
        """See `MetricsWriter`."""
        for writer in self._writers:
            writer.write(step, metrics, prefix)

    def close(self) -> None:
        """Closes every writer, also when one of them fails."""
        with contextlib.ExitStack() as stack:
            for writer in reversed(self._writers):
                stack.callback(writer.close)


def _cut_back(path: Path, resume_step: int) -> None:
    """Keeps the whole lines of `path` up to `resume_step`; replaces the file in one move."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        kept = [line for line in lines if line.endswith("\n") and 0 <= _step_of(line) <= resume_step and resume_step]
    temporary = path.with_name(path.name + ".new")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


def _step_of(line: str) -> int:
    """Returns the step of a record, -1 for what is no record."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


def _import(package: str, key: str, off: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        message = f"config.{key}: the package {package} is missing; pip install {package}, or set {off}"
        raise UserError(message) from error


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot write metrics ({error.strerror or error}); free space or mend it") from error
