"""GGUF files made from golden models, the way llama.cpp makes them: the same parameters must come out.

And files that nobody's converter made: a line that names the file, or a model.
"""

import json
import struct

import jax
import numpy as np
import pytest
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.errors import UserError
from fastlm.models import huggingface
from fastlm.models.huggingface import folders, gguf_tokenizer
from tests.models.huggingface_folders import GOLDEN, options_of, tensors_of
from tests.models.weight_file_makers import array, gguf_bytes, key_value, little_memory, string, tensor_info

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def neighbours(rows, head_dim):
    """Each head's rows with the two halves interleaved: channel i beside channel i + half."""
    half = head_dim // 2
    within = [which * half + pair for pair in range(half) for which in (0, 1)]
    return rows[[head + channel for head in range(0, len(rows), head_dim) for channel in within]]


def renamed(name):
    module, kind = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, layer, module = module.split(".", 3)
        return f"blk.{layer}.{NAMES[module]}.{kind}"
    return f"{NAMES[module]}.{kind}"


def write(path, case, name, change=lambda writer: None, tensors=None, **numbers):
    """Writes a golden model as a GGUF file of architecture `name`."""
    options, writer = options_of(GOLDEN / case), GGUFWriter(path, name)
    head_dim = options.get("head_dim") or options["hidden_size"] // options["num_attention_heads"]
    writer.add_context_length(options["max_position_embeddings"])
    writer.add_embedding_length(options["hidden_size"])
    writer.add_block_count(options["num_hidden_layers"])
    writer.add_feed_forward_length(options["intermediate_size"])
    writer.add_head_count(options["num_attention_heads"])
    writer.add_head_count_kv(options["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_rope_freq_base(options["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(options["rms_norm_eps"])
    change(writer)
    for key, tensor in (tensors or tensors_of(GOLDEN / case)).items():
        if name == "llama" and (".q_proj" in key or ".k_proj" in key):
            tensor = neighbours(tensor, head_dim)
        writer.add_tensor(renamed(key) if "." in key and "freqs" not in key else key, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def linear(writer):
    writer.add_string("llama.rope.scaling.type", "linear")
    writer.add_float32("llama.rope.scaling.factor", 2.0)


def vocabulary(writer):
    characters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["<|begin|>", "<|end|>", *characters, "ab", "\u0120", "\u0120a"]
    tokens += [f"[unused{number}]" for number in range(67 - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * 65)
    writer.add_token_merges(["a b", "\u0120 a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages }}")


@pytest.mark.parametrize(
    ("case", "name", "change"),
    [
        ("llama_tied", "llama", linear),
        ("mistral", "llama", lambda writer: None),
        ("qwen2", "qwen2", lambda writer: None),
        ("qwen3", "qwen3", lambda writer: None),
    ],
)
def test_the_same_parameters_come_out(case, name, change, tmp_path):
    expected = huggingface.read(GOLDEN / case)
    found = huggingface.read(write(tmp_path / "model.gguf", case, name, change))
    jax.tree.map(np.testing.assert_array_equal, expected.params, found.params)
    assert found.cfg == expected.cfg and found.missing == () == found.unused
    assert found.tokenizer_files == {} and "cannot be rebuilt" in found.tokenizer_note


def factors(factor, base=500.0, head_dim=8, length=8192):
    """By what llama.cpp divides the frequencies of a Llama 3, as its converter computes it."""
    found = []
    for channel in range(0, head_dim, 2):
        wavelength = 2 * np.pi * base ** (channel / head_dim)
        smooth = (length / wavelength - 1) / (4 - 1)
        kept, stretched = wavelength < length / 4, wavelength > length
        found.append(1 if kept else factor if stretched else 1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def test_scaling_of_llama3_is_recovered_from_its_factors(tmp_path):
    tensors = tensors_of(GOLDEN / "llama")
    stretch = factors(32.0, base=1e9)
    assert stretch[0] == 1 < stretch[-1]
    base = lambda writer: writer.add_float32("llama.rope.freq_base", 1e9)
    path = tmp_path / "model.gguf"
    original = GGUFWriter.add_rope_freq_base
    try:
        GGUFWriter.add_rope_freq_base = lambda self, value: None
        write(path, "llama", "llama", base, tensors | {"rope_freqs.weight": stretch})
        cfg = huggingface.read(path).cfg
        assert cfg.rotary_scaling == (32.0, 1.0, 4.0, 8192.0) and cfg.rotary_base == 1e9 and cfg.bias
        write(path, "llama", "llama", base, tensors | {"rope_freqs.weight": stretch[::-1].copy()})
        with pytest.raises(UserError, match=r"'rope_freqs.weight' is no scaling of Llama 3"):
            huggingface.read(path)
    finally:
        GGUFWriter.add_rope_freq_base = original


def test_the_tokenizer_is_rebuilt(tmp_path):
    from tokenizers import Tokenizer

    imported = huggingface.read(write(tmp_path / "model.gguf", "mistral", "llama", vocabulary))
    assert (
        imported.generation == {"bos_token_id": 0, "eos_token_id": 1}
        and folders.chat_template(imported.tokenizer_files) == "{{ messages }}"
    )
    config = json.loads(imported.tokenizer_files["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"]) == ("<|begin|>", "<|end|>")
    tokenizer = Tokenizer.from_str(imported.tokenizer_files["tokenizer.json"].decode())
    assert tokenizer.encode("abc ab<|end|>").tokens == ["ab", "c", "\u0120", "ab", "<|end|>"]
    assert tokenizer.encode("b a").tokens == ["b", "\u0120a"]
    assert tokenizer.decode([28, 4, 30, 3]) == "abc ab" and tokenizer.decode([28, 1]) == "ab"


@pytest.mark.parametrize(
    ("split", "text", "pieces"),
    [
        ("gpt-2", "a12 b", ["a", "12", " b"]),
        ("smollm", "a12 b", ["a", "1", "2", " b"]),
        ("llama-bpe", "a1234 b", ["a", "123", "4", " b"]),
        ("qwen2", "a12\n\nb", ["a", "1", "2", "\n\n", "b"]),
    ],
)
def test_text_is_split_as_the_file_says(split, text, pieces):
    from tokenizers import Tokenizer

    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.bos_token_id": 0,
    }
    tokenizer = Tokenizer.from_str(gguf_tokenizer.rebuilt(metadata, "x.gguf")["tokenizer.json"].decode())
    assert [text[a:b] for _, (a, b) in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == pieces
    starts = tokenizer.encode("b").tokens[0] == "a"
    assert starts == (split == "llama-bpe")
    metadata["tokenizer.ggml.add_bos_token"] = not starts
    tokenizer = Tokenizer.from_str(gguf_tokenizer.rebuilt(metadata, "x.gguf")["tokenizer.json"].decode())
    assert (tokenizer.encode("b").tokens[0] == "a") is not starts


@pytest.mark.parametrize(("split", "tokens"), [("llama-bpe", ["abc"]), ("gpt-2", ["a", "b", "c"])])
def test_llama3_takes_whole_words_first(split, tokens):
    from tokenizers import Tokenizer

    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": ["a", "b", "c", "abc"],
    }
    tokenizer = Tokenizer.from_str(gguf_tokenizer.rebuilt(metadata, "x.gguf")["tokenizer.json"].decode())
    assert tokenizer.encode("abc").tokens == tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "kind 'llama'"),
        ({"model": np.array([1, 2])}, "kind"),
        ({"pre": ["gpt-2"]}, "split"),
        ({"pre": "poro"}, "split 'poro'"),
        ({"tokens": ["a", "a"]}, "repeated, tokens"),
        ({"tokens": None}, "tokens"),
        ({"merges": ["ab"]}, "not pairs"),
        ({"merges": ["a c"]}, "contradicts itself"),
        ({"merges": [1]}, "tokens"),
        ({"bos_token_id": 7}, "bos_token_id is no token"),
        ({"bos_token_id": "a"}, "bos_token_id is no token"),
        ({"token_type": np.array([1, 1, 3])}, "contradicts itself"),
    ],
)
def test_tokenizers_that_cannot_be(changes, message):
    good = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "merges": ["a b"]}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in (good | changes).items()}
    if "token_type" in changes:
        metadata["tokenizer.ggml.token_type"] = np.array([1, 1, 1, 3])
    with pytest.raises(UserError, match=f"x.gguf.*{message}"):
        gguf_tokenizer.rebuilt(metadata, "x.gguf")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("expert_count", 8, "mixtures of experts"),
        ("attention.sliding_window", 16, "windows are not supported"),
        ("rope.dimension_count", 4, "differs from the size of a head"),
        ("attention.value_length", 16, "differs from the size of a head"),
    ],
)
def test_variants_that_we_do_not_have(key, value, message, tmp_path):
    change = lambda writer: writer.add_uint32(f"llama.{key}", value)
    with pytest.raises(UserError, match=f"'{key}': .*{message}"):
        huggingface.read(write(tmp_path / "model.gguf", "mistral", "llama", change))


