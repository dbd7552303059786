"""A folder of ONNX graphs in ONNX Runtime: rows in, logits out, caches kept between calls.

Notable: a cache by slot is written where it lies, and never copied; what other kinds keep goes from the results of one
call into the inputs of the next without leaving the runtime. Sessions are opened when first needed, and share the file
of weights as far as the system maps it.

Dims: B batch, T time, S source time, V vocab.
"""

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.errors import UserError, first_line
from fastlm.exports.onnx_graph import DATA, OPSETS

SIGNATURE = "signature.json"
NEXT = "next/"  # what stands before the name of a cache that comes out


class Programs:
    """The programs of an exported model."""

    def __init__(self, folder: str | Path, threads: int = 0) -> None:
        """Reads what is in a folder.

        Args:
          threads: of a call; 0 leaves that to the runtime.

        Raises:
          UserError: no export is there, or one that is cut short.
        """
        self.folder, self._threads = Path(folder), threads
        try:
            told = json.loads((self.folder / SIGNATURE).read_text())
            self.signature: dict[str, Any] = told["programs"]
            self._sizes = told["sizes"]
        except (OSError, ValueError, KeyError):
            raise UserError(f"{folder}: no ONNX export; make one: python -m fastlm.export --format onnx") from None
        for name, size in self._sizes.items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != size:
                raise UserError(f"{path}: missing or cut short ({size:,} bytes were written); export again")

    @functools.lru_cache  # noqa: B019 (a session lives as long as its programs)
    def session(self, name: str) -> Any:
        """Returns the session of a program.

        Raises:
          UserError: the installed runtime is too old for it.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        try:
            return onnxruntime.InferenceSession(self.folder / self.signature[name]["file"], options)
        except Exception as error:
            said = re.sub(r"/\S+\.(h|cc):\d+ .*\) (?=[A-Z])", "", first_line(error))  # without where in its source
            raise UserError(
                f"ONNX Runtime {onnxruntime.__version__} cannot read '{name}' ({said[:300]}); graphs need opset "
                f"{OPSETS['']}: upgrade onnxruntime if it is older, else export again"
            ) from None

    def weights(self) -> np.ndarray:
        """Returns the file of weights, bytes, mapped."""
        return np.memmap(self.folder / DATA, np.uint8, "r")

    def bytes(self) -> int:
        """Returns what graphs and weights take on disk."""
        return sum(self._sizes.values())

    def has(self, name: str) -> bool:
        """Whether there is such a program."""
        return name in self.signature

    def call(self, name: str, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs a program on arrays."""
        outputs = list(self.signature[name]["outputs"])
        return dict(zip(outputs, self.session(name).run(outputs, dict(given)), strict=True))


class Decoding:
    """Rows that are being written: the cache, and the programs that read on."""

    def __init__(self, programs: Programs, slots: int) -> None:
        """Begins with room for so many tokens of each row."""
        self._programs, self._slots = programs, slots
        self._cache: dict[str, Any] = {}
        self._arrays: list[np.ndarray] = []  # where caches lie: the runtime's values do not keep it alive

    def begin(self, prompts: np.ndarray, lengths: np.ndarray, source: Mapping[str, np.ndarray]) -> np.ndarray:
        """Reads prompts [B, T] of `lengths` tokens (and sources [B, S]); returns logits [B, V] behind each."""
        import onnxruntime

        told = self._programs.signature["prefill"]["inputs"]
        sizes = {"b": len(prompts), "c": self._slots, "s": source["source"].shape[1] if source else 0}
        for name, value in told.items():
            if name.startswith("cache/"):
                shape = [sizes[size] if isinstance(size, str) else size for size in value["shape"]]
                self._arrays.append(np.zeros(shape, value["dtype"]))
                self._cache[name] = onnxruntime.OrtValue.ortvalue_from_numpy(self._arrays[-1])
        return self._run("prefill", {"tokens": prompts, "lengths": lengths, **source})

    def follow(self, rows: np.ndarray) -> None:
        """Makes the cache that of these of its rows, in this order; a row may go on as several."""
        import onnxruntime

        self._arrays = [np.ascontiguousarray(value.numpy()[rows]) for value in self._cache.values()]
        self._cache = dict(zip(self._cache, map(onnxruntime.OrtValue.ortvalue_from_numpy, self._arrays), strict=True))

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Reads one token [B] more of each row; returns logits [B, V]."""
        if self._programs.has("decode"):
            return self._run("decode", {"token": tokens})
        return self._run("prefill", {"tokens": tokens[:, None], "lengths": np.ones(len(tokens), np.int32)})

    def _run(self, name: str, given: Mapping[str, np.ndarray]) -> np.ndarray:
        session = self._programs.session(name)
        told = self._programs.signature[name]
        binding = session.io_binding()
        given = {key: np.ascontiguousarray(value, told["inputs"][key]["dtype"]) for key, value in given.items()}
        for key, value in given.items():  # which the binding does not keep alive
            binding.bind_cpu_input(key, value)
        in_place = set(told["in_place"])
        for key, value in self._cache.items():
            if key in told["inputs"]:
                binding.bind_ortvalue_input(key, value)
        for key in told["outputs"]:
            if key.removeprefix(NEXT) in in_place:
                binding.bind_ortvalue_output(key, self._cache[key.removeprefix(NEXT)])
            else:
                binding.bind_output(key)
        session.run_with_iobinding(binding)
        results = dict(zip(told["outputs"], binding.get_outputs(), strict=True))
        logits = results.pop("logits")
        self._cache.update((key.removeprefix(NEXT), value) for key, value in results.items())
        return logits.numpy()
