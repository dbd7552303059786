"""How many times as fast as its teacher a student will be: measured before it is trained.

Notable: what a model weighs does not change how fast it is, so weights are random. Each student takes turns with the
teacher, so that both see the same minutes of the machine; products are fused, as `fastlm.generate` has them.
"""

import functools
import statistics
from collections.abc import Callable, Sequence

import jax

from fastlm.measurement import ruler
from fastlm.measurement.ruler import Load
from fastlm.measurement.runtimes import PIECE, Jitted
from fastlm.models import Compute, Model, ModelConfig, fusion
from fastlm.search.students import Clock


def clock(compute: Compute, *, rows: int = 1, length: int = 128, tokens: int = 32, turns: int = 5) -> Clock:
    """Returns what times students: writing `tokens` behind `length` others, or reading, where a model does not write.

    Args:
      compute: how all of them are computed.
    """

    def speeds(teacher: ModelConfig, students: Sequence[ModelConfig]) -> list[float]:
        first, load = _runtime(teacher, compute), load_of(teacher, compute, rows, length, tokens)
        return [_ratio(first, _runtime(student, compute), load, turns) for student in students]

    return speeds


def load_of(cfg: ModelConfig, compute: Compute, rows: int, length: int, tokens: int) -> Load:
    """Returns writing `tokens` behind `length` others, or reading, where a model does not write; as it has room."""
    room = cfg.max_length - tokens - PIECE
    writes = Jitted(Model(cfg, compute), None).writes()
    return Load(rows, max(min(length, room), 1), tokens) if writes else Load(rows, min(length, cfg.max_length))


def runner(cfg: ModelConfig, compute: Compute) -> Callable[[Load], Sequence[float]]:
    """Returns what times a load of a model with random weights: seconds of its pieces."""
    return functools.partial(_run, _runtime(cfg, compute))


def _runtime(cfg: ModelConfig, compute: Compute) -> Jitted:
    cfg, params = fusion.fuse(cfg, jax.jit(Model(cfg).init)(jax.random.key(0)))
    return Jitted(Model(cfg, compute), params, 0 if cfg.encoder_layers else None)


def _run(runtime: Jitted, load: Load) -> list[float]:
    if load.count:
        return runtime.write(load.rows, load.length, load.count)
    return [runtime.read(load.rows, load.length)]


def _ratio(teacher: Jitted, student: Jitted, load: Load, turns: int) -> float:
    models = {"teacher": functools.partial(_run, teacher), "student": functools.partial(_run, student)}
    seconds = {name: by_load[str(load)] for name, by_load in ruler.take_turns(models, [load], turns).items()}
    return statistics.median(sum(a) / sum(b) for a, b in zip(seconds["teacher"], seconds["student"]))
