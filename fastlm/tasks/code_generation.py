"""Writing the body of a function under its header and docstring.

Notable: training and the loss are those of `sequence_to_sequence`; the final score adds whether header
and body compile (nothing is run) and `solve` has a model write several solutions to each problem of a file in
HumanEval's format and runs their tests in isolation (arXiv 2107.03374). Left out: scoring by running for
rows without tests, and solutions that are no continuation of their prompt.
"""

import dataclasses
import functools
from collections.abc import Sequence
from itertools import takewhile

import numpy as np

from fastlm.data.examples import Row
from fastlm.data.settings import Data, Evaluation
from fastlm.decoding import sample
from fastlm.errors import UserError
from fastlm.measurement import code_execution, statistics
from fastlm.measurement.human_eval import Problem, pass_at_k, program
from fastlm.tasks.kind import Scored, Trained
from fastlm.tasks.sequence_to_sequence import SequenceToSequence
from fastlm.tasks.writing import Writing

ATTEMPTS = (1, 10, 100)  # k of pass@k, as far as there are so many solutions


@dataclasses.dataclass(frozen=True)
class CodeGeneration(SequenceToSequence):
    """The kind "code_generation"; see `SequenceToSequence` for the fields."""

    source: str = "prompt"
    target: str = "body"
    scores: tuple[str, ...] = ("chrf", "exact")
    beams: int = 1
    label_smoothing: float = 0.0

    families = ("decoder",)

    def texts(self, row: Row) -> tuple[str, str]:
        """Returns prompt and body, the space between them with the body: tokens of code begin with it."""
        prompt, body = super().texts(row)
        return prompt.rstrip(), prompt[len(prompt.rstrip()) :] + body

    def score(self, trained: Trained, data: Data, evaluation: Evaluation, split: str, limit: int = 0) -> Scored:
        """Adds to the scores of the texts the share of functions that compile."""
        scored = super().score(trained, data, evaluation, split, limit)
        whole = [_is_function(output["source"], output["said"]) for output in scored.outputs]
        share = statistics.mean([float(compiled) for compiled in whole])
        metrics = scored.metrics | {"compiles": share.value, "compiles_error": share.error}
        outputs = [output | {"compiles": compiled} for output, compiled in zip(scored.outputs, whole)]
        return Scored(metrics, outputs)


@dataclasses.dataclass(frozen=True)
class Attempts:
    """How problems are tried.

    Attributes:
      samples: solutions written to each.
      how, seed: how they are drawn.
      max_tokens: of each; fewer where the context ends.
      batch_size: solutions written at a time.
      timeout_seconds: of the tests of one.
    """

    samples: int = 1
    how: sample.Sampling = sample.Sampling(temperature=0.0)
    seed: int = 0
    max_tokens: int = 256
    batch_size: int = 16
    timeout_seconds: float = 5.0

    def __post_init__(self) -> None:
        if min(self.samples, self.max_tokens, self.batch_size) < 1:
            raise UserError("samples, max_tokens and batch_size must be at least 1")
        if self.samples > 1 and self.how.temperature == 0:
            raise UserError(f"{self.samples} samples at temperature 0 are all the same; raise the temperature")


def solve(trained: Trained, writing: Writing, problems: Sequence[Problem], attempts: Attempts) -> Scored:
    """Writes solutions, runs their tests in isolation, and gives pass@k and the share that compiles.

    Args:
      writing: how the model continues a prompt.

    Raises:
      UserError: the machine has no way to isolate a program, or a prompt does not fit the context.
    """
    code_execution.run_tests(["pass"])  # without isolation, fail before an hour of writing
    problems = [dataclasses.replace(problem, prompt=problem.prompt.rstrip()) for problem in problems]
    bodies = [function_body(text) for text in _write(trained, writing, problems, attempts)]
    written = list(zip([problem for problem in problems for _ in range(attempts.samples)], bodies))
    programs = [program(problem, body) for problem, body in written]
    outcomes = code_execution.run_tests(programs, timeout_seconds=attempts.timeout_seconds)
    compiled = [_is_function(problem.prompt, body) for problem, body in written]
    outputs = [
        {"task_id": problem.task_id, "said": body, "compiles": whole, "status": outcome.status, "error": outcome.error}
        for (problem, body), whole, outcome in zip(written, compiled, outcomes)
    ]
    passed = np.array([outcome.passed for outcome in outcomes]).reshape(len(problems), attempts.samples)
    metrics: dict[str, float] = {"problems": float(len(problems)), "samples": float(attempts.samples)}
    for k in (k for k in ATTEMPTS if k <= attempts.samples):
        metrics |= _named(f"pass@{k}", pass_at_k(attempts.samples, passed.sum(axis=1), k))
    return Scored(metrics | _named("compiles", np.reshape(compiled, passed.shape).mean(axis=1)), outputs)


def function_body(completion: str) -> str:
    """Returns the lines that still belong to the function: up to the first that is not indented.

    A string that goes over several lines must be indented too.
    """
    first, *rest = completion.split("\n")  # the first goes on in the prompt's last line
    return "\n".join([first, *takewhile(_belongs, rest)]).rstrip() + "\n"


def _belongs(line: str) -> bool:
    return not line.strip() or line[0] in " \t)]}"


def _write(trained: Trained, writing: Writing, problems: Sequence[Problem], attempts: Attempts) -> list[str]:
    """Returns the completions, those of one problem beside each other."""
    rows = [writing.read(problem.prompt) for problem in problems for _ in range(attempts.samples)]
    context, texts = trained.model.cfg.max_length, [""] * len(rows)
    text_of = functools.partial(sample.text_of, trained.tokenizer)
    enough = lambda tokens: not all(map(_belongs, text_of(tokens).split("\n")[1:]))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # like lengths together: few shapes
    for start in range(0, len(order), attempts.batch_size):
        chosen = order[start : start + attempts.batch_size]
        room = context - len(rows[chosen[-1]])
        if room < 1:
            raise UserError(f"a prompt of {len(rows[chosen[-1]])} tokens fills the model's context of {context}")
        chunks = sample.generate(
            trained.model,
            trained.weights["model"],
            [rows[i] for i in chosen],
            max_tokens=min(attempts.max_tokens, room),
            how=attempts.how,
            seed=attempts.seed + start,
            **writing.rules,
        )
        for i, tokens in zip(chosen, sample.until_end(chunks, *writing.ends, enough=enough)):
            texts[i] = text_of(tokens)
    return texts


def _is_function(prompt: str, body: str) -> bool:
    """Whether there is a body, and it compiles under its prompt (which does alone, being a docstring)."""
    return bool(body.strip()) and code_execution.compiles(prompt + body)


def _named(name: str, values: np.ndarray) -> dict[str, float]:
    estimate = statistics.mean(values)
    return {name: estimate.value, f"{name}_error": estimate.error}
