"""Which tokens a continuation may have, and where: what searches and sampling ask before they choose.

Notable: rules are values of a program, not part of it, so changing them compiles nothing. Scores of the tokens
that stay allowed are not renormalized, so a hypothesis keeps the probability that the model gives it; a
forced token costs nothing. Left out: banned phrases, repeated n-grams, a forced last token.

Dims: V vocab, W at least V (scores padded behind).
"""

from collections.abc import Sequence

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fastlm.decoding.inputs import check_token
from fastlm.errors import UserError

NEGATIVE = -1e30  # finite: sums and differences of it are no NaN
NONE = -1  # no token


@flax.struct.dataclass
class Rules:
    """What a continuation may consist of; see `make`."""

    end: Int[Array, ""]
    min_tokens: Int[Array, ""]
    forbidden: Bool[Array, "V"]
    forced_first: Int[Array, ""]

    def allow(self, scores: Float[Array, "... W"], written: Int[Array, ""] | int) -> Float[Array, "... W"]:
        """Returns scores with what is not allowed after `written` tokens at -1e30, and a forced token at 0."""
        token = jnp.arange(scores.shape[-1])
        too_early = (token == self.end) & (written < self.min_tokens)
        hidden = jnp.pad(self.forbidden, (0, scores.shape[-1] - self.forbidden.shape[0])) | too_early
        forcing = (self.forced_first >= 0) & (written == 0)
        hidden = jnp.where(forcing, token != self.forced_first, hidden)
        return jnp.where(hidden, NEGATIVE, jnp.where(forcing, 0.0, scores))


def make(
    vocab_size: int,
    max_tokens: int,
    *,
    end: int | None = None,
    min_tokens: int = 0,
    forbidden: Sequence[int] = (),
    forced_first: int | None = None,
) -> Rules:
    """Returns rules.

    Args:
      max_tokens: most tokens of a continuation.
      end: the token that ends it; None if nothing does.
      min_tokens: fewest tokens before the end token.
      forbidden: tokens that never come (padding, say).
      forced_first: the token it begins with, even a forbidden one; None leaves that free.

    Raises:
      UserError: tokens outside the vocabulary, none left to choose, or lengths that cannot be.
    """
    for name, tokens in (("end", [end]), ("forced_first", [forced_first]), ("forbidden", forbidden)):
        for token in tokens:
            if token is not None:
                check_token(name, token, vocab_size)
    mask = np.zeros(vocab_size, bool)
    mask[list(forbidden)] = True
    if (mask | ((np.arange(vocab_size) == end) & (min_tokens > 0))).all():
        raise UserError(f"forbidden: no token of the vocabulary of {vocab_size} is left to begin with; allow some")
    if not 0 <= min_tokens <= max_tokens:
        raise UserError(f"min_tokens: must lie between 0 and max_tokens ({max_tokens}), got {min_tokens}")
    number = lambda token: np.int32(NONE if token is None else token)
    return Rules(number(end), np.int32(min_tokens), mask, number(forced_first))
