"""Weights that become zero while a model trains: masks beside the optimizer's state, renewed inside the jitted step.

Notable: one wrapper, and a table of methods that differ in what a zero learns and in how masks are renewed. Scores and
allocations are those of `importance` and `masks`; what they look at is the gradient of the step itself.
  kept              the zeros of the weights that training starts from (see `experiments.sparsify`) stay zero
  masked            as the schedule says, weights with the lowest scores are left out; they keep their value, and come
                    back if others fall below it (Zhu and Gupta, arXiv 1710.01878)
  straight_through  the same, and what is left out learns as if it were not (2006.07253, 2102.04010)
  regrown           RigL (1911.11134): as many as at the start; the smallest go, those with the largest gradient come
Rewinding (1803.03635) is a checkpoint of earlier weights with later zeros: `experiments.sparsify --rewind`.
Left out: zeros that multiply faster; unstructured sparsity saves bytes, and no time on any backend of XLA.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fastlm import configuration
from fastlm.compress import importance, masks, schedules
from fastlm.compress.evidence import ABSOLUTE, GRADIENT, Evidence
from fastlm.compress.setting import Setting
from fastlm.errors import UserError, nearest
from fastlm.models import ModelConfig, abstract, formats
from fastlm.ops import paths
from fastlm.ops.leaf import Leaf, is_whole
from fastlm.tasks.task import Compression, Task

NAME = "pruned"
MATRICES = ("(cross_)?attention/(q|k|qk|v|out)", "feed_forward/(up|gate|down)")

ZEROS, SCORE, CHANCE = "zeros", "score", "chance"

Masks = dict[str, Array]
Refresh = Callable[["Step"], Masks]


@dataclasses.dataclass(frozen=True)
class Step:
    """What masks are renewed from.

    Attributes:
      masks, scores, sizes, gradients: by path: what holds now, what decides, and the absolute weights and gradients.
      sparsity: that is wanted.
      allocate: see `masks.ALLOCATIONS`.
      share: of the ones, that may change places.
    """

    masks: Masks
    scores: Masks
    sizes: Masks
    gradients: Masks
    sparsity: Array
    allocate: Callable[[Masks, Array], Masks]
    share: Array


def _by_score(step: Step) -> Masks:
    return step.allocate(step.scores, step.sparsity)


def _regrown(step: Step) -> Masks:
    """Drops the smallest of what stays, and lets as many grow where the gradient is largest: never the same."""

    def one(mask: Array, size: Array, gradient: Array) -> Array:
        flat, ones = mask.reshape(-1), jnp.sum(mask, dtype=jnp.int32)
        moving = jnp.minimum(jnp.round(step.share * ones).astype(jnp.int32), flat.size - ones)
        stays = masks.largest(jnp.where(flat, size.reshape(-1), -1.0), ones - moving)
        grown = masks.largest(jnp.where(flat, -1.0, gradient.reshape(-1)), moving)
        return (stays | grown).reshape(mask.shape)

    return {path: one(step.masks[path], step.sizes[path], step.gradients[path]) for path in step.masks}


@dataclasses.dataclass(frozen=True)
class Method:
    """How zeros come and go.

    Attributes:
      start: what the masks before the first step are made by: ZEROS of the weights themselves, CHANCE, or the SCORE, or
        magnitude where the score needs a gradient.
      refresh: how masks are renewed; None for never.
      learns: whether what is left out has a gradient.
      forgets: whether what is left out becomes zero, and comes back as that.
    """

    start: str
    refresh: Refresh | None
    learns: bool = False
    forgets: bool = False


METHODS = {
    "kept": Method(ZEROS, None),
    "masked": Method(SCORE, _by_score),
    "straight_through": Method(SCORE, _by_score, learns=True),
    "regrown": Method(CHANCE, _regrown, learns=True, forgets=True),
}


@dataclasses.dataclass(frozen=True)
class Pruned:
    """The wrapper "pruned".

    Attributes:
      method: one of `METHODS`.
      sparsity: share of zeros in the matrices, a number or a schedule; with an N:M allocation, that decides.
      score: one of `importance.WEIGHTS` that looks at the gradient, or at weights alone.
      allocation: "matrix", "output", "global", "erdos_renyi", or "2:4".
      every: steps between two renewals of the masks.
      until: share of the run after which they stay as they are.
      share: of the ones, that change places at the first renewal of "regrown"; then ever fewer, as a cosine.
      paths: patterns of the matrices that are pruned.
    """

    method: str = "masked"
    sparsity: float | str = "cubic(start=0.0, end=0.7, until=0.6)"
    score: str = "magnitude"
    allocation: str = "matrix"
    every: int = 10
    until: float = 0.75
    share: float = 0.3
    paths: tuple[str, ...] = MATRICES

    def __post_init__(self) -> None:
        configuration.at_least(NAME, self, every=1)
        for key in ("until", "share"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"config.{NAME}.{key}: must be from 0 to 1, got {getattr(self, key)}")
        if self.method not in METHODS:
            raise UserError(
                f"config.{NAME}.method: no '{self.method}'{nearest(self.method, METHODS)}; one of: {', '.join(METHODS)}"
            )
        score = importance.of_weights(self.score, f"config.{NAME}.score")
        if not set(score.needs) <= {GRADIENT, ABSOLUTE}:
            raise UserError(
                f"config.{NAME}.score: '{self.score}' looks at more than the gradient, which is all that a training "
                "step keeps; prune with experiments.sparsify, then train with method 'kept'"
            )
        masks.allocation(self.allocation, f"config.{NAME}.allocation")
        self._sparsity(1)

    def _sparsity(self, steps: int) -> schedules.Schedule:
        return schedules.make(self.sparsity, steps, f"config.{NAME}.sparsity", most=1.0)

    def __call__(self, task: Task, setting: Setting) -> Task:
        """Returns the task whose model has zeros in its matrices.

        Raises:
          UserError: a pattern that selects nothing, or weights that another wrapper has in another form.
        """
        sides = {path: names for path, names in task.axes.items() if path.startswith("model/")}
        pruned = matrices(sides, self.paths, f"config.{NAME}.paths")
        sparsity = self._sparsity(setting.steps)
        outer = _Wrapper(self, METHODS[self.method], task.compression, pruned, setting.steps, sparsity)
        return dataclasses.replace(task, compression=outer.compression(), export=outer.export(task))


def matrices(sides: Mapping[str, tuple[str | None, ...]], patterns: tuple[str, ...], where: str) -> tuple[str, ...]:
    """Returns the paths of the matrices that patterns select, of those with these logical axes.

    Raises:
      UserError: one of them selects nothing.
    """
    matches = lambda path: any(paths.matches(pattern, path) for pattern in patterns)
    found = tuple(path for path, names in sides.items() if len(names) == 2 and matches(path))
    for pattern in patterns:
        if not any(paths.matches(pattern, path) for path in found):
            paths.require_match(pattern, sides, where)
    return found


def packed(cfg: ModelConfig, params: Any) -> tuple[ModelConfig, Any]:
    """Returns a model for disk: matrices with zeros as a bit for each number and the others, where that is smaller."""
    leaves, found = paths.flatten(params, is_leaf=is_whole), {}
    for path, names in abstract(cfg.plain())[1].items():
        leaf = leaves.get(path)
        if len(names) == 2 and isinstance(leaf, jax.Array):
            form = formats.OfSparse(int(jnp.count_nonzero(leaf)))
            if leaf.size / 8 + form.ones * leaf.dtype.itemsize < leaf.nbytes:
                found[path] = form
    own = tuple((path, formats.text_of(form)) for path, form in found.items())
    put = lambda path, leaf: found[path].of(leaf) if path in found else leaf
    return dataclasses.replace(cfg, formats=own + cfg.formats), paths.map_with_path(put, params, is_leaf=is_whole)


@dataclasses.dataclass(frozen=True)
class _Wrapper:
    """The parts of a `Compression` around another one; paths begin with "model/"."""

    settings: Pruned
    method: Method
    inner: Compression
    pruned: tuple[str, ...]
    steps: int
    sparsity: schedules.Schedule

    def compression(self) -> Compression:
        return Compression(self.init, self.view, self.penalty, self.update)

    def init(self, params: Any) -> Any:
        own = self._own(params)
        sums = {path: jnp.zeros_like(leaf) for path, leaf in own.items()} if self._score.sums else {}
        return {"inner": self.inner.init(params), "masks": paths.nested(self._first(own)), "sums": paths.nested(sums)}

    def _first(self, own: Masks) -> Masks:
        if self.method.start == ZEROS:
            return {path: leaf != 0 for path, leaf in own.items()}
        name = "random" if self.method.start == CHANCE else "magnitude" if self._score.needs else self.settings.score
        scores = importance.scores(name, own, dict.fromkeys(own, Evidence()), jax.random.key(0))
        return self._allocate(scores, self.sparsity(jnp.zeros((), jnp.int32)))

    def view(self, params: Any, constants: Any, state: Any, step: Array, rng: Array | None) -> Any:
        weights = self.inner.view(params, constants, state["inner"], step, rng)
        return self._masked(weights, state, self.method.learns)

    def penalty(self, params: Any, state: Any, step: Array) -> tuple[Array, dict[str, Array]]:
        penalty, metrics = self.inner.penalty(params, state["inner"], step)
        return penalty, metrics | {"sparsity": masks.sparsity(paths.flatten(state["masks"]))}

    def update(self, params: Any, state: Any, grads: Any, aux: Any, step: Array, rng: Array) -> tuple[Any, Any]:
        inner_key, rng = jax.random.split(rng)
        params, inner = self.inner.update(params, state["inner"], grads, aux, step, inner_key)
        own, gradients = self._own(params), self._own(grads)
        sums, now = paths.flatten(state["sums"]), paths.flatten(state["masks"])
        if self._score.sums:
            sums = {path: sums[path] + score for path, score in self._scores(own, gradients, rng).items()}
        if self.method.refresh is not None:
            due = (step % self.settings.every == 0) & (step <= self.settings.until * self.steps)

            def renewed() -> Masks:  # in here, so that other steps do not pay for it
                return self.method.refresh(
                    Step(
                        now,
                        sums or self._scores(own, gradients, rng),
                        {path: jnp.abs(leaf) for path, leaf in own.items()},
                        {path: jnp.abs(g) for path, g in gradients.items()},
                        self.sparsity(step),
                        self._allocate,
                        self._moving(step),
                    )
                )

            now = jax.lax.cond(due, renewed, lambda: now)
        state = {"inner": inner, "masks": paths.nested(now), "sums": paths.nested(sums)}
        return (self._masked(params, state, False) if self.method.forgets else params), state

    def _scores(self, own: Masks, gradients: Masks, rng: Array) -> Masks:
        seen = {path: Evidence(g, jnp.abs(g)) for path, g in gradients.items()}
        return importance.scores(self.settings.score, own, seen, rng)

    def export(self, task: Task) -> Callable[..., Any]:
        def export(params: Any, constants: Any, state: Any) -> Any:
            model = params["model"] if task.export is None else task.export(params, constants, state["inner"])
            return self._masked({"model": model}, state, False)["model"]

        return export

    @property
    def _score(self) -> importance.OfWeights:
        return importance.WEIGHTS[self.settings.score]

    def _allocate(self, scores: Masks, sparsity: Array) -> Masks:
        return masks.allocation(self.settings.allocation, NAME)(scores, sparsity)

    def _moving(self, step: Array) -> Array:
        gone = step / max(1.0, self.settings.until * self.steps)
        return 0.5 * self.settings.share * (1 + jnp.cos(math.pi * jnp.clip(gone, 0, 1)))

    def _own(self, tree: Any) -> Masks:
        leaves = paths.flatten(tree, is_leaf=is_whole)
        return {path: leaves[path] for path in self.pruned}

    def _masked(self, weights: Any, state: Any, learns: bool) -> Any:
        """Returns the weights with zeros, which have a gradient as if they were none if they learn."""
        found = paths.flatten(state["masks"])

        def one(path: str, leaf: Any) -> Any:
            if path not in found:
                return leaf
            if isinstance(leaf, Leaf):
                raise UserError(f"config.wrappers: '{NAME}' comes before what gives weights another form (lora)")
            zeroed = jnp.where(found[path], leaf, 0)
            return leaf + jax.lax.stop_gradient(zeroed - leaf) if learns else zeroed

        return paths.map_with_path(one, weights, is_leaf=is_whole)
