"""Scores a trained model: `python -m fastlm.evaluate --workdir runs/lm_small`.

By default on the test split of the data it was trained on; `--source` takes any source the data
pipeline knows (`text:my/*.txt`, `jsonl:my.jsonl#body`, `python_stdlib`). With `--problems FILE`, a model that
continues text writes Python functions instead, whose tests are run in isolation, if that is allowed. Prints one line
of metrics and one of JSON. With `--runtime onnx` or `--runtime stablehlo`, what fastlm.export wrote is scored instead.

With `--attention_maps` nothing is scored: what each head looks at in one text is drawn, measured and put on a page.

    python -m fastlm.evaluate --workdir runs/lm_small --attention_maps --text "Fellow citizens of the Senate"
"""

import json
from pathlib import Path

import jax
from absl import flags

from fastlm import command_line
from fastlm.decoding.sample import Sampling
from fastlm.errors import UserError
from fastlm.exports import runtimes
from fastlm.measurement.human_eval import Problem, read_human_eval
from fastlm.parallel import mesh as meshes
from fastlm.parallel import multihost
from fastlm.tasks import code_generation
from fastlm.tasks.code_generation import Attempts
from fastlm.tasks.kind import Scored
from fastlm.training import quality, restore

WORKDIR = flags.DEFINE_string("workdir", None, "a run of fastlm.train")
RUNTIME = flags.DEFINE_enum("runtime", "jax", runtimes.RUNTIMES, "what runs it; but for jax, --workdir is an export")
STEP = flags.DEFINE_string("step", "", "checkpoint: a number, 'best', or nothing for the newest")
SOURCE = flags.DEFINE_multi_string("source", [], "what to score instead of the training data; may be repeated")
SPLIT = flags.DEFINE_string(
    "split", "", "split to score; default the final one of the config, or all for --source text: and jsonl:"
)
LENGTH = flags.DEFINE_integer("length", 0, "context in tokens; 0 takes that of training", lower_bound=0)
OVERLAP = flags.DEFINE_integer(
    "overlap", -1, "context tokens repeated, unscored, per window; -1 takes the config's", lower_bound=-1
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 16, "rows per batch; rounded up to a multiple of the devices", lower_bound=1
)
BATCHES = flags.DEFINE_integer("batches", 0, "score only this many batches; 0 scores all", lower_bound=0)
OUTPUTS = flags.DEFINE_integer("outputs", 0, "print so many of the model's answers, for tasks that have them")
TENSOR = flags.DEFINE_integer("tensor", 1, "devices that share each weight (tensor parallelism)", lower_bound=1)
AVERAGE = flags.DEFINE_bool("average", None, "use averaged weights; default: if the run kept any")
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "compute type; default that of training")

PROBLEMS = flags.DEFINE_string("problems", "", "file in HumanEval's format: score by the tests that solutions pass")
ALLOW_CODE_EXECUTION = flags.DEFINE_bool("allow_code_execution", False, "with --problems: run what the model writes")
SAMPLES = flags.DEFINE_integer("samples", 1, "with --problems: solutions written to each", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "with --problems: of the drawing; 0 takes the likeliest token")
SEED = flags.DEFINE_integer("seed", 0, "with --problems: of the drawing", lower_bound=0, upper_bound=2**32 - 1)
flags.DEFINE_alias("allow-code-execution", "allow_code_execution")

ATTENTION_MAPS = flags.DEFINE_bool("attention_maps", False, "draw what each head looks at in a text, score nothing")
TEXT = flags.DEFINE_multi_string(
    "text", [], "with --attention_maps: the text, by default the split's first; once for each field the task reads"
)
TEXT_FILE = flags.DEFINE_string("text_file", "", "with --attention_maps: file with the text, or with the last of them")
MAP_TOKENS = flags.DEFINE_integer(
    "map_tokens",
    0,
    "with --attention_maps: first tokens of the text to read; 0 takes 128, or the context",
    lower_bound=0,
)
MAPS_FOLDER = flags.DEFINE_string("maps_folder", "", "with --attention_maps: default attention_maps in the workdir")
flags.DEFINE_alias("attention-maps", "attention_maps")
flags.DEFINE_alias("text-file", "text_file")
flags.DEFINE_alias("map-tokens", "map_tokens")
flags.DEFINE_alias("maps-folder", "maps_folder")


