"""Weight files of other programs, in and out: safetensors (single or sharded) and GGUF (read only).

Notable: `open_weights` checks the whole header before any tensor is touched and trusts no number in
it, so a truncated or hostile file ends in one line and never in a large allocation. One tensor is
read or written at a time: the memory needed beside the model is that of its largest tensor. Pickle
(.bin, .pt, .ckpt ...) is never loaded, since loading one runs whatever code it holds.

Left out: writing GGUF; GGUF models split over several files; big-endian machines (none runs XLA).
"""

from fastlm.models.weight_files.opening import open_weights
from fastlm.models.weight_files.source import WeightSource
from fastlm.models.weight_files.writing import TensorToWrite, write_safetensors

__all__ = ["TensorToWrite", "WeightSource", "open_weights", "write_safetensors"]
