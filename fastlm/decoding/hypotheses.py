"""One step of beam search on scores alone: who goes on, who has ended, and whether to stop.

Notable: each step looks at the 2 K likeliest continuations of an input's K beams, so that K of them go on even
if K end. Ended ones are kept apart, the best K, by summed log-probability / length**penalty, where the length
counts the written tokens and the end token, not the prompt. Only those among the K likeliest may end there (what
ranks below would not have been a beam either). At the last step every beam counts as ended. All of it as in
Hugging Face's search; the penalty is that of arXiv 1609.08144 with its constant 5 left out.
Scores are float32 whatever the model computes in; what does not exist (a beam not begun, a forbidden token) has
-1e30 and is never returned.

Dims: B batch, K beams, b beams that scores come from (1 at first, then K), C candidates (2 K), T steps, V vocab.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fastlm.decoding.likeliest import BLOCK, top_k, top_k_by_blocks
from fastlm.decoding.rules import NEGATIVE, Rules

_DEAD = NEGATIVE / 2

# Of (score of the best beam, written, limit, penalty): the best it could still come to, by each rule. An input
# is done when that is no better than the worst of K that have ended.
STOPPING: dict[str, Callable[[Array, Array, Array, Array], Array]] = {
    "full": lambda best, written, limit, penalty: jnp.full_like(best, -jnp.inf),
    "unlikely": lambda best, written, limit, penalty: _normalized(best, written, penalty),
    "impossible": lambda best, written, limit, penalty: _normalized(
        best, jnp.where(penalty > 0, limit, written), penalty
    ),
}


@flax.struct.dataclass
class Settings:
    """What is asked of a search; values, so that changing them compiles nothing.

    Attributes:
      rules: which tokens may come.
      limit: most tokens of a hypothesis.
      penalty: the power of the length that scores are divided by.
      stop_when: number of an entry of `STOPPING`.
    """

    rules: Rules
    limit: Int[Array, ""]
    penalty: Float[Array, ""]
    stop_when: Int[Array, ""]


@flax.struct.dataclass
class Hypotheses:
    """Where a search stands.

    Attributes:
      written: tokens of every beam so far.
      scores, tokens: of the beams, likeliest first; scores are sums of log-probabilities.
      ended_scores, ended_tokens, ended_lengths: the best that have ended, by score over length**penalty;
        -inf where there are fewer than K. Lengths count the end token, which is among the tokens.
      done: inputs for which nothing better is looked for.
    """

    written: Int[Array, ""]
    scores: Float[Array, "B K"]
    tokens: Int[Array, "B K T"]
    ended_scores: Float[Array, "B K"]
    ended_tokens: Int[Array, "B K T"]
    ended_lengths: Int[Array, "B K"]
    done: Bool[Array, "B"]


def empty(rows: int, beams: int, steps: int) -> Hypotheses:
    """Returns the start: one beam per input with nothing written, the others not begun."""
    tokens = jnp.zeros((rows, beams, steps), jnp.int32)
    return Hypotheses(
        written=jnp.int32(0),
        scores=jnp.full((rows, beams), NEGATIVE, jnp.float32).at[:, 0].set(0.0),
        tokens=tokens,
        ended_scores=jnp.full((rows, beams), -jnp.inf, jnp.float32),
        ended_tokens=tokens,
        ended_lengths=jnp.zeros((rows, beams), jnp.int32),
        done=jnp.zeros((rows,), bool),
    )


def grow(found: Hypotheses, steps: int) -> Hypotheses:
    """Returns the same with room for `steps` tokens in all."""
    more = ((0, 0), (0, 0), (0, steps - found.tokens.shape[2]))
    return found.replace(tokens=jnp.pad(found.tokens, more), ended_tokens=jnp.pad(found.ended_tokens, more))


def advance(
    found: Hypotheses, logits: Float[Array, "B b V"], settings: Settings
) -> tuple[Hypotheses, Int[Array, "B K"]]:
    """Writes one token more, chosen from `logits`; returns the new state and the beam that each beam continues."""
    beams, written, rules = found.scores.shape[1], found.written + 1, settings.rules
    scores, parents, tokens = _candidates(logits, found.scores[:, : logits.shape[1]], 2 * beams, rules, found.written)
    ends = (scores > _DEAD) & ((tokens == rules.end) | (written >= settings.limit))
    texts = jnp.take_along_axis(found.tokens, parents[..., None], axis=1)
    texts = jax.lax.dynamic_update_slice_in_dim(texts, tokens[..., None], found.written, axis=2)

    ended = _ended(found, scores[:, :beams], ends[:, :beams], texts[:, :beams], written, settings.penalty)
    going, chosen = top_k(jnp.where(ends, NEGATIVE, scores), beams)
    parents = jnp.take_along_axis(parents, chosen, axis=1)
    texts = jnp.take_along_axis(texts, chosen[..., None], axis=1)
    found = ended.replace(written=written, scores=going, tokens=texts)
    return found.replace(done=found.done | (written >= settings.limit) | _settled(found, settings)), parents


def _candidates(
    logits: Array, scores: Array, count: int, rules: Rules, written: Array
) -> tuple[Float[Array, "B C"], Int[Array, "B C"], Int[Array, "B C"]]:
    """Returns (score, beam, token) of the likeliest continuations, padded with impossible ones if there are fewer."""
    # Padded at once, so that every later pass goes over whole blocks.
    logits = jnp.pad(logits, ((0, 0), (0, 0), (0, -logits.shape[2] % BLOCK)), constant_values=NEGATIVE)
    rows, _, vocabulary = logits.shape
    chances = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    flat = (rules.allow(chances, written) + scores[..., None]).reshape(rows, -1)
    best, places = top_k_by_blocks(flat, min(count, flat.shape[1]))
    more = ((0, 0), (0, count - best.shape[1]))
    best, places = jnp.pad(best, more, constant_values=NEGATIVE), jnp.pad(places, more)
    return best, places // vocabulary, places % vocabulary


def _ended(found: Hypotheses, scores: Array, ends: Array, texts: Array, written: Array, penalty: Array) -> Hypotheses:
    """Returns the state with what ends now among the ended, as far as it is better; inputs that are done stay."""
    normalized = jnp.where(ends & ~found.done[:, None], _normalized(scores, written, penalty), -jnp.inf)
    best, chosen = top_k(jnp.concatenate([found.ended_scores, normalized], axis=1), scores.shape[1])
    both = jnp.concatenate([found.ended_tokens, texts], axis=1)
    lengths = jnp.concatenate([found.ended_lengths, jnp.full(scores.shape, written)], axis=1)
    return found.replace(
        ended_scores=best,
        ended_tokens=jnp.take_along_axis(both, chosen[..., None], axis=1),
        ended_lengths=jnp.take_along_axis(lengths, chosen, axis=1),
    )


def _settled(found: Hypotheses, settings: Settings) -> Bool[Array, "B"]:
    """Whether an input has no beam left, or K that have ended and, by the rule, nothing better to hope for."""
    best, worst = found.scores[:, 0], found.ended_scores[:, -1]
    bounds = [bound(best, found.written, settings.limit, settings.penalty) for bound in STOPPING.values()]
    hopeless = jnp.stack(bounds)[settings.stop_when] <= worst
    return (hopeless & (worst > -jnp.inf)) | (best <= _DEAD)


def _normalized(score: Array, length: Array, penalty: Array) -> Array:
    return score / jnp.power(length.astype(jnp.float32), penalty)
