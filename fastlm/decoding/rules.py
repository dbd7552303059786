"""Which tokens a continuation may have, and where: what searches and sampling ask before they choose.

Notable: scores of the tokens that stay allowed are not renormalized, so a hypothesis keeps the probability
that the model gives it; a forced token costs nothing. Left out: banned phrases, repeated n-grams.

Dims: V vocab.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastlm.decoding.inputs import check_token
from fastlm.errors import UserError

NEGATIVE = -1e30  # finite: sums and differences of it are no NaN


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a continuation may consist of.

    Attributes:
      end: the token that ends it; None if nothing does.
      min_tokens: fewest tokens before the end token.
      forbidden: tokens that never come (padding, say).
      forced_first: the token it begins with, even a forbidden one; None leaves that free.
    """

    end: int | None = None
    min_tokens: int = 0
    forbidden: tuple[int, ...] = ()
    forced_first: int | None = None

    def check(self, vocab_size: int, max_tokens: int) -> None:
        """Raises a `UserError` for tokens outside the vocabulary, none left to choose, or lengths that cannot be."""
        named = [("forbidden", token) for token in self.forbidden]
        named += [(name, token) for name in ("end", "forced_first") if (token := getattr(self, name)) is not None]
        for name, token in named:
            check_token(name, token, vocab_size)
        if len(set(self.forbidden)) >= vocab_size:
            raise UserError(f"forbidden: all {vocab_size} tokens of the vocabulary; leave some")
        if not 0 <= self.min_tokens <= max_tokens:
            raise UserError(f"min_tokens: must lie between 0 and max_tokens ({max_tokens}), got {self.min_tokens}")

    def allow(self, scores: Float[Array, "... V"], written: Int[Array, ""] | int) -> Float[Array, "... V"]:
        """Returns scores with what is not allowed after `written` tokens at -1e30, and a forced token at 0."""
        token = jnp.arange(scores.shape[-1])
        if self.forbidden:
            scores = jnp.where(jnp.isin(token, jnp.array(self.forbidden)), NEGATIVE, scores)
        if self.end is not None and self.min_tokens:
            scores = jnp.where((token == self.end) & (written < self.min_tokens), NEGATIVE, scores)
        if self.forced_first is not None:
            forced = jnp.where(token == self.forced_first, 0.0, NEGATIVE)
            scores = jnp.where(written == 0, forced, scores)
        return scores
