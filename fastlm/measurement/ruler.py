"""The ruler: what a model takes in parameters, bytes, memory and time, beside the model it came from.

Notable: every model lives in a process of its own and they take turns, so that all see the same minutes of the machine;
a ratio is the median of the ratios of turns, and counts as a difference only where their quartiles lie on one side of
one. So a model that was made smaller on paper alone, or faster in theory, is told so (`verdicts`).
Bytes are those of the leaves as they are stored (packed integers packed, shared tables once), of the same through gzip,
which finds what a format left lying (zeros of a pruned matrix), and of the checkpoint's files.

Units: seconds, bytes, tokens; rates in tokens a second over all rows.
"""

import dataclasses
import statistics
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fastlm.measurement.runtimes import PIECE

PERCENTILES = (50, 90, 99)
GZIP_LEVEL = 6


@dataclasses.dataclass(frozen=True)
class Load:
    """Something that is timed: `rows` of `length` tokens read, or `count` tokens written behind them."""

    rows: int
    length: int
    count: int = 0

    def __str__(self) -> str:
        rows = f"{self.rows} row{'s' if self.rows > 1 else ''}"
        return f"writing, {rows}" if self.count else f"reading, {rows} of {self.length}"

    @property
    def tokens(self) -> int:
        """Tokens of all rows that one run of it takes."""
        return self.rows * (self.count or self.length)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a stored model takes.

    Attributes:
      parameters: numbers, tied tables counted once.
      stored: bytes of its leaves.
      gzipped: bytes of the same, compressed without loss.
      files: bytes of the folder it was read from; 0 if unknown.
      flops: of reading one token of a row of `length` tokens.
    """

    parameters: int
    stored: int
    gzipped: int
    files: int
    flops: float
    length: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """One model on the ruler.

    Attributes:
      name: what the user called it.
      sizes: as `Sizes`.
      seconds: of every load, by its text, one list for each turn; reading has one number, writing one per piece.
      memory: MiB, the process at its peak, before its quality was scored.
      quality: metrics and their errors (`accuracy`, `accuracy_error`); empty if nothing was scored.
    """

    name: str
    sizes: Sizes
    seconds: Mapping[str, Sequence[Sequence[float]]]
    memory: float
    quality: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def rates(self, load: Load) -> list[float]:
        """Returns tokens a second of each turn."""
        return [load.tokens / sum(turn) for turn in self.seconds[str(load)]]

    def latencies(self, load: Load) -> dict[int, float]:
        """Returns percentiles of the seconds of a token, over all pieces of all turns."""
        pieces = [piece / PIECE for turn in self.seconds[str(load)] for piece in turn]
        return {percent: float(np.percentile(pieces, percent)) for percent in PERCENTILES}


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A ratio of a model to its baseline, with the quartiles over turns; above one is more."""

    median: float
    low: float
    high: float

    @property
    def word(self) -> str:
        """What the quartiles allow to say of a rate."""
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "as fast, within the spread,"

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f}-{self.high:.2f})"


def sizes(params: Any, flops: float, length: int, files: int = 0) -> Sizes:
    """Measures a tree of weights."""
    leaves = jax.tree.leaves(params)
    return Sizes(
        parameters=sum(leaf.size for leaf in leaves),
        stored=sum(leaf.nbytes for leaf in leaves),
        gzipped=gzipped_bytes(leaves),
        files=files,
        flops=flops,
        length=length,
    )


def gzipped_bytes(leaves: Sequence[Any]) -> int:
    """Returns how many bytes the arrays take one after the other through gzip's compression."""
    press, total = zlib.compressobj(GZIP_LEVEL), 0
    for leaf in leaves:
        total += len(press.compress(np.ascontiguousarray(leaf).view(np.uint8).data))
    return total + len(press.flush())


