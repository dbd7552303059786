"""The one table of a sweep: mean and standard error over seeds for every grid point, as Markdown, CSV and JSON."""

import csv
import dataclasses
import io
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from sweep_runs import Run, Status, status, write_atomically


@dataclasses.dataclass(frozen=True)
class Row:
    """One grid point: `by_seed` holds the metric of each finished seed, `note` what happened to the others."""

    values: tuple[tuple[str, str], ...]
    by_seed: dict[int, float]
    seeds: int
    note: str

    @property
    def mean(self) -> float | None:
        """Mean over the finished seeds."""
        return statistics.fmean(self.by_seed.values()) if self.by_seed else None

    @property
    def standard_error(self) -> float | None:
        """Sample standard deviation over seeds, divided by the root of their number; None for fewer than two."""
        if len(self.by_seed) < 2:
            return None
        return statistics.stdev(self.by_seed.values()) / math.sqrt(len(self.by_seed))


def rows(runs: Sequence[Run], metric: str, maximize: bool = False) -> list[Row]:
    """Reads all results and sorts the grid points by `metric`, best first, those without a result last."""
    points: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        points.setdefault(run.values, []).append(run)
    table = [_row(values, members, metric) for values, members in points.items()]
    sign = -1 if maximize else 1
    return sorted(table, key=lambda row: math.inf if row.mean is None or math.isnan(row.mean) else sign * row.mean)


def _row(values: tuple[tuple[str, str], ...], members: Sequence[Run], metric: str) -> Row:
    by_seed: dict[int, float] = {}
    notes = []
    for run in members:
        found = status(run)
        value = found.metrics.get(metric)
        if found.word == "finished" and isinstance(value, int | float):
            by_seed[run.seed] = float(value)
        else:
            notes.append(f"seed {run.seed} {_note(found, metric)}")
    return Row(values, by_seed, len(members), "; ".join(notes))


def _note(found: Status, metric: str) -> str:
    if found.word == "finished":
        return f"failed: result.json has no number '{metric}', only {', '.join(sorted(found.metrics)) or 'nothing'}"
    return f"{found.word}: {found.reason}" if found.reason else found.word


def markdown(table: Sequence[Row], metric: str) -> str:
    """Formats the table for people."""
    keys = [key for key, _ in table[0].values]
    header = [*keys, metric, "± standard error", "seeds", "note"]
    lines = [header, ["---"] * len(header)]
    lines += [[*(value for _, value in row.values), *_figures(row), row.note] for row in table]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _figures(row: Row) -> list[str]:
    mean, error = row.mean, row.standard_error
    return [
        "" if mean is None else f"{mean:.5g}",
        "" if error is None else f"{error:.2g}",
        f"{len(row.by_seed)}/{row.seeds}",
    ]


def write(table: Sequence[Row], metric: str, out: Path) -> None:
    """Writes `results.md`, `results.csv` and `results.json` into `out`; the last has the figure of every seed."""
    write_atomically(out / "results.md", markdown(table, metric))
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow([*(key for key, _ in table[0].values), metric, "standard_error", "finished", "seeds", "note"])
    for row in table:
        figures = ["" if figure is None else figure for figure in (row.mean, row.standard_error)]
        lines.writerow([*(value for _, value in row.values), *figures, len(row.by_seed), row.seeds, row.note])
    write_atomically(out / "results.csv", text.getvalue())
    write_atomically(out / "results.json", json.dumps([_json_row(row, metric) for row in table], indent=1) + "\n")


def _json_row(row: Row, metric: str) -> dict[str, object]:
    return {
        "values": dict(row.values),
        "metric": metric,
        "mean": row.mean,
        "standard_error": row.standard_error,
        "by_seed": {str(seed): value for seed, value in row.by_seed.items()},
        "seeds": row.seeds,
        "note": row.note,
    }
