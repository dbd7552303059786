"""Every architecture beside transformers, by golden files; in, out and in again; parts that may be missing."""

import dataclasses
import json
import tracemalloc

import jax
import numpy as np
import pytest

from experiments.benchmarks.huggingface_parity import LIMIT, compare, compute, same_tensors, write_back
from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig, abstract, huggingface
from fastlm.models.huggingface import folders
from fastlm.models.huggingface.describing import ARCHITECTURES, shapes_of
from fastlm.models.huggingface.tables import transfers
from fastlm.ops import paths
from tests.models.huggingface_folders import CASES, GOLDEN, copied, options_of, store, tensors_of, with_options


@pytest.fixture
def copy_of(tmp_path):
    """A copy of a golden folder to change."""

    def make(case):
        return copied(case, tmp_path / case)

    return make


@pytest.mark.parametrize("case", CASES)
def test_computes_what_transformers_computes(case):
    difference, greedy = compare(GOLDEN / case)
    assert difference <= LIMIT
    assert greedy is not False


def test_every_architecture_is_compared():
    compared = {options_of(GOLDEN / case)["model_type"] for case in CASES}
    assert compared == set(ARCHITECTURES)


@pytest.mark.parametrize("case", CASES)
def test_in_out_and_in_again_loses_no_bit(case, tmp_path):
    imported, same = write_back(GOLDEN / case, tmp_path)
    assert same
    again = huggingface.read(tmp_path)
    for field in ("cfg", "architecture", "generation", "missing", "unused"):
        assert getattr(again, field) == getattr(imported, field)
    assert jax.tree.structure(imported.params) == jax.tree.structure(abstract(imported.cfg)[0])
    jax.tree.map(np.testing.assert_array_equal, imported.params, again.params)


@pytest.mark.parametrize("case", ["bert_masked", "gpt2", "llama", "qwen2", "qwen3", "t5_gated", "bart", "marian"])
def test_finds_a_class_for_a_model_by_itself(case):
    cfg = huggingface.read(GOLDEN / case).cfg
    name, architecture, _ = huggingface.describe(cfg)
    assert [name] == options_of(GOLDEN / case)["architectures"]
    assert architecture is ARCHITECTURES[architecture.model_type]


def test_a_model_of_our_own_goes_out_and_comes_back(tmp_path):
    cfg = ModelConfig(
        vocab_size=50, layers=2, width=16, heads=4, kv_heads=2, feed_forward="swiglu", norm="rms_norm", max_length=32
    )
    params = jax.jit(Model(cfg).init)(jax.random.key(0))
    name, files = huggingface.write(tmp_path, cfg, params)
    assert name == "LlamaForCausalLM" and all(path.is_file() for path in files)
    back = huggingface.read(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, back.params)


def test_names_what_keeps_a_model_from_a_class():
    with pytest.raises(UserError, match=r"does not fit any class of transformers .*norm 'layer_norm'"):
        huggingface.describe(ModelConfig(vocab_size=50, feed_forward="swiglu"))
    cfg = ModelConfig(vocab_size=50, feed_forward="swiglu", norm="rms_norm", width=24, heads=(2, 4, 6, 6, 6, 6))
    with pytest.raises(UserError, match="does not fit LlamaForCausalLM: .*heads"):
        huggingface.describe(cfg, "LlamaForCausalLM")
    with pytest.raises(UserError, match="did you mean 'LlamaForCausalLM'"):
        huggingface.describe(cfg, "LamaForCausalLM")


def test_a_parameter_that_no_row_names_is_not_lost_in_silence(monkeypatch):
    cfg, rows = huggingface.read(GOLDEN / "gpt2").cfg, ARCHITECTURES["gpt2"].rows
    shorter = dataclasses.replace(ARCHITECTURES["gpt2"], rows=rows[:-1])
    monkeypatch.setitem(ARCHITECTURES, "gpt2", shorter)
    with pytest.raises(UserError, match="does not fit GPT2LMHeadModel: parameter final_norm/bias"):
        huggingface.describe(cfg, "GPT2LMHeadModel")


