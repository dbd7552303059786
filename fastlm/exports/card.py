"""The card beside an export: what the model is, where it came from, what it takes, and the command that made it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastlm.models import ModelConfig


def text(
    *,
    name: str,
    form: str,
    cfg: ModelConfig,
    about: dict[str, Any],
    parameters: int,
    command: str,
    files: Sequence[str],
) -> str:
    """Returns a README in Markdown with the header that model hubs read.

    Args:
      form: the export's format.
      about: the checkpoint's description.
      files: names of what lies beside it.
    """
    origin = about.get("huggingface", {})
    task, metrics = about["config"].get("task", {}).get("name", "none"), about.get("metrics", {})
    sources = ", ".join(str(spec) for spec, _ in about["config"].get("data", {}).get("sources", ())) or "not known here"
    scores = "\n".join(f"- {key}: {value:.4g}" for key, value in sorted(metrics.items())) or "- none kept"
    return f"""---
library_name: fastlm
license: {origin.get("license", "unknown")}
tags: [{form}, {cfg.family}]
---

# {name}

A {cfg.family.replace("_", "-")} of {parameters:,} parameters: {cfg.total_layers} layers of width {cfg.width},
vocabulary {cfg.vocab_size}, context {cfg.max_length} tokens. Task: {task}. Trained on: {sources}. {_origin(origin)}

Format: {form}. Files: {", ".join(files)}.

Scores on validation when the checkpoint was kept:

{scores}

Made with

    {command}

License: {origin.get("license", "not stated; see where the weights and the data came from before passing this on")}

<details><summary>Architecture</summary>

```json
{json.dumps(json.loads(cfg.to_json()), indent=1)}
```

</details>
"""


def measured(folder: Path) -> str:
    """Returns what `fastlm.measure` left in a workdir, as a section; nothing if it has not been there."""
    path = folder / "measured" / "measured.md"
    return f"\n## Measured\n\n{path.read_text()}" if path.is_file() else ""


def _origin(origin: dict[str, Any]) -> str:
    return f"The weights came from {origin['architecture']}." if origin.get("architecture") else "Trained with fastlm."
