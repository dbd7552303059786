"""What can be compared with a teacher that has another tokenizer: spans of text that both give a probability.

Notable: a span lies between two neighbouring places where tokens of both end (`data.retokenized`). Its probability
under a model is the product of those of its tokens, so the comparison is of two numbers: whether this stretch comes
next, or something else.
  span_likelihood  a divergence between the two distributions (span, anything else), each probability to the power of
                   1 / temperature (approximate likelihood matching, arXiv 2503.20083). At high temperatures it
                   compares surprisals u (teacher's) and v: u log(u / v) - u + v, which long spans need, whose
                   probabilities all are nearly 0.
  shared_tokens    a divergence between the two distributions of the next token where a span begins, over the tokens
                   that both vocabularies have: every token counts as the longest of these that it begins with, where
                   the other tokenizer would also cut it. Both sides are coarsened by a function of their tokens, so
                   the divergence is one. Tokens without text (special, padding) are left out on both sides.
With one tokenizer for both, these are exact. With two the two sides are not asked quite the same. A span's probability
is that of one way to write it. Where a token of the teacher ends, none of its longer ones was there, which a student
with other tokens does not know: its 'go' may go on with 'vern', the teacher's, who has 'govern', hardly does
(tokenization bias). Where one BPE goes on merging the tokens of the other, the next token of the finer one follows
from the coarser one's, so `shared_tokens` then compares the same events, under that condition still. So the task's own
loss should keep some weight.
Left out: ULD (arXiv 2402.12030), which compares sorted probabilities of whatever tokens; weighing spans by whether
a new word follows, which lessens the bias (arXiv 2503.20083); probabilities of bytes (arXiv 2410.09303), which have
none, and need several passes of each model.

Dims: B batch, T predictions of a row, N numbers of spans (0 is none), V vocabulary, K shared tokens.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fastlm.compress.mixture import DIVERGENCES
from fastlm.data.tokenizers import Tokenizer
from fastlm.errors import UserError, nearest

LEAST = 1e-6  # nats: probabilities nearer to 1 than float32 can say count as this
MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class SpanTerm:
    """Of a term that compares spans.

    Attributes:
      temperature: a number or a schedule.
      divergence: a key of `mixture.DIVERGENCES`, with its own options as they are.
    """

    temperature: float | str = 1.0
    divergence: str = "forward_kl"

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            hint = nearest(self.divergence, DIVERGENCES) or f"; one of: {', '.join(DIVERGENCES)}"
            raise UserError(f"divergence: unknown '{self.divergence}'{hint}")


@dataclasses.dataclass(frozen=True)
class SpanLikelihood(SpanTerm):
    """The term "span_likelihood"; see the header."""

    def __call__(
        self, teacher: Float[Array, "..."], student: Float[Array, "..."], temperature: Float[Array, ""] | float
    ) -> Float[Array, "..."]:
        """Returns the divergence of each span, times the temperature, so that gradients keep their size.

        Args:
          teacher, student: negative log-likelihood of the span, in nats.
        """
        divergence, _ = DIVERGENCES[self.divergence]
        return temperature * divergence(_or_else(teacher, temperature), _or_else(student, temperature))


@dataclasses.dataclass(frozen=True)
class SharedTokens(SpanTerm):
    """The term "shared_tokens"; see the header."""

    def __call__(
        self,
        teacher: Float[Array, "... U"],
        student: Float[Array, "... V"],
        bins: "Bins",
        temperature: Float[Array, ""] | float,
    ) -> Float[Array, "..."]:
        """Returns the divergence of each pair of logits, times the temperature's square (arXiv 1503.02531)."""
        divergence, _ = DIVERGENCES[self.divergence]
        theirs = binned(teacher / temperature, bins.teacher, bins.count)
        return temperature**2 * divergence(theirs, binned(student / temperature, bins.student, bins.count))


SPANS: dict[str, type[SpanTerm]] = {"span_likelihood": SpanLikelihood, "shared_tokens": SharedTokens}


def _or_else(nll: Array, temperature: Array | float) -> Float[Array, "... 2"]:
    """Returns the logarithms of p^(1 / temperature) and of what is missing to 1."""
    nll = jnp.maximum(nll, LEAST) / temperature
    return jnp.stack([-nll, jnp.log(-jnp.expm1(-nll))], axis=-1)


def totals(values: Float[Array, "B T"], spans: Int[Array, "B T"], count: int) -> Float[Array, "B N"]:
    """Returns the sum of what belongs to each span, for the numbers 0 to `count`; 0 under the number 0."""
    add = lambda row, numbers: jax.ops.segment_sum(row, numbers, count + 1)
    return jax.vmap(add)(values, spans).at[:, 0].set(0.0)


def begins(spans: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Returns 1 where a span begins."""
    before = jnp.pad(spans, ((0, 0), (1, 0)))[:, :-1]
    return ((spans > 0) & (spans != before)).astype(jnp.float32)


def beginnings(spans: Int[Array, "B S"], count: int) -> Int[Array, "B N"]:
    """Returns where each span begins, for the numbers 0 to `count`; any place for those that are not there."""
    places = jnp.arange(spans.shape[1])
    first = jax.vmap(lambda numbers: jax.ops.segment_min(places, numbers, count + 1))(spans)
    return jnp.clip(first, 0, spans.shape[1] - 1)


@flax.struct.dataclass
class Bins:
    """Which of the K = `count` shared tokens each token of the student and of the teacher counts as, -1 for none."""

    student: Int[Array, "V"]
    teacher: Int[Array, "U"]
    count: int = flax.struct.field(pytree_node=False)


def binned(logits: Float[Array, "... V"], bins: Int[Array, "V"], count: int) -> Float[Array, "... K"]:
    """Returns the logarithms of the probabilities of bins of tokens, given that it is one of them; -1 is no bin."""
    *places, size = logits.shape
    probabilities = jax.nn.softmax(jnp.where(bins >= 0, logits, MASKED))
    # With the vocabulary first whole rows are added, not single numbers.
    rows = probabilities.reshape(-1, size).T
    sums = jax.ops.segment_sum(rows, jnp.where(bins >= 0, bins, count), count + 1)[:count].T
    return jnp.log(jnp.maximum(sums, jnp.finfo(jnp.float32).tiny)).reshape(*places, count)


def bins_of(student: Tokenizer, teacher: Tokenizer, student_size: int, teacher_size: int) -> Bins:
    """Returns the bins of two vocabularies, padded to the sizes of the models; both ends are one more token."""
    shared = {piece: number for number, piece in enumerate(sorted({*student.pieces} & {*teacher.pieces} - {b""}))}
    of_student = _numbers(student, teacher, shared, student_size)
    of_teacher = _numbers(teacher, student, shared, teacher_size)
    return Bins(jnp.asarray(of_student), jnp.asarray(of_teacher), len(shared) + 1)


def _numbers(own: Tokenizer, other: Tokenizer, shared: dict[bytes, int], size: int) -> np.ndarray:
    encoded = other.encode_batch([_text(piece) for piece in own.pieces])
    numbers = np.full(size, -1, np.int32)
    for token, (piece, ids) in enumerate(zip(own.pieces, encoded)):
        begin = other.pieces[ids[0]] if len(ids) else b""
        # What is no text, or is spelled with a space before it, is cut by its bytes alone.
        part = begin if piece not in shared and begin and piece.startswith(begin) else piece
        while part and part not in shared:
            part = part[:-1]
        numbers[token] = shared.get(part, -1)
    numbers[own.eos] = len(shared)
    return numbers


def _text(piece: bytes) -> str:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return ""
