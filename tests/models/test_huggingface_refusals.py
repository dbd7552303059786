"""Folders of others that do not fit, are not what they say, or mean harm: one line each, naming the place."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.errors import UserError
from fastlm.models import huggingface
from tests.models.huggingface_folders import CASES, GOLDEN, copied, options_of, store, tensors_of, with_options


def refuses(message, source, **choices):
    with pytest.raises(UserError, match=message) as caught:
        huggingface.read(source, **choices)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.fixture
def folder(tmp_path):
    return copied("llama", tmp_path / "llama")


# --- the description -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        ("llama", {"model_type": "lama"}, "unknown architecture 'lama'; did you mean 'llama'.*known: bert"),
        ("llama", {"model_type": ...}, "unknown architecture None"),
        ("llama", {"model_type": ["llama"]}, "unknown architecture"),
        ("llama", {"architectures": ["LlamaForTokenClassification"]}, "unknown class .*choose a head"),
        ("llama", {"hidden_size": ...}, "'hidden_size' is missing"),
        ("llama", {"hidden_size": "32"}, "'hidden_size': must be a whole number .*'32'"),
        ("llama", {"hidden_size": 32.0}, "'hidden_size': must be a whole number"),
        ("llama", {"hidden_size": True}, "'hidden_size': must be a whole number"),
        ("llama", {"hidden_size": -32}, "'hidden_size': must be a whole number from 0"),
        ("llama", {"hidden_size": 2**40}, "'hidden_size': must be a whole number"),
        ("llama", {"hidden_size": 0}, "cannot be built"),
        ("llama", {"vocab_size": 0}, "vocab_size 0"),
        ("llama", {"num_attention_heads": 0}, "cannot be built"),
        ("llama", {"num_hidden_layers": 10**9}, "more layers than there are tensors"),
        ("llama", {"rms_norm_eps": "small"}, "'rms_norm_eps': must be a number of usual size"),
        ("llama", {"tie_word_embeddings": 1}, "'tie_word_embeddings': must be true or false"),
        ("llama", {"hidden_act": "quick_gelu"}, "'hidden_act': 'quick_gelu' is not supported"),
        ("llama", {"attention_bias": False}, "'attention_bias': False with mlp_bias True"),
        ("llama", {"pretraining_tp": 2}, "'pretraining_tp': 2 is not supported, only 1"),
        ("llama", {"quantization_config": {"bits": 4}}, "'quantization_config': .* is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'rope_type': 'yarn' is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "'low_freq_factor' is missing"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 0}}, "'factor': must be positive"),
        ("qwen3", {"layer_types": ["sliding_attention"], "sliding_window": 8}, "'sliding_window': 8 is below"),
        ("llama", {"rope_parameters": [1]}, "'rope_parameters': must be an object"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16}, "'sliding_window': 16 is below the context"),
        ("qwen3", {"attention_bias": True}, "'attention_bias': True is not supported, only False"),
        ("bert_masked", {"hidden_act": "relu"}, "'relu' with a masked language model head"),
        ("bert_masked", {"position_embedding_type": "relative_key"}, "only 'absolute'"),
        ("bert_masked", {"is_decoder": True}, "'is_decoder': True is not supported"),
        ("bert_masked", {"tie_word_embeddings": False}, "'tie_word_embeddings': False is not supported"),
        ("bert_masked", {"type_vocab_size": 0}, "'type_vocab_size': must be at least 1"),
        ("roberta_masked", {"pad_token_id": 21}, "leaves no room"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "'scale_attn_by_inverse_layer_idx': True is not"),
        ("gpt2", {"add_cross_attention": True}, "'add_cross_attention': True is not supported"),
        ("t5", {"feed_forward_proj": "gated-relu"}, "'feed_forward_proj': 'gated-relu' is not supported"),
        ("bart", {"tie_word_embeddings": False}, "'tie_word_embeddings': False is not supported"),
        ("marian", {"share_encoder_decoder_embeddings": False}, "'share_encoder_decoder_embeddings': False"),
        ("marian", {"decoder_vocab_size": 66}, "'decoder_vocab_size': must be vocab_size"),
        ("bert_classifier", {"id2label": {"0": "a", "2": "b"}}, "'id2label': must number the classes from 0"),
        (
            "bert_classifier",
            {"problem_type": "multi_label_classification"},
            "'problem_type': 'multi_label_classification' is not supported, only 'single_label_classification'",
        ),
        ("bert_classifier", {"problem_type": "regression"}, "'problem_type': 'regression' is not supported"),
        ("bert_classifier", {"id2label": {"a": "b"}}, "'id2label': must be names by number"),
        ("llama", {"eos_token_id": "</s>"}, "'eos_token_id': must be a token id"),
    ],
)
def test_options_that_we_cannot_take(case, options, message, tmp_path):
    folder = with_options(copied(case, tmp_path / case), **options)
    (folder / "generation_config.json").unlink(missing_ok=True)
    refuses(f"config.json.*{message}", folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '"llama"', "\x00", "[" * 100_000])
def test_descriptions_that_are_no_json(text, folder):
    (folder / "config.json").write_text(text)
    refuses("config.json: is not", folder)


def test_descriptions_that_are_not_there_or_far_too_large(folder):
    with (folder / "config.json").open("ab") as file:
        file.truncate(100_000_000)
    refuses("too large", folder)
    (folder / "config.json").unlink()
    refuses("no config.json beside the weights", folder)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 200),
    st.sampled_from([2**31, 2**63, 10**30, 1e308, float("inf"), float("nan")]),
    st.floats(-10, 10),
    st.text(max_size=4),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@settings(max_examples=60)
@given(data=st.data(), case=st.sampled_from(["bert_classifier", "gpt2", "llama_tied", "mistral", "t5_gated", "marian"]))
def test_any_change_of_one_option_is_taken_or_refused_in_one_line(data, case, tmp_path_factory):
    folder = copied(case, tmp_path_factory.mktemp("changed") / case)
    key = data.draw(st.sampled_from(sorted(options_of(folder))))
    with_options(folder, **{key: data.draw(VALUES)})
    (folder / "generation_config.json").unlink(missing_ok=True)
    try:
        imported = huggingface.read(folder)
    except UserError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
    else:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(imported.params))


# --- the tensors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_needed(case, tmp_path):
    folder = copied(case, tmp_path / case)
    tensors = tensors_of(folder)
    # Without these the model is another one: no bias on the logits, no pooler, a tied head.
    optional = ("final_logits_bias", "pooler.dense", "lm_head.weight" if case == "t5_gated" else "-")
    lost = [name for name in tensors if not name.startswith(optional)]
    for name in (lost[0], lost[len(lost) // 2], lost[-1]):
        store(folder, {other: array for other, array in tensors.items() if other != name})
        refuses(f"'{name}'", folder)


def test_lists_the_first_of_many_missing_tensors(folder):
    tensors = tensors_of(folder)
    store(folder, {name: array for name, array in tensors.items() if ".1." not in name})
    refuses(r"lacks 16 tensors: 'model.layers.1.input_layernorm.weight', .* \.\.\.", folder)


def test_a_misspelt_tensor_is_named_with_the_nearest(folder):
    tensors = tensors_of(folder)
    tensors["model.norm.wieght"] = tensors.pop("model.norm.weight")
    store(folder, tensors)
    refuses("lacks 1 tensor: 'model.norm.weight'; did you mean 'model.norm.wieght'", folder)


def test_tensors_that_belong_nowhere(folder):
    store(folder, tensors_of(folder) | {"model.layers.2.mlp.up_proj.weight": np.zeros((2, 2), np.float32)})
    refuses("1 tensor: 'model.layers.2.mlp.up_proj.weight' belong to nothing in a llama model", folder)


def test_biases_that_the_description_denies(folder):
    refuses(
        "14 tensors: .*bias' \\.\\.\\. belong to nothing", with_options(folder, attention_bias=False, mlp_bias=False)
    )


def test_a_tensor_under_two_names_of_the_same(folder):
    tensors = tensors_of(folder)
    store(folder, tensors | {"norm.weight": tensors["model.norm.weight"]})
    refuses("tensors 'model.norm.weight' and 'norm.weight' are the same one|'norm.weight' and 'model.norm", folder)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("model.norm.weight", (31,)), ("lm_head.weight", (32, 67)), ("model.embed_tokens.weight", (67,))],
)
def test_shapes_that_differ(name, shape, folder):
    store(folder, tensors_of(folder) | {name: np.zeros(shape, np.float32)})
    refuses(rf"tensor '{name}' has shape .*{shape[0]}.* and the description asks for", folder)


def test_shapes_are_checked_before_anything_is_read(folder, monkeypatch):
    store(folder, tensors_of(folder) | {"model.norm.weight": np.zeros(3, np.float32)})
    monkeypatch.setattr("fastlm.models.weight_files.WeightSource.read", None)
    refuses("has shape", folder)


def test_quantized_tensors(folder):
    tensors = tensors_of(folder)
    store(folder, tensors | {"model.layers.0.mlp.up_proj.weight": np.zeros((40, 32), np.int8)})
    refuses("holds int8; quantized weights are read from GGUF only", folder)


@pytest.mark.parametrize(
    ("case", "copy", "original"),
    [
        ("llama_tied", "lm_head.weight", "model.embed_tokens.weight"),
        ("t5", "lm_head.weight", "shared.weight"),
        ("bart", "model.encoder.embed_tokens.weight", "model.shared.weight"),
        ("bert_masked", "cls.predictions.decoder.bias", "cls.predictions.bias"),
    ],
)
def test_a_copy_of_a_tied_tensor_must_be_one(case, copy, original, tmp_path):
    folder = copied(case, tmp_path / case)
    tensors = tensors_of(folder)
    store(folder, tensors | {copy: tensors[original]})
    assert huggingface.read(folder).missing == ()
    changed = tensors[original].copy()
    changed.flat[-1] += 1
    store(folder, tensors | {copy: changed})
    refuses(f"tensor '{copy}' should be a copy of '{original}' and differs", folder)


def test_pickle_is_never_loaded(folder):
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
    refuses("pickle files only.*save_pretrained", folder)
    refuses("never loaded", folder / "pytorch_model.bin")


# --- what is asked for ---------------------------------------------------------------------------


def test_choices_that_do_not_exist(folder):
    refuses("head: unknown 'sequense'; did you mean 'sequence'", folder, head="sequense")
    refuses("dtype: unknown 'int8'", folder, dtype="int8")
    refuses("allow_missing: 'layers' cannot be missing", folder, allow_missing=("layers",))
    refuses("max_length cannot change where positions are learned", GOLDEN / "gpt2", max_length=10)
    refuses("classes: a LlamaForCausalLM has 0, not 3; name another head", folder, classes=3)
    refuses("classes: a BertForQuestionAnswering has 2, not 3", GOLDEN / "bert_spans", classes=3)
    refuses("revision: .* is on disk and has no revision 'v1'", folder, revision="v1")
    refuses("no such file or folder", "no/such/place.gguf")
    refuses("no such file or folder", "../elsewhere/model")


def test_hub_names_without_network_or_library(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("unreachable\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    refuses(r"owner/name: .*cannot be fetched from the hub \(unreachable\)", "owner/name")
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    refuses("need 'pip install huggingface_hub'", "owner/name")


def test_hub_names_fetch_no_pickle(monkeypatch):
    asked = {}

    def fetch(name, **options):
        asked.update(options, name=name)
        return str(GOLDEN / "gpt2")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert huggingface.read("owner/name", revision="v1").architecture == "GPT2LMHeadModel"
    assert (asked["name"], asked["revision"]) == ("owner/name", "v1")
    assert not any("bin" in pattern or "py" in pattern or pattern == "*" for pattern in asked["allow_patterns"])


def test_parameters_of_another_config_are_not_written(tmp_path):
    imported = huggingface.read(GOLDEN / "gpt2")
    other = huggingface.read(GOLDEN / "gpt2_untied").params
    with pytest.raises(UserError, match=r"parameter .* has shape .* do not belong together"):
        huggingface.write(tmp_path / "out", imported.cfg, other)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    imported = huggingface.read(GOLDEN / "gpt2")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        huggingface.write(tmp_path / "file" / "out", imported.cfg, imported.params)


def test_a_write_that_fails_leaves_no_description(tmp_path, monkeypatch):
    imported = huggingface.read(GOLDEN / "gpt2")

    def full(*_, **__):
        raise UserError("disk full")

    monkeypatch.setattr("fastlm.models.huggingface.writing.write_safetensors", full)
    with pytest.raises(UserError):
        huggingface.write(tmp_path / "out", imported.cfg, imported.params, {"tokenizer.json": b"{}"})
    assert not (tmp_path / "out" / "config.json").exists()


def test_only_files_of_tokenizers_are_written(tmp_path):
    imported = huggingface.read(GOLDEN / "gpt2")
    files = {"../outside.json": b"", "config.json": b"", "vocab.json": json.dumps({}).encode()}
    huggingface.write(tmp_path / "out", imported.cfg, imported.params, files)
    assert (tmp_path / "out" / "vocab.json").exists() and not (tmp_path / "outside.json").exists()
    assert options_of(tmp_path / "out")["model_type"] == "gpt2"
