"""From one text to another: translation, summaries, code from its description.

Notable: an encoder-decoder reads the source with its encoder, between the special tokens that its tokenizer puts
around a text (T5: `text </s>`, BART: `<s> text </s>`), or before an end; a decoder reads source and target as one
text and is scored on the target only, so both families do the same tasks. Training forces the right
past (teacher forcing); the final score writes its own, with beam search, and is compared with
BLEU and chrF, ROUGE, or exact equality, each with a standard error. Papers: arXiv 1706.03762; label
smoothing 1512.00567. Over-long sources and targets are cut; how many were is logged at every start.

Dims: B batch, S source time, T target time.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fastlm.data.bucketing import Encode
from fastlm.data.encoded import CUT
from fastlm.data.examples import Row
from fastlm.data.settings import Data, Evaluation
from fastlm.data.tokenizers import Tokenizer
from fastlm.data.tokenizers.layout import Layout, opened_and_closed
from fastlm.decoding import beam, sample
from fastlm.errors import UserError, nearest
from fastlm.measurement import statistics, text_scores
from fastlm.models import Model, ModelConfig
from fastlm.ops.chunked_loss import MASK
from fastlm.ops.cross_entropy import TARGETS, CrossEntropy
from fastlm.tasks.kind import Scored, Trained
from fastlm.tasks.language_modeling import per_token, token_sums
from fastlm.tasks.rows import RowsKind, rows_by_record, segments
from fastlm.tasks.scoring import gather_host
from fastlm.tasks.task import Batch, Read, Task, captured, of_model, through_head
from fastlm.tasks.writing import Writing


def _bleu(said: Sequence[str], wanted: Sequence[str]) -> dict[str, statistics.Estimate]:
    return {"bleu": text_scores.bleu(said, wanted).estimate}


def _chrf(said: Sequence[str], wanted: Sequence[str]) -> dict[str, statistics.Estimate]:
    return {"chrf": text_scores.chrf(said, wanted).estimate}


def _rouge(said: Sequence[str], wanted: Sequence[str]) -> dict[str, statistics.Estimate]:
    return {name: score.estimate for name, score in text_scores.rouge(said, wanted, stemmer=False).items()}


def _exact(said: Sequence[str], wanted: Sequence[str]) -> dict[str, statistics.Estimate]:
    return {"exact": statistics.mean([float(a.strip() == b.strip()) for a, b in zip(said, wanted, strict=True)])}


SCORES: dict[str, Callable[[Sequence[str], Sequence[str]], dict[str, statistics.Estimate]]] = {
    "bleu": _bleu,
    "chrf": _chrf,
    "rouge": _rouge,
    "exact": _exact,
}


@dataclasses.dataclass(frozen=True)
class SequenceToSequence(RowsKind):
    """The kind "sequence_to_sequence".

    Attributes:
      source, target: fields that are read and written.
      prefix: text before every source (T5's "translate English to German: ").
      separator: text between source and target, for a decoder that reads both as one.
      scores: which of `SCORES` the final score computes.
      beams, length_penalty: of the search in the final score; see `decoding.beam`.
      label_smoothing: share of the target spread evenly over the vocabulary.
      start: token that opens the target; -1 for the tokenizer's start token, or its end token where it has none.
      forced_first: token that every written target begins with; -1 leaves that free (BART's start token).
      forbidden: tokens that are never written (padding, where a model was not trained to avoid it).
    """

    source: str = "source"
    target: str = "target"
    prefix: str = ""
    separator: str = ""
    scores: tuple[str, ...] = ("bleu", "chrf")
    beams: int = 4
    length_penalty: float = 1.0
    label_smoothing: float = 0.1
    start: int = -1
    forced_first: int = -1
    forbidden: tuple[int, ...] = ()

    head = "language_model"
    families = ("encoder_decoder", "decoder")

    def __post_init__(self) -> None:
        for name in self.scores:
            if name not in SCORES:
                raise UserError(f"config.task.scores: unknown '{name}'{nearest(name, SCORES)} ({', '.join(SCORES)})")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"config.task.label_smoothing: must lie in [0, 1), got {self.label_smoothing}")
        if self.beams < 1:
            raise UserError(f"config.task.beams: must be at least 1, got {self.beams}")

    @property
    def text_fields(self) -> tuple[str, ...]:
        """Source and target."""
        return (self.source, self.target) if self.target else (self.source,)

    def unlabelled(self) -> "SequenceToSequence":
        """Reads no target."""
        return dataclasses.replace(self, target="")

    def fit(self, cfg: ModelConfig, tokenizer: Tokenizer, data: Data) -> ModelConfig:
        """Checks that lengths go together, too."""
        cfg = super().fit(cfg, tokenizer, data)
        self.check_lengths(cfg, data)
        return cfg

    def check_scoring(self, model: Model) -> None:
        """Checks that the model can be searched."""
        try:
            beam.check(model)
        except UserError as error:
            raise UserError(f"config.task.beams: the final score is a search with {self.beams}; {error}") from None

    def check_lengths(self, cfg: ModelConfig, data: Data) -> None:
        """Raises a `UserError` unless sources fit the model, and a decoder's leave room for a target."""
        longest = data.source_length or (data.length if cfg.family == "encoder_decoder" else max(1, data.length // 2))
        if longest > cfg.max_length:
            raise UserError(
                f"config.data.source_length: {longest} is more than config.model.max_length {cfg.max_length}; lower it"
            )
        if cfg.family == "decoder" and longest >= data.length:
            raise UserError(
                f"config.data.source_length: {longest} leaves no room for a target in config.data.length "
                f"{data.length}, which holds both for a decoder; lower the one or raise the other"
            )

    def texts(self, row: Row) -> tuple[str, str]:
        """Returns the source and the target of a row."""
        return str(row[self.source]), str(row[self.target]) if self.target else ""

    def start_token(self, tokenizer: Tokenizer) -> int:
        """The token that a target begins with, as input."""
        if self.start >= 0:
            return self.start
        return tokenizer.eos if tokenizer.bos is None else tokenizer.bos

    def writing(self, cfg: ModelConfig, tokenizer: Tokenizer) -> Writing:
        """Writes a target for a source."""
        forced = None if self.forced_first < 0 else self.forced_first
        rules = {"forbidden": self.forbidden, "forced_first": forced}
        if cfg.family == "encoder_decoder":
            layout, start = _layout(tokenizer), self.start_token(tokenizer)
            read = lambda text: layout.join([tokenizer.encode(self.prefix + text)])[0]
        else:
            read, start = lambda text: sample.prompt_ids(tokenizer, self.prefix + text + self.separator), None
        return Writing(read, start, (tokenizer.eos,), rules)

    def going_on_from(self, task: Mapping[str, Any]) -> "SequenceToSequence":
        """Takes over with which tokens a text begins and which it never has, where nothing else is said."""
        taken = {}
        for name in ("start", "forced_first", "forbidden"):
            usual = getattr(SequenceToSequence, name)
            if name in task and getattr(self, name) == usual:
                taken[name] = type(usual)(task[name])
        return dataclasses.replace(self, **taken)

    def encoder(self, cfg: ModelConfig, tokenizer: Tokenizer, data: Data) -> Encode:
        """Returns row -> source [S], tokens and targets [T]; of a decoder, tokens, targets and scored [T]."""
        if cfg.family == "encoder_decoder":
            longest, start = data.source_length or data.length, [self.start_token(tokenizer)]
            layout, limit = _layout(tokenizer), f"config.data.{'source_length' if data.source_length else 'length'}"
            # What else opens a text opens a target too, behind the start (BART: </s> <s> text), or is the start.
            opening = [] if start == list(layout.special[0]) else list(layout.special[0])

            def encode(row: Row) -> dict[str, Any]:
                (read, written), cut = self.texts(row), _Cutter()
                source_end = f"sources at their end, to {limit}={longest} tokens"
                source = cut(tokenizer.encode(self.prefix + read), longest - layout.size, source_end)
                target_end = f"targets at their end, to config.data.length={data.length} tokens"
                target = cut(tokenizer.encode_target(written), data.length - 1 - len(opening), target_end)
                target = np.concatenate([opening, target])
                return {
                    "source": layout.join([source])[0],
                    "tokens": np.concatenate([start, target]).astype(np.int32),
                    "targets": np.concatenate([target, [tokenizer.eos]]).astype(np.int32),
                    CUT: cut.limits,
                }

            return encode

        def encode_as_one(row: Row) -> dict[str, Any]:
            (read, written), cut = self.texts(row), _Cutter()
            source = self.prompt(tokenizer, read, data, cut)
            end = f"targets at their end, to what sources leave of config.data.length={data.length} tokens"
            target = cut(tokenizer.encode(written), data.length - len(source), end)
            whole = np.concatenate([source, target, [tokenizer.eos]]).astype(np.int32)
            scored = (np.arange(1, len(whole)) >= len(source)).astype(np.int32)
            return {"tokens": whole[:-1], "targets": whole[1:], "scored": scored, CUT: cut.limits}

        return encode_as_one

    def prompt(self, tokenizer: Tokenizer, text: str, data: Data, cut: "_Cutter") -> np.ndarray:
        """Returns what a decoder reads before it writes, cut at its beginning to leave half of the length."""
        start = [] if tokenizer.bos is None else [tokenizer.bos]
        ids = tokenizer.encode(self.prefix + text + self.separator)
        room = max(0, (data.source_length or data.length // 2) - len(start))
        half = f"half of config.data.length={data.length}"
        limit = f"config.data.source_length={data.source_length}" if data.source_length else half
        kept = cut(ids[::-1], room, f"sources at their beginning, to {limit} tokens")[::-1]
        return np.concatenate([start, kept]).astype(np.int32)

    def completed(self, trained: Trained, data: Data, texts: Sequence[str]) -> list[str]:
        """Returns source and target; the model writes the target if there is none."""
        if len(texts) == 1:
            source, _ = self.unlabelled().texts({self.source: texts[0]})
            return [source, *self.unlabelled().write(trained, [{self.source: source}], data, 1)]
        return super().completed(trained, data, texts)

    def inputs(self, trained: Trained, data: Data, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns source and target, or both as one text; the target's end, which is never read, is not among it."""
        return self.read_row(trained, data, dict(zip(self.text_fields, texts, strict=True)))

    def make(self, model: Model, tokenizer: Tokenizer) -> Task:
        """Returns the task."""
        return make(model, tokenizer.token_bytes, self.label_smoothing)

    def score(self, trained: Trained, data: Data, evaluation: Evaluation, split: str, limit: int = 0) -> Scored:
        """Writes a target for each source and compares; adds the loss of the right ones."""
        rows, outputs = self.say(trained, data, evaluation, split, limit)
        said = [one["said"] for one in outputs]
        sources, wanted = zip(*map(self.texts, rows))
        metrics: dict[str, float] = {}
        for name in self.scores:
            for metric, estimate in SCORES[name](said, wanted).items():
                metrics |= {metric: estimate.value, f"{metric}_error": estimate.error}
        outputs = [
            {"source": source, "expected": expected, "said": text}
            for source, expected, text in zip(sources, wanted, said)
        ]
        return Scored(metrics | {"rows": float(len(rows))}, outputs)

    def say(
        self, trained: Trained, data: Data, evaluation: Evaluation, split: str, limit: int = 0
    ) -> tuple[list[Row], list[dict[str, Any]]]:
        """Returns rows, and the text written for each."""
        self.check_lengths(trained.model.cfg, data)
        records = self._records(trained, data, evaluation, split, limit)
        rows = rows_by_record(self.load(data, split), records)
        written = self.write(trained, rows, data, evaluation.batch_size or data.batch_size)
        return rows, [{"said": text} for text in written]

    def _records(self, trained: Trained, data: Data, evaluation: Evaluation, split: str, limit: int) -> list[int]:
        batches = self.eval_batches(trained.model.cfg, trained.tokenizer, data, evaluation, split, limit)
        found = [record for batch in batches for record in gather_host(batch["record"]).tolist()]
        return sorted(record for record in found if record >= 0)

    def write(self, trained: Trained, rows: Sequence[Row], data: Data, batch_size: int) -> list[str]:
        """Returns the text that the model writes for each row, the best of the beams."""
        model, tokenizer = trained.model, trained.tokenizer
        writing = self.writing(model.cfg, tokenizer)
        pair = model.cfg.family == "encoder_decoder"
        read = self.encoder(model.cfg, tokenizer, data) if pair else None
        inputs = [
            read(row)["source"] if pair else self.prompt(tokenizer, self.texts(row)[0], data, _Cutter()) for row in rows
        ]
        said: list[str] = [""] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(inputs[i]))  # like lengths together: few shapes, no padding
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            found = beam.search(
                model,
                trained.weights["model"],
                [inputs[i] for i in chosen],
                beams=self.beams,
                max_tokens=min(data.length, model.cfg.max_length - 1)
                if pair
                else data.length - max(len(inputs[i]) for i in chosen),
                length_penalty=self.length_penalty,
                end=tokenizer.eos,
                start=writing.start,
                **writing.rules,
            )
            for i, hypotheses in zip(chosen, found):
                said[i] = tokenizer.decode(hypotheses[0].tokens)
        return said


def _layout(tokenizer: Tokenizer) -> Layout:
    """Returns the special tokens around a text: those that the model came with, or an end."""
    return tokenizer.layout(1) or opened_and_closed([], [tokenizer.eos], 1)


class _Cutter:
    """Cuts arrays of one row at their end, and keeps which limits did."""

    def __init__(self) -> None:
        self.limits: list[str] = []

    def __call__(self, ids: np.ndarray, room: int, limit: str) -> np.ndarray:
        if len(ids) > room:
            self.limits.append(limit)
        return ids[:room]


def make(model: Model, token_bytes: np.ndarray, label_smoothing: float = 0.0) -> Task:
    """Returns the task of writing targets; `predict` gives, per token [B, T], what `loss` sums."""
    unused = model.cfg.vocab_size - len(token_bytes)

    def read(weights, constants, carry, batch, rng, capture):
        del constants
        params, written = weights["model"], segments(batch)
        mask = written * batch.get("scored", written) * batch["row_mask"][:, None]
        documents, own, memory = {"": written}, {}, None
        if "source" in batch:
            source = segments(batch, "source")
            memory, aux = model.encode(params, batch["source"], segment_ids=source, rng=rng, capture=capture)
            documents["encoder"], own = source, captured(aux, capture, "encoder")
        # What pads a target stands behind it, where a causal decoder does not look.
        hidden, aux = model.features(params, batch["tokens"], memory=memory, rng=rng, capture=capture)
        pieces = {TARGETS: batch["targets"], MASK: mask.astype(jnp.float32)}
        return Read(hidden, pieces, carry, own | captured(aux, capture), documents)

    predictions = through_head(model, read, CrossEntropy(label_smoothing=label_smoothing), token_sums)

    def predict(weights: Any, constants: Any, carry: Any, batch: Batch) -> tuple[Any, dict[str, Array]]:
        found = read(weights, constants, carry, batch, None, ())
        said = per_token(predictions.scored(weights, found)[1], found.pieces, constants)
        return carry, {name: said[name] for name in ("nll", "correct", "tokens")}

    return of_model(
        model.cfg,
        predictions=predictions,
        summarize=summarize,
        predict=predict,
        constants={"token_bytes": jnp.pad(jnp.asarray(token_bytes, jnp.float32), (0, unused))},
    )


def summarize(sums: dict[str, Any]) -> dict[str, float]:
    """Returns loss (nats per target token), perplexity, bits_per_byte of the targets, and accuracy."""
    tokens = max(float(sums["tokens"]), 1.0)
    nats = float(sums["nll"]) / tokens
    return {
        "loss": nats,
        "perplexity": math.exp(min(nats, 700.0)),
        "bits_per_byte": float(sums["nll"]) / math.log(2) / max(float(sums["bytes"]), 1.0),
        "accuracy": float(sums["correct"]) / tokens,
    }
