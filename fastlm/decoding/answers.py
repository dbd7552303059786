"""What benchmarks ask a language model, in texts: likelihoods of continuations, and continuations.

The conventions are those of lm-evaluation-harness, whose adapter is `fastlm.harness`: a space between
context and continuation belongs to the continuation; a text alone is scored after the start token. What does not
fit the model's context is cut, and how much of what was asked that concerns is logged.
Left out: encoder-decoders, and batches of continuations.
"""

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastlm.data.tokenizers import Tokenizer
from fastlm.decoding import sample
from fastlm.decoding.likelihood import likelihoods, windows
from fastlm.errors import UserError
from fastlm.models import Model

_logger = logging.getLogger(__name__)

DEFAULT_TOKENS = 256
MOST_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names that tasks have for how many tokens are wanted; the first that is given counts."""


class Answers:
    """A language model that is asked in texts; see the header."""

    def __init__(self, model: Model, params: Any, tokenizer: Tokenizer, batch_size: int = 8) -> None:
        """Takes a model that sees what stands before a token only.

        Raises:
          UserError: another family than a decoder, or another head than a language model's.
        """
        cfg = model.cfg
        if cfg.family != "decoder" or cfg.head != "language_model":
            raise UserError(
                f"the model is of family '{cfg.family}' with head '{cfg.head}', which has no likelihoods of "
                "continuations; these benchmarks need a decoder with head 'language_model'"
            )
        self._asked = itertools.count()
        self.model, self.params, self.tokenizer, self.batch_size = model, params, tokenizer, batch_size
        self.start = self.tokenizer.eos if self.tokenizer.bos is None else self.tokenizer.bos

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Returns (log-probability in nats, greedy) of each (context, continuation)."""
        encoded = [self._pair(context, continuation) for context, continuation in pairs]
        found = likelihoods(self.model, self.params, encoded, batch_size=self.batch_size)
        return [(one.log_probability, one.greedy) for one in found]

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Returns the log-probability of each text, in windows as long as the model's context."""
        parts = [windows(self._ids(text), self.start, self.model.cfg.max_length) for text in texts]
        found = likelihoods(self.model, self.params, [p for part in parts for p in part], batch_size=self.batch_size)
        scores = iter(found)
        return [sum(next(scores).log_probability for _ in part) for part in parts]

    def generate(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Continues each (prompt, options) up to a stop text (`until`) or as many tokens as are wanted.

        Greedily, unless `do_sample` or a temperature asks for drawing: then from a seed that counts what this object
        was ever asked, so the same prompt asked again is drawn anew, and a whole evaluation gives the same again.
        """
        prompts = [sample.prompt_ids(self.tokenizer, prompt) or [self.start] for prompt, _ in requests]
        wanted = [_most_tokens(options) for _, options in requests]
        fitted = [self._fit(*pair) for pair in zip(prompts, wanted)]
        cut = sum(len(ids) < len(prompt) for prompt, (ids, _) in zip(prompts, fitted))
        limited = sum(tokens < most for most, (_, tokens) in zip(wanted, fitted))
        if cut or limited:
            _logger.warning(
                "of %d prompts %d are cut at their beginning, and the answers to %d limited to fewer tokens than "
                "wanted: the model's context is %d tokens (model.max_length)",
                *(len(requests), cut, limited, self.model.cfg.max_length),
            )
        return [self._continue(*pair, options) for pair, (_, options) in zip(fitted, requests)]

    def _fit(self, prompt: list[int], wanted: int) -> tuple[list[int], int]:
        """Returns the prompt and how many tokens come behind it; each may claim half of the context."""
        context = self.model.cfg.max_length
        tokens = min(wanted, max(context - len(prompt), context // 2))
        return prompt[-(context - tokens) :], tokens

    def _continue(self, prompt: list[int], tokens: int, options: Mapping[str, Any]) -> str:
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        seed, how, text = next(self._asked), _sampling(options), ""
        chunks = sample.generate(self.model, self.params, [prompt], max_tokens=tokens, how=how, seed=seed)
        for piece in sample.stream(self.tokenizer, chunks):
            text += piece
            places = [text.find(stop) for stop in stops if stop in text]
            if places:
                return text[: min(places)]
        return text

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        # Spaces belong to the word that follows them, as the tokenizer saw them in training.
        stripped = context.rstrip()
        continuation, context = context[len(stripped) :] + continuation, stripped
        before, whole = self._ids(context), self._ids(context + continuation)
        return [self.start, *before], whole[len(before) :]

    def _ids(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer.encode(text)]


def _most_tokens(options: Mapping[str, Any]) -> int:
    return int(next((options[name] for name in MOST_TOKENS if name in options), DEFAULT_TOKENS))


def _sampling(options: Mapping[str, Any]) -> sample.Sampling:
    if not options.get("do_sample", float(options.get("temperature", 0)) > 0):
        return sample.Sampling(temperature=0.0)
    numbers = {"temperature": float, "top_k": int, "top_p": float}
    return sample.Sampling(**{name: number(options[name]) for name, number in numbers.items() if name in options})
