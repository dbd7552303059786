"""Draws training curves: `python -m fastlm.reports.curves --workdir runs/lm_small --out curve.png`.

Several `--workdir` are drawn together, for comparing runs. Reads `metrics.jsonl` only.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from absl import app, flags

from fastlm.errors import UserError, exit_on_user_error


def read(workdir: str | Path, name: str) -> tuple[list[int], list[float]]:
    """Returns steps and values of a metric ("train/loss") of a run.

    Raises:
      UserError: the workdir has no metrics, or not this one.
    """
    path = Path(workdir) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; give --workdir of a run of fastlm.train")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    points = [(row["step"], row[name]) for row in rows if name in row]
    if not points:
        known = sorted({key for row in rows for key in row} - {"step", "time"})
        raise UserError(f"{path}: no metric '{name}'; it has {', '.join(known)}")
    return [step for step, _ in points], [value for _, value in points]


def draw(workdirs: Sequence[str], metric: str, out: str | Path) -> None:
    """Draws `metric` of each run: training as a thin line, the validation split as a thick one."""
    figure, axes = plt.subplots(figsize=(7, 3.8), dpi=150)
    for workdir, color in zip(workdirs, plt.rcParams["axes.prop_cycle"].by_key()["color"] * len(workdirs)):
        axes.plot(*read(workdir, f"train/{metric}"), color=color, alpha=0.35, linewidth=1)
        axes.plot(
            *read(workdir, f"validation/{metric}"), color=color, marker="o", markersize=3, label=Path(workdir).name
        )
    axes.set(xlabel="step", ylabel=metric.replace("_", " "))
    values = read(workdirs[0], f"train/{metric}")[1]
    axes.set_ylim(top=min(max(values), 2.2 * min(values)))
    axes.grid(alpha=0.3)
    axes.legend(title="thick: validation, thin: training", fontsize=8, title_fontsize=8)
    figure.tight_layout()
    figure.savefig(out)


def define_flags() -> None:
    """Defines the flags; not on import, because entry points define some of the same names."""
    flags.DEFINE_multi_string("workdir", None, "runs to draw", required=True)
    flags.DEFINE_string("out", "curve.png", "picture to write")
    flags.DEFINE_string("metric", "bits_per_byte", "what to draw")


def main(argv: list[str]) -> None:
    """Draws what the flags say."""
    del argv
    with exit_on_user_error():
        draw(flags.FLAGS.workdir, flags.FLAGS.metric, flags.FLAGS.out)
        print(f"wrote {flags.FLAGS.out}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
