"""LoRA: the model stays as it is, and thin matrices beside its weights learn (arXiv 2106.09685).

Notable: the thin matrices are trainables beside "model"; the forward pass sees leaves that add the
two, also over a base that is itself compressed. Frozen weights have no optimizer state and no
gradient. What is exported is the sum, in the architecture that it started from.
Left out: dropout on the input of the thin matrices.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fastlm.compress.setting import Setting
from fastlm.errors import UserError
from fastlm.ops import paths
from fastlm.ops.contract import dense
from fastlm.ops.leaf import is_whole
from fastlm.ops.leaves import Adapted
from fastlm.tasks.task import Compression, Task

NAME = "lora"


@dataclasses.dataclass(frozen=True)
class Lora:
    """The wrapper "lora".

    Attributes:
      rank: R of the thin matrices.
      alpha: the sum adds alpha / rank times their product.
      paths: patterns of the matrices that get them, of those in the model.
      train: patterns of the model's own parameters that learn too (a new head).
    """

    rank: int = 8
    alpha: float = 16.0
    paths: tuple[str, ...] = ("(cross_)?attention/(q|k|qk|v|out)", "feed_forward/(up|gate|down)")
    train: tuple[str, ...] = ("head", "pooler")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"config.lora.rank: must be at least 1, got {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"config.lora.alpha: must be a positive number, got {self.alpha}")

    def __call__(self, task: Task, setting: Setting | None = None) -> Task:
        """Returns the task with frozen weights and thin matrices beside them; of the setting it needs nothing.

        Raises:
          UserError: a pattern selects nothing.
        """
        del setting
        sides = {path: names for path, names in task.axes.items() if path.startswith("model/")}
        matches = lambda patterns, path: any(paths.matches(pattern, path) for pattern in patterns)
        adapted = sorted(path for path, names in sides.items() if len(names) == 2 and matches(self.paths, path))
        for pattern in self.paths:
            if not any(paths.matches(pattern, path) for path in adapted):
                # Gated layers have a "gate", others none: one pattern may name several kinds.
                paths.require_match(pattern, sides, "config.lora.paths")
        inside = lambda path: path.removeprefix("model/")
        frozen = tuple(path for path in sides if not matches(self.train, path) or path in adapted)
        return dataclasses.replace(
            task,
            init=self._init(task, [inside(path) for path in adapted]),
            compression=self._compression(task.compression, {inside(path) for path in frozen}),
            export=self._export(task),
            frozen=task.frozen + tuple(re.escape(path) for path in frozen),
            axes=task.axes
            | {f"{NAME}/{inside(path)}/a": (sides[path][0], None) for path in adapted}
            | {f"{NAME}/{inside(path)}/b": (None, sides[path][1]) for path in adapted},
        )

    def _init(self, task: Task, adapted: list[str]) -> Callable[..., Any]:
        def init(rng: jax.Array, model_params: Any) -> Any:
            params = task.init(rng, model_params)
            weights, thin = paths.flatten(params["model"]), {}
            for number, path in enumerate(adapted):
                rows, columns = weights[path].shape
                key = jax.random.fold_in(jax.random.fold_in(rng, 1), number)
                a = jax.random.normal(key, (rows, self.rank)) * rows**-0.5
                thin |= {f"{path}/a": a, f"{path}/b": jnp.zeros((self.rank, columns))}
            return {**params, NAME: paths.nested(thin)}

        return init

    def _compression(self, inner: Compression, frozen: set[str]) -> Compression:
        def view(params: Any, constants: Any, state: Any, step: Any, rng: Any) -> Any:
            held = lambda path, leaf: jax.lax.stop_gradient(leaf) if path in frozen else leaf
            own = {**params, "model": paths.map_with_path(held, params["model"])}
            weights = inner.view(own, constants, state, step, rng)
            return {**weights, "model": self.joined(weights["model"], params[NAME])}

        return dataclasses.replace(inner, view=view)

    def _export(self, task: Task) -> Callable[..., Any]:
        def export(params: Any, constants: Any, state: Any) -> Any:
            model = params["model"] if task.export is None else task.export(params, constants, state)
            return jax.tree.map(dense, self.joined(model, params[NAME]), is_leaf=is_whole)

        return export

    def joined(self, model: Any, thin: Any) -> Any:
        """Returns the tree with leaves that add the thin matrices where there are some."""
        found = paths.flatten(thin)

        def join(path: str, leaf: Any) -> Any:
            if f"{path}/a" not in found:
                return leaf
            return Adapted(leaf, found[f"{path}/a"], found[f"{path}/b"], self.alpha / self.rank)

        return paths.map_with_path(join, model, is_leaf=is_whole)
