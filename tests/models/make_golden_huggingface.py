"""Makes the golden files of test_huggingface*.py: tiny models of transformers with what they compute.

    python tests/models/make_golden_huggingface.py --out tests/models/golden/huggingface

Run by hand with a Python that has torch and transformers (5.23 made the files here); imports nothing of
fastlm, so that the two sides share only files. For every case it writes a folder as `save_pretrained` leaves it
and `expected.npz` beside it: inputs, outputs (logits, or hidden states), and for language models the 64 tokens of a
greedy continuation. All parameters are drawn at random, biases and norms too, so nothing is at its default.

    python tests/models/make_golden_huggingface.py --score FOLDER ...

loads folders that fastlm wrote, computes on the inputs in their `inputs.npz` and leaves `scored.npz`.

    python tests/models/make_golden_huggingface.py --real tests/models/golden/real SMOLLM2.gguf MINILM_FOLDER

does the same for the real models of test_huggingface_real.py (needs gguf and accelerate as well).
"""

import argparse
import os
import shutil
from pathlib import Path

import numpy as np

CONTINUED = 64
TEXT = (
    "The history of the bridge begins in 1847, when the two towns on either side of the river agreed to share its cost."
)
CODE = "def add(a, b):\n    return a + b  # 12345 na\u00efve \U0001f600\r\n\n\tx  = 1"
SENTENCES = ["A man is eating a piece of bread.", "The stock market fell sharply today."]
NAMES = {
    "tokens": "input_ids",
    "mask": "attention_mask",
    "token_types": "token_type_ids",
    "target": "decoder_input_ids",
}
POSITIONS, STRIDE = [0, 11, 28], 16  # of the logits that are kept
_BERT = {
    "vocab_size": 67,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
}
_DISTILBERT = {
    "vocab_size": 67,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 40,
    "max_position_embeddings": 20,
}
_ROBERTA = _BERT | {"type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5, "max_position_embeddings": 22}
_IDS = {"bos_token_id": 3, "eos_token_id": None, "pad_token_id": 0}
_GPT2 = {"vocab_size": 67, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 76} | _IDS
_LLAMA = _BERT | {"num_key_value_heads": 2, "max_position_embeddings": 128} | _IDS
_T5 = {
    "vocab_size": 67,
    "d_model": 24,
    "d_kv": 10,
    "num_heads": 2,
    "d_ff": 40,
    "num_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": None,
}
_GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_BART = {
    "vocab_size": 67,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 36,
    "max_position_embeddings": 70,
    "scale_embedding": True,
    "decoder_start_token_id": 2,
    "pad_token_id": 1,
    "eos_token_id": None,
    "forced_eos_token_id": None,
}
_UNTIED = {"tie_word_embeddings": False, "n_inner": 40, "scale_attn_weights": False, "activation_function": "relu"}
_LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0}
_TIED = {"tie_word_embeddings": True, "head_dim": 12, "num_key_value_heads": 1, "rope_parameters": _LINEAR}
_FAR = {"rope_theta": 1e6, "rope_type": "default"}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# name -> (class, options of its config, options of save_pretrained)
CASES = {
    "bert_masked": ("BertForMaskedLM", _BERT, {}),
    "bert_model": ("BertModel", _BERT | {"hidden_act": "relu"}, {}),
    "bert_classifier": ("BertForSequenceClassification", _BERT | {"hidden_act": "gelu_new", "num_labels": 3}, {}),
    "bert_spans": ("BertForQuestionAnswering", _BERT | {"layer_norm_eps": 1e-3}, {}),
    "distilbert_masked": ("DistilBertForMaskedLM", _DISTILBERT, {}),
    "distilbert_classifier": ("DistilBertForSequenceClassification", _DISTILBERT | {"num_labels": 3}, {}),
    "distilbert_spans": ("DistilBertForQuestionAnswering", _DISTILBERT, {}),
    "roberta_masked": ("RobertaForMaskedLM", _ROBERTA, {}),
    "roberta_classifier": ("RobertaForSequenceClassification", _ROBERTA | {"num_labels": 1}, {}),
    "roberta_spans": ("RobertaForQuestionAnswering", _ROBERTA, {}),
    "gpt2": ("GPT2LMHeadModel", _GPT2, {}),
    "gpt2_untied": ("GPT2LMHeadModel", _GPT2 | _UNTIED, {}),
    "llama": ("LlamaForCausalLM", _LLAMA | {"rope_parameters": _LLAMA3, "attention_bias": True, "mlp_bias": True}, {}),
    "llama_tied": ("LlamaForCausalLM", _LLAMA | _TIED, {"max_shard_size": "20KB"}),
    "mistral": ("MistralForCausalLM", _LLAMA | {"sliding_window": None, "rms_norm_eps": 1e-5}, {}),
    "qwen2": ("Qwen2ForCausalLM", _LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 4}, {}),
    "qwen3": ("Qwen3ForCausalLM", _LLAMA | {"head_dim": 6, "rope_parameters": _FAR}, {}),
    "t5": ("T5ForConditionalGeneration", _T5 | {"num_decoder_layers": 1}, {}),
    "t5_gated": ("T5ForConditionalGeneration", _T5 | _GATED, {}),
    "bart": ("BartForConditionalGeneration", _BART, {}),
    "marian": ("MarianMTModel", _BART | {"activation_function": "swish", "decoder_attention_heads": 4}, {}),
}


