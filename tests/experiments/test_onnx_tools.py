"""What ONNX Runtime's tools make of an export is an export."""

import jax
import numpy as np
import pytest

from experiments.benchmarks import onnx_tools
from fastlm.exports import exported_model
from fastlm.exports import onnx as onnx_format
from fastlm.exports.onnx_session import Programs
from fastlm.models import Compute, Model, ModelConfig


@pytest.mark.parametrize("tool", onnx_tools.TOOLS)
def test_it_computes_nearly_the_same_in_fewer_bytes(tool, tmp_path):
    cfg = {"vocab_size": 24, "layers": 1, "width": 64, "heads": 2, "max_length": 64, "init_scale": 0.3}
    model = Model(ModelConfig(**cfg), Compute(dtype="float32", attention_form="plain"))
    export, made = tmp_path / "export", tmp_path / "made"
    for folder in (export, made):
        folder.mkdir()
    onnx_format.write(export, model, model.init(jax.random.key(0)))
    for name in (exported_model.ABOUT, exported_model.TOKENIZER):
        (export / name).write_text("{}")
    onnx_tools.make(export, tool, made)
    given = {"tokens": np.array([[3, 5, 7, 11]], np.int32)}
    wanted, found = (Programs(folder).call("forward", given)["logits"] for folder in (export, made))
    assert 0 < np.abs(found - wanted).max() < 0.3 * np.abs(wanted).max()
    assert (made / "weights.data").stat().st_size < 0.6 * (export / "weights.data").stat().st_size
    assert not list(made.glob("whole*"))
