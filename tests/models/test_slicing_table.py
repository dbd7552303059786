"""The README's table of what can be cut in which family and kind of attention: every cell is tried."""

import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastlm.compress import importance
from fastlm.compress.parts import Part
from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig, abstract, formats
from fastlm.models import attention as attention_kinds
from fastlm.ops import paths

README = Path(__file__).parents[2] / "README.md"
SIZES = {"vocab_size": 16, "max_length": 16, "layers": 2, "width": 16, "heads": 4, "feed_forward_width": 16}
FAMILIES = {
    "decoder": {},
    "encoder": {"family": "encoder", "head": "masked_language_model", "positions": "learned"},
    "encoder_decoder": {"family": "encoder_decoder", "encoder_layers": 2},
}
OPTIONS = {"local": "local(window=4)", "chunk": "chunk(size=4)", "linformer": "linformer(rank=4)"}
UNITS = {
    "layers": lambda cfg: Part(layers=(*cfg.encoder_stack[:1], *cfg.stack[:1])),
    "heads": lambda cfg: Part(heads=2),
    "groups": lambda cfg: Part(heads=2),
    "feed-forward units": lambda cfg: Part(feed_forward_width=8),
    "hidden units": lambda cfg: Part(width=8),
}


def config_of(family, kind, unit):
    sizes = SIZES | FAMILIES[family] | ({"kv_heads": 2} if unit == "groups" else {})
    return ModelConfig(**sizes, attention=OPTIONS.get(kind, kind))


def possible(family, kind, unit):
    """Says whether a model can be built, cut and run; "factors": whether its matrices can be two."""
    try:
        Model(cfg := config_of(family, kind, unit))
        abstract(cfg)
    except UserError:
        return "-"
    try:
        if unit == "factors":
            names = [path for path, axes in abstract(cfg)[1].items() if len(axes) == 2 and "layers/" in path]
            small = ModelConfig(**{**vars(cfg), "formats": tuple((path, "low_rank(rank=2)") for path in names)})
            return "yes" if len(paths.flatten(abstract(small)[0])) == len(names) + len(abstract(cfg)[1]) else "no"
        small = UNITS[unit](cfg).config(cfg)
        return "no" if small == cfg else "yes"
    except UserError:
        return "no"


def row_of(family, kind):
    """A cell for each unit; None where the family does not take the kind."""
    cells = [possible(family, kind, unit) for unit in [*UNITS, "factors"]]
    return None if cells[0] == "-" else cells


def test_the_table_says_what_is_possible():
    text = README.read_text().split("| family | attention | layers |")[1]
    told = {}
    for line in text.splitlines()[2:]:
        if not line.startswith("|"):
            break
        family, kinds, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for kind in re.findall(r"`(\w+)`", kinds):
            told[family.strip("`"), kind] = cells
    found = {
        pair: row for pair in itertools.product(FAMILIES, attention_kinds.KINDS) if (row := row_of(*pair)) is not None
    }
    assert told == found


@pytest.mark.parametrize(
    ("family", "kind", "unit"),
    [
        ("decoder", "gated_delta", "heads"),
        ("decoder", "full", "groups"),
        ("encoder", "linformer", "hidden units"),
        ("encoder_decoder", "full", "heads"),
        ("encoder_decoder", "linear", "layers"),
    ],
)
def test_what_is_possible_runs(family, kind, unit, no_mesh):
    """And with factors in it."""
    cfg = config_of(family, kind, unit)
    params, part = Model(cfg).init(jax.random.key(0)), UNITS[unit](cfg)
    small = part.config(cfg)
    tokens = jnp.arange(16).reshape(2, 8)
    given = (tokens, tokens) if cfg.encoder_layers else (tokens,)
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    cut = part.take(cfg, params, mesh, None)
    assert importance.magnitude(small, cut)
    assert np.isfinite(Model(small).apply(cut, *given)[0]).all()
    thin = ModelConfig(**{**vars(small), "formats": (("feed_forward/(up|down)", "low_rank(rank=4)"),)})
    factors = formats.applied(thin.formats, cut, abstract(small)[1], lambda form, w: form.of(w))[0]
    assert np.isfinite(Model(thin).apply(factors, *given)[0]).all()
