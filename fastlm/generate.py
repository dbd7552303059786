"""Continues prompts with a trained model.

    python -m fastlm.generate --workdir runs/lm_small --prompt "Fellow citizens"

One `--prompt` streams to the terminal as it is made; several, or `--prompts FILE` (one a line),
run as a batch and are printed in order. The same seed gives the same text.
"""

from pathlib import Path

import jax
from absl import flags

from fastlm import command_line
from fastlm.decoding import sample
from fastlm.errors import UserError
from fastlm.parallel import mesh as meshes
from fastlm.parallel import multihost
from fastlm.training import restore

WORKDIR = flags.DEFINE_string("workdir", None, "a run of fastlm.train")
STEP = flags.DEFINE_string("step", "", "checkpoint: a number, 'best', or nothing for the newest")
PROMPT = flags.DEFINE_multi_string("prompt", [], "text to continue; may be repeated")
PROMPTS = flags.DEFINE_string("prompts", "", "file with one prompt per line")
MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 0, "tokens to add; 0 takes 200, or what fits the context", lower_bound=0
)
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 always takes the likeliest token")
TOP_K = flags.DEFINE_integer("top_k", 0, "keep the k likeliest tokens; 0 keeps all")
TOP_P = flags.DEFINE_float("top_p", 0.95, "keep the likeliest tokens that make up this probability")
MIN_P = flags.DEFINE_float("min_p", 0.0, "keep tokens at least this share as likely as the likeliest")
SEED = flags.DEFINE_integer("seed", 0, "of the random draws", lower_bound=0, upper_bound=2**32 - 1)
AVERAGE = flags.DEFINE_bool("average", None, "use averaged weights; default: if the run kept any")
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "compute type; default that of training")

DEFAULT_TOKENS = 200


def main() -> None:
    """Restores, continues, prints."""
    prompts = read_prompts()
    how = sample.Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value, MIN_P.value)
    mesh = meshes.make()
    jax.set_mesh(mesh)
    restored = restore.restore(WORKDIR.value, mesh, step=STEP.value, average=AVERAGE.value, dtype=DTYPE.value)
    tokenizer = restored.tokenizer
    ids = [sample.prompt_ids(tokenizer, prompt) for prompt in prompts]
    room = restored.model.cfg.max_length - max(map(len, ids))
    max_tokens = MAX_TOKENS.value or max(1, min(DEFAULT_TOKENS, room))
    chunks = sample.generate(restored.model, restored.params, ids, max_tokens=max_tokens, how=how, seed=SEED.value)
    # Every process reads the same tokens and so stops at the same chunk; one of them talks.
    say = print if multihost.is_primary() else lambda *words, **options: None
    if len(prompts) == 1:
        say(prompts[0], end="")
        for piece in sample.stream(tokenizer, chunks):
            say(piece, end="", flush=True)
        say()
        return
    for prompt, row in zip(prompts, sample.until_end(chunks, tokenizer.eos)):
        say(f"--- {prompt!r}\n{prompt}{sample.text_of(tokenizer, row)}\n")


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
    if not prompts:
        raise UserError("nothing to continue; give --prompt TEXT or --prompts FILE with one prompt per line")
    return prompts


if __name__ == "__main__":
    flags.mark_flag_as_required("workdir")
    command_line.main(main)
