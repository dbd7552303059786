"""Pictures of attention: one of each layer with all of its heads, and one of the numbers of all heads.

Notable: all maps of a text share one scale, whose colours go with the square root of the weight, so that a weight of
1 in 100 can still be seen beside one of 1. Weights that are no shares of 1 have a scale of their own, and one with two
colours if some are negative.
Tokens stand at the axes as long as they can be read there; of longer texts their places do.

Dims: N heads, T queries, S keys, L layers.
"""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import Colormap

from fastlm.measurement.attention_maps import AttentionMap, Looked

LEGIBLE = 48  # tokens of a text of which each is written at the axes
LONGEST_NAME = 14  # characters of a token there
COLUMNS = 4  # heads side by side
INCHES_PER_TOKEN = 0.12
LEAST_INCHES, MOST_INCHES = 2.0, 4.2  # of a map of so few, or so many, tokens that they are not written
DPI = 120
HIDDEN = "#dcdcdc"
TICKS = (0.01, 0.1, 0.3, 0.6, 1.0)  # of the largest weight
MEASURES = {"entropy": "entropy, nats", "distance": "distance, tokens", "first_token": "weight on the first token"}
FORMATS = {"entropy": "{:.2f}", "distance": "{:.1f}", "first_token": "{:.2f}"}


@dataclasses.dataclass(frozen=True)
class Scale:
    """Weights to colours.

    Attributes:
      top: the largest absolute weight.
      signed: whether weights may be negative.
    """

    top: float
    signed: bool

    @property
    def colors(self) -> Colormap:
        """From no weight to the largest; or from the most negative through none to the largest."""
        return plt.get_cmap("RdBu_r" if self.signed else "magma_r").with_extremes(bad=HIDDEN)

    def levels(self, weights: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """Returns places on the scale, from 0 to 1: roots of weights as shares of the root of the largest."""
        roots = np.sign(weights) * np.sqrt(np.minimum(np.abs(weights) / self.top, 1))
        return (roots + 1) / 2 if self.signed else np.maximum(roots, 0)

    def ticks(self) -> list[float]:
        """Returns weights worth naming on the scale."""
        positive = [self.top * tick for tick in TICKS]
        return [*(-tick for tick in positive[:0:-1]), 0.0, *positive[1:]] if self.signed else [0.0, *positive]


def scales(maps: Sequence[AttentionMap]) -> list[Scale]:
    """Returns the scale of each map, one for all whose weights are of a kind: shares of 1, positive, signed."""
    largest: dict[tuple[bool, bool], float] = {}
    for one in maps:
        alike = (one.sums_to_one, one.signed)
        largest[alike] = max(largest.get(alike, 1e-9), float(np.nanmax(np.abs(one.weights), initial=0)))
    made = {alike: Scale(1.0 if alike[0] else top, signed=alike[1]) for alike, top in largest.items()}
    return [made[one.sums_to_one, one.signed] for one in maps]


def visible(one: AttentionMap) -> np.ma.MaskedArray:
    """Returns the weights [N, T, S], those masked that no query could have had."""
    queries, keys = np.indices(one.weights.shape[1:])
    return np.ma.array(one.weights, mask=np.broadcast_to(one.causal & (keys > queries), one.weights.shape))


def caption(one: AttentionMap, head: int) -> str:
    """Returns the numbers of a head in a few words."""
    entropy, distance = one.entropy[head], one.distance
    words = f"head {head}: {np.exp(entropy):.1f} tokens"
    return words if distance is None else f"{words}, {distance[head]:.1f} away"


def draw_layer(one: AttentionMap, looked: Looked, scale: Scale, out: Path) -> None:
    """Draws the maps of a layer's heads side by side."""
    weights = visible(one)
    heads, queries, keys = weights.shape
    columns = min(COLUMNS, heads)
    rows = math.ceil(heads / columns)
    height, width = _inches(queries), _inches(keys)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(columns * (width + 0.2) + 1.9, rows * (height + 0.35) + 1.5),
        dpi=DPI,
        squeeze=False,
        layout="constrained",
    )
    for panel in grid.flat[heads:]:
        panel.axis("off")
    for head, panel in zip(range(heads), grid.flat):
        image = panel.imshow(scale.levels(weights[head]), cmap=scale.colors, vmin=0, vmax=1, aspect="auto")
        panel.set_title(caption(one, head), fontsize=9)
        _name_places(panel, "y", looked.tokens[one.queries], written=head % columns == 0)
        _name_places(panel, "x", looked.tokens[one.keys], written=head + columns >= heads)
    bar = figure.colorbar(image, ax=grid, shrink=min(1.0, 3 / rows / height), aspect=25, pad=0.01)
    ticks = scale.ticks()
    bar.set_ticks(scale.levels(np.array(ticks)), labels=[f"{tick:.2g}" for tick in ticks], fontsize=8)
    bar.set_label("weight", fontsize=9)
    figure.supylabel("query", fontsize=10)
    figure.supxlabel("looked at", fontsize=10)
    figure.suptitle(f"{looked.title}: {one.name} ({one.kind})", fontsize=11, parse_math=False)
    _save(figure, out)


