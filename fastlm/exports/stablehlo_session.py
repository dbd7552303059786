"""A folder of StableHLO programs in this process's XLA: rows in, logits out, caches kept between calls.

Notable: what runs is what was written, whatever this version's model code does. Programs are compiled for the shapes
that come, as any function of jax is, and inside of jit they are a part of what is compiled; a cache is given back to
the step that takes it.

Dims: B batch, T time, S source time, V vocab.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Float

from fastlm.errors import UserError, first_line
from fastlm.exports.exported_programs import ExportedPrograms, filled_up
from fastlm.exports.stablehlo import WEIGHTS
from fastlm.models import weight_files


class Programs(ExportedPrograms):
    """See `ExportedPrograms`; weights are arguments."""

    FORM, WEIGHTS = "stablehlo", WEIGHTS

    def params(self) -> dict[str, Array]:
        """Returns the weights by path."""
        with weight_files.open_weights(self.folder / WEIGHTS) as source:
            return {name: jnp.asarray(source.read(name)) for name in source.names()}

    @functools.lru_cache  # noqa: B019 (a program lives as long as its folder)
    def open(self, name: str) -> export.Exported:
        """Returns a program.

        Raises:
          UserError: the installed jax cannot read it, or it was not written for this platform.
        """
        try:
            program = export.deserialize(bytearray((self.folder / self.signature[name]["file"]).read_bytes()))
        except Exception as error:
            raise UserError(
                f"jax {jax.__version__} cannot read '{name}' of {self.folder} ({first_line(error)[:300]}); upgrade jax "
                "if it is older than the one that wrote it, else export again"
            ) from None
        if jax.default_backend() not in map(_platform, program.platforms):
            raise UserError(
                f"'{name}' of {self.folder} is for {', '.join(program.platforms)}; this is {jax.default_backend()}"
            )
        if program.nr_devices != 1:
            raise UserError(f"'{name}' of {self.folder} is for {program.nr_devices} devices; export again")
        return program

    def forward(self, params: Any, given: Mapping[str, Array]) -> Float[Array, "B ... C"]:
        """See `ExportedPrograms`."""
        taken = self.signature["forward"]["inputs"]
        length = given["tokens"].shape[1]
        filled = filled_up({key: x for key, x in given.items() if key in taken}, self.length_of("forward"), jnp.pad)
        (found,) = self.open("forward").call(params, filled).values()
        return found[:, :length] if found.ndim == 3 else found

    def decoding(self, params: Any, slots: int) -> "Decoding":
        """See `ExportedPrograms`."""
        return Decoding(self, params, slots)

    @functools.lru_cache  # noqa: B019
    def jitted(self, name: str) -> Any:
        """Returns a program as `(params, cache, its other inputs) -> outputs`, written where the cache was."""
        program = self.open(name)
        return jax.jit(lambda params, cache, given: program.call(params, {**given, **cache}), donate_argnums=1)


class Decoding:
    """See `exported_programs.Decoding`."""

    def __init__(self, programs: Programs, params: Any, slots: int) -> None:
        """Begins with room for so many tokens of each row."""
        self._programs, self._params, self._slots = programs, params, slots
        self._cache: dict[str, Any] = {}

    def begin(self, prompts: np.ndarray, lengths: np.ndarray, source: Mapping[str, np.ndarray]) -> np.ndarray:
        """See `exported_programs.Decoding`."""
        width = source["source"].shape[1] if source else 0
        self._cache = jax.device_put(self._programs.empty_cache(len(prompts), self._slots, width))
        return self._run("prefill", {"tokens": prompts, "lengths": lengths, **source})

    def follow(self, rows: np.ndarray) -> None:
        """See `exported_programs.Decoding`."""
        self._cache = {name: leaf[rows] for name, leaf in self._cache.items()}

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """See `exported_programs.Decoding`."""
        return self._run("decode", {"token": tokens})

    def _run(self, name: str, given: Mapping[str, np.ndarray]) -> np.ndarray:
        given = {key: np.asarray(value, np.int32) for key, value in given.items()}
        found = dict(self._programs.jitted(name)(self._params, self._cache, given))
        logits = found.pop("logits")
        self._cache = found
        return np.asarray(logits)


def _platform(name: str) -> str:
    """What `jax.default_backend` calls a platform of an export."""
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)
