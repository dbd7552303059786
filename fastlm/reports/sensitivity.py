"""What readings of `search.sensitivity` look like: a picture, and one HTML file with nothing loaded from outside.

Notable: rows are kinds of parts by way and level, columns are layers. Colours go with the logarithm of how much the
loss rises, for that spans orders of magnitude; what does not rise is white. A number in grey is less than two standard
errors from none.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm, to_hex

from fastlm.search.sensitivity import Reading

TEMPLATE = Path(__file__).with_name("sensitivity.html")
COLORS = plt.get_cmap("YlOrRd")
LEAST = 1e-4  # nats, from where colours begin
MOST = 12  # of each list of the page
DPI = 120


@dataclasses.dataclass(frozen=True)
class Row:
    """Alike parts of all layers.

    Attributes:
      name: of the part within its layer, "" for the whole.
      by_layer: readings, where there are some.
    """

    name: str
    way: str
    level: float
    by_layer: dict[int, Reading]

    @property
    def title(self) -> str:
        """What stands beside the row."""
        share = "" if self.level == 1 else f" -{self.level:.0%}"
        return f"{self.name or 'layer'}: {self.way}{share}"


def rows(readings: Sequence[Reading]) -> list[Row]:
    """Returns readings by way, level and part."""
    found: dict[tuple[str, float, str], Row] = {}
    for one in readings:
        name = one.part.split("/", 2)[2] if one.part.count("/") > 1 else ""
        row = found.setdefault((one.way, one.level, name), Row(name, one.way, one.level, {}))
        row.by_layer[one.layer] = one
    return list(found.values())


def scale(readings: Sequence[Reading]) -> LogNorm:
    """Returns the scale of colours of all readings."""
    return LogNorm(LEAST, max([one.rise for one in readings if math.isfinite(one.rise)] + [10 * LEAST]), clip=True)


def color(one: Reading, norm: LogNorm) -> str:
    """Returns the colour of a reading, as HTML has it."""
    return to_hex(COLORS(float(norm(one.rise)))) if one.rise > LEAST else "#ffffff"


def picture(readings: Sequence[Reading], title: str) -> plt.Figure:
    """Draws the heat map."""
    table, norm = rows(readings), scale(readings)
    layers = 1 + max(one.layer for one in readings)
    rises = np.full((len(table), layers), np.nan)
    for number, row in enumerate(table):
        for layer, one in row.by_layer.items():
            rises[number, layer] = max(one.rise, LEAST)
    figure, axes = plt.subplots(figsize=(3 + 0.55 * layers, 1.6 + 0.3 * len(table)), layout="constrained")
    image = axes.imshow(rises, norm=norm, cmap=COLORS, aspect="auto")
    axes.set_xticks(range(layers), [str(layer) for layer in range(layers)])
    axes.set_yticks(range(len(table)), [row.title for row in table])
    axes.set_xlabel("layer")
    axes.set_title(title, fontsize=10)
    for number, row in enumerate(table):
        for layer, one in row.by_layer.items():
            dark = norm(one.rise) > 0.6 if one.rise > LEAST else False
            axes.text(layer, number, short(one.rise), ha="center", va="center", fontsize=7, color="w" if dark else "k")
    figure.colorbar(image, label="rise of the loss, nats")
    return figure


def short(rise: float) -> str:
    """Returns a rise as a cell has it."""
    return f"{rise:.3f}" if abs(rise) < 9.9995 else f"{rise:.0f}"


def render(readings: Sequence[Reading], about: dict[str, Any]) -> str:
    """Returns the page.

    Args:
      about: "title", and whatever else to say of the readings by name.
    """
    norm, table = scale(readings), rows(readings)
    layers = range(1 + max(one.layer for one in readings))
    worth = sorted((one for one in readings if one.gone > 0), key=lambda one: one.rise / one.gone)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    cell = lambda one: {
        "text": short(one.rise),
        "color": color(one, norm),
        "dark": one.rise > LEAST and norm(one.rise) > 0.6,
        "unclear": abs(one.rise) < 2 * one.error,
        "told": f"{one.part}: {one.way}, {one.gone:,} numbers less; loss +{one.rise:.5f} ± {one.error:.5f}",
    }
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        about=about,
        layers=list(layers),
        rows=[(row.title, [cell(row.by_layer[i]) if i in row.by_layer else None for i in layers]) for row in table],
        cheapest=worth[:MOST],
        dearest=worth[::-1][:MOST],
    )


def write(readings: Sequence[Reading], about: dict[str, Any], folder: Path) -> list[Path]:
    """Writes the picture and the page; returns their paths."""
    figure = picture(readings, about["title"])
    figure.savefig(folder / "sensitivity.png", dpi=DPI)
    plt.close(figure)
    (folder / "sensitivity.html").write_text(render(readings, about), encoding="utf-8")
    return [folder / "sensitivity.png", folder / "sensitivity.html"]
