"""Rows with some of their words replaced, for a student to learn a task from (TinyBERT, arXiv 1909.10351, algorithm 1).

    launch/local.sh -m fastlm.train --config configs/mlm_small.py
    launch/local.sh -m experiments.augment_texts --workdir runs/mlm_small --source state_of_the_union_passages \\
        --folder runs/augmented
    launch/local.sh -m experiments.distill --config configs/distill/tinybert_task.py \\
        --config.data.sources="(('jsonl:runs/augmented/*.jsonl', 1.0),)"

Each training row is written as it is and in up to --copies versions, all different. In a version each word is
replaced with the probability --chance by one of its --candidates: of a word that is one token, those that a masked
language model finds likeliest where it is hidden; of a word of several tokens, those whose embeddings lie nearest to
the mean of its own. At least one word is replaced; a row in which none can be is written once. A candidate is a token
that stands alone as a word somewhere in the source. Everything else of a row (its label) is carried over, and the other
splits are kept as they are. Files are those of `experiments.row_files`; what a row becomes follows from --seed and its
number.
Notable: words are hidden one at a time, as in the paper, so a text is read as often as it has words; texts longer than
the encoder's rows are read in pieces.
Left out: GloVe vectors, which the paper takes for words of several pieces; rows that name places in their texts
(answers to questions), which would no longer be right.

Dims: B hidden words, T tokens, V vocabulary, C candidates.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Array, Bool, Int

from experiments import row_files
from fastlm import command_line
from fastlm.data import examples
from fastlm.data.examples import Examples, Row, every
from fastlm.data.tokenizers import Tokenizer
from fastlm.decoding import inputs
from fastlm.errors import UserError, nearest
from fastlm.models import Model
from fastlm.ops.contract import dense
from fastlm.parallel import mesh as meshes
from fastlm.tasks.masked_language_modeling import MaskedLanguageModeling, mask_token
from fastlm.tasks.rows import row_layout
from fastlm.training import quality, restore

FLAGS = flags.FLAGS
WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
CASES = 3  # spellings of the word itself ("the", "The", "THE") that may be among the likeliest


def define_flags() -> None:
    """Defines the flags; not on import, for experiments that stand side by side share names."""
    flags.DEFINE_string("workdir", None, "of a masked language model")
    flags.DEFINE_string("source", None, "rows, as in config.data.sources: a named data set, or 'jsonl:GLOB'")
    flags.DEFINE_string("split", "train", "of it, to be augmented")
    flags.DEFINE_list("keep", ["validation", "test"], "other splits, which are copied as they are")
    flags.DEFINE_list("fields", ["text"], "of its rows, whose words are replaced")
    flags.DEFINE_string("folder", None, "where the files go")
    flags.DEFINE_integer("copies", 20, "versions of a row (N in the paper)", lower_bound=1)
    flags.DEFINE_float("chance", 0.4, "that a word is replaced (p)", lower_bound=0.0, upper_bound=1.0)
    flags.DEFINE_integer("candidates", 15, "to replace a word (K)", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of the draws", lower_bound=0)
    flags.DEFINE_integer("batch_size", 64, "hidden words at a time", lower_bound=1)
    flags.DEFINE_integer("rows_per_file", 256, "rows of the source that one file is made of", lower_bound=1)
    flags.DEFINE_integer("most", 0, "rows to augment; 0 for all", lower_bound=0)
    flags.DEFINE_string("data_dir", None, "where prepared data lies")
    flags.mark_flags_as_required(["workdir", "source", "folder"])


class Word(NamedTuple):
    """A word of a text: characters [start, stop), tokens [first, last]."""

    start: int
    stop: int
    first: int
    last: int


class Place(NamedTuple):
    """A word of a row's field that can be replaced, and by what."""

    field: str
    start: int
    stop: int
    candidates: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A masked language model that proposes words.

    Attributes:
      words: that it may propose, by their tokens; see `whole_words`.
      length: tokens that it reads at most.
      batch_size: B.
    """

    model: Model
    params: Any
    tokenizer: Tokenizer
    words: Mapping[int, str]
    length: int
    batch_size: int = 64

    @functools.cached_property
    def allowed(self) -> Bool[np.ndarray, "V"]:
        """Which tokens are in `words`."""
        allowed = np.zeros(self.model.cfg.vocab_size, bool)
        allowed[list(self.words)] = True
        return allowed

    @functools.cached_property
    def vectors(self) -> np.ndarray:
        """Embeddings [V, D] as unit vectors."""
        table = np.asarray(dense(self.params["embedding"]["table"]), np.float32)
        return _unit(table)

    def likeliest(self, rows: Sequence[np.ndarray], count: int) -> np.ndarray:
        """Returns the likeliest words for the mask token that each row of tokens has, ids [len(rows), count]."""
        found = np.zeros((len(rows), count), np.int32)
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        for start in range(0, len(rows), self.batch_size):
            chosen = order[start : start + self.batch_size]
            filler = [rows[chosen[0]]] * (self.batch_size - len(chosen))
            padded, lengths = inputs.pad([rows[row] for row in chosen] + filler)
            places = np.argmax(padded == mask_token(self.tokenizer), axis=1)
            likeliest = _likeliest(self.model, count, self.params, padded, lengths, places, self.allowed)
            found[chosen] = np.asarray(likeliest)[: len(chosen)]
        return found

    def nearest(self, tokens: Sequence[np.ndarray], count: int) -> np.ndarray:
        """Returns the words whose embeddings point nearest to the mean of several tokens', ids [len(tokens), count]."""
        if not len(tokens):
            return np.zeros((0, count), np.int32)
        words, places = np.flatnonzero(self.allowed), {tuple(one): None for one in map(np.ndarray.tolist, tokens)}
        means = _unit(np.stack([self.vectors[list(one)].mean(axis=0) for one in places]))
        found = []
        for start in range(0, len(means), self.batch_size):  # for each there are as many numbers as words
            closeness = means[start : start + self.batch_size] @ self.vectors[words].T
            found += list(words[np.argsort(-closeness, axis=1, kind="stable")[:, :count]])
        by_tokens = dict(zip(places, found, strict=True))
        return np.stack([by_tokens[tuple(one.tolist())] for one in tokens])

    def masked(self, tokens: np.ndarray, place: int) -> np.ndarray:
        """Returns the piece of a text that has a token, between special ones, with a hole there."""
        layout = row_layout(self.tokenizer, 1)
        room = self.length - layout.size
        start = place // room * room
        piece = tokens[start : start + room].copy()
        piece[place - start] = mask_token(self.tokenizer)
        return layout.join([piece])[0]

    def candidates(self, texts: Sequence[str], count: int) -> list[list[tuple[Word, tuple[str, ...]]]]:
        """Returns, for each text, its words with those that may stand in their places; none that has nothing."""
        encoded = [words_of(self.tokenizer, text) for text in texts]
        words = [(text, word) for text, (_, found) in enumerate(encoded) for word in found]
        alone = [(text, word) for text, word in words if word.first == word.last]
        several = [(text, word) for text, word in words if word.first < word.last]
        more = min(count + CASES, len(self.words))
        likeliest = self.likeliest([self.masked(encoded[text][0], word.first) for text, word in alone], more)
        nearest = self.nearest([encoded[text][0][word.first : word.last + 1] for text, word in several], more)
        by_word = dict(zip([*alone, *several], [*likeliest, *nearest], strict=True))
        found: list[list[tuple[Word, tuple[str, ...]]]] = [[] for _ in texts]
        for text, word in words:
            own = texts[text][word.start : word.stop].casefold()
            said = [self.words[int(token)] for token in by_word[text, word]]
            others = tuple(one for one in said if one.casefold() != own)[:count]
            found[text] += [(word, others)] if others else []
        return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _likeliest(
    model: Model,
    count: int,
    params: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    places: Int[Array, "B"],
    allowed: Bool[Array, "V"],
) -> Int[Array, "B C"]:
    real = jnp.arange(tokens.shape[1]) < lengths[:, None]
    hidden, _ = model.features(params, tokens, segment_ids=real.astype(jnp.int32), packed=False)
    logits = model.head(params, hidden[jnp.arange(tokens.shape[0]), places])
    return jax.lax.top_k(jnp.where(allowed, logits, -jnp.inf), count)[1]


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def words_of(tokenizer: Tokenizer, text: str) -> tuple[Int[np.ndarray, "T"], list[Word]]:
    """Returns the tokens of a text and its words, without those that share a token with something else."""
    tokens, starts, stops = tokenizer.encode_with_offsets(text)
    words = []
    for match in WORD.finditer(text):
        first = int(np.searchsorted(stops, match.start(), side="right"))
        last = int(np.searchsorted(starts, match.end(), side="left")) - 1
        if first <= last < len(tokens) and text[starts[first] : stops[last]].strip() == match.group():
            words.append(Word(*match.span(), first, last))
    return tokens, words


