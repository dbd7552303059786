"""The long-range suite: tasks x attention kinds x seeds, each an ordinary training, into one table.

    launch/local.sh -m experiments.long_range --folder runs/long_range --tasks list_ops,digits \\
        --kinds full,local,linear --seeds 0

Every run is `fastlm.train` on a config of configs/long_range in a process of its own, with a workdir under --folder; a
finished one is a line of results.jsonl there and is not run again, a stopped one resumes. More overrides
(--config.training.steps=3000) go to every run. --kinds takes names or whole specs ("local(window=32)"); without it, all
kinds that can look ahead. --size paper takes the sizes of the paper. Time on two quiet cores: five to ten minutes a
run; --at_once 2 trains two side by side, each on its share of the cores: small models use one core better than two.
Accuracy is that of the test split, its error over rows (and over seeds, where there are several); a result within
two errors of the best constant answer is called not learned. Speeds are taken at the end, one task after the other,
with nothing else running: all its kinds take turns at training steps on a batch of the longest rows, and medians count.
Memory is what such a step needs beside its state and batch, and the peak of the whole process, data and compilation
included.
Beside it stands Table 1 of Long Range Arena (arXiv 2011.04006), as secondary sources repeat it: its data (but for
ListOps and Pathfinder, which are made alike), sizes and budgets are others, so it says what order to expect, no more.
"""

import dataclasses
import functools
import json
import math
import re
import signal
import statistics
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from experiments import runs
from experiments import steps as training_steps
from fastlm import command_line
from fastlm.errors import UserError, nearest
from fastlm.measurement import workers
from fastlm.models import attention
from fastlm.training import workdir_files

FLAGS = flags.FLAGS
CONFIGS = Path("configs/long_range")

# Our task -> the column of the paper's table that it stands for; the shipped digits have none.
TASKS = {
    "list_ops": "ListOps",
    "digits": "",
    "pathfinder": "Pathfinder",
    "text_bytes": "Text",
    "retrieval_bytes": "Retrieval",
    "cifar10": "Image",
}
SHIPPED = tuple(task for task in TASKS if task != "cifar10")  # which has to be fetched

# The options that a kind has at these lengths, 500 to 4,000 tokens; a kind that is not here has its own defaults.
SPECS = {
    "local": "local(window=64)",
    "chunk": "chunk(size=64)",
    "block_sparse": "block_sparse(block=32)",
    "lsh": "lsh(chunk=32)",
    "hierarchical": "hierarchical(block=32)",
}

