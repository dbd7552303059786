"""A picture of the ruler's figures: what a model takes and how fast it is, as shares of its baseline."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fastlm.measurement import ruler
from fastlm.measurement.ruler import Load, Measured


def draw(base: Measured, model: Measured, what: Sequence[Load], out: str | Path) -> None:
    """Draws bars of bytes and memory (less is better) and of rates with their quartiles (more is), baseline 1."""
    sizes = {
        "bytes as stored": (model.sizes.stored / base.sizes.stored, model.sizes.stored / 2**20),
        "bytes through gzip": (model.sizes.gzipped / base.sizes.gzipped, model.sizes.gzipped / 2**20),
        "peak memory": (model.memory / base.memory, model.memory),
    }
    ratios = {str(load): ruler.ratio(model, base, load) for load in what}
    figure, axes = plt.subplots(figsize=(7.5, 1.0 + 0.36 * (len(sizes) + len(ratios))), dpi=150)
    titles = [*sizes, *ratios]
    values = [share for share, _ in sizes.values()] + [ratio.median for ratio in ratios.values()]
    lows = [0.0] * len(sizes) + [ratio.median - ratio.low for ratio in ratios.values()]
    highs = [0.0] * len(sizes) + [ratio.high - ratio.median for ratio in ratios.values()]
    texts = [f"{share:.2f}x  {mebibytes:,.1f} MiB" for share, mebibytes in sizes.values()]
    for load in what:
        texts.append(f"{ratios[str(load)].median:.2f}x  {statistics.median(model.rates(load)):,.0f} tok/s")
    colors = ["tab:orange"] * len(sizes) + ["tab:blue"] * len(ratios)
    axes.barh(titles, values, 0.7, xerr=(lows, highs), color=colors, error_kw={"linewidth": 0.8})
    for place, (value, high, text) in enumerate(zip(values, highs, texts, strict=True)):
        axes.text(value + high, place, f" {text}", va="center", fontsize=7)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.tick_params(labelsize=8)
    axes.invert_yaxis()
    if max(values) > 8 or min(values) < 1 / 8:  # or a bar would hide the others
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 2, max(values) * 10)
    else:
        axes.set_xlim(right=axes.get_xlim()[1] * 1.25)
    axes.set_title(f"{model.name} / {base.name}: orange, less is better; blue, more is", fontsize=9)
    figure.tight_layout()
    figure.savefig(out)
    plt.close(figure)
