"""A folder of exported programs, whatever runs them: what is in it, and how a model calls it.

Notable: a runtime is two small classes, one for the programs of a folder and one for rows that are being written;
`exported_model` makes of them a model that tasks score and that writes texts.

Dims: B batch, T time, S source time, V vocab.
"""

import abc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from jaxtyping import Array, Float, Int

from fastlm.errors import UserError

SIGNATURE = "signature.json"


class Decoding(Protocol):
    """Rows that are being written: the cache, and the programs that read on."""

    def begin(
        self, prompts: Int[np.ndarray, "B T"], lengths: Int[np.ndarray, "B"], source: Mapping[str, np.ndarray]
    ) -> Float[np.ndarray, "B V"]:
        """Reads prompts of `lengths` tokens (and sources [B, S]); returns the logits behind each."""

    def follow(self, rows: Int[np.ndarray, "R"]) -> None:
        """Makes the cache that of these of its rows, in this order; a row may go on as several."""

    def step(self, tokens: Int[np.ndarray, "B"]) -> Float[np.ndarray, "B V"]:
        """Reads one token more of each row; returns the logits behind each."""


class ExportedPrograms(abc.ABC):
    """The programs of an exported model.

    Attributes:
      folder: where they lie.
      signature: what goes in and comes out, by program.
    """

    FORM: ClassVar[str]  # as fastlm.export names it
    WEIGHTS: ClassVar[str]  # file of the weights

    def __init__(self, folder: str | Path) -> None:
        """Reads what is in a folder.

        Raises:
          UserError: no such export is there, or one that is cut short.
        """
        self.folder = Path(folder)
        try:
            told = json.loads((self.folder / SIGNATURE).read_text())
            self.signature: dict[str, Any] = told["programs"]
            self._sizes: dict[str, int] = told["sizes"]
            if self.WEIGHTS not in self._sizes:
                raise KeyError(self.WEIGHTS)
        except (OSError, ValueError, KeyError):
            raise UserError(
                f"{folder}: no {self.FORM} export; make one: python -m fastlm.export --format {self.FORM}"
            ) from None
        for name, size in self._sizes.items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != size:
                raise UserError(f"{path}: missing or cut short ({size:,} bytes were written); export again")

    def weights(self) -> np.ndarray:
        """Returns the file of weights, bytes, mapped."""
        return np.memmap(self.folder / self.WEIGHTS, np.uint8, "r")

    def bytes(self) -> int:
        """Returns what programs and weights take on disk."""
        return sum(self._sizes.values())

    def has(self, name: str) -> bool:
        """Whether there is such a program."""
        return name in self.signature

    def length_of(self, name: str) -> int | None:
        """Returns the tokens of a row of a program; None where these are open."""
        tokens = self.signature[name]["inputs"]["tokens"]["shape"][1]
        return None if isinstance(tokens, str) else tokens

    def empty_cache(self, rows: int, slots: int, source: int) -> dict[str, np.ndarray]:
        """Returns the cache, by name, that "prefill" begins with, for so many rows, slots and source tokens."""
        sizes = {"b": rows, "c": slots, "s": source}
        return {
            name: np.zeros([sizes[size] if isinstance(size, str) else size for size in told["shape"]], told["dtype"])
            for name, told in self.signature["prefill"]["inputs"].items()
            if name.startswith("cache/")
        }

    def params(self) -> Any:
        """Returns what `forward` and `decoding` take as the weights; nothing where programs hold them."""
        return {}

    @abc.abstractmethod
    def open(self, name: str) -> Any:
        """Makes a program ready to be called.

        Raises:
          UserError: it cannot run here.
        """

    @abc.abstractmethod
    def forward(self, params: Any, given: Mapping[str, Array]) -> Float[Array, "B ... C"]:
        """Returns what the program "forward" gives; may be called from inside jit.

        Args:
          given: tokens, segments and whatever else the program takes, [B, T]; segments that it does not take tell
            apart the documents of a row.
        """

    @abc.abstractmethod
    def decoding(self, params: Any, slots: int) -> Decoding:
        """Returns rows to be written, with room for so many tokens each."""


def filled_up(given: Mapping[str, Array], length: int | None, pad: Any) -> dict[str, Array]:
    """Returns inputs whose rows, but sources, have `length` tokens: zeros, which are padding, behind them.

    Args:
      pad: `np.pad`, or that of `jax.numpy`.
    """
    if length is None:
        return dict(given)
    wider = lambda x: pad(x, ((0, 0), (0, length - x.shape[1])))
    return {key: value if key.startswith("source") else wider(value) for key, value in given.items()}