def test_ids_that_a_model_does_not_have_are_written_as_null(tmp_path):
    """Without them transformers takes defaults, which may lie beyond the vocabulary."""
    imported = huggingface.read(GOLDEN / "roberta_masked")
    huggingface.write(tmp_path, imported.cfg, imported.params, generation={"pad_token_id": 5})
    options = options_of(tmp_path)
    assert (options["bos_token_id"], options["eos_token_id"]) == (None, None)
    assert options["pad_token_id"] == 1  # from which positions are counted


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_short_floats_survive(stored, tmp_path):
    folder = tmp_path / "short"
    imported = huggingface.read(GOLDEN / "qwen3", dtype=stored)
    huggingface.write(folder, imported.cfg, imported.params)
    assert options_of(folder)["dtype"] == stored
    wide = huggingface.read(folder)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(wide.params)} == {"float32"}
    kept = huggingface.read(folder, dtype="stored")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(kept.params)} == {stored}
    huggingface.write(tmp_path / "again", wide.cfg, wide.params, dtype=stored)
    assert same_tensors(folder, tmp_path / "again")


def test_large_models_are_written_in_shards(tmp_path):
    imported = huggingface.read(GOLDEN / "llama_tied")
    huggingface.write(tmp_path, imported.cfg, imported.params, max_shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert same_tensors(GOLDEN / "llama_tied", tmp_path)


def test_memory_stays_close_to_the_size_of_the_model(tmp_path):
    """Also where a copy of the largest tensor has to be compared; numpy reports its arrays to tracemalloc."""
    cfg = ModelConfig(
        vocab_size=4000, layers=4, width=128, heads=4, feed_forward="swiglu", norm="rms_norm", max_length=32
    )
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), abstract(cfg)[0])
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert 0.3 < params["embedding"]["table"].nbytes / size < 0.5

    def peak(run):
        tracemalloc.start()
        try:
            kept = run()
            return tracemalloc.get_traced_memory()[1] / size, kept
        finally:
            tracemalloc.stop()

    assert peak(lambda: huggingface.write(tmp_path, cfg, params))[0] < 0.5
    tensors = tensors_of(tmp_path)
    store(tmp_path, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    del tensors
    ratio, _ = peak(lambda: huggingface.read(tmp_path))
    assert 1 <= ratio < 1.3


# --- other spellings of the same model -----------------------------------------------------------


def test_reads_names_as_they_were_before(copy_of):
    """The published BERT: gamma and beta, copies of tied weights, buffers, the other heads of its pretraining."""
    folder = with_options(copy_of("bert_masked"), architectures=["BertForPreTraining"])
    expected = huggingface.read(GOLDEN / "bert_masked")
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): array
        for name, array in tensors_of(folder).items()
    }
    tensors["bert.embeddings.position_ids"] = np.arange(20)[None]
    tensors["cls.seq_relationship.weight"] = np.zeros((2, 32), np.float32)
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]
    tensors["bert.pooler.dense.weight"] = np.zeros((32, 32), np.float32)
    store(folder, tensors)
    found = huggingface.read(folder)
    jax.tree.map(np.testing.assert_array_equal, expected.params, found.params)
    assert "bert.pooler.dense.weight" in found.unused and found.architecture == "BertForMaskedLM"


@pytest.mark.parametrize(
    ("case", "prefix"), [("gpt2", "transformer."), ("bert_spans", "bert."), ("llama", "model."), ("bart", "model.")]
)
def test_the_prefix_of_the_body_is_optional(case, prefix, copy_of):
    folder = copy_of(case)
    expected = huggingface.read(folder)
    store(folder, {name.removeprefix(prefix): array for name, array in tensors_of(folder).items()})
    jax.tree.map(np.testing.assert_array_equal, expected.params, huggingface.read(folder).params)


