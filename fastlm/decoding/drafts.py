"""What proposes tokens in speculative decoding: a smaller model, or the text so far.

A draft is a hashable value; its weights and its state are passed in and out. See `speculative`.

Dims: B batch, K span, V vocab, S slots of a history.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastlm.decoding import inputs
from fastlm.decoding.inputs import Inputs
from fastlm.models import Model
from fastlm.models import attention as attention_kinds
from fastlm.ops.caches import Cache


@flax.struct.dataclass
class Proposal:
    """Tokens that may come next, and how likely each was to be proposed.

    Attributes:
      probabilities: of every token at each place; None where the proposed one was certain.
    """

    tokens: Int[Array, "B K"]
    probabilities: Float[Array, "B K V"] | None


# From logits [B, V] and a place to tokens [B] and probabilities [B, V], by the rules and the sampling asked for.
Choose = Callable[[Array, Array], tuple[Array, Array]]


class Draft(Protocol):
    """What proposes; a hashable value, its weights are passed in."""

    def begin(self, weights: Any, batch: Inputs, slots: int) -> Any:
        """Returns its state behind the inputs; the last token of each prompt is still to come."""

    def propose(
        self, weights: Any, state: Any, last: Int[Array, "B"], span: int, choose: Choose
    ) -> tuple[Any, Proposal]:
        """Returns its state behind `last` and the proposals, and these."""

    def keep(self, weights: Any, before: Any, after: Any, read: Int[Array, "B K1"], kept: Int[Array, "B"]) -> Any:
        """Returns its state behind the first `kept` tokens of `read`, which are the last one and the proposals.

        Args:
          before, after: its states before and after it proposed.
        """


@dataclasses.dataclass(frozen=True)
class ModelDraft:
    """A smaller model of the same vocabulary."""

    model: Model

    def begin(self, weights: Any, batch: Inputs, slots: int) -> Cache:
        """See `Draft`."""
        return before_last(self.model, weights, batch, slots)

    def propose(self, weights: Any, state: Cache, last: Array, span: int, choose: Choose) -> tuple[Cache, Proposal]:
        """See `Draft`."""

        def step(carry, place):
            cache, token = carry
            hidden, aux = self.model.features(weights, token[:, None], cache=cache)
            token, chances = choose(self.model.head(weights, hidden[:, 0]), place)
            return (aux["cache"], token), (token, chances)

        (after, _), (tokens, chances) = jax.lax.scan(step, (state, last), jnp.arange(span))
        return after, Proposal(tokens.T, jnp.moveaxis(chances, 0, 1))

    def keep(self, weights: Any, before: Cache, after: Cache, read: Array, kept: Array) -> Cache:
        """See `Draft`; the last proposal has not been read yet, and may be kept."""
        if rewinds(self.model):
            _, aux = self.model.features(weights, read[:, -1:], cache=after)
            return aux["cache"].replace(length=before.length + kept)
        _, aux = self.model.features(weights, read, cache=before, lengths=kept)
        return aux["cache"]


@flax.struct.dataclass
class History:
    """Tokens that were read and written, from slot 0, and how many."""

    tokens: Int[Array, "B S"]
    length: Int[Array, "B"]


@dataclasses.dataclass(frozen=True)
class LookupDraft:
    """What followed the last `match` tokens (or fewer) when they stood there last."""

    match: int = 3

    def begin(self, weights: Any, batch: Inputs, slots: int) -> History:
        """See `Draft`; an encoder-decoder's source stands before what is written."""
        del weights
        tokens, lengths = batch.prompts, batch.lengths - 1
        if batch.sources is not None:
            sources = jnp.sum(batch.segments > 0, axis=1)
            tokens, lengths = batch.sources, sources + lengths
        room = slots + (0 if batch.sources is None else batch.sources.shape[1])
        return History(jnp.pad(tokens, ((0, 0), (0, room - tokens.shape[1]))), lengths)

    def propose(self, weights: Any, state: History, last: Array, span: int, choose: Choose) -> tuple[History, Proposal]:
        """See `Draft`."""
        del weights, choose
        known = put(state.tokens, last[:, None], state.length)
        length = state.length + 1
        place = jnp.arange(known.shape[1])
        # How many tokens before slot s (at most `match`) are those before the end: more is better, and later is.
        same = jnp.ones(known.shape, bool)
        agreeing = jnp.zeros(known.shape, jnp.int32)
        for back in range(1, self.match + 1):
            token = jnp.take_along_axis(known, jnp.maximum(length - back, 0)[:, None], axis=1)
            same &= (jnp.roll(known, back, axis=1) == token) & (place >= back) & (length[:, None] >= back)
            agreeing += same
        score = jnp.where(place < length[:, None], agreeing * known.shape[1] + place, -1)
        found = jnp.argmax(jnp.where(agreeing > 0, score, -1), axis=1)
        ahead = found[:, None] + jnp.arange(span)
        # What would lie beyond the end repeats the stretch between, as a text does that goes in a circle.
        period = jnp.maximum(length - found, 1)[:, None]
        ahead = jnp.where(ahead < length[:, None], ahead, found[:, None] + (ahead - found[:, None]) % period)
        return History(known, length), Proposal(jnp.take_along_axis(known, ahead, axis=1), None)

    def keep(self, weights: Any, before: History, after: History, read: Array, kept: Array) -> History:
        """See `Draft`."""
        del weights
        return History(put(after.tokens, read, before.length), before.length + kept)


def rewinds(model: Model) -> bool:
    """Whether the model's cache forgets its last tokens by its length alone."""
    kinds = [attention_kinds.kind(model.cfg.layer(i).attention) for i in model.cfg.stack]
    return all(kind.rewinds for kind in kinds)


def before_last(model: Model, params: Any, batch: Inputs, slots: int) -> Cache:
    """Returns the cache behind all of each prompt but its last token."""
    cache, memory = inputs.begin(model, params, slots, batch)
    _, aux = model.features(params, batch.prompts, memory=memory, cache=cache, lengths=batch.lengths - 1, empty=True)
    return aux["cache"]


def put(old: Int[Array, "B S"], new: Int[Array, "B n"], at: Int[Array, "B"]) -> Int[Array, "B S"]:
    """Returns rows with new tokens from their places on."""
    return jax.vmap(lambda row, more, place: jax.lax.dynamic_update_slice(row, more, (place,)))(old, new, at)
