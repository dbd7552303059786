"""Pathfinder: do the two discs lie on one dashed path? Gray images of 32 x 32, generated.

Two long paths wind through every image among shorter ones that distract. Discs mark both ends of one long path
(label "connected") or one end of each ("apart"), so nothing but following a path tells. Seeded, the same on every
machine, labels balanced. After Linsley et al. (arXiv 1805.08315) and Long Range Arena (2011.04006), whose sizes these
are: paths of 14 dashes, up to five distractors of 4, dashes of 2 pixels, discs of radius 1.5, no turn sharper than 45
degrees. Drawing is our own: dashes of a path follow each other closer than two paths ever come.
Left out: larger images (Path-X), contrasts that vary.

Dims: H height, W width, D dashes, P points.
"""

import functools
import itertools
import math
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from fastlm.data.builders import dataset_info

SIZE = 32
LONG, SHORT, DISTRACTORS = 14, 4, 5
DASH, GAP, HALF_WIDTH = 1.7, 1.4, 0.3
RADIUS = 1.5
SHARPEST = math.pi / 4
CLEARANCE = 3.0  # between middles of lines of two paths
ROWS = {
    "small": {"train": 8_000, "validation": 1_000, "test": 1_000},
    "paper": {"train": 160_000, "validation": 20_000, "test": 20_000},
}
LABELS = ("apart", "connected")

_MARGIN = 2.0  # of the image
_TURN = 0.35  # standard deviation of the angle between dashes that follow each other
_PATHS, _STEPS, _TRIES, _BACK = (
    4,
    60,
    6,
    4,
)  # tries of a path, dashes of a try, turns of a dash, dashes undone at a dead end
_OWN = 3  # dashes of the own path that the next one may be near to
_CELLS = 3
_SAME_DISTANCE = 1.0

Dash = tuple[float, float, float, float]
"""From x, y to x, y."""
Path = list[Dash]
Discs = tuple[tuple[float, float], tuple[float, float]]


class Scene(NamedTuple):
    """The paths of an image, the two long ones first, and where the two discs are."""

    paths: list[Path]
    discs: Discs


class Taken:
    """What is too near to paths that are there already, on a grid of four cells a pixel."""

    def __init__(self, cells: np.ndarray | None = None) -> None:
        self.cells = np.ones((SIZE * _CELLS,) * 2, bool) if cells is None else cells
        if cells is None:
            inner = slice(round(_MARGIN * _CELLS), round((SIZE - _MARGIN) * _CELLS))
            self.cells[inner, inner] = False

    def copy(self) -> "Taken":
        """Returns one that can be added to alone."""
        return Taken(self.cells.copy())

    def add(self, x: float, y: float, radius: float) -> None:
        """Takes what is nearer than `radius` to a point."""
        disc = _disc(radius)
        reach = len(disc) // 2
        row, column = int(y * _CELLS) - reach, int(x * _CELLS) - reach
        top, left = max(row, 0), max(column, 0)
        window = self.cells[top : row + len(disc), left : column + len(disc)]
        window |= disc[top - row :, left - column :][: window.shape[0], : window.shape[1]]

    def add_dash(self, dash: Dash) -> None:
        """Takes what is too near to a dash."""
        for x, y in points(dash):
            self.add(x, y, CLEARANCE)

    def free(self, dash: Dash) -> bool:
        """Whether a dash keeps clear of everything."""
        edge = SIZE * _CELLS
        for x, y in points(dash):
            row, column = int(y * _CELLS), int(x * _CELLS)
            if not (0 <= row < edge and 0 <= column < edge) or self.cells[row, column]:
                return False
        return True


@functools.cache
def _disc(radius: float) -> np.ndarray:
    reach = round(radius * _CELLS)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return y**2 + x**2 < (radius * _CELLS) ** 2


def points(dash: Dash) -> tuple[tuple[float, float], ...]:
    """Returns the ends of a dash and its middle."""
    x, y, far_x, far_y = dash
    return (x, y), ((x + far_x) / 2, (y + far_y) / 2), (far_x, far_y)


def long_paths(drawn: random.Random) -> tuple[list[Path], Taken]:
    """Draws lots for the two long paths of an image; returns them and where no other path may be."""
    while True:
        taken, found = Taken(), []
        for _ in range(2):
            path = next((path for _ in range(_PATHS) if (path := _path(drawn, LONG, taken))), None)
            if path is None:  # the first one leaves no room
                break
            found.append(path)
            for x, y in _ends(path):
                taken.add(x, y, CLEARANCE + RADIUS)
        else:
            return found, taken


