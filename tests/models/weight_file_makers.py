"""Small weight files byte by byte, valid or not, for the tests of the readers."""

import contextlib
import json
import struct
import tracemalloc

from fastlm.errors import UserError
from fastlm.models.weight_files import open_weights

MAX_MEMORY = 4_000_000


@contextlib.contextmanager
def little_memory():
    """Fails if the block allocates more than a few MB at once, whatever a header announces."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MAX_MEMORY
    finally:
        tracemalloc.stop()


def read_all(path):
    """Every tensor by name, with its shape, dtype and encoding held against what was announced."""
    with open_weights(path) as source:
        arrays = {name: source.read(name) for name in source.names()}
        for name, array in arrays.items():
            assert (array.shape, array.dtype) == (source.shape(name), source.dtype(name))
            assert array.flags.owndata or array.base is not None
        return arrays


def outcome(path):
    """The tensors, or the one line that refuses them; any other exception is a failure."""
    with little_memory():
        try:
            return read_all(path)
        except UserError as error:
            message = str(error)
            assert "\n" not in message and len(message) < 1500 and str(path) in message
            return message


def safetensors_bytes(header, data=b"", length=None):
    """A file from a header (text, or what JSON makes of it) and data; `length` may lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def string(text):
    content = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(content)) + content


def key_value(key, kind, content):
    return string(key) + struct.pack("<I", kind) + content


def array(kind, count, content):
    return struct.pack("<IQ", kind, count) + content


def tensor_info(name="w", shape=(2,), kind=0, offset=0):
    """`shape` is in the file's order, the fastest axis first."""
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf_bytes(infos=(), values=(), data=b"", counts=None, magic=b"GGUF", version=3, alignment=32):
    """A file from parts made above; `counts` (tensors, key-values) may lie."""
    tensors, keys = counts or (len(infos), len(values))
    header = magic + struct.pack("<IQQ", version, tensors, keys) + b"".join(values) + b"".join(infos)
    return header + b"\0" * (-len(header) % alignment) + data
