"""Starting from a trained model: what it was, and its weights in the shape of what it becomes.

Notable: the architecture comes from the checkpoint, and the keys that the section `model` has change it
(dropout, a longer vocabulary, another pooling); `command_line.load_config` leaves in it what was said.
What came of it is said before the first step (`notes`). Weights are taken over by
path and shape. Only a head and a pooler may be new, a table of tokens may grow; everything else that
does not fit is an error, since half a model trains without a word and ends as a bad one.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh

from fastlm import configuration
from fastlm.data import tokenizers
from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig, abstract, huggingface
from fastlm.ops import paths
from fastlm.training import restore
from fastlm.training.checkpoints import Checkpoints

FREE = ("head", "pooler")  # parts of the tree that may be new, or left behind
GROWING = "embedding/table"


@dataclasses.dataclass(frozen=True)
class Init:
    """What training starts from.

    Attributes:
      source: a workdir of fastlm.train or fastlm.convert; "" starts from random weights.
      step: of its checkpoints: a number, "best", or "" for the newest.
    """

    source: str = ""
    step: str = ""

    def __post_init__(self) -> None:
        folder = Path(self.source).expanduser()
        if self.source and not (folder / "checkpoints").is_dir():
            raise UserError(
                f"config.init.source: {self.source} holds no fastlm checkpoint; a model from elsewhere is converted "
                f"first: python -m fastlm.convert --from {self.source} --to runs/base"
            )


@dataclasses.dataclass(frozen=True)
class Start:
    """A checkpoint to start from, its weights still on disk.

    Attributes:
      origin: what it keeps of where it came from (see `convert`): chat template, ids for generation; {} for our own.
      task: the section of its config.
    """

    init: Init
    step: int
    cfg: ModelConfig
    tokenizer: tokenizers.Tokenizer
    origin: dict[str, Any]
    task: dict[str, Any] = dataclasses.field(default_factory=dict)

    def params(self, cfg: ModelConfig, mesh: Mesh, seed: int) -> Any:
        """Returns the weights for the architecture `cfg`, with what is new made anew."""
        old = restore.restore(self.init.source, mesh, step=self.step).params
        return taken_over(old, cfg, jax.random.key(seed), where=f"config.init.source: {self.init.source}")


def start(init: Init) -> Start:
    """Reads what a checkpoint says of itself.

    Raises:
      UserError: there is none, or it is damaged.
    """
    files = Checkpoints(Path(init.source).expanduser(), read_only=True)
    step = files.resolve(init.step)
    about = files.about(step)
    cfg = ModelConfig.from_json(json.dumps(about["model"]))
    tokenizer, task = tokenizers.from_json(about["tokenizer"]), about["config"].get("task", {})
    return Start(init, step, cfg, tokenizer, about.get("huggingface", {}), task)


def changed(cfg: ModelConfig, values: Mapping[str, Any]) -> ModelConfig:
    """Returns `cfg` with the values of a config section, which holds nothing else; see `notes`."""
    return dataclasses.replace(cfg, **configuration.arguments(ModelConfig, "model", values))


def notes(start: Start, cfg: ModelConfig) -> tuple[str, ...]:
    """Returns what to know before training: what is as in the checkpoint and what is not, and if it cannot go back.

    Args:
      cfg: what is trained.
    """
    changes, kept = [], []
    for field in dataclasses.fields(ModelConfig):
        old, new = getattr(start.cfg, field.name), getattr(cfg, field.name)
        if old != new:
            changes.append(f"{field.name} {new!r} (there {old!r})")
        elif new != field.default:
            kept.append(f"{field.name} {new!r}")
    lines = [
        f"starts from {start.init.source}, step {start.step}; changed: {', '.join(changes) or 'nothing'}; as there: "
        f"{', '.join(kept) or 'the defaults'}"
    ]
    if start.origin.get("architecture"):  # who brought a model from Hugging Face may want to take it back
        try:
            huggingface.describe(cfg)
        except UserError as error:
            lines.append(
                f"cannot be written for Hugging Face: {error}; to change it: --config.model.KEY=VALUE, from the start"
            )
    return tuple(lines)


def taken_over(old: Any, cfg: ModelConfig, rng: jax.Array, *, where: str) -> Any:
    """Returns parameters of `cfg`: those of `old` where path and shape agree, fresh ones in a new head or pooler.

    Raises:
      UserError: something else is missing, left over, or of another shape; names it.
    """
    old, wanted = paths.flatten(old), paths.flatten(abstract(cfg)[0])
    free = lambda path: path.split("/")[0] in FREE
    grown = {GROWING} if _grows(old, wanted) else set()
    same = {path for path in wanted if path in old and old[path].shape == wanted[path].shape}
    new = sorted(set(wanted) - same - grown)
    left = sorted(path for path in set(old) - set(wanted))
    for what, names in (("does not have", new), ("also has", left)):
        wrong = [path for path in names if not free(path)]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise UserError(
                f"{where} {what} {', '.join(_shown(path, wanted, old) for path in wrong[:3])}{more}; change "
                "config.model so that it fits"
            )
    if new or left or grown:
        logging.info("made anew: %s; left behind: %s; grown: %s", new, left, sorted(grown))
    fresh = jax.jit(lambda key: {path: paths.flatten(Model(cfg).init(key))[path] for path in [*new, *grown]})(rng)
    for path in grown:
        fresh[path] = jnp.concatenate([old[path], fresh[path][len(old[path]) :]])
    return paths.map_with_path(lambda path, leaf: fresh.get(path, old.get(path)), abstract(cfg)[0])


def _grows(old: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    before, after = old.get(GROWING), wanted[GROWING]
    return before is not None and before.shape[0] < after.shape[0] and before.shape[1:] == after.shape[1:]


def _shown(path: str, wanted: Mapping[str, Any], old: Mapping[str, Any]) -> str:
    if path in wanted and path in old:
        return f"{path} {tuple(wanted[path].shape)} (its own is {tuple(old[path].shape)})"
    return f"{path} {tuple((wanted.get(path) or old.get(path)).shape)}"