def folder_bytes(folder: Path) -> int:
    """Returns the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def loads(batches: Sequence[int], length: int, count: int, writes: bool) -> list[Load]:
    """Returns what is timed: reading at each batch size, and writing where the model does that."""
    read = [Load(rows, length) for rows in batches]
    return read + ([Load(rows, length, count) for rows in batches] if writes else [])


def take_turns(
    models: Mapping[str, Callable[[Load], Sequence[float]]], what: Sequence[Load], turns: int
) -> dict[str, dict[str, list[Sequence[float]]]]:
    """Returns the seconds of every model's loads, one list per turn, models in alternation behind one warm-up each."""
    seconds: dict[str, dict[str, list[Sequence[float]]]] = {name: {str(load): [] for load in what} for name in models}
    for load in what:
        for run in models.values():
            run(load)
        for _ in range(turns):
            for name, run in models.items():
                seconds[name][str(load)].append(run(load))
    return seconds


def ratio(model: Measured, baseline: Measured, load: Load) -> Ratio:
    """Returns how many times the baseline's rate a model has."""
    pairs = [mine / other for mine, other in zip(model.rates(load), baseline.rates(load), strict=True)]
    low, _, high = statistics.quantiles(pairs, n=4) if len(pairs) > 1 else pairs * 3
    return Ratio(statistics.median(pairs), low, high)


def verdicts(model: Measured, baseline: Measured, what: Sequence[Load]) -> list[str]:
    """Says in words whether a model is smaller and faster than its baseline, and what that costs in quality."""
    share = model.sizes.stored / baseline.sizes.stored
    lines = [f"{'smaller' if share < 0.995 else 'NOT smaller'}: {share:.2f}x the bytes"]
    for load in what:
        found = ratio(model, baseline, load)
        word = found.word if found.word == "faster" else f"NOT faster ({found.word.rstrip(',')})"
        lines.append(f"{word} at {load}: {found}")
    for name, value in model.quality.items():
        error, before = model.quality.get(f"{name}_error"), baseline.quality.get(name)
        if error is not None and before is not None:
            both = (error**2 + baseline.quality[f"{name}_error"] ** 2) ** 0.5
            lines.append(f"{name}: {value:.4g}, {value - before:+.2g} to the baseline's (error of both {both:.2g})")
    return lines


def table(models: Sequence[Measured], what: Sequence[Load]) -> str:
    """Returns the figures as Markdown; the first model is the baseline where there are several."""
    first, *others = models
    heads = ["", *(model.name for model in models), *(f"{model.name} / {first.name}" for model in others)]
    rows = [_size_row(title, models, get) for title, get in _SIZES]
    rows.append(_row("peak memory of the process, MiB", [f"{model.memory:,.0f}" for model in models]))
    for load in what:
        rates = [f"{statistics.median(model.rates(load)):,.0f} tok/s" for model in models]
        rows.append(_row(str(load), rates, [str(ratio(model, first, load)) for model in others]))
        if load.count:
            for percent in PERCENTILES:
                shown = [f"{1e3 * model.latencies(load)[percent]:.2f} ms" for model in models]
                rows.append(_row(f"a token of it, {percent}th percentile", shown, [""] * len(others)))
    for name in first.quality:
        if not name.endswith("_error"):
            rows.append(_row(name, [_quality(model, name) for model in models], [""] * len(others)))
    width = len(heads)
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (width - 1)]
    return "\n".join(lines + ["| " + " | ".join(row + [""] * (width - len(row))) + " |" for row in rows])


_SIZES: tuple[tuple[str, Callable[[Sizes], float]], ...] = (
    ("parameters", lambda sizes: sizes.parameters),
    ("bytes as stored", lambda sizes: sizes.stored),
    ("bytes through gzip", lambda sizes: sizes.gzipped),
    ("bytes of the checkpoint", lambda sizes: sizes.files),
    ("MFLOPs a token", lambda sizes: sizes.flops / 1e6),
)


def _size_row(title: str, models: Sequence[Measured], get: Callable[[Sizes], float]) -> list[str]:
    values = [get(model.sizes) for model in models]
    shares = [f"{value / values[0]:.3f}x" if values[0] else "" for value in values[1:]]
    return _row(title, [f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" for value in values], shares)


def _row(title: str, values: Sequence[str], ratios: Sequence[str] = ()) -> list[str]:
    return [title, *values, *ratios]


def _quality(model: Measured, name: str) -> str:
    if name not in model.quality:
        return "-"
    error = model.quality.get(f"{name}_error")
    return f"{model.quality[name]:.4g}" + (f" ± {error:.2g}" if error is not None else "")
