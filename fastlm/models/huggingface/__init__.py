"""Models in and out of Hugging Face: `read` a folder, a GGUF file or a hub name; `write` what transformers loads.

An architecture is one table of names and a config mapping (`bert.py`, `gpt2.py`, `llama.py`, `t5.py`, `bart.py`;
`gguf.py` for files of llama.cpp), listed in `describing.ARCHITECTURES`. Everything else is common:
`tables` (rows), `tensors` (checking and moving), `describing` (configs), `folders` (what lies beside).
"""

from fastlm.models.huggingface import folders
from fastlm.models.huggingface.describing import ARCHITECTURES, describe
from fastlm.models.huggingface.own_tokenizer import files_of as tokenizer_files
from fastlm.models.huggingface.reading import Imported, complete, read
from fastlm.models.huggingface.writing import write

__all__ = ["ARCHITECTURES", "Imported", "complete", "describe", "folders", "read", "tokenizer_files", "write"]