COLUMNS = ("ListOps", "Text", "Retrieval", "Image", "Pathfinder")
PUBLISHED = {  # accuracy in percent; the row of the paper's table that a kind stands for
    "full": ("Transformer", (36.37, 64.27, 57.46, 42.44, 71.40)),
    "local": ("Local Attention", (15.82, 52.98, 53.39, 41.46, 66.63)),
    "linear": ("Linear Transformer", (16.13, 65.90, 53.09, 42.34, 75.30)),
    "performer": ("Performer", (18.01, 65.40, 53.82, 42.77, 77.05)),
    "linformer": ("Linformer", (35.70, 53.94, 52.27, 38.56, 76.34)),
    "lsh": ("Reformer", (37.27, 56.10, 53.40, 38.07, 68.50)),
    "block_sparse": ("BigBird", (36.05, 64.02, 59.29, 40.83, 74.87)),
}
BASELINE = "full"
COSTS = "costs.json"


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: what is learned, with which attention, from which seed, and the trainer's arguments."""

    task: str
    kind: str
    seed: int
    workdir: Path
    arguments: tuple[str, ...]

    @property
    def log(self) -> Path:
        """What the trainer printed, all attempts appended."""
        return runs.log_of(self.workdir)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to; one line of results.jsonl.

    Attributes:
      accuracy, accuracy_error: of the test rows, and its standard error.
      chance: accuracy of the best constant answer on these rows.
      peak_memory: of the process that ended the run, in MiB.
    """

    task: str
    kind: str
    seed: int
    accuracy: float
    accuracy_error: float
    chance: float
    rows: int
    peak_memory: float
    arguments: tuple[str, ...]


def plan(
    tasks: Sequence[str], kinds: Sequence[str], seeds: Sequence[int], folder: Path, size: str, overrides: Sequence[str]
) -> list[Run]:
    """Lists all runs, seeds outermost: after a share of the time there is a whole first table.

    Raises:
      UserError: an unknown task or kind, or a kind that cannot look ahead.
    """
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"--tasks: unknown '{task}'{nearest(task, TASKS)} (one of: {', '.join(TASKS)})")
    for kind in kinds:
        attention.require(kind, "bidirectional")
    shared = tuple(f"--config.{override}" for override in overrides)
    planned = []
    for seed in seeds:
        for task in tasks:
            for kind in kinds:
                workdir = folder / task / re.sub(r"[^\w.=]+", "_", kind).strip("_") / f"seed{seed}"
                config = f"{CONFIGS / task}.py" + (f":{size}" if size else "")
                own = (f"--config.seed={seed}", f"--config.model.attention={SPECS.get(kind, kind)}")
                planned.append(Run(task, kind, seed, workdir, ("--config", config, *shared, *own)))
    return planned


def bidirectional() -> list[str]:
    """Returns the names of all kinds that an encoder can have."""
    return [name for name, kind in attention.KINDS.items() if kind.bidirectional]


def finished(folder: Path, wanted: Sequence[Run]) -> dict[Run, Result]:
    """Returns the results that are there already.

    Raises:
      UserError: a run was made with other settings.
    """
    path = folder / "results.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    known = {(line["task"], line["kind"], line["seed"]): line for line in map(json.loads, lines)}
    found = {}
    for run in wanted:
        line = known.get((run.task, run.kind, run.seed))
        if line and tuple(line["arguments"]) != run.arguments:
            raise UserError(
                f"{path} has {run.workdir} with other settings ({' '.join(line['arguments'])}); name another --folder"
            )
        if line:
            found[run] = Result(**line | {"arguments": run.arguments})
    return found


def result_of(run: Run, outcome: runs.Outcome) -> Result:
    """Returns what a finished training came to."""
    labels = Counter(json.loads(line)["label"] for line in (run.workdir / "predictions.jsonl").open(encoding="utf-8"))
    return Result(
        task=run.task,
        kind=run.kind,
        seed=run.seed,
        accuracy=outcome.metrics["accuracy"],
        accuracy_error=outcome.metrics["accuracy_error"],
        chance=max(labels.values()) / labels.total(),
        rows=labels.total(),
        peak_memory=outcome.peak_memory,
        arguments=run.arguments,
    )


class Cost(NamedTuple):
    """What a training step on the longest rows takes: median seconds, and MiB beside its state and batch."""

    seconds: float
    mebibytes: float


def step_costs(wanted: Sequence[Run], turns: int = 5, steps: int = 2) -> dict[str, Cost]:
    """Returns what a training step of each of these runs' kinds takes, timed by turns."""
    with tempfile.TemporaryDirectory() as unused:
        each = {}
        for run in wanted:
            _, file, *changes = run.arguments
            config = command_line.load_config(file, [change.removeprefix("--config.") for change in changes])
            step = each[run.kind] = training_steps.TrainingStep(config, Path(unused))
            for _ in range(2):  # let the allocator settle
                step()
        timers = {kind: functools.partial(workers.timed, step, steps) for kind, step in each.items()}
        taken = workers.take_turns(timers, turns)
    median = lambda kind: statistics.median(turn["seconds"] for turn in taken[kind])
    return {kind: Cost(median(kind), step.mebibytes) for kind, step in each.items()}


