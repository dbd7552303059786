"""Rules that make questions with extracted answers from plain prose.

A context is a few sentences in a row. In a sentence, spans of a known kind (a sum of money, a date, a
percentage, a year, a count, a country, a name) can be asked for, in one of two forms:
  topic  "What sum of money is stated in connection with the public debt?": the topic is a noun phrase of the
         sentence that the rest of the context does not have, and the sentence has no other span of the kind
  gap    'Which name belongs in the gap: "the boundary between ___ and the United States"?'
An answer stands once in its context, and never in its question, so there is one right answer. A span is asked for
only if other sentences of the context have spans of its kind, and most contexts get two questions: an
answer cannot be guessed without reading the question.
Left out: parsing and tagging of words. The rules are regular expressions, and now and then a question is clumsy.
"""

import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from fastlm.data.builders import question_words as words

_Option = TypeVar("_Option")
_WORDS_BEFORE, _WORDS_AFTER, _FEWEST_WORDS = 6, 4, 6
_SHORTEST_TOPIC = 5

_COUNTED = r"(?:[a-z]+ )??(?:[a-z]{3,}s|men|people|persons|children)"


def _any(phrases: Iterable[str]) -> str:
    return "|".join(sorted(map(re.escape, phrases), key=lambda phrase: (-len(phrase), phrase)))


# In this order: what is part of an earlier kind (the year of a date) is no span of a later one.
_SPANS = {
    "date": rf"\b(?:{_any(words.MONTHS)}) \d{{1,2}}(?:, \d{{4}})?(?!\d)",
    "amount": r"\$\d[\d,]*(?<!,)(?:\.\d+)?(?: (?:thousand|million|billion)s?)?",
    "percentage": r"(?<![\d.,½¼¾])\d+(?:\.\d+)? per ?cent(?:um)?\b",
    "year": r"(?<![\d,.$-])1[4-9]\d\d\b(?![,.]\d)(?!-)",
    "number": rf"(?<![\d,.$-])\d[\d,]*(?<!,)(?:\.\d+)?(?: (?:thousand|million|billion))?(?= {_COUNTED}\b)",
    "person": r"\b(?:Mr\.|General|President|Captain|Colonel|Commodore|Judge|Governor|Admiral) [A-Z][a-z]{2,}\b(?!-)",
    "officer": r"\b(?:Secretary|Commissioner|Director) of (?:the )?[A-Z][a-z]+(?: [A-Z][a-z]+)*",
    "state": rf"\b(?:{_any(words.STATES)})\b",
    "country": rf"(?<!Gulf of )(?<!City of )(?<!New )\b(?:{_any(words.COUNTRIES)})\b",
    "city": rf"\b(?:{_any(words.CITIES)})\b",
    "name": r"(?<=[a-z,;] )[A-Z][a-z]+(?:(?: of| of the)? [A-Z][a-z]+)*\b(?!-)(?! [A-Z]\.)(?!['’](?!s\b))",
}
KINDS = tuple(_SPANS)
_PATTERNS = {kind: re.compile(pattern) for kind, pattern in _SPANS.items()}
_NOUN = re.compile(rf" ({_COUNTED})\b")
_TOPIC = re.compile(
    r"\b(?:the|an?|our|this|their|its|his) ([a-z]+(?: [a-z]+)?)(?="
    r" (?:of|in|to|for|from|with|by|and|which|that|at|on|was|were|is|are|has|have|had|will|shall|may|between)\b|[,.;:])"
)
_SENTENCE_END = re.compile(r"""(?:(?<=[a-z0-9)\]"”’%][.?!])|(?<=[a-z][.?!]["”’)]))\s+(?=["“(]?[A-Z])""")
_TITLES = "Mr|Mrs|Dr|St|Hon|Gen|Col|Capt|Lieut|Messrs|Gov|Nos?|Art|Sec|vs|Jr|Sr"
_ABBREVIATION = re.compile(rf"""(?:^|[\s("“])(?:{_TITLES})\.$""")
_ADJECTIVE = re.compile(r"\w+(?:ish|ese|ean|ian|ians|can|ern|ch)$")


class Question(NamedTuple):
    """A question whose answer is context[answer_start : answer_start + len(answer)]."""

    context: str
    question: str
    answer: str
    answer_start: int
    kind: str


class Span(NamedTuple):
    """sentence[start:stop], of a kind in `KINDS`."""

    kind: str
    start: int
    stop: int


def sentences(text: str) -> list[str]:
    """Splits text into sentences, as far as punctuation tells."""
    parts: list[str] = []
    for part in _SENTENCE_END.split(text):
        if parts and _ABBREVIATION.search(parts[-1]):
            parts[-1] += f" {part}"
        else:
            parts.append(part)
    return parts