def whole_words(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[int, str]:
    """Returns the tokens that are a whole word of some text, with the space before it.

    What a token spells does not tell: " dec" may be "dec", or how "decent" begins.

    Raises:
      UserError: there is none.
    """
    seen: set[int] = set()
    for text in texts:
        tokens, words = words_of(tokenizer, text)
        seen |= {int(tokens[word.first]) for word in words if word.first == word.last}
    spelled = {token: tokenizer.pieces[token].decode(errors="replace") for token in sorted(seen)}
    found = {token: piece[1:] for token, piece in spelled.items() if piece[:1] == " " and WORD.fullmatch(piece[1:])}
    if not found:
        raise UserError("--workdir: no token of this model is a whole word; train one with a tokenizer of words")
    return found


def versions(row: Row, places: Sequence[Place], copies: int, chance: float, rng: np.random.Generator) -> list[Row]:
    """Returns the row, and up to `copies` others in which some of these places hold another word."""
    made = {_key(row, places): row}
    for _ in range(copies if places else 0):
        chosen = rng.random(len(places)) < chance
        chosen[rng.integers(len(places))] |= not chosen.any()
        new = dict(row)
        for place in [place for place, replace in zip(places, chosen, strict=True) if replace][::-1]:
            text, word = str(new[place.field]), place.candidates[rng.integers(len(place.candidates))]
            new[place.field] = text[: place.start] + word + text[place.stop :]
        made.setdefault(_key(new, places), new)
    return list(made.values())


def _key(row: Row, places: Sequence[Place]) -> tuple[Any, ...]:
    return tuple(row[field] for field in dict.fromkeys(place.field for place in places))


def augmented(
    encoder: Encoder, fields: Sequence[str], settings: Mapping[str, Any], start: int, rows: Sequence[Row]
) -> list[Row]:
    """Returns the versions of rows.

    Args:
      settings: "candidates", "copies", "chance" and "seed".
      start: number of the first of the rows in its split.
    """
    asked = [(number, field) for number in range(len(rows)) for field in fields]
    found = encoder.candidates([str(rows[number][field]) for number, field in asked], settings["candidates"])
    places: list[list[Place]] = [[] for _ in rows]
    for (number, field), words in zip(asked, found, strict=True):
        places[number] += [Place(field, word.start, word.stop, others) for word, others in words]
    made = []
    for number, (row, own) in enumerate(zip(rows, places, strict=True)):
        rng = np.random.default_rng((settings["seed"], start + number))
        made += versions(row, own, settings["copies"], settings["chance"], rng)
    return made


def plain(rows: Examples, fields: Sequence[str] = ()) -> list[Row]:
    """Returns rows as a line of JSON has them.

    Raises:
      UserError: they lack one of `fields`, or it holds no text.
    """
    found = rows.get(range(len(rows)))
    for field in fields:
        if field not in rows.fields:
            raise UserError(f"--fields: {rows.name} has no '{field}'{nearest(field, rows.fields)}")
        if not isinstance(found[0][field], str):
            raise UserError(f"--fields: '{field}' of {rows.name} holds no text")
    return [{name: list(row.get(every(name), ())) or row[name] for name in rows.fields} for row in found]


def main() -> None:
    """Restores the encoder and writes."""
    mesh = meshes.share_weights(1)
    jax.set_mesh(mesh)
    restored = restore.restore(FLAGS.workdir, mesh)
    kind = restored.kind()
    if not isinstance(kind, MaskedLanguageModeling):
        raise UserError(f"--workdir: {FLAGS.workdir} guesses no hidden words; its task is {type(kind).__name__}")
    load = lambda split: examples.load(FLAGS.source, split, data_dir=FLAGS.data_dir)
    source = load(FLAGS.split)
    names = ("workdir", "source", "split", "fields", "copies", "chance", "candidates", "seed", "batch_size")
    settings = {name: getattr(FLAGS, name) for name in (*names, "rows_per_file", "most")}
    settings |= {"step": restored.step, "data": source.fingerprint}
    rows = plain(source, FLAGS.fields)
    words = whole_words(restored.tokenizer, (str(row[field]) for row in rows for field in FLAGS.fields))
    length = quality.data_of(restored, quality.Asked())[0].length
    encoder = Encoder(restored.model, restored.params, restored.tokenizer, words, length, FLAGS.batch_size)
    make = functools.partial(augmented, encoder, FLAGS.fields, settings)
    others = {split: functools.partial(lambda split: plain(load(split)), split) for split in FLAGS.keep}
    row_files.write(Path(FLAGS.folder), settings, rows[: FLAGS.most or None], make, others)
    print(f"train on them with --config.data.sources=\"(('jsonl:{FLAGS.folder}/*.jsonl', 1.0),)\"")


if __name__ == "__main__":
    define_flags()
    command_line.main(main)
