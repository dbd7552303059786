"""Shapes for a student of a trained model, under a budget of parameters, of time, or of both.

Notable: what is proposed can be sliced out of the teacher (`compress.parts`): layers x width x heads x feed-forward
width, heads as wide as the teacher's. Thousands of shapes are counted (`search.shapes`), those that are proposed once
more by `models.abstract`. So that there is a choice, depths are spread: of every range of depths the shape is taken
that uses the budget and is most like the teacher in its proportions. Then all are ranked by that, and by FLOPs. FLOPs
know nothing of overheads: a budget of time is decided by the clock (`search.clock`), and where nothing is fast enough,
smaller ones are measured.
Left out: layers that differ from each other, and how well a shape learns.
"""

import collections
import dataclasses
import functools
import heapq
import math
from collections.abc import Callable, Sequence

from fastlm.compress.parts import Part
from fastlm.errors import UserError
from fastlm.measurement import flops
from fastlm.models import ModelConfig
from fastlm.search.shapes import Shape, Sizes, layers_of, parameters_of, shapes

UNUSED = 5.0  # a fifth of the budget left unused is as bad as proportions that differ e times from the teacher's
OF_A_DEPTH = 3  # shapes that are tried where the best is none that can be
ROUNDS = 4  # of measuring, ever smaller ones

Clock = Callable[[ModelConfig, Sequence[ModelConfig]], Sequence[float]]


@dataclasses.dataclass(frozen=True)
class Student:
    """A proposal.

    Attributes:
      part: what it keeps of its teacher, layers evenly spaced.
      parameters: how many; `share`, of all the teacher's; `inner_share`, of those outside of embeddings and vocabulary.
      work: its FLOPs of reading a token, as a share of the teacher's.
      speed: how many times as fast as the teacher it was measured to be, or None.
    """

    part: Part
    cfg: ModelConfig
    parameters: int
    share: float
    inner_share: float
    work: float
    speed: float | None = None


def propose(
    cfg: ModelConfig,
    *,
    parameters: float | None = None,
    speed: float | None = None,
    length: int = 256,
    count: int = 8,
    clock: Clock | None = None,
) -> list[Student]:
    """Returns students of `cfg` within a budget, the best first.

    Args:
      parameters: the most that a student may have: up to 1 a share of the teacher's, above 1 a number.
      speed: how many times as fast as the teacher it has to be, by `clock`.
      length: of the rows whose FLOPs are counted.
      count: ranges of depths, and so the most that are returned, and that are measured in a round.
      clock: (teacher, students) -> how many times as fast each of them is.

    Raises:
      UserError: no budget, or one that no student meets; says what is nearest.
    """
    if parameters is None and speed is None:
        raise UserError("no budget: give --parameters, --speed, or both")
    if parameters is not None and not 0 < parameters < math.inf:
        raise UserError(f"--parameters: must be a share up to 1, or a number above 1, got {parameters}")
    if speed is not None and not 1 <= speed < math.inf:
        raise UserError(f"--speed: must be at least 1 time the teacher's, got {speed}")
    sizes = Sizes(cfg)
    most = math.inf if parameters is None else parameters * (sizes.total if parameters <= 1 else 1)
    ranked = functools.partial(_ranked, sizes, most, length=length, count=count)
    if speed is None:
        return ranked(math.inf)
    if clock is None:
        raise ValueError("a budget of time needs a clock")
    measured: dict[ModelConfig, Student] = {}
    work = 1 / speed
    for _ in range(ROUNDS):
        fresh = [one for one in ranked(work) if one.cfg not in measured]
        for one, found in zip(fresh, clock(cfg, [one.cfg for one in fresh])):
            measured[one.cfg] = dataclasses.replace(one, speed=found)
        if enough := [one for one in measured.values() if one.speed >= speed]:
            return enough[:count]
        fastest = max(measured.values(), key=lambda one: one.speed)
        work *= min(fastest.speed / speed, 0.8)
        if sizes.least_work > work:
            break
    raise UserError(
        f"--speed {speed}: nothing was as fast as that; the nearest has {fastest.cfg.layers} layers of width "
        f"{fastest.cfg.width}, {fastest.share:.1%} of the parameters, and is {fastest.speed:.2f} times as fast"
    )