def contexts(text: str, shortest: int = 400, longest: int = 900) -> Iterator[list[str]]:
    """Yields runs of sentences, `shortest` to `longest` characters together, that follow each other."""
    run: list[str] = []
    for sentence in sentences(text):
        run.append(sentence)
        size = len(" ".join(run))
        if size >= shortest:
            if size <= longest:
                yield run
            run = []


def make_questions(run: Sequence[str], most: int = 2) -> list[Question]:
    """Returns up to `most` questions about a context's sentences, each of another answer; the same each time.

    Only spans are asked for that have others of their kind in other sentences. Names, the most common kind,
    come last.
    """
    context = " ".join(run)
    all_spans = [spans(sentence) for sentence in run]
    found: list[Question] = []
    start = 0
    for sentence, here in zip(run, all_spans):
        elsewhere = {span.kind for there in all_spans if there is not here for span in there}
        found += [question for question in questions(sentence, here, context, start) if question.kind in elsewhere]
        start += len(sentence) + 1
    chosen: list[Question] = []
    while found and len(chosen) < most:
        chosen.append(_choose(found, f"{len(chosen)} {context}"))
        found = [question for question in found if question.answer_start != chosen[-1].answer_start]
    return chosen


def _choose(found: Sequence[Question], key: str) -> Question:
    """Picks a kind, other than names where there is one, then a question of that kind, about a topic if it can."""
    kinds = sorted({question.kind for question in found})
    kind = _pick([kind for kind in kinds if kind != "name"] or kinds, key)
    options = [question for question in found if question.kind == kind]
    topics = [question for question in options if words.GAP not in question.question]
    # Reversed: a second choice by the same key should not follow the first.
    return _pick(topics or options, key[::-1])


def _pick(options: Sequence[_Option], key: str) -> _Option:
    return options[zlib.crc32(key.encode()) % len(options)]


def spans(sentence: str) -> list[Span]:
    """Returns what of a sentence can be asked for, no two overlapping."""
    found: list[Span] = []
    for kind, pattern in _PATTERNS.items():
        for match in pattern.finditer(sentence):
            if not any(match.start() < span.stop and span.start < match.end() for span in found):
                found.append(Span(kind, *match.span()))
    return found


def questions(sentence: str, askable: Sequence[Span], context: str, start: int) -> Iterator[Question]:
    """Yields what can be asked about a sentence that begins at `start` of the context."""
    for span in askable:
        answer = sentence[span.start : span.stop]
        if context.count(answer) == 1 and _is_askable(span, answer, sentence):
            # "Which name is mentioned": not where there are two, and no adjective such as "Spanish".
            alone = sum(other.kind == span.kind for other in askable) == 1 and not _ADJECTIVE.fullmatch(answer)
            asked = list(_topic_questions(sentence, span, context)) if alone else []
            for question in filter(None, [*asked, _gap(sentence, span)]):
                if answer not in question:
                    yield Question(context, question, answer, start + span.start, span.kind)


def _is_askable(span: Span, answer: str, sentence: str) -> bool:
    if span.kind == "name":
        parts = set(answer.split()) - {"of", "the"}
        last = answer.split()[-1]
        poor = parts <= words.COMMON_NAMES or last in words.ADJECTIVES or answer.endswith("United States")
        return not poor and parts.isdisjoint(words.FUNCTION_WORDS)
    if span.kind == "person":
        return answer.split()[-1] not in words.COMMON_NAMES
    if span.kind == "number":
        return _counted(sentence, span).split()[-1] not in words.NOT_COUNTED
    return True


def _counted(sentence: str, span: Span) -> str:
    match = _NOUN.match(sentence, span.stop)
    return match[1] if match else ""


def _topic_questions(sentence: str, span: Span, context: str) -> Iterator[str]:
    lowered = context.lower()
    for match in _TOPIC.finditer(sentence):
        topic = match[1]
        parts = topic.split()
        inside = match.start() < span.stop and span.start < match.end()
        if inside or len(topic) < _SHORTEST_TOPIC or not words.NO_TOPIC.isdisjoint(parts) or lowered.count(topic) != 1:
            continue
        form = _pick(words.TOPIC_FORMS[span.kind], context + topic)
        yield form.format(kind=span.kind, topic=topic, counted=_counted(sentence, span))


def _gap(sentence: str, span: Span) -> str:
    """Returns the question for what stands between the words around it, or "" if they are too few."""
    before = " ".join(sentence[: span.start].split()[-_WORDS_BEFORE:])
    after = " ".join(sentence[span.stop :].split()[:_WORDS_AFTER]).rstrip(".,;:?!")
    # A comma or an apostrophe stays where it was, right after the gap.
    joint = " " if sentence[span.stop : span.stop + 1] == " " else ""
    phrase = f"{before} {words.GAP}{joint}{after}".strip()
    if len(phrase.split()) < _FEWEST_WORDS or '"' in phrase:
        return ""
    return _pick(words.GAP_FORMS, phrase).format(kind=span.kind, phrase=phrase)
