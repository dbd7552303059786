"""How far a distribution lies from a teacher's: what distillation minimises.

Notable: every divergence takes the teacher's and the student's logarithms of probabilities and sums over the last axis;
mixtures are made in logarithms, so that nothing overflows and a probability of zero stays one. The teacher comes
first and is p, the student q.
  forward_kl      KL(p | q): q covers what p does (Hinton et al., arXiv 1503.02531).
  reverse_kl      KL(q | p): q keeps to what p does most (MiniLLM, arXiv 2306.08543).
  symmetric_kl    a weighted sum of the two.
  jensen_shannon  beta KL(p | m) + (1 - beta) KL(q | m) with m = beta p + (1 - beta) q (GKD, arXiv 2306.13649). It
                  goes to zero with beta and with 1 - beta; divided by them it goes to forward and to reverse KL, which
                  is what beta of 0 and of 1 give here.
  skew_kl         KL(p | alpha p + (1 - alpha) q), and skew_reverse_kl KL(q | alpha q + (1 - alpha) p): bounded, with
                  calmer gradients (DistiLLM, arXiv 2402.03898).
Left out: total variation, and f-divergences beyond these.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

LogProbabilities = Float[Array, "... V"]
Value = float | Float[Array, ""]


def forward_kl(teacher: LogProbabilities, student: LogProbabilities) -> Float[Array, "..."]:
    """Returns KL(p | q)."""
    return jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)


def reverse_kl(teacher: LogProbabilities, student: LogProbabilities) -> Float[Array, "..."]:
    """Returns KL(q | p)."""
    return forward_kl(student, teacher)


def symmetric_kl(teacher: LogProbabilities, student: LogProbabilities, forward: Value = 0.5) -> Float[Array, "..."]:
    """Returns forward KL(p | q) + (1 - forward) KL(q | p)."""
    return forward * forward_kl(teacher, student) + (1 - forward) * reverse_kl(teacher, student)


def jensen_shannon(teacher: LogProbabilities, student: LogProbabilities, beta: Value = 0.5) -> Float[Array, "..."]:
    """Returns the generalised Jensen-Shannon divergence; its limits, scaled, at beta of 0 and of 1."""
    inner = jnp.clip(beta, 1e-6, 1 - 1e-6)  # what `where` does not choose must have finite gradients too
    mixed = _mixed(teacher, student, inner)
    between = inner * forward_kl(teacher, mixed) + (1 - inner) * forward_kl(student, mixed)
    at_the_ends = jnp.where(beta <= 0, forward_kl(teacher, student), reverse_kl(teacher, student))
    return jnp.where((beta > 0) & (beta < 1), between, at_the_ends)


def skew_kl(teacher: LogProbabilities, student: LogProbabilities, alpha: Value = 0.1) -> Float[Array, "..."]:
    """Returns KL(p | alpha p + (1 - alpha) q)."""
    return forward_kl(teacher, _mixed(teacher, student, alpha))


def skew_reverse_kl(teacher: LogProbabilities, student: LogProbabilities, alpha: Value = 0.1) -> Float[Array, "..."]:
    """Returns KL(q | alpha q + (1 - alpha) p)."""
    return forward_kl(student, _mixed(student, teacher, alpha))


def _mixed(first: LogProbabilities, second: LogProbabilities, share: Value) -> LogProbabilities:
    """Returns log(share e^first + (1 - share) e^second)."""
    least = jnp.finfo(first.dtype).tiny  # a share of 0 would make infinities of gradients
    log = lambda x: jnp.log(jnp.maximum(x, least))
    return jnp.logaddexp(
        log(jnp.asarray(share, first.dtype)) + first, log(1 - jnp.asarray(share, first.dtype)) + second
    )
