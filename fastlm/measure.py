"""The ruler: how large a trained model is, how fast it reads and writes, and how good it is, beside another.

    python -m fastlm.measure --workdir runs/lm_small
    python -m fastlm.measure --workdir runs/smaller --baseline runs/lm_small
    python -m fastlm.measure --workdir exported --runtime onnx --baseline runs/lm_small

Parameters, bytes, peak memory, tokens read and written a second at several batch sizes with the percentiles of a
token's latency, and the scores of the model's own test split (or of `--source`). With `--baseline` both take turns, and
what is printed ends with plain words: smaller or not, faster or not, at what cost in quality. Everything is kept in
`--out`: measured.json, measured.md, with a baseline measured.png; without `--out`, an export's card takes up the table.
Figures are those of this machine, if nothing else runs on it.
"""

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags

from fastlm import command_line
from fastlm.errors import UserError
from fastlm.exports import card
from fastlm.exports import runtimes as exported
from fastlm.measurement import flops, ruler, runtimes, workers
from fastlm.measurement.ruler import Load, Measured
from fastlm.parallel import mesh as meshes
from fastlm.training import quality, workdir_files
from fastlm.training.checkpoints import Checkpoints

WORKDIR = flags.DEFINE_string("workdir", None, "a run of fastlm.train, or what fastlm.convert wrote")
RUNTIME = flags.DEFINE_enum("runtime", "jax", exported.RUNTIMES, "what runs it; but for jax, --workdir is an export")
STEP = flags.DEFINE_string("step", "", "checkpoint of it: a number, 'best', or nothing for the newest")
BASELINE = flags.DEFINE_string("baseline", "", "another, to stand beside it")
BASELINE_RUNTIME = flags.DEFINE_enum("baseline_runtime", "jax", exported.RUNTIMES, "what runs that")
BASELINE_STEP = flags.DEFINE_string("baseline_step", "", "checkpoint of that")
OUT = flags.DEFINE_string("out", "", "folder for the results; default measured in the workdir")
BATCHES = flags.DEFINE_list("batches", ["1", "8"], "rows at a time, one or several numbers")
PROMPT = flags.DEFINE_integer("prompt", 0, "tokens of a row; 0 takes 256, or half the context", lower_bound=0)
NEW = flags.DEFINE_integer("new", 64, "tokens written to each", lower_bound=8)
TURNS = flags.DEFINE_integer("turns", 5, "times that each is timed", lower_bound=2)
SOURCE = flags.DEFINE_multi_string("source", [], "what to score instead of the training data; may be repeated")
SPLIT = flags.DEFINE_string("split", "", "split to score; default the final one of the config")
SCORE_BATCHES = flags.DEFINE_integer("score_batches", 0, "score only so many batches of 16 rows; 0 scores all")
QUALITY = flags.DEFINE_bool("quality", True, "score the models; --noquality leaves it out")
CACHE_DTYPE = flags.DEFINE_enum("cache_dtype", None, ["int8"], "type of kept keys and values; default that of compute")
TENSOR = flags.DEFINE_integer("tensor", 1, "devices that share each weight (tensor parallelism)", lower_bound=1)
AVERAGE = flags.DEFINE_bool("average", None, "use averaged weights; default: if the run kept any")
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "compute type; default that of training")
FUSED = flags.DEFINE_bool("fused", True, "products of the same input as one, as fastlm.generate has them")
WEIGHTS = flags.DEFINE_enum("weights", None, ["int8"], "type of the weights of --workdir; default as they are stored")
WORKER = flags.DEFINE_bool("worker", False, "internal: answer requests on the standard input")

LENGTH = 256
OF_JAX = ("average", "dtype", "cache_dtype", "tensor", "fused")  # what was chosen of an export when it was made