def table(results: Sequence[Result], costs: Mapping[str, Mapping[str, Cost]]) -> str:
    """Returns the results as Markdown, a line for each task and kind, in the order they first come.

    Args:
      costs: of a step, by task and kind, as far as they were taken.
    """
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.task, result.kind), []).append(result)
    lines = [
        "| task | attention | seeds | accuracy | best constant | ms/step | of full's speed | MiB of a step | peak MiB "
        "| published |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (task, kind), group in sorted(groups.items(), key=lambda item: list(TASKS).index(item[0][0])):
        known = costs.get(task, {})
        relative = f"{known[BASELINE].seconds / known[kind].seconds:.2f}" if {kind, BASELINE} <= known.keys() else "-"
        shown = ["-"] * 3
        if kind in known:
            shown = [f"{1e3 * known[kind].seconds:.0f}", relative, f"{known[kind].mebibytes:.0f}"]
        lines.append(
            f"| {task} | {SPECS.get(kind, kind)} | {len(group)} | {shown_accuracy(group)} "
            f"| {_mean(group, 'chance'):.3f} | {' | '.join(shown)} "
            f"| {_mean(group, 'peak_memory'):.0f} | {published(task, kind)} |"
        )
    return "\n".join(lines)


def shown_accuracy(group: Sequence[Result]) -> str:
    """Returns mean and standard error, or that nothing was learned. Seeds share test rows, whose error stays."""
    accuracy, error = _mean(group, "accuracy"), _mean(group, "accuracy_error")
    if len(group) > 1:
        error = math.hypot(error, statistics.stdev(result.accuracy for result in group) / math.sqrt(len(group)))
    text = f"{accuracy:.3f} ± {error:.3f}"
    return text if accuracy - _mean(group, "chance") > 2 * error else f"not learned here ({text})"


def published(task: str, kind: str) -> str:
    """Returns the paper's accuracy and what it calls the kind, "-" where it has none."""
    if not TASKS[task] or kind not in PUBLISHED:
        return "-"
    name, accuracies = PUBLISHED[kind]
    return f"{accuracies[COLUMNS.index(TASKS[task])]:.2f}% ({name})"


def _mean(group: Sequence[Result], name: str) -> float:
    return statistics.fmean(getattr(result, name) for result in group)


def split_kinds(text: str) -> list[str]:
    """Returns names and specs that commas separate; commas in parentheses do not."""
    return [part.strip() for part in re.split(r",(?![^(]*\))", text) if part.strip()]


def define_flags() -> None:
    """Defines the flags; not on import, for experiments that stand side by side share names."""
    flags.DEFINE_string("folder", "runs/long_range", "where results.jsonl, results.md and the workdirs lie")
    flags.DEFINE_list("tasks", list(SHIPPED), "names of configs in configs/long_range")
    flags.DEFINE_string("kinds", "", "attention kinds, with options or not; all that can look ahead if empty")
    flags.DEFINE_list("seeds", ["0"], "seeds of each")
    flags.DEFINE_string("size", "", "argument of the configs: nothing for small ones, or paper")
    flags.DEFINE_integer("at_once", 1, "trainings side by side, each on its share of the cores", lower_bound=1)
    flags.DEFINE_bool("train", True, "make the runs that are missing; --notrain for speeds and the table alone")
    flags.DEFINE_bool("speeds", True, "take the time of steps at the end; --nospeeds on a machine that is not quiet")


def run_all(wanted: Sequence[Run], folder: Path, at_once: int = 1) -> str:
    """Runs what is missing and returns the table of all, which is also written.

    Raises:
      UserError: some runs did not finish; the others are done.
    """
    results, failed = finished(folder, wanted), []
    missing = [run for run in wanted if run not in results]
    for run in missing:
        print(f"{run.task}, {run.kind}, seed {run.seed}: {run.log}", flush=True)
    for place, outcome in runs.train_each([(run.arguments, run.workdir) for run in missing], at_once):
        run = missing[place]
        if outcome is None:
            failed.append(run)
            continue
        results[run] = result_of(run, outcome)
        print(f"{run.task}, {run.kind}, seed {run.seed}: accuracy {results[run].accuracy:.3f}", flush=True)
        with (folder / "results.jsonl").open("a") as lines:
            lines.write(json.dumps(dataclasses.asdict(results[run])) + "\n")
    text = write_table(wanted, results, folder)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(wanted)} runs did not finish (see {', '.join(str(run.log) for run in failed)}); "
            f"the others are in {folder / 'results.md'}"
        )
    return text


def take_costs(wanted: Sequence[Run], folder: Path) -> None:
    """Adds to costs.json the steps of every task of which a kind is missing there: all its kinds by turns, again."""
    known: dict[str, dict[str, Cost]] = known_costs(folder)
    for task in dict.fromkeys(run.task for run in wanted):
        kinds = {run.kind: run for run in wanted if run.task == task}
        if kinds.keys() - known.get(task, {}).keys():
            print(f"{task}: taking the time of {len(kinds)} kinds", flush=True)
            taken = step_costs(list(kinds.values()))
            for kind, cost in taken.items():
                print(f"{task}, {kind}: {1e3 * cost.seconds:.0f} ms/step, {cost.mebibytes:.0f} MiB", flush=True)
            known[task] = known.get(task, {}) | taken
            workdir_files.write_whole(folder / COSTS, json.dumps(known, indent=1) + "\n")


def known_costs(folder: Path) -> dict[str, dict[str, Cost]]:
    """Returns what was taken, by task and kind."""
    path = folder / COSTS
    told = json.loads(path.read_text()) if path.is_file() else {}
    return {task: {kind: Cost(*cost) for kind, cost in kinds.items()} for task, kinds in told.items()}


def write_table(wanted: Sequence[Run], results: Mapping[Run, Result], folder: Path) -> str:
    """Writes results.md, and returns it."""
    text = table([results[run] for run in wanted if run in results], known_costs(folder))
    workdir_files.write_whole(folder / "results.md", text + "\n")
    return text


def main() -> None:
    """Reads the flags, runs, and prints the table."""
    signal.signal(signal.SIGTERM, _stop)
    kinds = split_kinds(FLAGS.kinds) or bidirectional()
    seeds = [runs.seed(text) for text in FLAGS.seeds]
    folder = Path(FLAGS.folder)
    wanted = plan(FLAGS.tasks, kinds, seeds, folder, FLAGS.size, command_line.overrides())
    folder.mkdir(parents=True, exist_ok=True)
    if FLAGS.train:
        run_all(wanted, folder, FLAGS.at_once)
    if FLAGS.speeds:
        take_costs(wanted, folder)
    print(write_table(wanted, finished(folder, wanted), folder))


def _stop(*_: Any) -> None:
    raise SystemExit(143)


if __name__ == "__main__":
    define_flags()
    command_line.main(main, overridable=True)
