"""Where special tokens stand around texts: `[CLS] a [SEP] b [SEP]` for BERT, `<s> a </s></s> b </s>` for RoBERTa.

Notable: read off the post-processor of a `tokenizer.json`, whatever its kind, by letting it arrange texts of one
token each; so a model reads what it was trained on. Left out: the spaces that a post-processor trims from offsets.
"""

import dataclasses
import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The special tokens around one text, or around and between several.

    Attributes:
      special: ids before the first text, between each and the next, behind the last: one group more than texts.
      special_types: the token types of these, in the same groups.
      text_types: the token type of each text.
    """

    special: tuple[tuple[int, ...], ...]
    special_types: tuple[tuple[int, ...], ...]
    text_types: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many special tokens there are."""
        return sum(map(len, self.special))

    def join(self, texts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Returns tokens and token types of encoded texts with the special tokens in place, int32 [T] each."""
        tokens, types = list(self.special[0]), list(self.special_types[0])
        for text, kind, behind, behind_types in zip(
            texts, self.text_types, self.special[1:], self.special_types[1:], strict=True
        ):
            tokens += [*text, *behind]
            types += [kind] * len(text) + list(behind_types)
        return np.array(tokens, np.int32), np.array(types, np.int32)


def opened_and_closed(start: Sequence[int], end: Sequence[int], texts: int) -> Layout:
    """Returns `start` before the first of `texts`, and `end` behind each; token types count the texts, as for BERT."""
    numbers = tuple(range(texts))
    return Layout(
        special=(tuple(start), *[tuple(end)] * texts),
        special_types=((0,) * len(start), *[(number,) * len(end) for number in numbers]),
        text_types=numbers,
    )


def of_post_processor(processor: Any) -> tuple[Layout, Layout] | None:
    """Returns what a post-processor of the `tokenizers` library makes of one text and of two.

    None if it adds nothing: then nothing would tell two texts apart, and of an empty one nothing would be left.
    """
    from tokenizers import Tokenizer, models

    if processor is None:
        return None
    library = Tokenizer(models.WordLevel({"text": 0}, unk_token="text"))  # any text is one token
    library.post_processor = processor
    encodings = library.encode("text"), library.encode("text", "text")
    orders = [[number for number in encoding.sequence_ids if number is not None] for encoding in encodings]
    if orders != [[0], [0, 1]]:
        _logger.warning("the tokenizer's post-processor repeats texts or turns them round; it is left out")
        return None
    one, two = map(_layout, encodings)
    return (one, two) if one.size + two.size else None


def _layout(encoding: Any) -> Layout:
    places = [place for place, number in enumerate(encoding.sequence_ids) if number is not None]
    gaps = [slice(before + 1, behind) for before, behind in pairwise([-1, *places, len(encoding.ids)])]
    groups = lambda values: tuple(tuple(values[gap]) for gap in gaps)
    types = encoding.type_ids
    return Layout(groups(encoding.ids), groups(types), tuple(types[place] for place in places))