class Subject:
    """A model on the ruler, in this process."""

    def __init__(self, runtime: str, workdir: str, step: str) -> None:
        """Restores it."""
        self._mesh = meshes.share_weights(TENSOR.value)
        jax.set_mesh(self._mesh)
        options = {"step": step, "average": AVERAGE.value, "dtype": DTYPE.value, "cache_dtype": CACHE_DTYPE.value}
        options |= {"fused": FUSED.value, "weights": WEIGHTS.value}
        self._restored = exported.restore(runtime, workdir, self._mesh, **options)
        self._longest = exported.longest(runtime, self._restored)
        self._stored = functools.partial(exported.sizes, runtime, workdir, self._restored, bool(AVERAGE.value))
        model = self._restored.model
        start = None
        if model.cfg.family == "encoder_decoder":
            start = self._restored.kind().writing(model.cfg, self._restored.tokenizer).start
        self._runtime = exported.timed(runtime, self._restored, start)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Does what a request names: "about", "load", "memory" or "quality"."""
        cfg = self._restored.model.cfg
        match request["what"]:
            case "about":
                told = {"writes": self._runtime.writes(), "context": cfg.max_length, "step": self._restored.step}
                return told | {"longest": self._longest}
            case "sizes":
                length = request["length"]
                source = length if cfg.family == "encoder_decoder" else 0
                cost = flops.forward_flops(cfg, 1, length, source) / length
                return dataclasses.asdict(self._stored(cost, length))
            case "load":
                load = Load(**request["load"])
                if load.count:
                    return {"seconds": self._runtime.write(load.rows, load.length, load.count)}
                return {"seconds": [self._runtime.read(load.rows, load.length)]}
            case "memory":
                return {"mebibytes": workers.peak_memory()}
            case "quality":
                asked = quality.Asked(SOURCE.value, SPLIT.value, batches=SCORE_BATCHES.value)
                data = quality.data_of(self._restored, asked)[0]
                if not data.sources:
                    return {}
                asked = dataclasses.replace(asked, length=min(data.length, request["longest"]))
                return quality.score(self._restored, self._mesh, asked).metrics
        raise ValueError(request)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A model that is asked for; what its runtime takes, at which step, with which type of weights."""

    runtime: str
    workdir: str
    step: str | int
    weights: str | None = None

    def resolved(self) -> "Chosen":
        """Returns the same with the number of its step; an export has only one.

        Raises:
          UserError: nothing is there.
        """
        if self.runtime != "jax":
            return self
        return dataclasses.replace(self, step=Checkpoints(self.workdir, read_only=True).resolve(str(self.step)))


def main() -> None:
    """Measures, prints, writes."""
    if WORKER.value:
        workers.serve(Subject(RUNTIME.value, WORKDIR.value, STEP.value).answer)
        return
    batches = batch_sizes()
    check_flags()
    chosen = [Chosen(RUNTIME.value, WORKDIR.value, STEP.value, WEIGHTS.value)]
    if BASELINE.value:
        chosen.insert(0, Chosen(BASELINE_RUNTIME.value, BASELINE.value, BASELINE_STEP.value))
    chosen = [one.resolved() for one in chosen]
    if len(set(chosen)) < len(chosen):
        raise UserError("--baseline: is the same checkpoint; name another, or leave it out")
    try:
        models, what = measure(chosen, batches)
    except workers.Ended as ended:
        sys.exit(ended.status)  # it has said why
    text = ruler.table(models, what)
    if BASELINE.value:
        text += "\n\n" + "\n".join(f"- {line}" for line in ruler.verdicts(models[1], models[0], what))
    folder = Path(OUT.value or Path(WORKDIR.value) / "measured")
    files = write(folder, models, what, text)
    if RUNTIME.value != "jax" and not OUT.value and card.put_measured(Path(WORKDIR.value), text):
        files.append(f"../{card.FILE}")
    print(f"{text}\n\nwrote {', '.join(files)} to {folder}")


def measure(chosen: list[Chosen], batches: list[int]) -> tuple[list[Measured], list[Load]]:
    """Measures these checkpoints, each in a process of its own, in turns; the first is the baseline of the others."""
    running = {}
    try:
        for name, one in zip(short_names(chosen), chosen):
            print(f"starting {one.workdir}" + f", step {one.step}" * (one.step != ""), file=sys.stderr, flush=True)
            running[name] = workers.Worker(*worker_arguments(one))
        about = {name: worker.ask({"what": "about"}) for name, worker in running.items()}
        length = row_length(about)
        what = ruler.loads(batches, length, NEW.value, all(told["writes"] for told in about.values()))
        asks = {name: functools.partial(seconds_of, worker) for name, worker in running.items()}
        print(f"timing {', '.join(map(str, what))}", file=sys.stderr, flush=True)
        seconds = ruler.take_turns(asks, what, TURNS.value)
        longest, models = min(told["longest"] for told in about.values()), []
        for name, worker in running.items():
            memory = worker.ask({"what": "memory"})["mebibytes"]
            sizes = ruler.Sizes(**worker.ask({"what": "sizes", "length": length}))
            models.append(Measured(name, sizes, seconds[name], memory, scores(name, worker, longest)))
        return models, what
    finally:
        workers.close(running.values())


