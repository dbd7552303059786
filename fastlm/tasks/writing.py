"""How a trained model is asked for text: what it reads, what its decoder begins with, what it may write."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from fastlm.data.tokenizers import Tokenizer
from fastlm.decoding import sample


@dataclasses.dataclass(frozen=True)
class Writing:
    """What the searches of `decoding` need to know of a task.

    Attributes:
      read: from a text to the tokens that the model is given: a prompt to continue, or a source.
      start: the token that an encoder-decoder's decoder begins with; None for a decoder.
      ends: tokens of which any ends what is written.
      rules: which tokens may come, as `decoding.rules.make` takes them.
      continues: whether what is written goes on from the text, and reads on from it; else it stands for itself.
    """

    read: Callable[[str], Sequence[int]]
    start: int | None
    ends: tuple[int, ...]
    rules: dict[str, Any] = dataclasses.field(default_factory=dict)
    continues: bool = False


def continuing(tokenizer: Tokenizer) -> Writing:
    """Returns how a language model goes on from a text."""
    return Writing(lambda text: sample.prompt_ids(tokenizer, text), None, (tokenizer.eos,), continues=True)
