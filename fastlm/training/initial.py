"""Starting from a trained model, or from a part of one: what it was, and its weights in the shape of what it becomes.

Notable: the architecture comes from the checkpoint, cut to the layers and the width that `Init` keeps, and the keys
that the section `model` has change it (dropout, a longer vocabulary, another pooling); `command_line.load_config`
leaves in it what was said.
What came of it is said before the first step (`notes`). Weights are taken over by
path and shape. Only a head, a pooler, and what another kind of attention needs may be new, a table of tokens may grow;
everything else that does not fit is an error, since half a model trains without a word and ends as a bad one.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fastlm import configuration
from fastlm.compress import parts
from fastlm.data import tokenizers
from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig, abstract, huggingface
from fastlm.models import attention as attention_kinds
from fastlm.ops import paths
from fastlm.training import restore
from fastlm.training.checkpoints import Checkpoints

_logger = logging.getLogger(__name__)

FREE = ("head", "pooler")  # parts of the tree that may be new, or left behind
GROWING = "embedding/table"


@dataclasses.dataclass(frozen=True)
class Init:
    """What training starts from.

    Attributes:
      source: a workdir of fastlm.train or fastlm.convert; "" starts from random weights.
      step: of its checkpoints: a number, "best", or "" for the newest.
      layers: which to keep: "" all, "0,2,4", of an encoder-decoder "0,2|1,3" (the encoder's and the decoder's, each
        counted from 0), or "evenly" as many as config.model.layers (and encoder_layers) says.
      width, feed_forward_width, heads: how many hidden units, and of each layer how many feed-forward units and heads
        to keep, those with the largest weights (see `compress.importance.magnitude`); 0 for all.
    """

    source: str = ""
    step: str = ""
    layers: str = ""
    width: int = 0
    feed_forward_width: int = 0
    heads: int = 0

    def __post_init__(self) -> None:
        for key in ("layers", "width", "feed_forward_width", "heads"):
            if getattr(self, key) and not self.source:
                raise UserError(f"config.init.{key}: keeps a part of a trained model; name it with config.init.source")
        if self.source:
            check_source(self.source, "config.init.source")


def check_source(workdir: str, where: str) -> None:
    """Raises a `UserError`, which names the key `where`, if a workdir has no checkpoints."""
    if not (Path(workdir).expanduser() / "checkpoints").is_dir():
        raise UserError(
            f"{where}: {workdir} holds no fastlm checkpoint; a model from elsewhere is converted first: "
            f"python -m fastlm.convert --from {workdir} --to runs/base"
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

    def part(self, layers: int | None, encoder_layers: int | None) -> parts.Part:
        """Returns what is kept, where the smaller model should have so many layers if they are spread evenly.

        Raises:
          UserError: layers that are not there.
        """
        init = self.init
        chosen = parts.layers_named(init.layers, self.cfg, layers, encoder_layers)
        return parts.Part(chosen, init.width, init.feed_forward_width, init.heads)

    def architecture(self, values: Mapping[str, Any]) -> ModelConfig:
        """Returns what is trained: the part that is kept, with the values of the config section `model`.

        Raises:
          UserError: there is no such part, or the section contradicts it.
        """
        values = configuration.arguments(ModelConfig, "model", values)
        with configuration.naming("init"):
            kept = self.part(values.get("layers"), values.get("encoder_layers")).config(self.cfg)
        by_key = {"layers": ("layers", "encoder_layers"), "heads": ("heads", "kv_heads")}
        for key in ("layers", "width", "feed_forward_width", "heads"):
            for name in by_key.get(key, (key,)) if getattr(self.init, key) else ():
                if values.get(name, own := getattr(kept, name)) != own:
                    raise UserError(
                        f"config.model.{name}: says {values[name]}, but what config.init.{key} keeps has {own}; say "
                        "the same, or leave it out"
                    )
        return changed(kept, values)

    def params(self, cfg: ModelConfig, mesh: Mesh, seed: int) -> Any:
        """Returns the weights for the architecture `cfg`: of the part that is kept, with what is new made anew."""
        part, old = self.part(cfg.layers, cfg.encoder_layers), restore.restore(self.init.source, mesh, step=self.step)
        old, converted = part.take(self.cfg, old.params, mesh), attention_kinds.converted(part.config(self.cfg), cfg)
        where = f"config.init.source: {self.init.source}"
        return taken_over(old, cfg, jax.random.key(seed), where=where, converted=converted)


def start(init: Init) -> Start:
    """Reads what a checkpoint says of itself.

    Raises:
      UserError: there is none, or it is damaged.
    """
    files = Checkpoints(Path(init.source).expanduser(), read_only=True)
    step = files.resolve(init.step)
    about = files.about(step)
    cfg = ModelConfig.from_json(json.dumps(about["model"])).in_use()
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
    part = start.part(cfg.layers, cfg.encoder_layers)
    described = part.describe(start.cfg)
    lines = [
        f"starts from {f'{described} of ' if described else ''}{start.init.source}, step {start.step}; changed: "
        f"{', '.join(changes) or 'nothing'}; as there: {', '.join(kept) or 'the defaults'}"
    ]
    lines += _conversions(part.config(start.cfg), cfg)
    if start.origin.get("architecture"):  # who brought a model from Hugging Face may want to take it back
        try:
            huggingface.describe(cfg)
        except UserError as error:
            lines.append(
                f"cannot be written for Hugging Face: {error}; to change it: --config.model.KEY=VALUE, from the start"
            )
    return tuple(lines)


def _conversions(kept: ModelConfig, cfg: ModelConfig) -> list[str]:
    """Says of converted attention which of its parameters are new, and which of those there were are left behind."""
    old, new = (paths.flatten(abstract(one)[0]) for one in (kept, cfg))
    said: dict[str, list[str]] = {}
    for module in attention_kinds.converted(kept, cfg):
        before, after = _shapes_inside(old, module), _shapes_inside(new, module)
        made = [name for name, shape in after.items() if before.get(name) != shape]
        left = [name for name in before if name not in after]
        what = f"made anew {', '.join(made) or 'nothing'}; left behind {', '.join(left) or 'nothing'}"
        said.setdefault(what, []).append(module)
    return [f"{', '.join(modules)}: {what}" for what, modules in said.items()]


def _shapes_inside(leaves: Mapping[str, Any], module: str) -> dict[str, tuple[int, ...]]:
    inside = {path: leaf for path, leaf in leaves.items() if paths.inside(path, [module])}
    return {path.removeprefix(f"{module}/"): leaf.shape for path, leaf in inside.items()}


def taken_over(old: Any, cfg: ModelConfig, rng: jax.Array, *, where: str, converted: tuple[str, ...] = ()) -> Any:
    """Returns parameters of `cfg`: those of `old` where path and shape agree, fresh ones in a new head or pooler.

    Args:
      converted: more parts where parameters may be new, or left behind: attention of another kind.

    Raises:
      UserError: something else is missing, left over, or of another shape; names it.
    """
    old, wanted = paths.flatten(old), paths.flatten(abstract(cfg)[0])
    free = lambda path: paths.inside(path, (*FREE, *converted))
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
                "config.model so that it fits, or keep a part with config.init"
            )
    if new or left or grown:
        _logger.info("made anew: %s; left behind: %s; grown: %s", new, left, sorted(grown))
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
