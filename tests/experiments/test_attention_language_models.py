"""The language models that are compared: equal parameters, one line each."""

import json

import pytest

from experiments import attention_language_models as models
from experiments import runs


@pytest.mark.parametrize("name", list(models.MODELS))
def test_every_model_has_as_many_parameters_as_the_one_with_full_attention(name):
    wanted = models.parameters("full", 256, 1024)
    width = models.equal_width(name, 256)
    assert abs(models.parameters(name, 256, width) / wanted - 1) < 1e-3
    assert (width == 1024) == (name in ("full", "local", "linear"))


def test_every_model_gets_the_steps_that_fit_its_time_and_finished_ones_are_read_back(tmp_path, monkeypatch):
    asked = []

    def train(arguments, workdir):
        asked.append((workdir.name, arguments))
        workdir.mkdir(parents=True)
        (workdir / "metrics.jsonl").write_text(json.dumps({"train/step_seconds": 0.25}) + "\n")
        (workdir / "result.json").write_text("{}")
        return runs.Outcome({"bits_per_byte": 1.5, "bits_per_byte_error": 0.01}, 100.0)

    monkeypatch.setattr(runs, "train", train)
    result = models.run("linear", 3, 256, 2.0, tmp_path)
    assert (result.steps, result.step_seconds, result.seed) == (480, 0.25, 3)
    assert [name for name, _ in asked] == ["linear", "seed3"]
    assert "--config.training.steps=480" in asked[1][1] and "--config.data.mode=stream" in asked[1][1]
    models.run("linear", 4, 256, 2.0, tmp_path)
    assert [name for name, _ in asked] == ["linear", "seed3", "seed4"], "a step is measured once"
    assert "| linear | 3 | 1.5000 ± 0.0100 | 480 | 0.250 |" in models.table([result])