def _path(drawn: random.Random, dashes: int, taken: Taken) -> Path | None:
    """Returns a path that keeps clear of what is taken and of itself, and takes its place; None if none was found."""
    start, path, grids = _start(drawn), [], [taken]
    for _ in range(_STEPS):
        dash = _next_dash(drawn, *(_behind(path[-1]) if path else start), grids[-1])
        if dash is None:  # a dead end: some dashes back
            del path[-_BACK:], grids[max(len(grids) - _BACK, 1) :]
            start = start if path else _start(drawn)
            continue
        path.append(dash)
        if len(path) == dashes:
            for dash in path:
                taken.add_dash(dash)
            return path
        grids.append(grids[-1].copy())
        if len(path) > _OWN:  # the latest ones may be near
            grids[-1].add_dash(path[-1 - _OWN])
    return None


def _start(drawn: random.Random) -> tuple[float, float, float]:
    """Returns a place and a direction."""
    x, y = (_MARGIN + drawn.random() * (SIZE - 2 * _MARGIN) for _ in range(2))
    return x, y, drawn.random() * 2 * math.pi


def _next_dash(drawn: random.Random, x: float, y: float, angle: float, taken: Taken) -> Dash | None:
    """Returns a free dash that begins behind (x, y) and goes on in about the direction `angle`."""
    for attempt in range(_TRIES):
        turn = drawn.gauss(0.0, _TURN) if attempt < _TRIES // 2 else (2 * drawn.random() - 1) * SHARPEST
        turned = angle + max(-SHARPEST, min(SHARPEST, turn))
        right, down = math.cos(turned), math.sin(turned)
        dash = (x + GAP * right, y + GAP * down, x + (GAP + DASH) * right, y + (GAP + DASH) * down)
        if taken.free(dash):
            return dash
    return None


def _behind(dash: Dash) -> tuple[float, float, float]:
    """Returns where a dash ends, and its direction."""
    x, y, far_x, far_y = dash
    return far_x, far_y, math.atan2(far_y - y, far_x - x)


def _ends(path: Path) -> tuple[tuple[float, float], tuple[float, float]]:
    return path[0][:2], path[-1][2:]


def scene_pair(drawn: random.Random) -> tuple[Scene, Scene]:
    """Draws lots for two images, "apart" and "connected", whose discs are about equally far from each other."""
    while True:
        (apart, apart_taken), (connected, connected_taken) = long_paths(drawn), long_paths(drawn)
        same = [_ends(path) for path in connected]
        other = list(itertools.product(_ends(apart[0]), _ends(apart[1])))
        ends, tips = min(itertools.product(same, other), key=_difference)
        if _difference((ends, tips)) < _SAME_DISTANCE:
            break
    return (
        Scene(apart + _distractors(drawn, apart_taken), tips),
        Scene(connected + _distractors(drawn, connected_taken), ends),
    )


def _difference(both: tuple[Discs, Discs]) -> float:
    return abs(math.dist(*both[0]) - math.dist(*both[1]))


def _distractors(drawn: random.Random, taken: Taken) -> list[Path]:
    """Returns the short paths that found room."""
    return [path for _ in range(DISTRACTORS) if (path := _path(drawn, SHORT, taken))]


def render(scene: Scene) -> UInt8[np.ndarray, "H W"]:
    """Draws a scene: how bright a pixel is says how much of it a line or a disc covers."""
    dashes = np.array([dash for path in scene.paths for dash in path])
    start, along = dashes[:, :2], dashes[:, 2:] - dashes[:, :2]
    pixels = np.indices((SIZE, SIZE))[::-1].reshape(2, -1).T + 0.5
    place = np.clip((pixels @ along.T - (start * along).sum(-1)) / (along**2).sum(-1), 0, 1)
    nearest = start + place[..., None] * along
    to_line = np.hypot(*np.moveaxis(pixels[:, None] - nearest, -1, 0)).min(-1)
    to_disc = np.hypot(*np.moveaxis(pixels[:, None] - np.array(scene.discs), -1, 0)).min(-1)
    covered = np.maximum(HALF_WIDTH - to_line, RADIUS - to_disc) + 0.5
    return np.round(255 * np.clip(covered, 0, 1)).astype(np.uint8).reshape(SIZE, SIZE)


def scenes(split: str) -> Iterator[tuple[Scene, str]]:
    """Yields scenes and labels without end, half of them of either label; the first ones are always the same."""
    drawn = random.Random(f"pathfinder {split}")
    while True:
        yield from zip(scene_pair(drawn), LABELS)


class Pathfinder(tfds.core.GeneratorBasedBuilder):
    """One row per image."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 (the name and the type are TFDS's)
        tfds.core.BuilderConfig(name=name, description=f"{counts['train']} images to train on")
        for name, counts in ROWS.items()
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return dataset_info(
            self,
            "Two discs on one dashed path or on two, generated.",
            image=tfds.features.Tensor(shape=(SIZE, SIZE), dtype=np.uint8, encoding="zlib"),
            label=tfds.features.Text(),
        )

    def _split_generators(self, download_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in ROWS[self.builder_config.name]}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, (scene, label) in zip(range(ROWS[self.builder_config.name][split]), scenes(split)):
            yield f"{number:06d}", {"image": render(scene), "label": label}
