"""A trained model whose weights were changed, as a workdir of its own, which everything here reads and goes on from."""

import json
from pathlib import Path
from typing import Any

from fastlm.models import ModelConfig
from fastlm.training import checkpoints, workdir_files
from fastlm.training import state as states
from fastlm.training.restore import Restored


def write(source: str | Path, restored: Restored, cfg: ModelConfig, params: Any, workdir: str | Path, how: str) -> int:
    """Writes step 0 of a new workdir, and returns how many bytes are in it.

    Args:
      source: the workdir that `restored` is of.
      cfg, params: what it became.
      how: the command that made it, which the checkpoint keeps.

    Raises:
      UserError: the folder is not free, or cannot be written.
    """
    workdir = Path(workdir).expanduser()
    workdir_files.require_free(workdir)
    model = json.loads(cfg.to_json())
    about = restored.about | {
        "model": model,
        "config": restored.about["config"] | {"model": json.loads(cfg.in_use().to_json()), "wrappers": ()},
        "metrics": {},
        "versions": checkpoints.versions(),
        "made_from": {"workdir": str(source), "step": restored.step, "command": how},
    }
    files = checkpoints.Checkpoints(workdir)
    files.save(0, states.of_model(params), about)
    files.close()
    workdir_files.carry_tokenizer(Path(source).expanduser(), workdir)
    return sum(path.stat().st_size for path in workdir.rglob("*") if path.is_file())
