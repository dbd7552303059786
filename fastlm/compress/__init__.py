"""What makes a model smaller, or cheaper to train, while it learns: functions from `Task` to `Task`.

`config.wrappers` names them in order, innermost first; each has a section of its own in the config. A wrapper is made
of that section and called with a task and the `Setting` that it becomes part of.
"""

from collections.abc import Callable

from fastlm.compress.distill import Distilled
from fastlm.compress.gates import Gated
from fastlm.compress.lora import Lora
from fastlm.compress.prune import Pruned
from fastlm.compress.setting import Setting
from fastlm.tasks.task import Task

__all__ = ["WRAPPERS", "Setting"]

WRAPPERS: dict[str, Callable[..., Callable[[Task, Setting], Task]]] = {
    "distilled": Distilled,
    "gated": Gated,
    "lora": Lora,
    "pruned": Pruned,
}
