"""Scores of generated text against references: BLEU and chrF (sacrebleu), ROUGE-1/2/L (rouge-score).

BLEU and chrF are scores of a corpus: sums over sentences, then one formula. So each carries its
per-sentence sums, from which come standard errors (bootstrap over sentences) and the comparison of two
systems (paired bootstrap). The signature belongs into every report; scores with different signatures do
not compare. Scale: BLEU and chrF 0 to 100, ROUGE 0 to 1, each as its literature does.

ROUGE is the F-measure, with Porter stemming (as the evaluations of PEGASUS, BART and T5 do it), ROUGE-L over
the whole text as one sequence. Its tokenizer keeps a-z and 0-9 only: it is for English.

An empty text: BLEU counts an empty reference as length 0, so every hypothesis word is a miss; chrF leaves
an example with an empty reference out of its sums; ROUGE gives 0, also when both are empty.
A hypothesis may be empty everywhere, and scores as what it misses. Left out: TER, BLEU tokenizers that
need a download, ROUGE-Lsum.

BLEU: ACL P02-1040 and 1804.08771. chrF: W15-3049. ROUGE: W04-1013.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING

import numpy as np

from fastlm.errors import UserError, nearest
from fastlm.measurement.statistics import Bootstrap, Estimate, PairedBootstrap, bootstrap, mean, paired_bootstrap
from fastlm.measurement.text_pairs import References, paired_texts

if TYPE_CHECKING:  # imported where used: sacrebleu takes a second to import, rouge-score (with nltk) two
    from sacrebleu.metrics.base import Metric

TOKENIZERS = ("13a", "intl", "char", "zh", "none")
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True, eq=False)
class SentenceSums:
    """Each sentence's part [N, S] of the sums that a corpus score is made of, and the formula over them."""

    rows: np.ndarray
    metric: "Metric"

    def score(self, indices: np.ndarray) -> float:
        """Returns the score of the corpus made of the sentences with these indices [n]."""
        return _score(self.metric, self.rows[indices].sum(0))


@dataclass(frozen=True, eq=False)
class CorpusScore:
    """A score of a corpus.

    Attributes:
      estimate: the score, 0 to 100, its standard error and 95% interval by bootstrap over sentences.
      per_example: [N], the score of each sentence by itself (BLEU: with effective order); to look at, because
        their mean is not the corpus score.
      signature: what was computed, as sacrebleu writes it.
      sums: what `compare` resamples.
    """

    name: str
    estimate: Bootstrap
    per_example: np.ndarray
    signature: str
    sums: SentenceSums = field(repr=False)


@dataclass(frozen=True, eq=False)
class MeanScore:
    """A score that is the mean of its examples' scores, `per_example` [N], all 0 to 1."""

    name: str
    estimate: Estimate
    per_example: np.ndarray
    signature: str


def bleu(
    hypotheses: Sequence[str], references: References, *, tokenize: str = "13a", resamples: int = 1000, seed: int = 0
) -> CorpusScore:
    """Returns corpus BLEU, 0 to 100, case-sensitive, on detokenized text.

    Args:
      hypotheses: N texts.
      references: N texts, or N lists of one or more.
      tokenize: one of `TOKENIZERS`: "13a" for most languages, "intl", "zh" for Chinese, "char".
      resamples: of the bootstrap.
      seed: of the bootstrap.

    Raises:
      UserError: an unknown tokenizer, or as `paired_texts`.
    """
    from sacrebleu.metrics import BLEU

    if tokenize not in TOKENIZERS:
        raise UserError(f"no BLEU tokenizer '{tokenize}'{nearest(tokenize, TOKENIZERS)}: use one of {TOKENIZERS}")
    sentence = BLEU(tokenize=tokenize, effective_order=True)
    return _corpus_score("BLEU", BLEU(tokenize=tokenize), sentence, hypotheses, references, resamples, seed)


def chrf(
    hypotheses: Sequence[str], references: References, *, word_order: int = 0, resamples: int = 1000, seed: int = 0
) -> CorpusScore:
    """Returns corpus chrF2, 0 to 100; with `word_order` 2 it is chrF++. Other arguments and errors as `bleu`."""
    from sacrebleu.metrics import CHRF

    metric = CHRF(word_order=word_order)
    return _corpus_score("chrF" + "+" * word_order, metric, metric, hypotheses, references, resamples, seed)


def compare(first: CorpusScore, second: CorpusScore, *, resamples: int = 1000, seed: int = 0) -> PairedBootstrap:
    """Returns first - second by paired bootstrap over the sentences both were scored on.

    Raises:
      UserError: the scores are of different kinds or of different numbers of sentences.
    """
    if (first.name, first.signature) != (second.name, second.signature):
        raise UserError(f"{first.name}|{first.signature} and {second.name}|{second.signature} do not compare")
    count = len(first.per_example)
    if count != len(second.per_example):
        raise UserError(f"systems were scored on {count} and {len(second.per_example)} sentences: use the same ones")
    return paired_bootstrap(first.sums.score, second.sums.score, count, resamples=resamples, seed=seed)


def rouge(hypotheses: Sequence[str], references: References, *, stemmer: bool = True) -> dict[str, MeanScore]:
    """Returns ROUGE-1, ROUGE-2 and ROUGE-L (F, 0 to 1) by name; of several references the best counts.

    Raises:
      UserError: as `paired_texts`.
    """
    lists = paired_texts(hypotheses, references)
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGE_TYPES, use_stemmer=stemmer)
    scores = [scorer.score_multi(given, hypothesis) for hypothesis, given in zip(hypotheses, lists)]
    signature = f"F|stemmer:{'yes' if stemmer else 'no'}|rouge-score:{metadata.version('rouge-score')}"
    result = {}
    for name in ROUGE_TYPES:
        values = np.array([score[name].fmeasure for score in scores])
        result[name] = MeanScore(name, mean(values), values, signature)
    return result


def _corpus_score(
    name: str,
    metric: "Metric",
    sentence_metric: "Metric",
    hypotheses: Sequence[str],
    references: References,
    resamples: int,
    seed: int,
) -> CorpusScore:
    lists = paired_texts(hypotheses, references)
    most = max(map(len, lists))
    streams = list(zip(*([*given, *[None] * (most - len(given))] for given in lists)))
    # sacrebleu's own significance tests stand on this method and the one in `_score`; the public ones hide chrF's sums.
    rows = np.array(metric._extract_corpus_statistics(hypotheses, streams), np.int64)
    sums = SentenceSums(rows, metric)
    per_example = np.array([_score(sentence_metric, row) for row in rows])
    estimate = bootstrap(sums.score, len(rows), resamples=resamples, seed=seed)
    return CorpusScore(name, estimate, per_example, str(metric.get_signature()), sums)


def _score(metric: "Metric", sums: np.ndarray) -> float:
    return float(metric._compute_score_from_stats(sums.tolist()).score)
