"""Scenes of Pathfinder: dashed paths that keep clear of each other, two discs, and how they are drawn.

A path grows dash by dash, each turned a little against the one before, and takes some dashes back at a dead end. The
discs of both labels are equally far apart, so that this distance says nothing; where paths run does not depend on the
label either. Left out: large images, contrasts that vary.

Dims: H height, W width.
"""

import functools
import itertools
import math
import random
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

SIZE = 32
LONG, SHORT, DISTRACTORS = 14, 4, 5  # dashes of the two long paths and of at most so many short ones
DASH, GAP, HALF_WIDTH = 1.7, 1.4, 0.3
RADIUS = 1.5  # of discs
SHARPEST = math.pi / 4
CLEARANCE = 2.7  # between middles of lines of two paths
CELLS = 3  # a pixel, of the grid on which distances are kept
SAME_DISTANCE = 1.0

_MARGIN = 2.0  # of the image
_TURN = 0.35  # standard deviation of the angle between dashes that follow each other
_OWN = 3  # dashes of the own path that the next one may be near to
_PATHS = 4  # tries of a path
_STEPS = 60  # dashes tried for a path
_TRIES = 6  # turns tried for a dash
_BACK = 4  # dashes taken back at a dead end

Dash = tuple[float, float, float, float]
"""From x, y to x, y."""
Path = list[Dash]
Discs = tuple[tuple[float, float], tuple[float, float]]


class Scene(NamedTuple):
    """The paths of an image, the two long ones first, and where the two discs are."""

    paths: list[Path]
    discs: Discs


class Taken:
    """What is too near to paths that are there already, on a grid of `CELLS` cells a pixel."""

    def __init__(self, cells: np.ndarray | None = None) -> None:
        self.cells = np.ones((SIZE * CELLS,) * 2, bool) if cells is None else cells
        if cells is None:
            inner = slice(round(_MARGIN * CELLS), round((SIZE - _MARGIN) * CELLS))
            self.cells[inner, inner] = False

    def copy(self) -> "Taken":
        """Returns one that can be added to alone."""
        return Taken(self.cells.copy())

    def add(self, x: float, y: float, radius: float) -> None:
        """Takes what is nearer than `radius` to a point."""
        disc = _disc(radius)
        reach = len(disc) // 2
        row, column = int(y * CELLS) - reach, int(x * CELLS) - reach
        top, left = max(row, 0), max(column, 0)
        window = self.cells[top : row + len(disc), left : column + len(disc)]
        window |= disc[top - row :, left - column :][: window.shape[0], : window.shape[1]]

    def add_dash(self, dash: Dash) -> None:
        """Takes what is too near to a dash."""
        for x, y in points(dash):
            self.add(x, y, CLEARANCE)

    def free(self, dash: Dash) -> bool:
        """Whether a dash keeps clear of everything."""
        edge = SIZE * CELLS
        for x, y in points(dash):
            row, column = int(y * CELLS), int(x * CELLS)
            if not (0 <= row < edge and 0 <= column < edge) or self.cells[row, column]:
                return False
        return True


@functools.cache
def _disc(radius: float) -> np.ndarray:
    reach = round(radius * CELLS)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return y**2 + x**2 < (radius * CELLS) ** 2


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
        if _difference((ends, tips)) < SAME_DISTANCE:
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
