"""Speculative decoding: a cheap draft proposes a few tokens, the model reads them at once and keeps what it agrees to.

    accept x_i with probability min(1, p_i(x_i) / q_i(x_i)); behind the first refusal draw from max(p - q, 0)

so what is written has exactly the model's own distribution, and greedily it is the model's own text (up to ties that
products of another shape break differently). One reading of span + 1 tokens costs a memory-bound model about what one
token does; the gain is the number of tokens that come out of it.
Drafts: a smaller model of the same vocabulary (`ModelDraft`), or what followed the last few tokens when they stood
there before, in the prompt, the source or what was written (`LookupDraft`), which costs nothing.
Notable: rows of a batch go on at their own pace, each with its own keys. Caches that keep tokens by slot are rewound by
their length alone; others (states, windows) are read again from before the proposals, up to what was kept.
Papers: arXiv 2211.17192 and 2302.01318; look-up: 2304.04487 and Saxena's prompt lookup decoding (2023).
Left out: trees of proposals, drafts that read the model's hidden states.

Dims: B batch, K span, V vocab, S slots of a history.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fastlm.decoding import inputs
from fastlm.decoding import rules as token_rules
from fastlm.decoding.drafts import Draft, ModelDraft, Proposal, before_last, put, rewinds
from fastlm.decoding.inputs import Inputs
from fastlm.decoding.rules import NEGATIVE, Rules
from fastlm.decoding.sample import Sampling, filtered, row_keys
from fastlm.errors import UserError
from fastlm.models import Model
from fastlm.ops.caches import Cache
from fastlm.parallel.rules import constrain

ROUNDS = 4  # between two looks of the host


@flax.struct.dataclass
class State:
    """Where a search stands.

    Attributes:
      cache, draft: of the model and its draft, behind everything but `last`.
      last: the latest token of each row.
      written: tokens of each row so far.
      tokens: these, with room behind them.
      ended: rows that wrote an end token.
      rounds, kept: readings of unfinished rows, and tokens that these gave.
    """

    cache: Cache
    draft: Any
    last: Int[Array, "B"]
    written: Int[Array, "B"]
    tokens: Int[Array, "B M"]
    ended: Bool[Array, "B"]
    rounds: Int[Array, ""]
    kept: Int[Array, ""]


@flax.struct.dataclass
class Asked:
    """What is asked of a search, as values: rules, most tokens, tokens that end a row, a key for each row."""

    rules: Rules
    limit: Int[Array, ""]
    ends: Int[Array, "E"]
    keys: Array


class Speculation:
    """An iterator of lists of new tokens, one array for each row, until all rows are done."""

    def __init__(self, chunks: Iterator[list[np.ndarray]]) -> None:
        """Takes what `generate` makes."""
        self._chunks = chunks
        self.rounds = self.kept = 0

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        """Yields, counting."""
        for chunk, rounds, kept in self._chunks:
            self.rounds, self.kept = rounds, kept
            yield chunk

    @property
    def tokens_per_reading(self) -> float:
        """How many tokens one reading of the model gave on average: 1 without a draft, at most span + 1."""
        return self.kept / max(self.rounds, 1)


def generate(
    model: Model,
    params: Any,
    draft: Draft,
    draft_weights: Any,
    rows: inputs.Rows,
    *,
    max_tokens: int,
    how: Sampling = Sampling(),
    seed: int = 0,
    first: int = 0,
    span: int = 4,
    start: int | None = None,
    ends: Sequence[int] = (),
    **rules: Any,
) -> Speculation:
    """Returns the new tokens of each row, as `sample.generate` would draw them, in chunks of a few readings.

    Args:
      draft, draft_weights: what proposes, and its parameters.
      span: K, tokens proposed at a time.
      ends: tokens behind which a row is done; what follows them in a chunk means nothing.
      rows, first, start, rules: as of `sample.generate`.

    Raises:
      UserError: inputs or rules that cannot be; a draft of another vocabulary or too short a context; at the call.
    """
    if span < 1:
        raise UserError(f"span: must be at least 1, got {span}")
    check_draft(model, draft, max_tokens, rows)
    batch = inputs.make(model.cfg, rows, start, max_tokens)
    slots = inputs.bucket(max(batch.prompts.shape[1], int(batch.lengths.max()) + max_tokens + 2 * span + 2))
    asked = Asked(
        rules=token_rules.make(model.cfg.vocab_size, max_tokens, **rules),
        limit=np.int32(max_tokens),
        ends=np.array(list(ends) or [-1], np.int32),
        keys=row_keys(seed, range(first, first + len(rows))),
    )
    room = inputs.bucket(max_tokens + 2 * span + 2)
    return Speculation(_rounds(model, params, draft, draft_weights, batch, slots, room, how, span, asked))


def check_draft(model: Model, draft: Draft, max_tokens: int, rows: inputs.Rows) -> None:
    """Raises a `UserError` unless the draft can go where the model goes."""
    if not isinstance(draft, ModelDraft):
        return
    cfg, own = draft.model.cfg, model.cfg
    if cfg.vocab_size != own.vocab_size:
        raise UserError(
            f"draft: has a vocabulary of {cfg.vocab_size}, the model one of {own.vocab_size}; "
            "a draft needs the model's own tokenizer"
        )
    if cfg.family != own.family:
        raise UserError(f"draft: is of family '{cfg.family}', the model of '{own.family}'; take one of the same")
    longest = max_tokens + (max(map(len, rows), default=0) if own.family == "decoder" else 1)
    if longest > cfg.max_length:
        raise UserError(f"draft: its context is {cfg.max_length} tokens, and {longest} are needed; write fewer")
    inputs.check_kinds(cfg)


def _rounds(model, params, draft, draft_weights, batch, slots, room, how, span, asked):
    state = _begin(model, params, draft, draft_weights, slots, room, batch)
    shown = np.zeros(len(batch.lengths), np.int32)
    while True:
        state = _go_on(model, params, draft, draft_weights, span, how, asked, state)
        tokens, written, ended, rounds, kept = jax.device_get(
            (state.tokens, state.written, state.ended, state.rounds, state.kept)
        )
        written = np.minimum(written, asked.limit)
        yield [row[begin:end] for row, begin, end in zip(tokens, shown, written)], int(rounds), int(kept)
        shown = written
        if (ended | (written >= asked.limit)).all():
            return


@functools.partial(jax.jit, static_argnums=(0, 2, 4, 5))
def _begin(model: Model, params: Any, draft: Draft, draft_weights: Any, slots: int, room: int, batch: Inputs) -> State:
    """Reads the inputs, all but the last token of each prompt."""
    rows = batch.prompts.shape[0]
    last = jnp.take_along_axis(batch.prompts, (batch.lengths - 1)[:, None], axis=1)[:, 0]
    zero = jnp.zeros((rows,), jnp.int32)
    return State(
        cache=before_last(model, params, batch, slots),
        draft=draft.begin(draft_weights, batch, slots),
        last=jnp.asarray(last, jnp.int32),
        written=zero,
        tokens=jnp.zeros((rows, room), jnp.int32),
        ended=zero > 0,
        rounds=jnp.int32(0),
        kept=jnp.int32(0),
    )


@functools.partial(jax.jit, static_argnums=(0, 2, 4, 5), donate_argnums=(7,))
def _go_on(
    model: Model, params: Any, draft: Draft, draft_weights: Any, span: int, how: Sampling, asked: Asked, state: State
) -> State:
    """Runs up to `ROUNDS` readings, fewer if all rows are done."""

    def going(state: State) -> Array:
        return ~state.ended & (state.written < asked.limit)

    def more(carry: tuple[Array, State]) -> Array:
        return (carry[0] < ROUNDS) & jnp.any(going(carry[1]))

    def body(carry: tuple[Array, State]) -> tuple[Array, State]:
        count, state = carry
        return count + 1, _round(model, params, draft, draft_weights, span, how, asked, state, going(state))

    _, state = jax.lax.while_loop(more, body, (jnp.int32(0), state))
    whole = lambda x: constrain(x, (None,) * x.ndim)  # on every process, which all read these
    return state.replace(**{name: whole(getattr(state, name)) for name in ("tokens", "written", "ended")})


def _round(model, params, draft, draft_weights, span, how, asked, state: State, going: Array) -> State:
    """One reading: propose, read, keep."""
    keys = jax.vmap(jax.random.fold_in)(asked.keys, state.written)
    purpose = lambda number: jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)

    def choose(logits, place):
        chances = distribution(logits, asked.rules, state.written + place, how)
        if how.temperature == 0:
            return jnp.argmax(chances, axis=-1).astype(jnp.int32), chances
        own = jax.vmap(lambda key: jax.random.fold_in(key, place))(purpose(0))
        return jax.vmap(jax.random.categorical)(own, jnp.log(chances)).astype(jnp.int32), chances

    drafted, proposal = draft.propose(draft_weights, state.draft, state.last, span, choose)
    read = jnp.concatenate([state.last[:, None], proposal.tokens], axis=1)
    hidden, aux = model.features(params, read, cache=state.cache)
    places = state.written[:, None] + jnp.arange(span + 1)
    wanted = distribution(model.head(params, hidden), asked.rules, places, how)
    accepted, following = verdict(proposal, wanted, purpose(1), purpose(2))
    kept = jnp.where(going, accepted + 1, 0)  # tokens of `read` that stay, and as many new ones behind them
    if rewinds(model):
        cache = aux["cache"].replace(length=state.cache.length + kept)
    else:
        _, aux = model.features(params, read, cache=state.cache, lengths=kept)
        cache = aux["cache"]
    proposed = jnp.pad(proposal.tokens, ((0, 0), (0, 1)))
    new = jnp.where(jnp.arange(span + 1) < accepted[:, None], proposed, following[:, None])
    is_new = jnp.arange(span + 1) < kept[:, None]
    return State(
        cache=cache,
        draft=draft.keep(draft_weights, state.draft, drafted, read, kept),
        last=jnp.where(going, following, state.last),
        written=state.written + kept,
        tokens=put(state.tokens, jnp.where(is_new, new, 0), state.written),
        ended=state.ended | jnp.any(is_new & jnp.isin(new, asked.ends), axis=1),
        rounds=state.rounds + jnp.sum(going),
        kept=state.kept + jnp.sum(kept),
    )


def distribution(logits: Float[Array, "... V"], rules: Rules, places: Array, how: Sampling) -> Float[Array, "... V"]:
    """Returns the probabilities that tokens are drawn with behind `places` written ones; all on one if greedy."""
    allow = rules.allow
    for _ in places.shape:
        allow = jax.vmap(allow)
    allowed = allow(logits, places)
    if how.temperature == 0:
        return jax.nn.one_hot(jnp.argmax(allowed, axis=-1), logits.shape[-1])
    return jax.nn.softmax(filtered(allowed, how), axis=-1)


def verdict(
    proposal: Proposal, wanted: Float[Array, "B K1 V"], accept_keys: Array, draw_keys: Array
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Returns how many proposals are accepted, and the token that follows them.

    Args:
      wanted: what the model draws from at each of K + 1 places.
      accept_keys, draw_keys: a random key for each row.
    """
    span, vocabulary = proposal.tokens.shape[1], wanted.shape[-1]
    likely = proposal.probabilities
    if likely is None:
        likely = jax.nn.one_hot(proposal.tokens, vocabulary)
    at = lambda chances: jnp.take_along_axis(chances, proposal.tokens[..., None], axis=2)[..., 0]
    draws = jax.vmap(lambda key: jax.random.uniform(key, (span,)))(accept_keys)
    agreed = draws * at(likely) < at(wanted[:, :span])
    accepted = jnp.sum(jnp.cumprod(agreed, axis=1), axis=1)
    rest = jnp.maximum(wanted - jnp.pad(likely, ((0, 0), (0, 1), (0, 0))), 0.0)
    rest = jnp.take_along_axis(rest, accepted[:, None, None], axis=1)[:, 0]
    # Nothing is left only where rounding refused what had the same probability on both sides.
    own = jnp.take_along_axis(wanted, accepted[:, None, None], axis=1)[:, 0]
    rest = jnp.where(jnp.sum(rest, axis=-1, keepdims=True) > 0, rest, own)
    logits = jnp.where(rest > 0, jnp.log(jnp.maximum(rest, 1e-38)), NEGATIVE)
    return accepted, jax.vmap(jax.random.categorical)(draw_keys, logits).astype(jnp.int32)
