"""GGUF: what is written is the model again when read, here and as llama.cpp has it."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from gguf import GGUFReader

from fastlm.errors import UserError
from fastlm.exports import gguf
from fastlm.models import huggingface
from tests.models.huggingface_folders import GOLDEN
from tests.models.test_huggingface_gguf import neighbours, vocabulary
from tests.models.test_huggingface_gguf import write as write_golden


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory):
    path = write_golden(tmp_path_factory.mktemp("tokenizer") / "model.gguf", "llama", "llama", vocabulary)
    return huggingface.read(path).tokenizer_files


@pytest.mark.parametrize("case", ["mistral", "llama_tied", "qwen2", "qwen3"])
def test_the_same_model_comes_back(case, tmp_path, tokenizer_files):
    model = huggingface.read(GOLDEN / case)
    assert gguf.write(tmp_path, model.cfg, model.params, tokenizer_files, "float16", case) == [gguf.FILE]
    back = huggingface.read(tmp_path / gguf.FILE)
    assert back.cfg == model.cfg and back.missing == () == back.unused
    rounded = lambda leaf: leaf.astype(np.float16).astype(np.float32) if leaf.ndim == 2 else leaf
    jax.tree.map(np.testing.assert_array_equal, back.params, jax.tree.map(rounded, model.params))
    assert back.tokenizer_files == tokenizer_files and back.license == ""


def test_its_license_goes_along(tmp_path, tokenizer_files):
    model = huggingface.read(GOLDEN / "mistral")
    gguf.write(tmp_path, model.cfg, model.params, tokenizer_files, "float16", "name", "apache-2.0")
    assert huggingface.read(tmp_path / gguf.FILE).license == "apache-2.0"


def test_rows_of_queries_and_keys_lie_as_llama_cpp_turns_them(tmp_path, tokenizer_files):
    model = huggingface.read(GOLDEN / "mistral")
    gguf.write(tmp_path, model.cfg, model.params, tokenizer_files, "float16", "name")
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / gguf.FILE).tensors}
    for letter in "qk":
        ours = model.params["layers"]["0"]["attention"][letter].T
        wanted = neighbours(ours, model.cfg.layer(0).head_dim).astype(np.float16)
        np.testing.assert_array_equal(tensors[f"blk.0.attn_{letter}.weight"], wanted)


@pytest.mark.parametrize(("weights", "levels"), [("q8_0", 127), ("q4_0", 8)])
def test_blocks_lose_half_a_step(weights, levels, tmp_path, tokenizer_files):
    model = huggingface.read(GOLDEN / "mistral")
    gguf.write(tmp_path, model.cfg, model.params, tokenizer_files, weights, "name")
    back = huggingface.read(tmp_path / gguf.FILE)
    for name in ("q", "v", "out"):
        old, new = (params["layers"]["0"]["attention"][name].T for params in (model.params, back.params))
        step = np.abs(old).max(axis=1, keepdims=True) / levels  # rows of 32 are one block each; scales are float16
        assert (np.abs(old - new) <= step * (0.57 if levels > 8 else 1.01)).all() and (old != new).any()
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / gguf.FILE).tensors}
    assert types["blk.0.attn_q.weight"] == weights.upper()
    assert types["blk.0.ffn_down.weight"] == "F16"  # rows of 40 are no whole blocks
    assert types["blk.0.attn_norm.weight"] == "F32"


def test_scaling_of_llama3_comes_back(tmp_path, tokenizer_files):
    model = huggingface.read(GOLDEN / "llama_tied")
    cfg = dataclasses.replace(model.cfg, rotary_scaling=(32.0, 1.0, 4.0, 8192.0), rotary_base=1e9)
    gguf.write(tmp_path, cfg, model.params, tokenizer_files, "float16", "name")
    assert huggingface.read(tmp_path / gguf.FILE).cfg == cfg
    other = dataclasses.replace(cfg, rotary_scaling=(32.0, 2.0, 4.0, 8192.0))
    with pytest.raises(UserError, match="is not that of Llama 3"):
        gguf.write(tmp_path, other, model.params, tokenizer_files, "float16", "name")


def test_what_has_no_form_is_refused(tmp_path, tokenizer_files):
    llama, bert = huggingface.read(GOLDEN / "mistral"), huggingface.read(GOLDEN / "bert_masked")
    with pytest.raises(UserError, match="not a BertForMaskedLM"):
        gguf.write(tmp_path, bert.cfg, bert.params, tokenizer_files, "float16", "name")
    falling = dataclasses.replace(llama.cfg, positions="alibi")
    with pytest.raises(UserError, match="positions 'alibi'"):
        gguf.write(tmp_path, falling, llama.params, tokenizer_files, "float16", "name")
    with pytest.raises(UserError, match=r"needs a tokenizer\.json"):
        gguf.write(tmp_path, llama.cfg, llama.params, {}, "float16", "name")
    words = json.loads(tokenizer_files["tokenizer.json"])
    words["pre_tokenizer"] = {"type": "Whitespace"}
    files = tokenizer_files | {"tokenizer.json": json.dumps(words).encode()}
    with pytest.raises(UserError, match="splits text like gpt-2"):
        gguf.write(tmp_path, llama.cfg, llama.params, files, "float16", "name")