def main() -> None:
    """Restores, scores, prints."""
    problems, texts = read_problems(), read_texts()
    mesh = meshes.share_weights(TENSOR.value)
    jax.set_mesh(mesh)
    options = {"step": STEP.value, "average": AVERAGE.value, "dtype": DTYPE.value}
    restored = runtimes.restore(RUNTIME.value, WORKDIR.value, mesh, **options)
    if ATTENTION_MAPS.value:
        draw_attention(restored, mesh, texts)
        return
    scored = solve(restored, mesh, problems) if problems else quality.score(restored, mesh, asked())
    metrics = scored.metrics
    shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    if multihost.is_primary():
        print(f"step {restored.step}: {shown}")
        for output in scored.outputs[: OUTPUTS.value]:
            print(json.dumps(output, ensure_ascii=False))
        print(json.dumps({"workdir": WORKDIR.value, "step": restored.step, "metrics": metrics}))


def asked() -> quality.Asked:
    """Returns what the flags ask for."""
    return quality.Asked(SOURCE.value, SPLIT.value, LENGTH.value, OVERLAP.value, BATCH_SIZE.value, BATCHES.value)


def draw_attention(restored: restore.Restored, mesh: jax.sharding.Mesh, texts: list[str]) -> None:
    """Writes what the model looks at in the texts, or else in the first example of the split."""
    from fastlm.reports import attention_maps  # draws, and so imports a plotting library that scoring does without

    data, _, split = quality.data_of(restored, asked())
    kind = restored.kind()
    if not texts and not data.sources:
        raise UserError("no text to look at; give --text, --text_file or --source")
    texts = texts or kind.first_example(data, split)
    title = f"Attention of {Path(WORKDIR.value).absolute().name}, step {restored.step}"
    looked = attention_maps.look(kind, restored.trained(kind, mesh), data, texts, MAP_TOKENS.value, title)
    if multihost.is_primary():
        page, *files = attention_maps.write(looked, Path(MAPS_FOLDER.value or Path(WORKDIR.value) / "attention_maps"))
        print(*filter(None, [looked.notice, f"wrote {page} and {len(files)} files beside it"]), sep="\n")


def read_texts() -> list[str]:
    """Returns the texts to look at.

    Raises:
      UserError: there are some and nothing looks at them, or a file that cannot be read.
    """
    if (TEXT.value or TEXT_FILE.value) and not ATTENTION_MAPS.value:
        raise UserError("--text and --text_file go with --attention_maps; to score a text, give --source text:FILE")
    if not TEXT_FILE.value:
        return TEXT.value
    try:
        return [*TEXT.value, Path(TEXT_FILE.value).read_bytes().decode()]
    except OSError as error:
        raise UserError(f"--text_file: {TEXT_FILE.value}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--text_file: {TEXT_FILE.value}: no UTF-8 at byte {error.start}; convert the file") from None


def read_problems() -> list[Problem]:
    """Returns the problems asked for, none if none are.

    Raises:
      UserError: running code is not allowed, or the file holds no problems.
    """
    if not PROBLEMS.value:
        return []
    if not ALLOW_CODE_EXECUTION.value:
        raise UserError("--problems runs programs that the model writes (isolated); allow it: --allow-code-execution")
    return read_human_eval(PROBLEMS.value)


def solve(restored: restore.Restored, mesh: jax.sharding.Mesh, problems: list[Problem]) -> Scored:
    """Has the model write solutions, and runs their tests."""
    kind = restored.kind()
    writing = kind.writing(restored.model.cfg, restored.tokenizer)
    if writing.start is not None:
        raise UserError("--problems: only a decoder continues the header of a function")
    how = Sampling(temperature=TEMPERATURE.value, top_p=0.95)
    attempts = Attempts(SAMPLES.value, how, SEED.value, batch_size=BATCH_SIZE.value)
    return code_generation.solve(restored.trained(kind, mesh), writing, problems, attempts)


if __name__ == "__main__":
    flags.mark_flag_as_required("workdir")
    command_line.main(main)