def draw_overview(looked: Looked, out: Path) -> None:
    """Draws each number of every head: layers down, heads across, a row of pictures for each stack."""
    stacks = list(dict.fromkeys(one.stack for one in looked.maps))
    heads, layers = max(len(one.entropy) for one in looked.maps), len(looked.maps) / len(stacks)
    size = (3 * max(2.8, 0.42 * heads + 1.3), len(stacks) * max(1.9, 0.3 * layers + 1.0) + 0.4)
    figure, grid = plt.subplots(len(stacks), 3, figsize=size, dpi=DPI, squeeze=False, layout="constrained")
    for stack, panels in zip(stacks, grid):
        maps = [one for one in looked.maps if one.stack == stack]
        for measure, panel in zip(MEASURES, panels):
            _draw_numbers(panel, maps, measure)
    figure.suptitle(looked.title, fontsize=10, parse_math=False)
    _save(figure, out)


def table(maps: Sequence[AttentionMap], measure: str) -> Float[np.ndarray, "L N"] | None:
    """Returns a measure of every head, NaN where a layer has fewer heads; None if these maps do not have it."""
    rows = [getattr(one, measure) for one in maps]
    if any(row is None for row in rows):
        return None
    widest = max(map(len, rows))
    return np.array([np.pad(row, (0, widest - len(row)), constant_values=np.nan) for row in rows])


def _draw_numbers(panel: Axes, maps: Sequence[AttentionMap], measure: str) -> None:
    values = table(maps, measure)
    if values is None:
        panel.axis("off")
        return
    image = panel.imshow(values, cmap="viridis", vmin=0, aspect="auto")
    panel.set_title(
        f"{'cross-attention' if maps[0].stack == 'cross' else maps[0].stack}: {MEASURES[measure]}", fontsize=9
    )
    panel.set_yticks(range(len(maps)), [str(one.layer) for one in maps], fontsize=8)
    panel.set_xticks(range(values.shape[1]), [str(head) for head in range(values.shape[1])], fontsize=8)
    panel.set_xlabel("head", fontsize=8)
    panel.set_ylabel("layer", fontsize=8)
    panel.figure.colorbar(image, ax=panel).ax.tick_params(labelsize=7)
    if values.shape[1] > 16:
        return
    middle = 0.55 * np.nanmax(values, initial=1e-9)
    for (layer, head), value in np.ndenumerate(values):
        if not np.isnan(value):
            color = "black" if value > middle else "white"
            text = FORMATS[measure].format(value)
            panel.text(head, layer, text, ha="center", va="center", fontsize=7, color=color)


def _inches(tokens: int) -> float:
    if tokens <= LEGIBLE:
        return max(LEAST_INCHES, tokens * INCHES_PER_TOKEN)
    return MOST_INCHES


def _name_places(panel: Axes, axis: str, tokens: list[str], written: bool) -> None:
    place = panel.set_yticks if axis == "y" else panel.set_xticks
    if not written:
        place([])
    elif len(tokens) > LEGIBLE:
        panel.tick_params(axis=axis, labelsize=8)  # numbers of the tokens, where matplotlib puts them
    else:
        names = [name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…" for name in tokens]
        turned = {"rotation": 90} if axis == "x" else {}
        place(range(len(tokens)), names, fontsize=7, parse_math=False, **turned)
        panel.tick_params(axis=axis, length=2, pad=1)


def _save(figure: plt.Figure, out: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # scripts that the font lacks are shown as boxes
        figure.savefig(out)
    plt.close(figure)
