"""Every task that has a config, made small, on the data that ships: it learns, scores itself, and says something."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.entry_points import call

ROOT = Path(__file__).parents[2]
CONFIGS = {
    "classify_small": "era",
    "regression_small": "year",
    "question_answering_small": "expected",
    "translate_small": "expected",
    "code_small": "expected",
    "summarize_small": "expected",
    "mlm_small": None,  # scores tokens; leaves no answers of rows
}
SMALL = {
    "model.layers": 1,
    "model.width": 32,
    "model.heads": 2,
    "training.steps": 40,
    "training.accumulation": 1,
    "data.batch_size": 16,
    "evaluation.every": 0,
    "evaluation.batches": 2,
    "evaluation.final_split": "test[:20]",
    "checkpoint.every": 40,
    "logging.every": 4,
    "logging.tensorboard": False,
    "schedule.name": "constant",
    "schedule.peak": 0.01,
    "init.source": "",
    "model.dropout": 0.0,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_task_learns_on_real_data(name, tmp_path, no_mesh, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(jax, "device_count", lambda *a: 1)
    monkeypatch.setattr(jax, "devices", lambda *a, _all=jax.devices: _all(*a)[:1])
    changes = SMALL | ({"model.encoder_layers": 1, "task.beams": 1} if name == "translate_small" else {})
    overrides = [f"--config.{key}={value}" for key, value in changes.items()]
    outcome = call("train", "--config", f"configs/{name}.py", "--workdir", tmp_path, *overrides)
    assert outcome.status == 0, outcome.err
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    # From scratch, answers are not found in so few steps: more than a hundred go by before the loss moves.
    assert np.mean(losses[-3:]) < (1.0 if name == "question_answering_small" else 0.97) * losses[0], losses
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "finished" and all(np.isfinite(list(result["metrics"].values())))
    if CONFIGS[name] is None:
        return
    said = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(said) == 20 and all("said" in row for row in said)
