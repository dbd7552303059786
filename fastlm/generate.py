"""Has a trained model write: continue a text, answer in a chat, translate or summarise, whatever its task is.

    python -m fastlm.generate --workdir runs/lm_small --prompt "Fellow citizens"
    python -m fastlm.generate --workdir runs/smollm2 --chat --prompt "Why is the sky blue?"
    python -m fastlm.generate --workdir runs/translate_small --prompt "In the beginning" --beams 4

One `--prompt` streams to the terminal as it is made; several, or `--prompts FILE` (one a line), are printed in order,
`--rows` being written at a time: one that ends makes room for the next (searches, drafts and exports finish such a
group first). The same seed gives the same text. `--beams` searches for the likeliest text instead of drawing one.
`--draft` has a smaller model of the same tokenizer, or with `--draft lookup` the text so far, propose tokens that the
model only checks: the same distribution, the same greedy text, in fewer readings. With `--runtime onnx` or
`--runtime stablehlo` it is what fastlm.export wrote that writes.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from fastlm import command_line
from fastlm.data import chat
from fastlm.data.tokenizers.base import check_text
from fastlm.decoding import batching, beam, drafts, inputs, sample, speculative
from fastlm.errors import UserError
from fastlm.exports import runtimes
from fastlm.parallel import mesh as meshes
from fastlm.parallel import multihost
from fastlm.tasks.writing import Writing
from fastlm.training import restore

WORKDIR = flags.DEFINE_string("workdir", None, "a run of fastlm.train, or what fastlm.convert wrote")
RUNTIME = flags.DEFINE_enum("runtime", "jax", runtimes.RUNTIMES, "what runs it; but for jax, --workdir is an export")
STEP = flags.DEFINE_string("step", "", "checkpoint: a number, 'best', or nothing for the newest")
PROMPT = flags.DEFINE_multi_string("prompt", [], "text to continue, or to answer; may be repeated")
PROMPTS = flags.DEFINE_string("prompts", "", "file with one prompt per line")
MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 0, "tokens to add; 0 takes 200, or what fits the context", lower_bound=0
)
CHAT = flags.DEFINE_bool("chat", False, "prompts are what a user says, put into the model's own chat template")
SYSTEM = flags.DEFINE_string("system", "", "with --chat: what the model is told before")
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 always takes the likeliest token")
TOP_K = flags.DEFINE_integer("top_k", 0, "keep the k likeliest tokens; 0 keeps all")
TOP_P = flags.DEFINE_float("top_p", 0.95, "keep the likeliest tokens that make up this probability")
MIN_P = flags.DEFINE_float("min_p", 0.0, "keep tokens at least this share as likely as the likeliest")
SEED = flags.DEFINE_integer("seed", 0, "of the random draws", lower_bound=0, upper_bound=2**32 - 1)
BEAMS = flags.DEFINE_integer("beams", 0, "search with so many beams instead of drawing; 0 draws", lower_bound=0)
N_BEST = flags.DEFINE_integer("n_best", 1, "with --beams: texts shown per prompt, with their scores", lower_bound=1)
LENGTH_PENALTY = flags.DEFINE_float("length_penalty", 1.0, "with --beams: more than 0 likes length")
STOP = flags.DEFINE_multi_string("stop", [], "text that ends what is written, and is not shown; may be repeated")
ROWS = flags.DEFINE_integer("rows", 8, "of several prompts, so many are written at a time", lower_bound=1)
LOG_PROBABILITIES = flags.DEFINE_bool("log_probabilities", False, "show that of each text, in nats, by the model alone")
DRAFT = flags.DEFINE_string("draft", "", "speculative decoding: workdir of a smaller model that proposes, or 'lookup'")
SPAN = flags.DEFINE_integer("span", 4, "with --draft: tokens proposed at a time", lower_bound=1)
FUSED = flags.DEFINE_bool("fused", True, "products of the same input as one: the same model, and up to a tenth faster")
CACHE_DTYPE = flags.DEFINE_enum("cache_dtype", None, ["int8"], "type of kept keys and values; default that of compute")
TENSOR = flags.DEFINE_integer("tensor", 1, "devices that share each weight (tensor parallelism)", lower_bound=1)
WEIGHTS = flags.DEFINE_enum("weights", None, ["int8"], "type of weights while it writes; default as they are stored")
AVERAGE = flags.DEFINE_bool("average", None, "use averaged weights; default: if the run kept any")
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "compute type; default that of training")

DEFAULT_TOKENS = 200


def main() -> None:
    """Restores, writes, prints."""
    prompts = read_prompts()
    mesh = meshes.share_weights(TENSOR.value)
    jax.set_mesh(mesh)
    options = {"step": STEP.value, "average": AVERAGE.value, "dtype": DTYPE.value, "cache_dtype": CACHE_DTYPE.value}
    options |= {"fused": FUSED.value, "weights": WEIGHTS.value}
    restored = runtimes.restore(RUNTIME.value, WORKDIR.value, mesh, **options)
    writing = chatting(restored) if CHAT.value else task_writing(restored)
    rows = [writing.read(prompt) for prompt in prompts]
    longest = 1 if writing.start is not None else max(map(len, rows))
    max_tokens = MAX_TOKENS.value or max(1, min(DEFAULT_TOKENS, restored.model.cfg.max_length - longest))
    inputs.make(restored.model.cfg, rows, writing.start, max_tokens)  # what cannot be read is said before any text
    (search if BEAMS.value else draw)(restored, writing, prompts, rows, max_tokens)


def draw(
    restored: restore.Restored, writing: Writing, prompts: list[str], rows: list[Sequence[int]], max_tokens: int
) -> None:
    """Draws a text for each prompt; the only one appears as it is made."""
    options = {
        "max_tokens": max_tokens,
        "how": sample.Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value, MIN_P.value),
        "seed": SEED.value,
        "start": writing.start,
        **writing.rules,
    }
    if RUNTIME.value != "jax":
        draw_elsewhere(restored, writing, prompts, rows, options)
    elif DRAFT.value:
        draw_with_draft(restored, writing, prompts, rows, options)
    elif len(prompts) == 1 and not LOG_PROBABILITIES.value:
        show(restored, writing, prompts[0], sample.generate(restored.model, restored.params, rows, **options))
    else:
        serve(restored, writing, prompts, rows, options)


def draw_elsewhere(
    restored: restore.Restored,
    writing: Writing,
    prompts: list[str],
    rows: list[Sequence[int]],
    options: dict[str, Any],
) -> None:
    """Draws in another runtime, `--rows` texts at a time.

    Raises:
      UserError: what only our own runtime does is asked for.
    """
    for name, asked in (("draft", DRAFT.value), ("log_probabilities", LOG_PROBABILITIES.value)):
        if asked:
            raise UserError(f"--{name}: goes with --runtime jax")
    for several in groups(prompts):
        chunks = sample.generate(restored.model, restored.params, rows[several], first=several.start, **options)
        show_group(restored, writing, prompts, several, chunks)


def draw_with_draft(
    restored: restore.Restored,
    writing: Writing,
    prompts: list[str],
    rows: list[Sequence[int]],
    options: dict[str, Any],
) -> None:
    """Draws with another model, or the text itself, proposing."""
    if LOG_PROBABILITIES.value:
        raise UserError("--log_probabilities: are not kept with --draft; leave one of the two out")
    draft, weights = read_draft(restored)
    speculative.check_draft(restored.model, draft, options["max_tokens"], rows)
    options |= {"span": SPAN.value, "ends": writing.ends}
    rounds = kept = 0
    for several in groups(prompts):
        chunks = speculative.generate(
            *(restored.model, restored.params, draft, weights, rows[several]), first=several.start, **options
        )
        show_group(restored, writing, prompts, several, chunks)
        rounds, kept = rounds + chunks.rounds, kept + chunks.kept
    told = f"{kept / max(rounds, 1):.2f} tokens a reading, of at most {SPAN.value + 1}"
    say(f"draft {DRAFT.value}: {told}", file=sys.stderr)


def groups(prompts: list[str]) -> Iterator[slice]:
    """Yields which prompts are written together: `--rows` of them, so that memory does not grow with their number."""
    for begin in range(0, len(prompts), ROWS.value):
        yield slice(begin, begin + ROWS.value)


def show(restored: restore.Restored, writing: Writing, prompt: str, chunks: Iterable[Sequence[np.ndarray]]) -> None:
    """Prints one text as it is made."""
    say(prompt if writing.continues else "", end="")
    for piece in sample.stream(restored.tokenizer, chunks, writing.ends, not writing.continues, STOP.value):
        say(piece, end="", flush=True)
    say()


def show_group(
    restored: restore.Restored,
    writing: Writing,
    prompts: list[str],
    several: slice,
    chunks: Iterable[Sequence[np.ndarray]],
) -> None:
    """Prints texts that were written together, when all have ended; the only one that was asked for as it is made."""
    if len(prompts) == 1:
        show(restored, writing, prompts[0], chunks)
        return
    for prompt, row in zip(prompts[several], sample.until_end(chunks, *writing.ends)):
        say(f"--- {prompt!r}\n{text_of(restored, writing, prompt, row)}\n")


def serve(
    restored: restore.Restored,
    writing: Writing,
    prompts: list[str],
    rows: list[Sequence[int]],
    options: dict[str, Any],
) -> None:
    """Prints the texts of all prompts in their order, `--rows` of them being written at a time."""
    stopped = lambda tokens: sample.first_stop(sample.text_of(restored.tokenizer, tokens), STOP.value) is not None
    served = batching.serve(
        *(restored.model, restored.params, rows),
        **options,
        rows=ROWS.value,
        ends=writing.ends,
        **({"enough": stopped} if STOP.value else {}),
    )
    finished: dict[int, batching.Finished] = {}
    for text in served:
        finished[text.number] = text
        while (number := len(prompts) - len(rows)) in finished:
            rows = rows[1:]
            show_finished(restored, writing, prompts, finished.pop(number))


def show_finished(restored: restore.Restored, writing: Writing, prompts: list[str], text: batching.Finished) -> None:
    """Prints one of several texts."""
    prompt = prompts[text.number]
    say(f"--- {prompt!r}\n{text_of(restored, writing, prompt, text.tokens)}")
    if LOG_PROBABILITIES.value:
        say(f"log-probability {sum(text.log_probabilities):.4f} of {len(text.tokens)} tokens")
    say()


def read_draft(restored: restore.Restored) -> tuple[drafts.Draft, Any]:
    """Returns what proposes, and its weights.

    Raises:
      UserError: a model that splits text otherwise.
    """
    if DRAFT.value == "lookup":
        return drafts.LookupDraft(), None
    mesh = jax.sharding.get_mesh()  # of the large model
    options = {"dtype": DTYPE.value, "cache_dtype": CACHE_DTYPE.value, "fused": FUSED.value}
    draft = restore.restore(DRAFT.value, mesh, **options)
    if not draft.tokenizer.splits_like(restored.tokenizer):
        raise UserError(f"--draft: {DRAFT.value} has another tokenizer than {WORKDIR.value}; it needs the same")
    return drafts.ModelDraft(draft.model), draft.params


def search(
    restored: restore.Restored, writing: Writing, prompts: list[str], rows: list[Sequence[int]], max_tokens: int
) -> None:
    """Searches for the likeliest texts of each prompt."""
    for name, value in (("draft", DRAFT.value), ("log_probabilities", LOG_PROBABILITIES.value)):
        if value:
            raise UserError(f"--{name}: a search with --beams takes none; leave one of the two out")
    if len(writing.ends) > 1:
        raise UserError(f"--beams: any of {len(writing.ends)} tokens ends a turn of this model, and a search knows one")
    find = functools.partial(
        beam.search,
        restored.model,
        restored.params,
        max_tokens=max_tokens,
        beams=BEAMS.value,
        n_best=N_BEST.value,
        length_penalty=LENGTH_PENALTY.value,
        start=writing.start,
        end=writing.ends[0],
        **writing.rules,
    )
    found = (hypotheses for several in groups(prompts) for hypotheses in find(rows[several]))
    for prompt, hypotheses in zip(prompts, found):
        say(f"--- {prompt!r}" if len(prompts) > 1 else "", end="\n" if len(prompts) > 1 else "")
        for hypothesis in hypotheses:
            score = f"{hypothesis.score:.3f}  " if N_BEST.value > 1 else ""
            say(score + text_of(restored, writing, prompt, hypothesis.tokens))


def task_writing(restored: restore.Restored) -> Writing:
    """Returns how the task that the model was trained for writes."""
    return restored.kind().writing(restored.model.cfg, restored.tokenizer)


def chatting(restored: restore.Restored) -> Writing:
    """Returns how the model answers in a chat."""
    came = restored.about.get("huggingface", {})
    stated = came.get("generation", {}).get("eos_token_id", [])
    ends = dict.fromkeys([restored.tokenizer.eos, *(stated if isinstance(stated, list) else [stated])])
    told = [{"role": "system", "content": SYSTEM.value}] if SYSTEM.value else []

    def read(text: str) -> Sequence[int]:
        messages = [*told, {"role": "user", "content": text}]
        names = came.get("special_tokens", {})
        return chat.encode(came.get("chat_template"), restored.tokenizer, messages, names)

    plain = task_writing(restored)
    return dataclasses.replace(plain, read=read, ends=tuple(ends), continues=False)


def text_of(restored: restore.Restored, writing: Writing, prompt: str, tokens: Sequence[int]) -> str:
    """Returns what was written up to a stop, behind its prompt where it continues that."""
    text = sample.text_of(restored.tokenizer, tokens) if writing.continues else restored.tokenizer.decode(tokens)
    return (prompt if writing.continues else "") + text[: sample.first_stop(text, STOP.value)]


def say(*words: str, **options: object) -> None:
    """Prints on one process: every process reads the same tokens and so stops at the same chunk."""
    if multihost.is_primary():
        print(*words, **options)


def read_prompts() -> list[str]:
    """Returns the prompts of the command line.

    Raises:
      UserError: none, or a file that cannot be read as UTF-8 lines.
    """
    prompts = list(PROMPT.value)
    if PROMPTS.value:
        try:
            text = Path(PROMPTS.value).read_bytes().decode()
        except OSError as error:
            raise UserError(f"--prompts: {PROMPTS.value}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"--prompts: {PROMPTS.value}: no UTF-8 at byte {error.start}; convert the file") from None
        prompts += [line for line in text.splitlines() if line.strip()]
    for prompt in prompts:
        check_text(prompt, "the prompt")
    if not prompts:
        raise UserError("nothing to continue; give --prompt TEXT or --prompts FILE with one prompt per line")
    return prompts


if __name__ == "__main__":
    flags.mark_flag_as_required("workdir")
    command_line.main(main)