def test_a_tied_table_may_lie_under_any_of_its_names(copy_of):
    folder = copy_of("t5")
    expected, tensors = huggingface.read(folder), tensors_of(folder)
    tensors["decoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    store(folder, tensors)
    jax.tree.map(np.testing.assert_array_equal, expected.params, huggingface.read(folder).params)


def test_positions_that_we_compute_must_be_what_is_stored(copy_of):
    folder = copy_of("marian")
    tensors, width = tensors_of(folder), 24
    angles = np.arange(70)[:, None] / 10_000 ** (np.arange(0, width, 2) / width)
    table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
    tensors["model.encoder.embed_positions.weight"] = table
    store(folder, tensors)
    assert huggingface.read(folder).missing == ()
    tensors["model.encoder.embed_positions.weight"] = table[::-1]
    store(folder, tensors)
    with pytest.raises(UserError, match=r"embed_positions.weight' is not what"):
        huggingface.read(folder)


@pytest.mark.parametrize(("case", "old"), [("llama", "rope_scaling"), ("llama_tied", "rope_scaling")])
def test_rotary_options_as_they_were_before(case, old, copy_of):
    folder = copy_of(case)
    expected = huggingface.read(folder).cfg
    new = options_of(folder)["rope_parameters"]
    base = new.pop("rope_theta")
    with_options(folder, rope_parameters=..., rope_theta=base, **{old: {"type": new.pop("rope_type")} | new})
    assert huggingface.read(folder).cfg == expected


def test_what_we_write_is_read_by_old_and_new_transformers(tmp_path):
    imported = huggingface.read(GOLDEN / "llama")
    huggingface.write(tmp_path, imported.cfg, imported.params)
    options = options_of(tmp_path)
    assert options["rope_parameters"] == options["rope_scaling"] | {"rope_theta": options["rope_theta"]}
    assert options["dtype"] == options["torch_dtype"] == "float32"


def test_a_bias_on_the_logits_that_is_not_stored_does_not_exist(copy_of):
    folder = copy_of("bart")
    tensors = tensors_of(folder)
    del tensors["final_logits_bias"]
    store(folder, tensors)
    found = huggingface.read(folder)
    assert not found.cfg.head_bias and "head" not in found.params
    huggingface.write(folder, found.cfg, found.params)
    assert set(tensors_of(folder)) == set(tensors)


# --- heads and pooling ---------------------------------------------------------------------------


def test_a_head_that_is_not_there_is_made_anew(tmp_path):
    with pytest.raises(UserError, match=r"no weights for the head asked for .*'classifier.weight'.*or allow head"):
        huggingface.read(GOLDEN / "bert_model", head="sequence", classes=5)
    imported = huggingface.read(GOLDEN / "bert_model", head="sequence", classes=5, allow_missing=("head",))
    assert set(imported.missing) == {"head/kernel", "head/bias"}
    assert imported.architecture == "BertForSequenceClassification" and imported.cfg.classes == 5
    params = huggingface.complete(imported, jax.random.key(0))
    assert {path: leaf.shape for path, leaf in paths.flatten(params).items()} == shapes_of(imported.cfg)
    assert float(np.abs(params["head"]["kernel"]).max()) > 0
    assert "head" not in imported.params
    inputs = {"tokens": np.full((2, 4), 7, np.int32)}
    assert compute(imported.cfg, params, inputs).shape == (2, 5)


def test_another_head_leaves_out_what_it_does_not_use():
    imported = huggingface.read(GOLDEN / "gpt2_untied", head="sequence", classes=3, allow_missing=("head",))
    assert imported.unused == ("lm_head.weight",)
    assert imported.architecture == "" and imported.cfg.pooling == "last"
    body = huggingface.read(GOLDEN / "roberta_classifier", head="none")
    assert body.architecture == "RobertaModel" and body.missing == () and body.cfg.pooler == ""
    with pytest.raises(UserError, match="no weights for the head"):
        huggingface.read(GOLDEN / "roberta_masked", head="sequence", allow_missing=("head",))
    both = huggingface.read(GOLDEN / "roberta_masked", head="sequence", allow_missing=("head", "pooler"))
    assert {path.split("/")[0] for path in both.missing} == {"head", "pooler"}


def test_a_head_of_another_size_replaces_the_one_that_is_there():
    imported = huggingface.read(GOLDEN / "bert_classifier", classes=5, allow_missing=("head",))
    assert imported.cfg.classes == 5 and set(imported.missing) == {"head/kernel", "head/bias"}
    assert set(imported.unused) == {"classifier.weight", "classifier.bias"}
    with pytest.raises(UserError, match="'classifier.weight' has shape"):
        huggingface.read(GOLDEN / "bert_classifier", classes=5)


def test_the_class_follows_the_number_of_classes():
    choices = {"head": "tokens", "allow_missing": ("head",)}
    spans = huggingface.read(GOLDEN / "bert_masked", **choices)
    assert (spans.architecture, spans.cfg.classes) == ("BertForQuestionAnswering", 2)
    tags = huggingface.read(GOLDEN / "bert_masked", classes=9, **choices)
    assert (tags.architecture, tags.cfg.classes) == ("BertForTokenClassification", 9)
    assert huggingface.describe(tags.cfg)[0] == tags.architecture
    instead = huggingface.read(GOLDEN / "bert_spans", classes=9, **choices)
    assert (instead.architecture, instead.cfg.classes) == ("BertForTokenClassification", 9)


def test_names_of_labels_are_kept(copy_of, tmp_path):
    folder = with_options(copy_of("bert_classifier"), id2label={"0": "no", "2": "yes", "1": "perhaps"})
    imported = huggingface.read(folder)
    assert imported.labels == ("no", "perhaps", "yes")
    huggingface.write(tmp_path / "out", imported.cfg, imported.params, labels=imported.labels)
    assert huggingface.read(tmp_path / "out").labels == imported.labels


def test_what_a_head_is_for_is_read_and_written(copy_of, tmp_path):
    """A model of several labels at a time is refused; its body is free, and so is a new head."""
    folder = with_options(copy_of("bert_classifier"), problem_type="single_label_classification")
    imported = huggingface.read(folder)
    huggingface.write(tmp_path / "out", imported.cfg, imported.params)
    assert options_of(tmp_path / "out")["problem_type"] == "single_label_classification"
    with_options(folder, problem_type="multi_label_classification")
    assert huggingface.read(folder, head="none").cfg.head == "none"
    assert huggingface.read(folder, classes=5, allow_missing=("head",)).cfg.classes == 5
    one = huggingface.read(folder, classes=1, allow_missing=("head",))
    huggingface.write(tmp_path / "one", one.cfg, huggingface.complete(one, jax.random.key(0)))
    assert options_of(tmp_path / "one")["problem_type"] == "regression"
    assert huggingface.read(tmp_path / "one").cfg.classes == 1


def test_pooling_of_sentence_encoders_is_kept(copy_of, tmp_path):
    folder = copy_of("bert_model")
    assert huggingface.read(folder).cfg.pooling == "first"
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    imported = huggingface.read(folder)
    assert imported.cfg.pooling == "mean"
    huggingface.write(tmp_path / "out", imported.cfg, imported.params)
    assert huggingface.read(tmp_path / "out").cfg == imported.cfg
    assert huggingface.read(folder, head="sequence", allow_missing=("head",)).cfg.pooling == "first"
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(UserError, match="pooling_mode_max_tokens"):
        huggingface.read(folder)
    assert huggingface.read(folder, pooling="first").cfg.pooling == "first"
    assert huggingface.read(GOLDEN / "bert_classifier").cfg.pooling == "first"


def listed(*names):
    """modules.json of sentence-transformers."""
    folder = lambda i, name: f"{i}_{name}" if i else ""
    return [{"idx": i, "path": folder(i, name), "type": f"sentence_transformers.models.{name}"} for i, name in names]


@pytest.mark.parametrize("mode", ["mean_tokens", "cls_token"])
def test_modules_of_sentence_encoders_go_back_as_they_came(mode, copy_of, tmp_path):
    folder, out = copy_of("bert_model"), tmp_path / "out"
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{mode}": True}))
    for names in (("Transformer", "Pooling"), ("Transformer", "Pooling", "Normalize")):
        modules = listed(*enumerate(names))
        (folder / "modules.json").write_text(json.dumps(modules))
        imported = huggingface.read(folder)
        assert imported.modules == names[1:]
        huggingface.write(out, imported.cfg, imported.params, modules=imported.modules)
        back = json.loads((out / "modules.json").read_text())
        assert [(module["path"], module["type"]) for module in back] == [(m["path"], m["type"]) for m in modules]
        assert huggingface.read(out).modules == imported.modules and huggingface.read(out).cfg == imported.cfg


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (listed((0, "Transformer"), (1, "Pooling"), (2, "Dense")), "Transformer, Pooling, Dense.* not supported, only"),
        (listed((0, "Transformer"), (1, "Pooling"), (2, "Dense"), (3, "Normalize")), "Pooling, Dense, Normalize"),
        (listed((0, "Transformer")), "modules 'Transformer' are not supported"),
        (listed((0, "Transformer"), (1, "Pooling"), (2, "Normalize"), (3, "Normalize")), "are not supported"),
        (listed((0, "Transformer"), (2, "Pooling")), "Pooling lies in '2_Pooling', not in '1_Pooling'"),
        ([1, {"type": 3}], "modules ', 3' are not supported"),
        ({}, "is not a JSON list"),
    ],
)
def test_modules_that_we_would_leave_out_are_refused_by_name(modules, message, copy_of):
    folder = copy_of("bert_model")
    (folder / "modules.json").write_text(json.dumps(modules))
    for pooling in (None, "mean"):
        with pytest.raises(UserError, match=rf"modules.json: .*{message}"):
            huggingface.read(folder, pooling=pooling)
    assert huggingface.read(folder, head="sequence", allow_missing=("head",)).cfg.head == "sequence"


