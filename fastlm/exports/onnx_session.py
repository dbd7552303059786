"""A folder of ONNX graphs in ONNX Runtime: rows in, logits out, caches kept between calls.

Notable: a cache by slot is written where it lies, and never copied; what other kinds keep goes from the results of one
call into the inputs of the next without leaving the runtime. Sessions are opened when first needed, and share the file
of weights as far as the system maps it.

Dims: B batch, T time, S source time, V vocab.
"""

import functools
import itertools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fastlm.errors import UserError, first_line
from fastlm.exports.exported_programs import ExportedPrograms, filled_up
from fastlm.exports.onnx_graph import DATA, OPSETS

NEXT = "next/"  # what stands before the name of a cache that comes out
AT_ONCE = 1 << 26  # logits that a call gives


class Programs(ExportedPrograms):
    """See `ExportedPrograms`; weights are in the graphs, whatever is passed as such."""

    FORM, WEIGHTS = "onnx", DATA

    def __init__(self, folder: str | Path, threads: int = 0) -> None:
        """Reads what is in a folder.

        Args:
          threads: of a call; 0 leaves that to the runtime.

        Raises:
          UserError: no export is there, or one that is cut short.
        """
        super().__init__(folder)
        self._threads = threads

    @functools.lru_cache  # noqa: B019 (a session lives as long as its programs)
    def open(self, name: str) -> Any:
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

    def call(self, name: str, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs a program on arrays."""
        outputs = list(self.signature[name]["outputs"])
        return dict(zip(outputs, self.open(name).run(outputs, dict(given)), strict=True))

    def forward(self, params: Any, given: Mapping[str, Array]) -> Float[Array, "B ... C"]:
        """See `ExportedPrograms`; calls the runtime from inside jit, documents of a row one by one."""
        del params
        told = self.signature["forward"]
        ((name, output),) = told["outputs"].items()
        rows, length = given["tokens"].shape
        width = output["shape"][-1]
        shape = jax.ShapeDtypeStruct((rows, length, width) if len(output["shape"]) == 3 else (rows, width), jnp.float32)

        def answers(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
            length = arrays["tokens"].shape[1]
            found = self.call("forward", filled_up(arrays, self.length_of("forward"), np.pad))[name]
            return found[:, :length] if found.ndim == 3 else found

        def call(values: dict[str, Array]) -> np.ndarray:
            arrays = {key: np.asarray(value) for key, value in values.items()}
            if "segments" in told["inputs"] or "segments" not in arrays:
                return answers(arrays)
            read = lambda rows: answers({"tokens": rows})
            return by_document(read, arrays["tokens"], arrays["segments"], width, self.length_of("forward") or 0)

        return jax.pure_callback(call, shape, dict(given))

    def decoding(self, params: Any, slots: int) -> "Decoding":
        """See `ExportedPrograms`."""
        del params
        return Decoding(self, slots)


class Decoding:
    """See `exported_programs.Decoding`."""

    def __init__(self, programs: Programs, slots: int) -> None:
        """Begins with room for so many tokens of each row."""
        self._programs, self._slots = programs, slots
        self._cache: dict[str, Any] = {}
        self._arrays: list[np.ndarray] = []  # where caches lie: the runtime's values do not keep it alive

    def begin(self, prompts: np.ndarray, lengths: np.ndarray, source: Mapping[str, np.ndarray]) -> np.ndarray:
        """See `exported_programs.Decoding`."""
        import onnxruntime

        width = source["source"].shape[1] if source else 0
        for name, array in self._programs.empty_cache(len(prompts), self._slots, width).items():
            self._arrays.append(array)
            self._cache[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        return self._run("prefill", {"tokens": prompts, "lengths": lengths, **source})

    def follow(self, rows: np.ndarray) -> None:
        """See `exported_programs.Decoding`."""
        import onnxruntime

        self._arrays = [np.ascontiguousarray(value.numpy()[rows]) for value in self._cache.values()]
        self._cache = dict(zip(self._cache, map(onnxruntime.OrtValue.ortvalue_from_numpy, self._arrays), strict=True))

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """See `exported_programs.Decoding`."""
        if self._programs.has("decode"):
            return self._run("decode", {"token": tokens})
        return self._run("prefill", {"tokens": tokens[:, None], "lengths": np.ones(len(tokens), np.int32)})

    def _run(self, name: str, given: Mapping[str, np.ndarray]) -> np.ndarray:
        session = self._programs.open(name)
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


def by_document(
    call: Callable[[np.ndarray], np.ndarray], tokens: np.ndarray, segments: np.ndarray, width: int, filled: int = 0
) -> Float[np.ndarray, "B T V"]:
    """Returns logits of every document of packed rows read alone; zeros where a row is padding.

    Args:
      call: from rows [b, T'] to logits [b, T', V].
      tokens, segments: [B, T]; segments number the documents of a row, and are 0 where it is padding.
      filled: how long `call` makes every row, if it does.
    """
    result = np.zeros((*tokens.shape, width), np.float32)
    pieces = []
    for row, numbers in enumerate(segments):
        borders = [0, *(np.flatnonzero(np.diff(numbers)) + 1), len(numbers)]
        pieces += [(row, start, stop) for start, stop in itertools.pairwise(borders) if numbers[start]]
    longest = max((stop - start for _, start, stop in pieces), default=1)
    several = max(1, AT_ONCE // (max(longest, filled) * width))
    for begin in range(0, len(pieces), several):
        group = pieces[begin : begin + several]
        rows = np.zeros((len(group), longest), np.int32)
        for target, (row, start, stop) in zip(rows, group):
            target[: stop - start] = tokens[row, start:stop]
        for (row, start, stop), found in zip(group, call(rows), strict=True):
            result[row, start:stop] = found[: stop - start]
    return result
