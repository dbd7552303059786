"""What benchmarks ask a language model, in texts: likelihoods of continuations, and continuations.

The conventions are those of lm-evaluation-harness, whose adapter is `fastlm.harness`: a space between
context and continuation belongs to the continuation; a text alone is scored after the start token.
"""

from collections.abc import Sequence
from typing import Any

from fastlm.data.tokenizers import Tokenizer
from fastlm.decoding import sample
from fastlm.decoding.likelihood import likelihoods, windows
from fastlm.models import Model

DEFAULT_TOKENS = 256


class Answers:
    """A language model that is asked in texts; see the header."""

    def __init__(self, model: Model, params: Any, tokenizer: Tokenizer, batch_size: int = 8) -> None:
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

    def generate(self, prompt: str, options: dict[str, Any]) -> str:
        """Continues a prompt up to a stop text or `max_gen_toks` tokens, greedily unless `do_sample`."""
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        wanted = int(options.get("max_gen_toks", DEFAULT_TOKENS))
        temperature = float(options.get("temperature", 1.0)) if options.get("do_sample") else 0.0
        context = self.model.cfg.max_length
        tokens = min(wanted, context // 2)
        ids = sample.prompt_ids(self.tokenizer, prompt)[-(context - tokens) :] or [self.start]
        how = sample.Sampling(temperature=temperature, top_p=float(options.get("top_p", 1.0)))
        text = ""
        for piece in sample.stream(
            self.tokenizer, sample.generate(self.model, self.params, [ids], max_tokens=tokens, how=how)
        ):
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
