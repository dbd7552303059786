"""The card beside an export: what the model is, where it came from, what it takes, and the command that made it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastlm.models import ModelConfig
from fastlm.training import workdir_files

FILE = "README.md"
LIBRARIES = {"safetensors": "transformers"}  # what loads a format; of others, this code made them
FAMILIES = {"decoder": "A decoder", "encoder": "An encoder", "encoder_decoder": "An encoder-decoder"}
UNSTATED = "not stated; see where the weights and the data came from before passing this on"
MEASURED = "\n## Measured\n\n"


def text(
    *,
    name: str,
    form: str,
    cfg: ModelConfig,
    about: dict[str, Any],
    parameters: int,
    command: str,
    sizes: Mapping[str, int],
) -> str:
    """Returns a README in Markdown with the header that model hubs read.

    Args:
      form: the export's format.
      about: the checkpoint's description.
      sizes: bytes of what lies beside it, by name.
    """
    origin = about.get("huggingface", {})
    task, metrics = about["config"].get("task", {}).get("name", "none"), about.get("metrics", {})
    sources = ", ".join(str(spec) for spec, _ in about["config"].get("data", {}).get("sources", ())) or "not known here"
    scores = "\n".join(f"- {key}: {value:.4g}" for key, value in sorted(metrics.items())) or "- none kept"
    license_name = origin.get("license")
    files = "\n".join(f"- {file}: {size:,}" for file, size in sizes.items())
    return f"""---
library_name: {LIBRARIES.get(form, "fastlm")}
license: {license_name or "unknown"}
tags: [{form}, {cfg.family}]
---

# {name}

{FAMILIES[cfg.family]} of {parameters:,} parameters: {cfg.total_layers} layers of width {cfg.width},
vocabulary {cfg.vocab_size}, context {cfg.max_length} tokens. Task: {task}. Trained on: {sources}. {_origin(origin)}

Format: {form}. Bytes, {sum(sizes.values()):,} in all:

{files}

Scores on validation when the checkpoint was kept:

{scores}

Made with

    {command}

License: {license_name or UNSTATED}

<details><summary>Architecture</summary>

```json
{json.dumps(json.loads(cfg.to_json()), indent=1)}
```

</details>
"""


def measured(folder: Path) -> str:
    """Returns what `fastlm.measure` left in a workdir, as a section; nothing if it has not been there."""
    path = folder / "measured" / "measured.md"
    return f"{MEASURED}{path.read_text()}" if path.is_file() else ""


def put_measured(folder: Path, table: str) -> bool:
    """Has the card of an export end with what was measured last; says whether there is a card.

    Raises:
      UserError: it cannot be written.
    """
    path = folder / FILE
    if not path.is_file():
        return False
    workdir_files.write_whole(path, f"{path.read_text().partition(MEASURED)[0]}{MEASURED}{table}\n")
    return True


def _origin(origin: dict[str, Any]) -> str:
    return f"The weights came from {origin['architecture']}." if origin.get("architecture") else "Trained with fastlm."