def overrides(cfg: ModelConfig, student: Student, source: str) -> list[str]:
    """Returns the command line's words that make a training one of `student`, from the weights of its teacher `cfg`.

    All sizes are among them, for a config file may say others.
    """
    part, words = student.part, [f"init.source={source}"]
    if part.layers is not None:
        words.append("init.layers=evenly")
    for key in ("width", "heads", "feed_forward_width"):
        words += [f"init.{key}={size}"] if (size := getattr(part, key)) else []
    sizes = ("layers", "width", "heads", "kv_heads", "head_dim", "feed_forward_width")
    for key in (*sizes, "encoder_layers") if cfg.encoder_layers else sizes:
        words.append(f"model.{key}={getattr(student.cfg, key)}")
    return [f"--config.{word}" for word in words]


def _ranked(sizes: Sizes, most: float, work: float, *, length: int, count: int) -> list[Student]:
    """Returns students with at most so many parameters and such a share of FLOPs, one of each range of depths, ranked.

    Raises:
      UserError: there is none.
    """
    cfg, every = sizes.cfg, shapes(sizes.cfg)
    by_depth: dict[int, list[tuple[float, Shape]]] = collections.defaultdict(list)
    counted = list(sizes.of(every))
    for shape, (parameters, share) in zip(every, counted):
        if parameters <= most and share <= work:
            unused = 1 - max(parameters / most, share / work)
            by_depth[(shape.layers - 1) * count // cfg.layers].append(
                (UNUSED * unused + _unlikeness(cfg, shape), shape)
            )
    if not by_depth:
        parameters, share = min(counted)
        wanted = f"{most:,.0f} parameters" if most < math.inf else f"{work:.2g} of the FLOPs"
        raise UserError(
            f"no student has at most {wanted}: the smallest that can be sliced has {parameters:,} parameters "
            f"({parameters / sizes.total:.1%}) and takes {share:.1%} of the FLOPs"
        )
    found = []
    for shapes_of_depth in by_depth.values():
        for score, shape in heapq.nsmallest(OF_A_DEPTH, shapes_of_depth):
            student = _student(sizes, shape, length)
            if student is not None and student.parameters <= most:
                found.append((score + student.work, student.parameters, student))
                break
    return [student for *_, student in sorted(found, key=lambda one: one[:2])]


def _student(sizes: Sizes, shape: Shape, length: int) -> Student | None:
    cfg, layers = sizes.cfg, layers_of(sizes.cfg, shape.layers, shape.encoder_layers)
    cut = lambda size, own: 0 if size == own else size
    widest = [max(getattr(cfg.layer(i), key) for i in layers) for key in ("feed_forward_width", "heads")]
    part = Part(
        None if len(layers) == cfg.total_layers else layers,
        cut(shape.width, cfg.width),
        *(cut(min(size, own), own) for size, own in zip((shape.feed_forward_width, shape.heads), widest)),
    )
    try:
        small = part.config(cfg)
    except UserError:
        return None
    (total, inner), source = parameters_of(small), length if cfg.encoder_layers else 0
    work = flops.forward_flops(small, 1, length, source) / flops.forward_flops(cfg, 1, length, source)
    return Student(part, small, total, total / sizes.total, inner / sizes.inner, work)


def _unlikeness(cfg: ModelConfig, shape: Shape) -> float:
    """How far depth, heads and feed-forward width are from the teacher's, as factors of the width; 0 is like it."""
    first = cfg.layer(0)
    before = (cfg.layers, first.heads, first.feed_forward_width)
    after = (shape.layers, shape.heads, shape.feed_forward_width)
    narrower = shape.width / cfg.width
    return math.hypot(*(math.log(new / old / narrower) for new, old in zip(after, before)))
