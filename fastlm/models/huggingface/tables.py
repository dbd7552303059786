"""Tables from another program's tensors to our parameters: what a row says and how rows become transfers.

Notable: an architecture is rows `(our path, their name, how)` and no code per tensor. A row is in force
where our model has its paths (`models.abstract` of the config says which), so biases, an untied head
or QK-norm need no condition of their own. `{i}` counts the layers of the only or the decoder's
stack, `{e}` those of the encoder; ours are numbered through. Names are matched without the prefix that a
class with a head puts before the body's ("bert."), since files come with and without it.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fastlm.models.config import LayerConfig, ModelConfig

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class How:
    """A way between our arrays and their tensor.

    Attributes:
      shape: shapes of ours -> shape of theirs.
      read: their tensor, shapes of ours, the layer (None outside the stacks) -> ours.
      write: ours, the layer -> their tensor.
    """

    shape: Callable[[Sequence[Shape]], Shape]
    read: Callable[[np.ndarray, Sequence[Shape], LayerConfig | None], Sequence[np.ndarray]]
    write: Callable[[Sequence[np.ndarray], LayerConfig | None], np.ndarray]


def _cut(tensor: np.ndarray, shapes: Sequence[Shape], layer: LayerConfig | None) -> Sequence[np.ndarray]:
    return np.split(tensor, np.cumsum([shape[-1] for shape in shapes])[:-1], axis=-1)


AS_IS = How(lambda shapes: shapes[0], lambda tensor, shapes, layer: (tensor,), lambda ours, layer: ours[0])
# Their Linear keeps [out, in].
TRANSPOSED = How(
    lambda shapes: shapes[0][::-1], lambda tensor, shapes, layer: (tensor.T,), lambda ours, layer: ours[0].T
)
ONE_ROW = How(
    lambda shapes: (1, *shapes[0]), lambda tensor, shapes, layer: (tensor[0],), lambda ours, layer: ours[0][None]
)
# Several of ours side by side in one of theirs, along the last axis.
PACKED = How(
    lambda shapes: (*shapes[0][:-1], sum(shape[-1] for shape in shapes)),
    _cut,
    lambda ours, layer: np.concatenate(ours, axis=-1),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
      ours: template of a path, or of several that lie in one tensor.
      theirs: template of a name.
      copies: names under which files may hold the same tensor again, or instead.
      when: whether the row is for such a model, where its paths alone do not tell.
    """

    ours: str | tuple[str, ...]
    theirs: str
    how: How = AS_IS
    copies: tuple[str, ...] = ()
    when: Callable[[ModelConfig], bool] = lambda cfg: True

    @property
    def paths(self) -> tuple[str, ...]:
        """The templates of our paths."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours


def projection(ours: str, theirs: str) -> tuple[Row, ...]:
    """Rows of a Linear inside a layer, whose bias is `<ours>_bias`."""
    return Row(ours, f"{theirs}.weight", TRANSPOSED), Row(f"{ours}_bias", f"{theirs}.bias")


def dense(ours: str, theirs: str) -> tuple[Row, ...]:
    """Rows of a Linear that is a module of its own, with `kernel` and `bias`."""
    return Row(f"{ours}/kernel", f"{theirs}.weight", TRANSPOSED), Row(f"{ours}/bias", f"{theirs}.bias")


def norm(ours: str, theirs: str) -> tuple[Row, ...]:
    """Rows of a LayerNorm or RMSNorm."""
    return Row(f"{ours}/scale", f"{theirs}.weight"), Row(f"{ours}/bias", f"{theirs}.bias")


@dataclasses.dataclass(frozen=True)
class Head:
    """What a class adds to the body of its architecture.

    Attributes:
      kind: `ModelConfig.head`.
      rows: its tensors, by their full names.
      fields: of ModelConfig, over those of the architecture.
      prefixed: whether the names of the body carry the architecture's prefix.
    """

    kind: str
    rows: tuple[Row, ...] = ()
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prefixed: bool = True


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A family of classes that share a body.

    Attributes:
      model_type: how config.json calls it.
      prefix: what classes with a head put before the names of the body.
      rows: the body.
      heads: by class name; the first of a kind is the one that is written.
      fields: options of config.json and the names in the file -> fields of ModelConfig.
      options: ModelConfig -> options of config.json; `fields` is its inverse where the model fits.
      accepted: options that we take only at these values (absent is fine).
      ignored: patterns of whole names that hold nothing to keep: buffers, heads of the pretraining.
      renamed: endings of names that older files spell differently, old -> new.
      read_as: classes that are read as another, whose tensors they have.
      computed: names of what we compute, with what they must then hold.
    """

    model_type: str
    prefix: str
    rows: tuple[Row, ...]
    heads: Mapping[str, Head]
    fields: Callable[..., dict[str, Any]]
    options: Callable[[ModelConfig], dict[str, Any]] | None
    accepted: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    read_as: Mapping[str, str] = dataclasses.field(default_factory=dict)
    computed: Mapping[str, Callable[[ModelConfig], np.ndarray]] = dataclasses.field(default_factory=dict)

    def plain(self, name: str) -> str:
        """Returns a name as the tables have it: without the prefix, spelt as today."""
        for old, new in self.renamed.items():
            if name.endswith(old):
                name = name.removesuffix(old) + new
        return name.removeprefix(self.prefix)

    def optional_names(self, cfg: ModelConfig) -> set[str]:
        """Names of heads and poolers of any class, which a file may hold though this model does not want them."""
        rows = [row for head in self.heads.values() for row in head.rows]
        return {self.plain(name) for _, _, row in _expanded(rows, cfg) for name in (row.theirs, *row.copies)}


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One tensor of theirs and where it goes.

    Attributes:
      paths, shapes: ours.
      name: theirs; as in a written file.
      layer: number of our layer, None outside the stacks.
    """

    paths: tuple[str, ...]
    shapes: tuple[Shape, ...]
    name: str
    how: How
    copies: tuple[str, ...]
    layer: int | None

    @property
    def shape(self) -> Shape:
        """The shape that their tensor must have."""
        return self.how.shape(self.shapes)


def transfers(
    architecture: Architecture, head: Head, cfg: ModelConfig, shapes: Mapping[str, Shape]
) -> tuple[list[Transfer], list[str]]:
    """Returns what is to be moved for a model whose parameters have these shapes by path, and paths in no table."""
    prefix = architecture.prefix if head.prefixed else ""
    found = [*_in_force(architecture.rows, cfg, shapes, prefix), *_in_force(head.rows, cfg, shapes, "")]
    placed = {path for transfer in found for path in transfer.paths}
    return found, [path for path in shapes if path not in placed]


def _in_force(rows: Iterable[Row], cfg: ModelConfig, shapes: Mapping[str, Shape], prefix: str) -> Iterator[Transfer]:
    for paths, layer, row in _expanded(rows, cfg):
        if row.when(cfg) and all(path in shapes for path in paths):
            ours = tuple(shapes[path] for path in paths)
            yield Transfer(paths, ours, prefix + row.theirs, row.how, row.copies, layer)


def _expanded(rows: Iterable[Row], cfg: ModelConfig) -> Iterator[tuple[tuple[str, ...], int | None, Row]]:
    """Fills in layer numbers: our paths, our layer, and the row with their names."""
    for row in rows:
        letter = next((letter for letter in "ie" if f"{{{letter}}}" in row.paths[0]), None)
        if letter is None:
            yield row.paths, None, row
            continue
        for theirs, ours in enumerate(cfg.stack if letter == "i" else cfg.encoder_stack):
            paths = tuple(path.format(**{letter: ours}) for path in row.paths)
            yield paths, ours, dataclasses.replace(row, theirs=row.theirs.format(**{letter: theirs}))