def test_architectures_and_scalings_that_we_do_not_have(tmp_path):
    path = tmp_path / "model.gguf"
    write(path, "mistral", "gemma")
    with pytest.raises(UserError, match="unknown GGUF architecture 'gemma'; known: llama, qwen2, qwen3"):
        huggingface.read(path)
    write(path, "mistral", "llama", lambda writer: writer.add_string("llama.rope.scaling.type", "yarn"))
    with pytest.raises(UserError, match="'rope.scaling.type': 'yarn' is not supported"):
        huggingface.read(path)


def test_a_key_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(GGUFWriter, "add_head_count", lambda self, value: None)
    with pytest.raises(UserError, match="'llama.attention.head_count': is missing"):
        huggingface.read(write(tmp_path / "model.gguf", "mistral", "llama"))


# --- hostile files -------------------------------------------------------------------------------

UINT32, FLOAT32, STRING, ARRAY = 4, 6, 8, 9
SHAPES = {  # as in the file, the fastest axis first
    "token_embd.weight": (8, 5),
    "blk.0.attn_norm.weight": (8,),
    "blk.0.attn_q.weight": (8, 8),
    "blk.0.attn_k.weight": (8, 8),
    "blk.0.attn_v.weight": (8, 8),
    "blk.0.attn_output.weight": (8, 8),
    "blk.0.ffn_norm.weight": (8,),
    "blk.0.ffn_gate.weight": (8, 12),
    "blk.0.ffn_up.weight": (8, 12),
    "blk.0.ffn_down.weight": (12, 8),
    "output_norm.weight": (8,),
    "rope_freqs.weight": (4,),
}
NUMBERS = {
    "context_length": 16,
    "embedding_length": 8,
    "block_count": 1,
    "feed_forward_length": 12,
    "attention.head_count": 1,
    "attention.head_count_kv": 1,
    "attention.key_length": 8,
}
VALUES = {f"llama.{key}": (UINT32, struct.pack("<I", number)) for key, number in NUMBERS.items()} | {
    "general.architecture": (STRING, string("llama")),
    "llama.rope.freq_base": (FLOAT32, struct.pack("<f", 500.0)),
    "tokenizer.ggml.model": (STRING, string("gpt2")),
    "tokenizer.ggml.tokens": (ARRAY, array(STRING, 5, b"".join(map(string, "abcde")))),
    "tokenizer.ggml.token_type": (ARRAY, array(5, 5, struct.pack("<5i", 1, 1, 1, 3, 4))),
    "tokenizer.ggml.bos_token_id": (UINT32, struct.pack("<I", 3)),
}


