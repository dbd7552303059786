"""What a model looks at in a text, as pictures, numbers and a page: `fastlm.evaluate --attention_maps` writes it.

FOLDER/attention.html      all of it, on one page that needs no other file and no network
FOLDER/attention.json      the numbers of every head
FOLDER/overview.png        the same as colours
FOLDER/decoder_00.png      the weights of all heads of a layer; one for every layer of every stack
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.data.settings import Data
from fastlm.data.tokenizers.base import check_text
from fastlm.errors import UserError
from fastlm.measurement import attention_maps
from fastlm.measurement.attention_maps import AttentionMap, Looked
from fastlm.reports import attention_figures, attention_page
from fastlm.reports.token_names import token_names
from fastlm.tasks.kind import TaskKind, Trained

USUAL = 128  # tokens that are read
UNCUT = 10**9  # tokens, more than any text has


def look(kind: TaskKind, trained: Trained, data: Data, texts: Sequence[str], most: int, title: str) -> Looked:
    """Returns what a model looks at in one example.

    Args:
      texts: one, or one for each field that the task reads; a target that is missing is written by the model.
      most: tokens to read of each text; the rest is left away, and `notice` says so. 0 takes `USUAL`, or the context.

    Raises:
      UserError: an empty text, another number of texts than the task reads, more tokens than the model's context,
        a model that shows no weights.
    """
    for text in texts:
        check_text(text, "the text")
        if not text.strip():
            raise UserError("the text is empty; give at least one word")
    context = trained.model.cfg.max_length
    most = most or min(USUAL, context)
    if most > context:
        raise UserError(f"--map_tokens: {most} is more than the model's context of {context} tokens; choose fewer")
    completed = kind.completed(trained, data, texts)
    whole, read = (
        kind.inputs(trained, dataclasses.replace(data, length=length, source_length=length), completed)
        for length in (UNCUT, most)
    )
    found = attention_maps.capture(trained.model, trained.weights["model"], read)
    names = {name: token_names(trained.tokenizer, read[name]) for name in ("tokens", "source") if name in read}
    lost = [f"{len(read[name])} of {len(whole[name])}" for name in names if len(read[name]) < len(whole[name])]
    notices = [f"The text is cut: {' and '.join(lost)} tokens were read (--map_tokens={most})."] if lost else []
    notices += ["The model wrote the target itself."] if len(completed) > len(texts) else []
    return Looked(title, names, found, " ".join(notices))


def write(looked: Looked, folder: Path) -> list[Path]:
    """Writes the page, the numbers and the pictures, and returns them in this order.

    Raises:
      UserError: the folder cannot be written.
    """
    scales = attention_figures.scales(looked.maps)
    files = [folder / name for name in ("attention.html", "attention.json", "overview.png")]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files[0].write_text(attention_page.render(looked, scales), encoding="utf-8")
        files[1].write_text(json.dumps(numbers(looked), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        attention_figures.draw_overview(looked, files[2])
        for one, scale in zip(looked.maps, scales):
            files.append(folder / f"{one.stack}_{one.layer:02}.png")
            attention_figures.draw_layer(one, looked, scale, files[-1])
    except OSError as error:
        raise UserError(f"{folder}: could not be written ({error.strerror}); name another with --maps_folder") from None
    return files


def numbers(looked: Looked) -> dict[str, Any]:
    """Returns everything but the weights, ready for JSON; None stands for what a head does not have."""
    return {
        "title": looked.title,
        "notice": looked.notice,
        "tokens": looked.tokens,
        "maps": [_numbers(one) for one in looked.maps],
    }


def _numbers(one: AttentionMap) -> dict[str, Any]:
    return {
        "stack": one.stack,
        "layer": one.layer,
        "kind": one.kind,
        "queries": one.queries,
        "keys": one.keys,
        "signed": one.signed,
        "sums_to_one": one.sums_to_one,
        "entropy": _plain(one.entropy),
        "effective_tokens": _plain(np.exp(one.entropy)),
        "distance": None if one.distance is None else _plain(one.distance),
        "first_token": _plain(one.first_token),
        "most_entropy": round(one.most_entropy, 6),
        "threshold_margin": one.threshold_margin,
    }


def _plain(values: np.ndarray) -> list[float | None]:
    return [round(float(value), 6) if math.isfinite(value) else None for value in values]
