"""Attention kinds: one file, one module and one line of `KINDS` each.

A kind is a Linen module built as `Module(layer_config, compute, capture)` and called as
`(x, context, *, positions, mask, bias, cache, rng) -> (y, cache, aux)`. Its `KINDS` entry declares
what it can do; the stack asks for no more than that, and what is missing is an error while building.
"""

import dataclasses

import flax.linen as nn

from fastlm.errors import UserError, nearest
from fastlm.models.attention.full import FullAttention


@dataclasses.dataclass(frozen=True)
class Kind:
    """An attention kind and what it can do.

    Attributes:
      module: also has `empty_cache(layer_config, batch, slots, dtype)` if it decodes.
      causal: a token may be kept from seeing later ones.
      packed: documents in one row may be kept apart.
      cross: queries and keys may come from different sequences.
      decode: it runs step by step with a cache.
      fused_softmax: a platform's fused kernel may compute it.
    """

    module: type[nn.Module]
    causal: bool
    packed: bool
    cross: bool
    decode: bool
    fused_softmax: bool


KINDS: dict[str, Kind] = {
    "full": Kind(FullAttention, causal=True, packed=True, cross=True, decode=True, fused_softmax=True),
}


def require(name: str, *needs: str) -> Kind:
    """Returns the entry of `KINDS` if it can do all of `needs` (names of `Kind`'s flags).

    Raises:
      UserError: no such kind, or it cannot do one of them.
    """
    found = kind(name)
    for need in needs:
        if not getattr(found, need):
            raise UserError(f"config.model.attention: kind '{name}' cannot do '{need}'; choose another kind")
    return found


def kind(name: str) -> Kind:
    """Returns the entry of `KINDS`.

    Raises:
      UserError: no such kind.
    """
    if name not in KINDS:
        hint = nearest(name, KINDS) or f"; one of: {', '.join(KINDS)}"
        raise UserError(f"config.model.attention: unknown kind '{name}'{hint}")
    return KINDS[name]