def model_bytes(shapes=SHAPES, values=VALUES):
    """A whole model of one layer; all its numbers are 1."""
    infos, data = [], b""
    for name, shape in shapes.items():
        infos.append(tensor_info(name, shape, 0, len(data)))
        data += np.ones(max(-(-int(np.prod(shape)) // 8) * 8, 8), np.float32).tobytes()
    return gguf_bytes(infos, [key_value(key, kind, content) for key, (kind, content) in values.items()], data)


def outcome(path, content):
    """What is read, or the one line that refuses it; any other exception is a failure."""
    path.write_bytes(content)
    with little_memory():
        try:
            return huggingface.read(path)
        except UserError as error:
            message = str(error)
    assert "\n" not in message and len(message) < 1500 and str(path) in message
    return message


def test_the_model_of_the_hostile_tests_is_one(tmp_path):
    found = outcome(tmp_path / "model.gguf", model_bytes())
    assert (found.cfg.vocab_size, found.cfg.width, found.missing, found.tokenizer_note) == (5, 8, (), "")


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("shape", [(), (1,), (0, 0), (2, 2, 2)])
def test_tensors_of_other_ranks(name, shape, tmp_path):
    found = outcome(tmp_path / "model.gguf", model_bytes(SHAPES | {name: shape}))
    assert isinstance(found, str) and (name in found or "vocab_size 0" in found)


numbers = st.sampled_from([0, 1, 3, 8, 2**20, 2**31 - 1, 2**32 - 1]).map(lambda n: (UINT32, struct.pack("<I", n)))
floats = st.sampled_from([0.0, -1.0, 1e38, float("inf"), float("nan")]).map(lambda x: (FLOAT32, struct.pack("<f", x)))
texts = st.sampled_from(["", "llama", "qwen3", "gpt2"]).map(lambda text: (STRING, string(text)))
lists = st.sampled_from([0, 1, 7]).map(lambda n: (ARRAY, array(UINT32, n, bytes(4 * n))))
keys = st.sampled_from([*VALUES, "llama.rope.scaling.type", "llama.expert_count", "llama.attention.value_length"])
lengths = st.lists(st.sampled_from([0, 1, 2, 4, 5, 8]), max_size=4).map(tuple)


@settings(max_examples=60)
@given(
    st.dictionaries(st.sampled_from(sorted(SHAPES)), lengths, max_size=2),
    st.dictionaries(keys, numbers | floats | texts | lists, max_size=2),
    st.sets(st.sampled_from([*SHAPES, *VALUES]), max_size=1),
)
def test_any_model_is_read_or_refused_in_one_line(tmp_path_factory, shapes, values, lost):
    kept = lambda items: {name: item for name, item in items.items() if name not in lost}
    path = tmp_path_factory.getbasetemp() / "hostile.gguf"
    outcome(path, model_bytes(kept(SHAPES | shapes), kept(VALUES | values)))
