"""What a wrapper may know of the run that it becomes part of."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from jax.sharding import Mesh

from fastlm.data.documents import Documents
from fastlm.data.tokenizers import Tokenizer
from fastlm.models import Model, ModelConfig
from fastlm.tasks.kind import TaskKind


class Checkpoint(Protocol):
    """A trained model that still lies on disk (`training.initial.Start`)."""

    step: int
    cfg: ModelConfig
    tokenizer: Tokenizer
    task: dict[str, Any]

    def params(self, cfg: ModelConfig, mesh: Mesh, seed: int) -> Any:
        """Reads its weights."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """The parts of an experiment that stand before its task is wrapped.

    Attributes:
      model: what is trained.
      length: tokens of a row.
      steps: of the whole run.
      checkpoint: `(workdir, step) -> Checkpoint`; raises a `UserError` that names what is missing.
      documents: `() -> the training texts, by source`.
      start: workdir of the model whose weights the student begins with; "" for random ones.
    """

    model: Model
    kind: TaskKind
    tokenizer: Tokenizer
    mesh: Mesh
    length: int
    steps: int
    checkpoint: Callable[[str, str], Checkpoint]
    documents: Callable[[], Sequence[Documents]] = tuple
    start: str = ""
