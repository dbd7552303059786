"""A part of a model as a model: chosen layers, hidden units, heads and feed-forward units of its weights.

Notable: like `fusion`, rewrites of (cfg, params); which axis of which weight to slice follows from the logical axes
(`units`), so that tied embeddings, gates, biases, grouped queries, heads on top and every kind of attention come along.
Choosing everything changes nothing. Exact are cuts of feed-forward units whose `down` is zero, and of heads whose rows
of `out` are. Hidden units that are zero throughout (columns of the table, of everything that writes to the stream, and
gains) leave the sums as they are, but norms average over fewer: under RMSNorm `rescale_norms` makes up for that, in
gains and epsilon; under LayerNorm nothing can, unless the mean of what is left is zero.
Refused: hidden units where the width says more than how many there are (sinusoids), heads where their place says what
they do (ALiBi's slopes), models with fused products.

Dims: D embed, N heads, K kv heads, F mlp.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastlm.errors import UserError
from fastlm.models import formats, units
from fastlm.models.config import KINDS_PER_LAYER, SIZES_PER_LAYER, ModelConfig
from fastlm.models.transformer import abstract
from fastlm.models.units import HIDDEN, Kept, Unit
from fastlm.ops import paths
from fastlm.ops.leaf import Leaf, is_whole

Params = Mapping[str, Any]


# --- layers ------------------------------------------------------------------------------------------


def evenly(count: int, of: int) -> tuple[int, ...]:
    """Returns `count` of the numbers 0 ... of - 1, evenly spaced; with two or more, the first and the last are in.

    `evenly(6, 12)` is what DistilBERT took of BERT (arXiv 1910.01108): 0, 2, 4, 7, 9, 11.

    Raises:
      UserError: fewer than one, or more than there are.
    """
    if not 1 <= count <= of:
        raise UserError(f"{count} of {of} layers cannot be kept; keep between 1 and {of}")
    steps = max(count - 1, 1)
    return tuple((2 * i * (of - 1) + steps) // (2 * steps) for i in range(count))


def of_layers(cfg: ModelConfig, layers: Sequence[int]) -> ModelConfig:
    """Returns the architecture of the model that has these layers alone; see `keep_layers`."""
    layers = units.checked(layers, cfg.total_layers, "layers")
    if len(layers) == cfg.total_layers:
        return cfg
    encoder = sum(i < cfg.encoder_layers for i in layers)
    if cfg.encoder_layers and encoder in (0, len(layers)):
        raise UserError(
            f"layers {units.shown(layers)} leave a stack empty: 0 to {cfg.encoder_layers - 1} are the encoder's, "
            f"{cfg.encoder_layers} to {cfg.total_layers - 1} the decoder's; keep one of each at least"
        )
    changes: dict[str, Any] = {"layers": len(layers) - encoder, "encoder_layers": encoder}
    for name in KINDS_PER_LAYER + SIZES_PER_LAYER:
        value = getattr(cfg, name)
        if isinstance(value, tuple):
            kept = tuple(value[i % len(value)] for i in layers)
            changes[name] = _pattern(kept) if name in KINDS_PER_LAYER else _one_or_each(kept)
    if cfg.formats:
        axes = abstract(cfg.plain())[1]
        changes["formats"] = formats.without_layers(formats.by_path(cfg.formats, axes), layers)
    return dataclasses.replace(cfg, **changes)


def keep_layers(cfg: ModelConfig, params: Params, layers: Sequence[int]) -> tuple[ModelConfig, Params]:
    """Returns the model that has these layers alone, and what stands below, above and between them.

    Args:
      layers: ascending numbers, the encoder's first as everywhere; of both stacks where there are two.

    Raises:
      UserError: no such layer, one given twice or out of order, or a stack left empty.
    """
    small = of_layers(cfg, layers)
    if small is cfg:
        return cfg, params
    return small, {**params, "layers": {str(n): params["layers"][str(i)] for n, i in enumerate(layers)}}


def _pattern(kinds: tuple[str, ...]) -> str | tuple[str, ...]:
    """The shortest pattern that tiles to `kinds`."""
    for size in range(1, len(kinds) + 1):
        if all(kind == kinds[i % size] for i, kind in enumerate(kinds)):
            break
    return kinds[:size] if size > 1 else kinds[0]


def _one_or_each(sizes: Sequence[int]) -> int | tuple[int, ...]:
    return sizes[0] if len(set(sizes)) == 1 else tuple(sizes)


# --- width -------------------------------------------------------------------------------------------


def keep_width(
    cfg: ModelConfig, params: Params, kept: Kept, *, rescale_norms: bool = False
) -> tuple[ModelConfig, Params]:
    """Returns the model that has these units alone; heads stay as wide as they are.

    Args:
      rescale_norms: make up for the hidden units that norms no longer average over, as if those were zero: exact then,
        but for the epsilon of norms inside heads, which is the same number. By default what is left is normalized to
        the size it had, which suits units that are like the others.

    Raises:
      UserError: no such unit, units that do not go together, or what cannot be sliced (see the header), by name.
    """
    taken = units.chosen(cfg, kept)
    before = units.counts(cfg)
    sizes = dict(before) | {unit: len(numbers) for unit, numbers in taken.items()}
    of_each = lambda name: [sizes[_unit_of(name, i)] for i in range(cfg.total_layers)]
    small = resized(cfg, sizes[HIDDEN], *(of_each(name) for name in ("heads", "kv_heads", "feed_forward_width")))
    if small is cfg:
        return cfg, params
    slice_one = lambda path, leaf: _sliced(path, leaf, units.axes(cfg)[path], taken, before)
    params = paths.map_with_path(slice_one, params, is_leaf=is_whole)
    return _rescaled(cfg, small, params) if rescale_norms and small.width < cfg.width else (small, params)


def resized(
    cfg: ModelConfig, width: int, heads: Sequence[int], kv_heads: Sequence[int], feed_forward_width: Sequence[int]
) -> ModelConfig:
    """Returns the architecture with these sizes, one for each layer; heads stay as wide as they are.

    Raises:
      UserError: slicing cannot lead there: see the header; or no such model can be.
    """
    layers = [cfg.layer(i) for i in range(cfg.total_layers)]
    same_heads = all(layer.heads == n and layer.kv_heads == k for layer, n, k in zip(layers, heads, kv_heads))
    same_units = all(layer.feed_forward_width == n for layer, n in zip(layers, feed_forward_width))
    if width == cfg.width and same_heads and same_units:
        return cfg
    if cfg.fused:
        raise UserError("a model with fused products cannot be sliced; slice it first, then fuse")
    if width != cfg.width and cfg.positions == "sinusoidal":
        raise UserError("positions 'sinusoidal': a narrower stream has other waves, so hidden units cannot be cut")
    if not same_heads and cfg.positions == "alibi":
        raise UserError("positions 'alibi': the slope of a head is its place among the others; heads cannot be cut")
    dims = [layer.head_dim for layer in layers]
    derived = all(n * dim == width for n, dim in zip(heads, dims))
    small = dataclasses.replace(
        cfg,
        width=width,
        heads=_one_or_each(heads),
        kv_heads=0 if list(kv_heads) == list(heads) else _one_or_each(kv_heads),
        head_dim=0 if derived else _one_or_each(dims),
        feed_forward_width=_one_or_each(feed_forward_width),
    )
    _check_shapes(cfg, small)
    return small


def _check_shapes(cfg: ModelConfig, small: ModelConfig) -> None:
    """Refuses what has shapes that follow from sizes without the axis being named after them."""
    before, after = units.counts(cfg), units.counts(small)
    shapes, wanted = (paths.flatten(abstract(one)[0]) for one in (cfg, small))
    for path, names in units.axes(cfg).items():
        sizes = zip(shapes[path].shape, names)
        found = tuple(size if unit is None else size // before[unit] * after[unit] for size, unit in sizes)
        if found != wanted[path].shape:
            kind = f" (attention '{cfg.layer(int(path.split('/')[1])).attention}')" if path.startswith("layers") else ""
            raise UserError(
                f"{path}{kind} cannot be sliced: it would be {found}, and the smaller model has {wanted[path].shape}; "
                "cut something else, or train from another kind"
            )


def _unit_of(size: str, i: int) -> Unit:
    return units.feed_forward(i) if size == "feed_forward_width" else units.heads(i, kind=size)


def _sliced(
    path: str, leaf: Any, names: tuple[Unit | None, ...], taken: Mapping[Unit, np.ndarray], before: Mapping[Unit, int]
) -> Any:
    for axis, unit in enumerate(names):
        if unit not in taken or len(taken[unit]) == before[unit]:
            continue
        if isinstance(leaf, Leaf):
            raise UserError(f"{path}: a weight stored as {type(leaf).__name__} cannot be sliced; take the plain one")
        entries = np.arange(leaf.shape[axis]).reshape(before[unit], -1)[taken[unit]].reshape(-1)
        leaf = leaf.take(entries, axis=axis, mode="clip")  # checked to be inside
    return leaf


def _rescaled(cfg: ModelConfig, small: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """Root mean squares over D' of D units are sqrt(D / D') times as large where the others are zero."""
    if cfg.norm != "rms_norm":
        raise UserError(f"rescale_norms: '{cfg.norm}' takes the mean away, over fewer units another one; leave it out")
    ratio, axes = cfg.width / small.width, units.axes(cfg)
    gain = lambda path: path.endswith("/scale") and axes[path] == (HIDDEN,)
    params = paths.map_with_path(lambda path, leaf: leaf * ratio**0.5 if gain(path) else leaf, params)
    return dataclasses.replace(small, norm_epsilon=cfg.norm_epsilon * ratio), params