def build(class_name, options, seed):
    """Returns a model with every parameter drawn at random."""
    import torch
    import transformers

    model_class = getattr(transformers, class_name)
    model = model_class(model_class.config_class(**options)).eval()
    if options.get("tie_word_embeddings") is False and class_name.startswith("T5"):
        # transformers 5 ties what is built anew; files of version 1.1 hold a head of their own.
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
        model.all_tied_weights_keys.pop("lm_head.weight", None)
    rng = torch.Generator().manual_seed(seed)
    seen = set()
    tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n.endswith("logits_bias"))]
    with torch.no_grad():
        for name, tensor in tensors:
            # Marian's sinusoids are no weights.
            if tensor.data_ptr() in seen or (class_name.startswith("Marian") and "embed_positions" in name):
                continue
            seen.add(tensor.data_ptr())
            draw = torch.randn(tensor.shape, generator=rng)
            if tensor.dim() == 1:
                draw = 0.3 * draw + (1.0 if name.endswith("weight") else 0.0)
            elif "bias" not in name and "embed" not in name and "shared" not in name:
                draw = draw * 1.2 / tensor.shape[-1] ** 0.5
            else:
                draw = 0.5 * draw
            tensor.copy_(draw)
    return model


def inputs_for(model, seed):
    """Returns random inputs: rows of different lengths, padded on the right, for models that take a mask."""
    rng = np.random.default_rng(seed)
    config = model.config
    tokens = rng.integers(4, config.vocab_size, (3, 12), dtype=np.int32)
    lengths = np.array([12, 7, 10])
    made = {"tokens": tokens}
    if config.is_encoder_decoder or not model.can_generate():
        made["mask"] = (np.arange(12) < lengths[:, None]).astype(np.int32)
        made["tokens"] = np.where(made["mask"], tokens, config.pad_token_id).astype(np.int32)
    if config.model_type == "bert":
        made["token_types"] = rng.integers(0, 2, (3, 12), dtype=np.int32)
    if config.is_encoder_decoder:
        made["target"] = rng.integers(4, config.vocab_size, (3, 9), dtype=np.int32)
    return made


