"""GGUF: decoders of Llama's kind for llama.cpp, in one file with their tokenizer.

    FOLDER/model.gguf

Notable: names, order of rows and key-values are those that reading knows (`models.huggingface.gguf`), so that what is
written is read back as the same model. Matrices are whole (float16) or in blocks of 32 with a scale each: eight bits
(Q8_0) or four (Q4_0); vectors stay float32, and so does a matrix whose rows are no whole blocks (as float16).
Left out: formats with a scale of scales (Q4_K ...), which llama.cpp's own tool makes of a float16 file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.models import ModelConfig, formats
from fastlm.models.huggingface import gguf, gguf_tokenizer
from fastlm.models.huggingface.tensors import tensors_to_write

FILE = "model.gguf"
FORMATS = {"float16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
BLOCK = 32
HOW_TO_RUN = """
## How to run it

    llama-cli -m model.gguf -p "..."
"""


def write(
    folder: Path,
    cfg: ModelConfig,
    params: Any,
    tokenizer_files: Mapping[str, bytes],
    weights: str,
    name: str,
    license_name: str = "",
) -> list[str]:
    """Writes a model into a folder and returns the names of the files.

    Args:
      tokenizer_files: contents by name; tokenizer.json is needed.
      weights: one of `FORMATS`.
      name: of the model.
      license_name: what its license is called, if that is known.

    Raises:
      UserError: llama.cpp has no form for the model or its tokenizer, as far as is known here.
    """
    import gguf as library

    cfg, params = cfg.plain(), formats.merged(params)
    architecture, moved, values, more = gguf.described(cfg)
    values |= gguf_tokenizer.key_values(tokenizer_files, cfg.vocab_size)
    values |= {"general.name": name, "general.quantization_version": library.GGML_QUANT_VERSION}
    values |= {"general.license": license_name} if license_name else {}
    values["general.file_type"] = int(getattr(library.LlamaFileType, f"MOSTLY_{FORMATS[weights]}"))
    writer = library.GGUFWriter(folder / FILE, architecture)
    for key, value in values.items():
        _ADD[type(value[0] if isinstance(value, list) else value), isinstance(value, list)](writer, key, value)
    kind = library.GGMLQuantizationType[FORMATS[weights]]
    for tensor in tensors_to_write(cfg, params, moved, "float32"):
        array = np.ascontiguousarray(tensor.values())
        if array.ndim < 2:
            writer.add_tensor(tensor.name, array)
        elif weights == "float16" or array.shape[-1] % BLOCK:
            writer.add_tensor(tensor.name, array.astype(np.float16))
        else:
            writer.add_tensor(tensor.name, library.quants.quantize(array, kind), raw_dtype=kind)
    for key, array in more.items():
        writer.add_tensor(key, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [FILE]


_ADD = {
    (bool, False): lambda writer, key, value: writer.add_bool(key, value),
    (int, False): lambda writer, key, value: writer.add_uint32(key, value),
    (float, False): lambda writer, key, value: writer.add_float32(key, value),
    (str, False): lambda writer, key, value: writer.add_string(key, value),
    (int, True): lambda writer, key, value: writer.add_array(key, value),
    (str, True): lambda writer, key, value: writer.add_array(key, value),
}
