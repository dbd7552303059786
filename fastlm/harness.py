"""The tasks of lm-evaluation-harness on a model of ours.

    pip install "lm-eval>=0.4.13,<0.5"          # optional; brings no torch
    python -m fastlm.harness --workdir runs/lm_small --tasks lambada_openai,arc_easy --limit 100

`--include_path` adds a folder of one's own task files (YAML), which need no network. Prints the
harness's table and, with `--output`, writes its results as JSON. For decoders that continue text; requests that do not
fit the context are cut, and how many is logged. Left out: chat templates and multimodal requests; the harness's own
cache and its `--model` strings.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from fastlm import command_line
from fastlm.decoding.answers import Answers
from fastlm.errors import UserError
from fastlm.parallel import mesh as meshes
from fastlm.training import restore, workdir_files

WORKDIR = flags.DEFINE_string("workdir", None, "a run of fastlm.train, or what fastlm.convert wrote")
STEP = flags.DEFINE_string("step", "", "checkpoint: a number, 'best', or nothing for the newest")
TASKS = flags.DEFINE_list("tasks", None, "names of harness tasks, separated by commas")
INCLUDE_PATH = flags.DEFINE_string("include_path", None, "folder with task files of one's own")
LIMIT = flags.DEFINE_integer("limit", 0, "examples per task; 0 takes all", lower_bound=0)
FEWSHOT = flags.DEFINE_integer("num_fewshot", -1, "examples in the prompt; -1 takes the task's own", lower_bound=-1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "requests scored at a time", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", "", "file for the results as JSON")
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "compute type; default that of training")


def main() -> None:
    """Restores, runs the tasks, prints the table."""
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as error:
        raise UserError(f'the harness is not installed ({error}): pip install "lm-eval>=0.4.13,<0.5"') from None
    mesh = meshes.make()
    jax.set_mesh(mesh)
    restored = restore.restore(WORKDIR.value, mesh, step=STEP.value, dtype=DTYPE.value)
    results = lm_eval.simple_evaluate(
        model=adapter(restored, BATCH_SIZE.value),
        tasks=TASKS.value,
        task_manager=TaskManager(include_path=INCLUDE_PATH.value),
        limit=LIMIT.value or None,
        num_fewshot=None if FEWSHOT.value < 0 else FEWSHOT.value,
        log_samples=False,
    )
    print(make_table(results))
    if OUTPUT.value:
        workdir_files.write_whole(Path(OUTPUT.value), json.dumps(results["results"], indent=1, default=str) + "\n")


def adapter(restored: restore.Restored, batch_size: int) -> Any:
    """Returns the model as the harness's class `LM`.

    Raises:
      UserError: the model is none that the tasks can be asked of; see `Answers`.
    """
    from lm_eval.api.model import LM

    answers = Answers(restored.model, restored.params, restored.tokenizer, batch_size)

    class FastLM(LM):
        """A restored model; requests carry their arguments in `args`."""

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            """Returns (log-probability, whether greedy decoding says the same) of each continuation."""
            return answers.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            """Returns the log-probability of each whole text."""
            return answers.rolling([request.args[0] for request in requests])

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            """Returns each continuation up to the first of its stop texts."""
            return answers.generate([request.args for request in requests])

    return FastLM()


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir", "tasks"])
    command_line.main(main)
