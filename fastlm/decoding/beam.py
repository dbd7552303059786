"""Beam search: the likeliest continuations of prompts, or targets of sources, many inputs at once.

Notable: every input is encoded or prefilled once, and its beams share that (`tree`); the loop stays on the
device until all inputs are done, interrupted only when its arrays double (32 steps at first), so that
short outputs never pay for the longest that were allowed, and a bound of any size compiles few programs.
What one step decides is in `hypotheses`.
Papers: length normalization arXiv 1609.08144; forms of stopping 2204.05424.
Left out: the coverage penalty, diverse and sampled beams, repeated n-gram bans, a forced last token.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fastlm.decoding import hypotheses, inputs, tree
from fastlm.decoding import rules as token_rules
from fastlm.decoding.hypotheses import STOPPING, Hypotheses, Settings
from fastlm.decoding.inputs import Inputs
from fastlm.decoding.tree import Tree
from fastlm.errors import UserError, nearest
from fastlm.models import Model
from fastlm.parallel.rules import constrain

FIRST_STEPS = 32


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A continuation that was found.

    Attributes:
      tokens: what was written, without prompt and end token.
      score: summed log-probability (of the end token too) / length**length_penalty.
      ended: whether it came to its end token, and not only to `max_tokens`.
    """

    tokens: tuple[int, ...]
    score: float
    ended: bool


def search(
    model: Model,
    params: Any,
    rows: inputs.Rows,
    *,
    max_tokens: int,
    beams: int = 4,
    n_best: int = 1,
    length_penalty: float = 1.0,
    stop_when: str = "unlikely",
    start: int | None = None,
    end: int | None = None,
    **rules: Any,
) -> list[list[Hypothesis]]:
    """Returns the best hypotheses of each input, best first.

    Args:
      rows: prompts of a decoder, or sources of an encoder-decoder.
      max_tokens: most tokens of a hypothesis, the end token counted.
      beams: hypotheses followed at once. One is greedy search (unless `stop_when` is "impossible").
      n_best: hypotheses returned per input; fewer where there are not so many.
      length_penalty: scores are divided by length**this; 0 compares sums, more than 0 likes length.
        The length counts what was written and the end token, not the prompt.
      stop_when: an input is done when `beams` hypotheses have ended and ... "full": just that. "unlikely": the best
        beam would be no better than the worst of them if it ended as long as it is now. "impossible": nor
        at whatever length favours it most, which loses nothing. (Hugging Face's early_stopping True, False, "never".)
      start: the token that an encoder-decoder's decoder begins with.
      end: the token that ends a hypothesis; None if nothing does.
      rules: `min_tokens`, `forbidden` and `forced_first`, as `rules.make` takes them.

    Raises:
      UserError: inputs or rules that `inputs.make` or `rules.make` refuses, settings out of their range, or
        an attention kind that cannot keep beams apart, or a model whose scores are no numbers.
    """
    _check(beams, n_best, length_penalty, stop_when)
    batch = inputs.make(model.cfg, rows, start, max_tokens)
    allowed = token_rules.make(model.cfg.vocab_size, max_tokens, end=end, **rules)
    form = list(STOPPING).index(stop_when)
    settings = Settings(allowed, np.int32(max_tokens), np.float32(length_penalty), np.int32(form))
    best = _read(run(model, params, batch, beams, settings), n_best, end)
    if not all(best):
        raise UserError("the model's scores are no numbers; its weights are broken, or too large for this compute type")
    return best


@functools.singledispatch
def run(model: Model, params: Any, batch: Inputs, beams: int, settings: Settings) -> Hypotheses:
    """Returns where the search ends. What runs models otherwise registers how it does this.

    Raises:
      UserError: what runs the model cannot keep its beams apart.
    """
    check(model)
    steps = min(inputs.bucket(int(settings.limit)), FIRST_STEPS)
    found, grown, done = _begin(model, params, beams, steps, batch, settings)
    while not bool(done):
        if int(found.written) == steps:
            steps *= 2
        found, grown, done = _go_on(model, params, steps, found, grown, settings)
    return found


def check(model: Model) -> None:
    """Raises a `UserError` unless what all layers that write keep can be that of a search."""
    inputs.check_kinds(model.cfg)
    tree.check(model.cfg)
    if model.compute.cache_dtype:
        raise UserError(f"cache_dtype: a search keeps caches whole, not in {model.compute.cache_dtype}; leave it out")


State = tuple[Hypotheses, Tree, Array]


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _begin(model: Model, params: Any, beams: int, steps: int, batch: Inputs, settings: Settings) -> State:
    """Reads the inputs and writes the first token."""
    rows, longest = batch.prompts.shape
    cache, logits = inputs.prefill(model, params, longest, batch)
    found, grown = hypotheses.empty(rows, beams, steps), tree.plant(cache, beams, steps)
    return _readable(_chosen(found, grown, logits[:, None], settings))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _go_on(model: Model, params: Any, steps: int, found: Hypotheses, grown: Tree, settings: Settings) -> State:
    """Writes until all inputs are done or `steps` tokens are written."""

    def more(state: State) -> Array:
        return ~state[2] & (state[0].written < steps)

    def body(state: State) -> State:
        found, grown, _ = state
        last = found.written - 1
        tokens = jax.lax.dynamic_index_in_dim(found.tokens, last, axis=2, keepdims=False)
        hidden, grown = tree.advance(model, params, grown, tokens, last)
        return _chosen(found, grown, model.head(params, hidden), settings)

    state = (hypotheses.grow(found, steps), tree.grow(grown, steps), jnp.bool(False))
    return _readable(jax.lax.while_loop(more, body, state))


def _chosen(found: Hypotheses, grown: Tree, logits: Float[Array, "B b V"], settings: Settings) -> State:
    found, parents = hypotheses.advance(found, logits, settings)
    return found, tree.follow(grown, parents), jnp.all(found.done)


def _readable(state: State) -> State:
    """Has every process hold all hypotheses: each reads them, and all must leave the loop together."""
    found, grown, done = state
    found, done = jax.tree.map(lambda x: constrain(x, (None,) * x.ndim), (found, done))
    return found, grown, done


def _read(found: Hypotheses, n_best: int, end: int | None) -> list[list[Hypothesis]]:
    scores, lengths = np.asarray(found.ended_scores), np.asarray(found.ended_lengths)
    tokens: Int[np.ndarray, "B K T"] = np.asarray(found.ended_tokens)

    def one(row: int, rank: int) -> Hypothesis:
        text = tokens[row, rank, : lengths[row, rank]].tolist()
        ended = text[-1] == end
        return Hypothesis(tuple(text[:-1] if ended else text), float(scores[row, rank]), ended)

    ranks = range(min(n_best, scores.shape[1]))
    return [[one(row, k) for k in ranks if np.isfinite(scores[row, k])] for row in range(len(scores))]


def _check(beams: int, n_best: int, length_penalty: float, stop_when: str) -> None:
    if beams < 1:
        raise UserError(f"beams: must be at least 1, got {beams}")
    if not 1 <= n_best <= beams:
        raise UserError(f"n_best: must lie between 1 and the number of beams ({beams}), got {n_best}")
    if not math.isfinite(length_penalty):
        raise UserError(f"length_penalty: must be a number, got {length_penalty}")
    if stop_when not in STOPPING:
        raise UserError(
            f"stop_when: unknown '{stop_when}'{nearest(stop_when, STOPPING)}; one of: {', '.join(STOPPING)}"
        )
