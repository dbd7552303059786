"""What a person watches while a run goes on.

Notable: on a terminal two live lines (step, bar, time left; then loss with a sparkline of its
course, bits/byte of the last evaluation, speed, utilisation, rate), redrawn by rich; messages and
prints scroll by above them. Without a terminal one aligned `name=value` line for each log interval,
made to be read by `grep` and `split`. The pace behind "left" is that of the last few updates, not
of the whole run. Only process 0 shows anything.
Left out: notebooks, nested bars.
"""

import collections
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TextIO

import jax
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


class Field(NamedTuple):
    """How one metric is shown; `{unit}` in a name is what is counted."""

    metric: str
    label: str
    terminal: Callable[[float], str]
    plain_name: str
    plain: Callable[[float], str]


def _short(value: float) -> str:
    """Returns three figures: 873, 6.51k, 1.20M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:#.3g}".rstrip(".") + letter
    return f"{value:.0f}"


FIELDS = (
    Field("loss", "loss", "{:.3f}".format, "loss", "{:.4f}".format),
    # Early in the line, so that a narrow terminal does not cut off what must be seen.
    Field("skipped", "skipped", "{:.0f}".format, "skipped", "{:.0f}".format),
    Field("bits_per_byte", "bits/byte", "{:.3f}".format, "bits/byte", "{:.4f}".format),
    Field("tokens_per_second", "{unit}/s", _short, "{unit}/s", "{:.0f}".format),
    Field("utilisation", "of peak", "{:.0%}".format, "utilisation", "{:.3f}".format),
    Field("learning_rate", "rate", "{:.1e}".format, "rate", "{:.2e}".format),
)
# Shown once it is not zero: most runs never skip a step.
HIDDEN_WHEN_ZERO = ("skipped",)
# Measured beside the loss of the batch, so it is shown for evaluations only.
EVALUATION_ONLY = ("bits_per_byte",)
WINDOW = 16
SPARKS = "▁▂▃▄▅▆▇█"


class Progress:
    """A context manager that shows how far a run is.

    Args:
      total: steps of the whole run.
      start: the step the run starts or resumes at.
      unit: what `tokens_per_second` counts, in short.
      file: where to write; stdout when None.
      force_terminal: True or False overrides the look at `file`.
      clock: seconds, for tests.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        unit: str = "tok",
        file: TextIO | None = None,
        force_terminal: bool | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._total, self._step, self._unit, self._clock = total, start, unit, clock
        self._shown: dict[str, float] = {}
        self._losses: list[float] = []
        self._pace = Pace()
        self._file = file if file is not None else sys.stdout
        self._quiet = jax.process_index() != 0
        console = Console(file=self._file, force_terminal=force_terminal, highlight=False, markup=False, emoji=False)
        self._live = None
        if console.is_terminal and not console.is_dumb_terminal and not self._quiet:
            self._unicode = console.encoding.lower().startswith("utf")
            self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=False)
            self._live.start()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows `step`, and what `FIELDS` knows of `metrics`; the rest is remembered from before.

        A `<split>_bits_per_byte` is that of an evaluation. Without a terminal only metrics with a
        loss make a line.
        """
        self._step = step
        self._pace.add(self._clock(), step)
        for name, value in metrics.items():
            if name.endswith("_bits_per_byte"):
                self._shown["bits_per_byte"] = value
            elif name not in EVALUATION_ONLY:
                self._shown[name] = value
        if "loss" not in metrics:
            return
        self._losses = _halved([*self._losses, float(metrics["loss"])], limit=512)
        if self._live is None and not self._quiet:
            print(self._plain_line(), file=self._file, flush=True)

    def message(self, text: str) -> None:
        """Prints `text` on lines of its own, above the bar where there is one."""
        if self._live is not None:
            self._live.console.print(text, soft_wrap=True)
        elif not self._quiet:
            print(text, file=self._file, flush=True)

    def close(self) -> None:
        """Draws the last state and lets go of the terminal; a second call does nothing."""
        if self._live is not None:
            self._live.stop()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _fields(self) -> Iterable[tuple[Field, float]]:
        for field in FIELDS:
            value = self._shown.get(field.metric)
            if value is not None and (value or field.metric not in HIDDEN_WHEN_ZERO):
                yield field, float(value)

    def _left(self) -> str:
        if self._step >= self._total:
            return "0:00:00"
        steps_per_second = self._pace.steps_per_second()
        return _duration((self._total - self._step) / steps_per_second) if steps_per_second else "?"

    def _plain_line(self) -> str:
        width = len(str(self._total))
        parts = [f"step={self._step}/{self._total}".ljust(6 + 2 * width)]
        for field, value in self._fields():
            parts.append(f"{field.plain_name.format(unit=self._unit)}={field.plain(value)}".ljust(12))
        return " ".join([*parts, f"left={self._left()}"])

    def _render(self) -> Group:
        bar = Table.grid(expand=True, padding=(0, 1))
        for ratio in (None, 1, None, None):
            bar.add_column(ratio=ratio, no_wrap=True)
        share = self._step / max(self._total, 1)
        bar.add_row(
            Text(f"step {self._step:,}/{self._total:,}", style="bold"),
            ProgressBar(total=max(self._total, 1), completed=self._step),
            Text(f"{share:.0%}", style="bold"),
            Text("done" if self._step >= self._total else f"{self._left()} left", style="cyan"),
        )
        return Group(bar, self._numbers())

    def _numbers(self) -> Text:
        line = Text(no_wrap=True, overflow="ellipsis")
        for field, value in self._fields():
            line.append("  " if line else "")
            bad = field.metric in HIDDEN_WHEN_ZERO or not math.isfinite(value)
            line.append(field.terminal(value), style="bold red" if bad else "bold")
            line.append(f" {field.label.format(unit=self._unit)}", style="dim")
            if field.metric == "loss" and self._unicode:
                line.append(" " + sparkline(self._losses, 10), style="green")
        return line


class Pace:
    """Steps per second over the last `WINDOW` updates."""

    def __init__(self) -> None:
        self._seen: collections.deque[tuple[float, int]] = collections.deque(maxlen=WINDOW)

    def add(self, seconds: float, step: int) -> None:
        """Notes that `step` was reached at `seconds`."""
        self._seen.append((seconds, step))

    def steps_per_second(self) -> float:
        """Returns the pace, 0 while it is not known."""
        if len(self._seen) < 2:
            return 0.0
        (since, first), (now, last) = self._seen[0], self._seen[-1]
        return (last - first) / (now - since) if now > since else 0.0


def sparkline(values: list[float], width: int) -> str:
    """Returns at most `width` blocks, each the mean of an equal share of the finite `values`."""
    values = [value for value in values if math.isfinite(value)]
    count = min(width, len(values))
    shares = [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]
    means = [sum(share) / len(share) for share in shares]
    if not means:
        return ""
    low, high = min(means), max(means)
    height = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((mean - low) * height)] for mean in means)


def _halved(values: list[float], limit: int) -> list[float]:
    """Returns `values`, every other one of them once there are more than `limit`."""
    return values if len(values) <= limit else values[1::2]


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"