# --- what lies beside ----------------------------------------------------------------------------


def test_files_of_the_tokenizer_go_back_as_they_came(copy_of, tmp_path):
    folder, template = copy_of("llama"), "{{ messages[0].content }}"
    (folder / "tokenizer.json").write_text('{"model": 1}')
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    (folder / "modeling_own.py").write_text("raise SystemExit")
    imported = huggingface.read(folder)
    assert folders.chat_template(imported.tokenizer_files) == template
    huggingface.write(tmp_path / "out", imported.cfg, imported.params, imported.tokenizer_files)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert not (tmp_path / "out" / "modeling_own.py").exists()
    several = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "a"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert folders.chat_template(huggingface.read(folder).tokenizer_files) == "a"
    (folder / "chat_template.jinja").write_text("c")
    assert folders.chat_template(huggingface.read(folder).tokenizer_files) == "c"


def test_special_ids_come_from_the_generation_config_first(copy_of):
    folder = with_options(copy_of("bart"), eos_token_id=5, bos_token_id=7)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3], "max_length": 5}')
    found = huggingface.read(folder).generation
    assert found == {"eos_token_id": [2, 3], "bos_token_id": 7, "pad_token_id": 1, "decoder_start_token_id": 2}


def test_a_window_is_taken_where_the_context_fits_in_it(copy_of):
    folder = with_options(copy_of("mistral"), sliding_window=50)
    with pytest.raises(UserError, match=r"'sliding_window': 50 is below the context of 128 .* max_length 50"):
        huggingface.read(folder)
    assert huggingface.read(folder, max_length=50).cfg.max_length == 50
    with pytest.raises(UserError, match="above the model's context 128"):
        huggingface.read(folder, max_length=129)
    assert huggingface.read(with_options(folder, sliding_window=128)).cfg.max_length == 128


@pytest.mark.parametrize("name", [name for known in ARCHITECTURES.values() for name in known.heads])
def test_no_table_names_a_tensor_or_a_parameter_twice(name):
    architecture = next(known for known in ARCHITECTURES.values() if name in known.heads)
    case = next(case for case in CASES if options_of(GOLDEN / case)["model_type"] == architecture.model_type)
    head = architecture.heads[name].kind
    cfg = huggingface.read(GOLDEN / case, head=head, allow_missing=("head", "pooler")).cfg
    moved, unplaced = transfers(architecture, architecture.heads[name], cfg, shapes_of(cfg))
    names, ours = [t.name for t in moved], [path for t in moved for path in t.paths]
    assert len(set(names)) == len(names) and len(set(ours)) == len(ours) and not unplaced
