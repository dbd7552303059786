import math

import numpy as np
import pytest
import sacrebleu

from fastlm.errors import UserError
from fastlm.measurement import text_scores

REFERENCES = ["the cat sat on the mat today", "a quick brown fox jumps over dogs", "nothing is as it was before then"]
HYPOTHESES = ["the cat sat on a mat today", "a quick brown dog jumps over foxes", "nothing was as it is before then"]
WORSE = ["cat mat", "a fox", "before then nothing"]


def test_bleu_by_hand():
    # 7 of 8 words, 5 of 7 pairs, 3 of 6 triples, 2 of 5 quadruples; no length penalty.
    score = text_scores.bleu(["a b c d x f g h"], ["a b c d e f g h"], tokenize="none")
    assert score.estimate.value == pytest.approx(100 * (7 / 8 * 5 / 7 * 3 / 6 * 1 / 5) ** (1 / 4))
    # The same n-grams cut short: exp(1 - 8 / 6).
    short = text_scores.bleu(["a b c d e f"], ["a b c d e f g h"], tokenize="none")
    assert short.estimate.value == pytest.approx(100 * math.exp(1 - 8 / 6))


@pytest.mark.parametrize("hypotheses", [HYPOTHESES, WORSE, ["", *HYPOTHESES[1:]]])
def test_corpus_scores_are_those_of_sacrebleu(hypotheses):
    bleu, chrf = text_scores.bleu(hypotheses, REFERENCES), text_scores.chrf(hypotheses, REFERENCES, word_order=2)
    assert bleu.estimate.value == pytest.approx(sacrebleu.corpus_bleu(hypotheses, [REFERENCES]).score)
    assert chrf.estimate.value == pytest.approx(sacrebleu.corpus_chrf(hypotheses, [REFERENCES], word_order=2).score)
    assert chrf.name == "chrF++" and f"version:{sacrebleu.__version__}" in chrf.signature
    assert "tok:13a" in bleu.signature and "nrefs:1" in bleu.signature


def test_per_example_scores_are_those_of_sacrebleu():
    bleu, chrf = text_scores.bleu(WORSE, REFERENCES), text_scores.chrf(WORSE, REFERENCES)
    for number, (hypothesis, reference) in enumerate(zip(WORSE, REFERENCES)):
        assert bleu.per_example[number] == pytest.approx(sacrebleu.sentence_bleu(hypothesis, [reference]).score)
        assert chrf.per_example[number] == pytest.approx(sacrebleu.sentence_chrf(hypothesis, [reference]).score)


def test_several_references_may_differ_in_number():
    references = [[REFERENCES[0], HYPOTHESES[0]], REFERENCES[1], [REFERENCES[2]]]
    for scorer in (text_scores.bleu, text_scores.chrf):
        score = scorer(HYPOTHESES, references)
        assert score.per_example[0] == pytest.approx(100)
        assert score.estimate.value > scorer(HYPOTHESES, REFERENCES).estimate.value
        assert "nrefs:var" in score.signature
    assert text_scores.rouge(HYPOTHESES, references)["rouge2"].per_example[0] == 1


def test_error_is_the_spread_over_corpora():
    generator = np.random.default_rng(0)
    words = np.array(list("abcdefgh"))

    def score(resamples):
        references = [" ".join(generator.choice(words, 12)) for _ in range(60)]
        noisy = [" ".join(w if generator.random() < 0.8 else "x" for w in line.split()) for line in references]
        return text_scores.bleu(noisy, references, tokenize="none", resamples=resamples)

    bootstrapped = score(300)
    drawn = [score(2).estimate.value for _ in range(60)]
    assert bootstrapped.estimate.error == pytest.approx(np.std(drawn), rel=0.35)
    assert bootstrapped.estimate.low < bootstrapped.estimate.value < bootstrapped.estimate.high


def test_comparison_of_two_systems():
    better, worse = (text_scores.chrf(h * 10, REFERENCES * 10, resamples=20) for h in (HYPOTHESES, WORSE))
    difference = text_scores.compare(better, worse, resamples=200)
    assert difference.value == pytest.approx(better.estimate.value - worse.estimate.value)
    assert difference.p_value < 0.02 and difference.low > 0
    assert text_scores.compare(worse, worse, resamples=50).value == 0
    with pytest.raises(UserError, match="do not compare"):
        text_scores.compare(better, text_scores.bleu(HYPOTHESES * 10, REFERENCES * 10, resamples=2))
    with pytest.raises(UserError, match="same ones"):
        text_scores.compare(better, text_scores.chrf(WORSE, REFERENCES, resamples=2))


def test_rouge_by_hand():
    # Words: 3 of 4 and 3 of 5; pairs: 1 of 3 and 1 of 4; longest common subsequence "police the man".
    scores = text_scores.rouge(["police kill the man"], ["police shot the man dead"], stemmer=False)
    values = {name: score.estimate.value for name, score in scores.items()}
    assert values == pytest.approx({"rouge1": 2 * 3 / 9, "rouge2": 2 * 1 / 7, "rougeL": 2 * 3 / 9})
    swapped = text_scores.rouge(["the man police"], ["police the man"], stemmer=False)
    assert swapped["rouge1"].estimate.value == 1
    assert swapped["rougeL"].estimate.value == pytest.approx(2 / 3)


def test_rouge_stems_by_default_and_says_so():
    stemmed = text_scores.rouge(["running dogs"], ["run dog"])["rouge1"]
    plain = text_scores.rouge(["running dogs"], ["run dog"], stemmer=False)["rouge1"]
    assert stemmed.estimate.value == 1
    assert plain.estimate.value == 0
    assert "stemmer:yes" in stemmed.signature and "stemmer:no" in plain.signature


def test_empty_texts_score_as_stated():
    hypotheses, references = ["", "word", ""], ["word", "", ""]
    for scorer in (text_scores.bleu, text_scores.chrf):
        assert scorer(hypotheses, references, resamples=2).per_example.tolist() == [0, 0, 0]
    assert text_scores.rouge(hypotheses, references)["rouge1"].per_example.tolist() == [0, 0, 0]
    good = text_scores.bleu(HYPOTHESES, REFERENCES, resamples=2).estimate.value
    assert text_scores.bleu([*HYPOTHESES, "word"], [*REFERENCES, ""], resamples=2).estimate.value < good
    good = text_scores.chrf(HYPOTHESES, REFERENCES, resamples=2).estimate.value
    assert text_scores.chrf([*HYPOTHESES, "word"], [*REFERENCES, ""], resamples=2).estimate.value == good


@pytest.mark.parametrize(
    "hypotheses, references, says",
    [
        ([], [], "empty"),
        (["a"], [], "pair up"),
        (["a", "b"], [["a"], []], "example 1 has no reference"),
        (["a"], [None], "example 0 has no reference"),
        (["a", 3], ["a", "b"], "example 1 is no text"),
        ("a", ["a"], "wrap"),
    ],
)
def test_mistakes_are_named(hypotheses, references, says):
    for scorer in (text_scores.bleu, text_scores.chrf, text_scores.rouge):
        with pytest.raises(UserError, match=says) as caught:
            scorer(hypotheses, references)
        assert "\n" not in str(caught.value)


def test_unknown_tokenizer_is_named():
    with pytest.raises(UserError, match="did you mean 'intl'"):
        text_scores.bleu(["a"], ["a"], tokenize="int")
