"""The page on what a model looks at in a text: one HTML file, with its pictures in it and nothing loaded from outside.

Notable: a map is a picture of one pixel a weight, whose 255 colours are known to the page, so that pointing at it
tells weight and tokens without the weights being stored twice. Weights read so are rounded to the colour's.
Without scripts the pictures and the tables are still there.
"""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from markupsafe import Markup
from PIL import Image

from fastlm.measurement.attention_maps import AttentionMap, Looked
from fastlm.reports.attention_figures import FORMATS, HIDDEN, MEASURES, Scale, caption, table, visible

TEMPLATE = Path(__file__).with_name("attention_page.html")
SHOWN, UNSEEN = 254, 255  # the last level of a weight, and the one of what cannot be seen


def render(looked: Looked, scales: Sequence[Scale]) -> str:
    """Returns the page as HTML; `scales` are those of the maps."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    palettes = {scale: palette(scale) for scale in scales}
    drawn = enumerate(zip(looked.maps, scales))
    maps = [_map(one, number, scale, palettes[scale]) for number, (one, scale) in drawn]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        looked=looked,
        maps=maps,
        bars=[_bar(scale, palettes[scale], kinds) for scale, kinds in _kinds(looked.maps, scales).items()],
        stacks=_stacks(looked.maps),
        unusual=list(dict.fromkeys(one.kind for one in looked.maps if not one.sums_to_one)),
        signed=any(one.signed for one in looked.maps),
        data=_script_data(looked, scales, palettes),
    )


def palette(scale: Scale) -> UInt8[np.ndarray, "256 3"]:
    """Returns the colours of all levels."""
    shown = scale.colors(np.arange(SHOWN + 1) / SHOWN)[:, :3]
    return np.round(255 * np.vstack([shown, matplotlib.colors.to_rgb(HIDDEN)])).astype(np.uint8)


def picture(weights: np.ma.MaskedArray, scale: Scale, colors: UInt8[np.ndarray, "256 3"]) -> str:
    """Returns a PNG of a head's weights [T, S], a pixel each, as the address of an image."""
    levels = np.round(SHOWN * scale.levels(weights)).filled(UNSEEN)
    image = Image.fromarray(np.nan_to_num(levels).astype(np.uint8), "P")
    image.putpalette(colors.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _map(one: AttentionMap, number: int, scale: Scale, colors: np.ndarray) -> dict[str, Any]:
    heads = [
        {"number": head, "picture": picture(weights, scale, colors), "caption": caption(one, head)}
        for head, weights in enumerate(visible(one))
    ]
    return {"number": number, "name": one.name, "kind": one.kind, "heads": heads}


def _kinds(maps: Sequence[AttentionMap], scales: Sequence[Scale]) -> dict[Scale, list[str]]:
    """Returns the attention kinds that each scale is for."""
    return {
        scale: list(dict.fromkeys(one.kind for one, other in zip(maps, scales) if other == scale)) for scale in scales
    }


def _bar(scale: Scale, colors: np.ndarray, kinds: list[str]) -> dict[str, Any]:
    stops = ", ".join(_css(color) for color in colors[: SHOWN + 1 : 6])
    places = [(f"{tick:.2g}", f"{100 * float(scale.levels(np.array(tick))):.1f}%") for tick in scale.ticks()]
    return {"stops": stops, "places": places, "kinds": kinds}


def _stacks(maps: Sequence[AttentionMap]) -> list[dict[str, Any]]:
    """Returns the tables of each stack."""
    found = []
    for stack in dict.fromkeys(one.stack for one in maps):
        numbered = [(number, one) for number, one in enumerate(maps) if one.stack == stack]
        alike = [one for _, one in numbered]
        most = alike[0].most_entropy
        tables = [
            {"measure": measure, "title": title, "rows": _rows(numbered, values, measure)}
            for measure, title in MEASURES.items()
            if (values := table(alike, measure)) is not None
        ]
        heads = max(len(one.entropy) for one in alike)
        found.append({"name": stack, "tables": tables, "heads": heads, "most": most, "most_tokens": np.exp(most)})
    return found


def _rows(
    numbered: Sequence[tuple[int, AttentionMap]], values: Float[np.ndarray, "L N"], measure: str
) -> list[dict[str, Any]]:
    return [
        {"map": number, "layer": one.layer, "cells": [_cell(value, values, measure) for value in row]}
        for (number, one), row in zip(numbered, values)
    ]


def _cell(value: float, values: np.ndarray, measure: str) -> dict[str, str]:
    if np.isnan(value):
        return {"text": "", "more": "", "style": ""}
    share = value / max(float(np.nanmax(values)), 1e-9)
    color = np.round(255 * np.array(matplotlib.colormaps["viridis"](share)[:3]))
    more = f"{np.exp(value):.1f}" if measure == "entropy" else ""
    ink = "#000" if share > 0.55 else "#fff"
    return {"text": FORMATS[measure].format(value), "more": more, "style": f"background:{_css(color)};color:{ink}"}


def _css(color: np.ndarray) -> str:
    return "#" + "".join(f"{int(part):02x}" for part in color)


def _script_data(looked: Looked, scales: Sequence[Scale], palettes: dict[Scale, np.ndarray]) -> Markup:
    order = list(palettes)
    data = {
        "tokens": looked.tokens,
        "maps": [
            {"name": one.name, "queries": one.queries, "keys": one.keys, "scale": order.index(scale)}
            for one, scale in zip(looked.maps, scales)
        ],
        "scales": [
            {"top": scale.top, "signed": scale.signed, "colors": colors.tolist()} for scale, colors in palettes.items()
        ],
    }
    # "</script>" in a token would end the script.
    return Markup(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))