def seconds_of(worker: workers.Worker, load: Load) -> list[float]:
    """Returns what a worker took for a load."""
    return worker.ask({"what": "load", "load": dataclasses.asdict(load)})["seconds"]


def scores(name: str, worker: workers.Worker, longest: int) -> dict[str, float]:
    """Returns the quality of a model, if it is asked for, in rows that each of the models can read."""
    if not QUALITY.value:
        return {}
    print(f"scoring {name}", file=sys.stderr, flush=True)
    found = worker.ask({"what": "quality", "longest": longest})
    if not found:
        print(f"{name} came with no data to be scored on; give --source", file=sys.stderr, flush=True)
    return found


def worker_arguments(one: Chosen) -> list[str]:
    """Returns what a worker's Python is started with."""
    own = [f"--runtime={one.runtime}", f"--workdir={one.workdir}", f"--step={one.step}"]
    passed = ("source", "split", "score_batches", *(OF_JAX if one.runtime == "jax" else ()))
    own += [f"--weights={one.weights}"] if one.weights else []
    return ["-m", "fastlm.measure", "--worker", *own, *(word for name in passed for word in serialized(name))]


def serialized(name: str) -> list[str]:
    """Returns a flag as it stands on a command line; nothing if it was not given."""
    flag = flags.FLAGS[name]
    return flag.serialize().splitlines() if flag.present else []


def check_flags() -> None:
    """Raises a `UserError` for a flag that none of the models that are asked for reads."""
    own, other = RUNTIME.value == "jax", bool(BASELINE.value) and BASELINE_RUNTIME.value == "jax"
    read = {"step": own, "weights": own, "baseline_step": other, "baseline_runtime": bool(BASELINE.value)}
    for name, when in (read | dict.fromkeys(OF_JAX, own or other)).items():
        if flags.FLAGS[name].present and not when:
            needed = "--baseline" if name == "baseline_runtime" else "a model that jax runs; exports are what they are"
            raise UserError(f"--{name}: only has an effect with {needed}; leave it out")


def batch_sizes() -> list[int]:
    """Returns --batches.

    Raises:
      UserError: no positive whole numbers.
    """
    if not BATCHES.value or not all(text.isdecimal() and int(text) for text in BATCHES.value):
        raise UserError(f"--batches: needs numbers of rows like 1,8, got '{','.join(BATCHES.value)}'")
    return [int(text) for text in BATCHES.value]


def row_length(about: dict[str, dict[str, Any]]) -> int:
    """Returns how many tokens a row has.

    Raises:
      UserError: more than a model reads, or with what is written more than its context.
    """
    context = min(told["context"] for told in about.values())
    new = NEW.value + runtimes.PIECE if all(told["writes"] for told in about.values()) else 0
    longest = min(told["longest"] for told in about.values())
    length = PROMPT.value or min(LENGTH, context // 2, longest)
    if length > longest:
        raise UserError(f"--prompt: {length} tokens, but a model was exported for rows of {longest}; give fewer")
    if length + new > context:
        raise UserError(
            f"--prompt: {length} tokens and {new} written behind them are more than the context of {context} tokens; "
            "give a smaller --prompt or --new"
        )
    return length


def short_names(chosen: list[Chosen]) -> list[str]:
    """Returns the last part of each path, where these are the same the whole path, and then also the step."""
    for name in (
        lambda one: Path(one.workdir).absolute().name,
        lambda one: one.workdir,
        lambda one: f"{one.workdir}@{one.step}" + (f" {one.weights}" if one.weights else ""),
    ):
        names = [name(one) for one in chosen]
        if len(set(names)) == len(names):
            break
    return names


def write(folder: Path, models: list[Measured], what: list[Load], text: str) -> list[str]:
    """Writes the figures as JSON, as the table that is printed, and beside a baseline as a picture; returns names."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "loads": [dataclasses.asdict(load) for load in what],
        "models": [dataclasses.asdict(model) for model in models],
    }
    workdir_files.write_whole(folder / "measured.json", json.dumps(facts, indent=1) + "\n")
    workdir_files.write_whole(folder / "measured.md", text + "\n")
    if len(models) < 2:
        return ["measured.json", "measured.md"]
    from fastlm.reports import measured  # draws, and so imports a plotting library

    measured.draw(*models, what, folder / "measured.png")
    return ["measured.json", "measured.md", "measured.png"]


if __name__ == "__main__":
    flags.mark_flag_as_required("workdir")
    command_line.main(main)