def compute(model, inputs):
    """Returns what the model computes of inputs, and a greedy continuation where it writes text."""
    import torch

    given = {NAMES[key]: torch.from_numpy(value.astype(np.int64)) for key, value in inputs.items()}
    with torch.no_grad():
        out = model(**given)
        if "start_logits" in out:
            result = {"output": torch.stack([out.start_logits, out.end_logits], -1).numpy()}
        else:
            result = {"output": (out.logits if "logits" in out else out.last_hidden_state).numpy()}
        if model.can_generate():
            one = {key: value[:1] for key, value in given.items() if key in ("input_ids", "attention_mask")}
            one["input_ids"] = one["input_ids"][:, :10]
            if "attention_mask" in one:
                one["attention_mask"] = one["attention_mask"][:, :10]
            written = model.generate(**one, max_new_tokens=CONTINUED, do_sample=False, num_beams=1)
            result["greedy"] = written[0].numpy().astype(np.int32)
    return result


def make(out, seed):
    """Writes every case below `out`."""
    for number, (name, (class_name, options, saving)) in enumerate(CASES.items()):
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        model = build(class_name, options, seed + number)
        inputs = inputs_for(model, seed + number)
        model.save_pretrained(folder, **saving)
        # What is stored is what is compared: the model is loaded back before it computes.
        computed = compute(type(model).from_pretrained(folder).eval(), inputs)
        again = compute(model, inputs)["output"]
        # Up to rounding, which depends on where in memory weights happen to lie.
        assert np.abs(again - computed["output"]).max() < 1e-5, f"{name}: saving changed the model"
        np.savez_compressed(folder / "expected.npz", **inputs, **computed)
        print(f"{name}: {class_name}, |output| up to {np.abs(computed['output']).max():.2f}")


def make_real(out, gguf, encoder):
    """Writes what two real models compute: `gguf` by transformers' own reader of such files, `encoder` a folder."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    out.mkdir(parents=True, exist_ok=True)
    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    tokens = tokenizer(TEXT, return_tensors="pt").input_ids
    code = tokenizer(CODE).input_ids
    with torch.no_grad():
        logits = model(tokens).logits[0, POSITIONS].numpy()
        continued = {"max_new_tokens": CONTINUED, "min_new_tokens": CONTINUED, "do_sample": False}
        greedy = model.generate(tokens, **continued)[0].numpy()
    np.savez_compressed(
        out / "smollm2.npz",
        text=TEXT,
        code=CODE,
        code_tokens=np.array(code, np.int32),
        tokens=tokens[0].numpy().astype(np.int32),
        positions=np.array(POSITIONS),
        some_logits=logits[:, ::STRIDE],
        largest=np.abs(logits).max(),
        greedy=greedy.astype(np.int32),
    )
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).float().eval()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch.attention_mask[..., None]
    np.savez_compressed(
        out / "minilm.npz",
        sentences=np.array(SENTENCES),
        tokens=batch.input_ids.numpy().astype(np.int32),
        mask=batch.attention_mask.numpy().astype(np.int32),
        embeddings=((hidden * mask).sum(1) / mask.sum(1)).numpy(),
    )


def score(folders):
    """Loads what fastlm wrote and leaves what transformers computes of it."""
    import json

    import transformers

    for folder in map(Path, folders):
        class_name = json.loads((folder / "config.json").read_text())["architectures"][0]
        model, report = getattr(transformers, class_name).from_pretrained(folder, output_loading_info=True)
        problems = {key: sorted(map(str, value)) for key, value in report.items() if value}
        inputs = dict(np.load(folder / "inputs.npz"))
        np.savez(folder / "scored.npz", problems=json.dumps(problems), **compute(model.eval(), inputs))


def main():
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for the tiny models")
    parser.add_argument("--real", type=Path, nargs=3, metavar=("OUT", "GGUF", "ENCODER"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--score", nargs="*", default=[])
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(1)
    if arguments.out:
        make(arguments.out, arguments.seed)
    if arguments.real:
        make_real(*arguments.real)
    score(arguments.score)


if __name__ == "__main__":
    main()
