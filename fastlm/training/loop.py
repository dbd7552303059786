"""The loop around the train step: resuming, evaluating, saving, stopping.

Notable: nothing is lost. A checkpoint holds the state and the data position, so a run that was
killed and started again takes the same batches with the same keys and ends in the same bits.
SIGTERM (and Ctrl-C) finish the steps in hand (at most three), save and return; on several processes JAX's preemption
service makes all of them agree on the step. Values are fetched from the device once per log
interval only. A workdir has one writer: a second run of the same command is refused.
"""

import contextlib
import dataclasses
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fastlm.compress import WRAPPERS
from fastlm.data.settings import Data
from fastlm.errors import UserError
from fastlm.measurement import flops, peak
from fastlm.models import ModelConfig
from fastlm.parallel import multihost
from fastlm.tasks import scoring
from fastlm.tasks.kind import Scored, Trained
from fastlm.training import checkpoints as checkpoint_files
from fastlm.training import metrics, progress, workdir_files
from fastlm.training import state as states
from fastlm.training.build import Experiment
from fastlm.training.step import make_eval_step, make_train_step

# What decides the shape of the state, and what of it; other values may change when a run goes on.
STRUCTURE: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
    ("optimizer", "name", lambda name: name),
    ("optimizer", "groups", lambda groups: groups),
    ("optimizer", "muon_paths", lambda paths: paths),
    ("training", "average_decay", bool),
    ("compute", "dtype", lambda dtype: dtype == "float16"),
)
STATEFUL = {section for section, _, _ in STRUCTURE}
# Steps sent to the device before the host waits: enough to hide the host, few enough to hear a SIGTERM in time.
STEPS_IN_FLIGHT = 2


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
      status: "finished" or "interrupted".
      step: optimizer steps done.
      metrics: of the final evaluation, or the last one.
      state: the state on the device.
      weights: what evaluation sees: averaged where the run averages, viewed through the compression.
    """

    status: str
    step: int
    metrics: dict[str, float]
    state: states.State
    weights: Any


class StopRequest:
    """Whether somebody asked the run to stop; one answer for all processes."""

    def __init__(self) -> None:
        self._asked = False
        self._previous: dict[int, Any] = {}
        self._alone = jax.process_count() == 1

    def __enter__(self) -> "StopRequest":
        if self._alone and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:  # Ctrl-C twice: the person means it
            raise KeyboardInterrupt
        self._asked = True

    def now(self, step: int) -> bool:
        """Returns whether to stop after `step`."""
        return self._asked if self._alone else multihost_utils.reached_preemption_sync_point(step)


class Run:
    """The moving parts of one run of an experiment."""

    def __init__(self, experiment: Experiment, *, profile: bool = False, say: Callable[[str], None] = print):
        """Compiles nothing yet; opens the workdir and restores its newest checkpoint if there is one.

        Raises:
          UserError: the workdir holds a run that this experiment cannot continue.
        """
        self.experiment, self.profile = experiment, profile
        self.say = say if multihost.is_primary() else lambda text: None
        self.batches = experiment.train_batches()  # before any folder is made: this may fail
        multihost.require_same(
            self.batches.identity,
            "the processes have different data or tokenizers; give them one --config.data.data_dir",
        )
        self.lock = workdir_files.lock(experiment.workdir)
        self.checkpoints = checkpoint_files.Checkpoints(experiment.workdir, keep=experiment.checkpoint.keep)
        self.last_metrics: dict[str, float] = {}
        self.best = float("inf")  # lowest evaluation loss that was saved
        experiment_abstract = jax.eval_shape(experiment.create_state)
        self.placement = states.shardings(experiment_abstract, experiment.task, experiment.mesh)
        self.state = self._restore(experiment_abstract) or self._start()
        self.step = int(self.state.step)
        step = make_train_step(
            experiment.task,
            experiment.optimizer,
            accumulation=experiment.training.accumulation,
            average_decay=experiment.training.average_decay,
        )
        self.train_step = jax.jit(step, donate_argnums=0, out_shardings=(self.placement, None))
        self.eval_step = jax.jit(make_eval_step(experiment.task))

    def _start(self) -> states.State:
        create = jax.jit(self.experiment.create_state, out_shardings=self.placement)
        if self.experiment.initial_params is None:
            return create()
        return create(self.experiment.initial_params())

    # --- restoring and saving --------------------------------------------------------------------

    def _restore(self, shapes: states.State) -> states.State | None:
        steps = self.checkpoints.steps()
        multihost.require_same(
            steps,
            f"{self.experiment.workdir}: the processes see different checkpoints; it must be on a disk they share",
        )
        if not steps:
            return None
        about = self.checkpoints.about(steps[-1])
        check_same_run(self.experiment, about)
        if steps[-1] > self.experiment.training.steps:
            raise UserError(
                f"{self.experiment.workdir} holds a run at step {steps[-1]}, beyond config.training.steps="
                f"{self.experiment.training.steps}; raise it, or use another --workdir"
            )
        place = lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where)
        exports = self.experiment.task.export is not None
        state = self.checkpoints.restore(steps[-1], jax.tree.map(place, shapes, self.placement), exports=exports)
        self.batches.set_state(about["data"])
        self.last_metrics, self.best = about["metrics"], about.get("best", float("inf"))
        self.say(f"resuming {self.experiment.workdir} at step {steps[-1]}")
        return state

    def save(self, metrics: dict[str, float] | None = None) -> None:
        """Starts saving this step; `metrics` if it was evaluated just now."""
        about = describe(self.experiment) | {
            "data": multihost.gather_json(self.batches.get_state()),
            "metrics": self.last_metrics,
            "best": self.best,
        }
        self.checkpoints.save(self.step, self.state, about, metrics, self._exported())

    def _exported(self) -> Any:
        task = self.experiment.task
        if task.export is None:
            return None
        return jax.jit(task.export)(self.params(), task.constants, self.state.compression)

    def is_best(self, evaluated: dict[str, float] | None) -> bool:
        """Whether an evaluation is the best so far, and if so remembers it."""
        better = evaluated is not None and evaluated.get(checkpoint_files.BEST_METRIC, float("inf")) < self.best
        if better:
            self.best = evaluated[checkpoint_files.BEST_METRIC]
        return better

    # --- evaluating ------------------------------------------------------------------------------

    def params(self) -> Any:
        """The parameters to evaluate: the averaged ones where the run keeps them."""
        return self.state.average if jax.tree.leaves(self.state.average) else self.state.params

    def weights(self) -> Any:
        """The weights that the forward pass sees in evaluation."""
        task = self.experiment.task
        view = jax.jit(lambda p, c, s, step: task.compression.view(p, c, s, step, None))
        return view(self.params(), task.constants, self.state.compression, self.state.step)

    def evaluate(self, split: str, limit: int) -> dict[str, float]:
        """Scores a split (its first `limit` batches; 0 for all)."""
        e = self.experiment
        batches = e.eval_batches(split, limit)
        return scoring.evaluate(
            self.eval_step, e.task, self.params(), self.state.compression, self.state.step, batches, e.mesh
        )

    def score(self, split: str) -> Scored:
        """Scores a whole split as the task is scored for good."""
        e = self.experiment
        trained = Trained(e.model, e.task, self.weights(), e.tokenizer, e.mesh)
        return e.kind.score(trained, e.data, e.evaluation, split)


def run(experiment: Experiment, *, profile: bool = False, say: Callable[[str], None] = print) -> Result:
    """Trains to the last step, or until asked to stop.

    Raises:
      UserError: the data, the disk or the numbers gave out; the message says what is safe.
    """
    # Before the mesh is in force: the peak is that of one device, and each process measures its own.
    matmul_peak = peak.job_peak(experiment.model.compute.dtype)
    jax.set_mesh(experiment.mesh)
    current = Run(experiment, profile=profile, say=say)
    done_before = current.step == experiment.training.steps
    _write_description(experiment)
    if multihost.is_primary() and not done_before:
        (experiment.workdir / "result.json").unlink(missing_ok=True)  # of a shorter run that this one extends
    writer = metrics.make(
        experiment.workdir,
        tensorboard=experiment.logging.tensorboard,
        wandb=experiment.logging.wandb,
        resume_step=current.step,
        config=experiment.config,
    )
    try:
        with StopRequest() as stop:
            status = _train(current, writer, stop, matmul_peak)
            current.checkpoints.wait()  # what comes now may take long, and may be killed
        if status == "finished":
            _finish(current, None if done_before else writer)
        current.checkpoints.close()
    except UserError:
        with contextlib.suppress(UserError):  # a save under way may still succeed
            current.checkpoints.wait()
        raise
    finally:
        current.batches.close()
        writer.close()
        if current.lock is not None:
            current.lock.close()
    return Result(status, current.step, current.last_metrics, current.state, current.weights())


def _train(current: Run, writer: metrics.MetricsWriter, stop: StopRequest, matmul_peak: float) -> str:
    """Steps until the end or until asked to stop; returns the status."""
    e = current.experiment
    meter = Meter(e, matmul_peak)
    first = current.step
    with progress.Progress(e.training.steps, start=first) as bar:
        while current.step < e.training.steps:
            trace = current.profile and current.step == first + 3
            if trace:
                jax.profiler.start_trace(str(e.workdir / "profile"))
            batch = scoring.to_device(next(current.batches), e.mesh)
            current.state, values = current.train_step(current.state, e.task.constants, batch)
            current.step += 1
            meter.add(values, batch)
            meter.wait_for_the_last_but(STEPS_IN_FLIGHT)
            if current.profile and current.step == min(first + 8, e.training.steps) > first + 3:
                jax.block_until_ready(current.state)
                jax.profiler.stop_trace()
                bar.message(f"profile of {current.step - first - 3} steps written to {e.workdir / 'profile'}")
            last = current.step == e.training.steps
            if current.step % e.logging.every == 0 or last or current.step == first + 1:
                logged = meter.read(current.step)
                writer.write(current.step, logged, prefix="train")
                bar.update(current.step, logged)
                _check_finite(current, logged)
            evaluated = None
            if e.evaluation.split and (last or (e.evaluation.every and current.step % e.evaluation.every == 0)):
                with meter.paused():
                    evaluated = current.evaluate(e.evaluation.split, e.evaluation.batches)
                current.last_metrics = evaluated
                writer.write(current.step, evaluated, prefix=e.evaluation.split)
                bar.message("\n".join([_line(current.step, e.evaluation.split, evaluated), *e.task.remarks(evaluated)]))
                bar.update(current.step, {f"{e.evaluation.split}_{k}": v for k, v in evaluated.items()})
            stopping = stop.now(current.step)
            if current.is_best(evaluated) or last or stopping or current.step % e.checkpoint.every == 0:
                current.save(evaluated)
            if stopping and not last:
                current.checkpoints.wait()
                bar.message(f"asked to stop: saved step {current.step}; the same command resumes")
                return "interrupted"
    return "finished"


def _finish(current: Run, writer: metrics.MetricsWriter | None) -> None:
    """Scores the final split; without a writer (the run was finished before) nothing is logged twice."""
    split = current.experiment.evaluation.final_split
    if split:
        scored = current.score(split)
        final = scored.metrics
        if scored.outputs and multihost.is_primary():
            lines = "".join(json.dumps(output, ensure_ascii=False) + "\n" for output in scored.outputs)
            workdir_files.write_whole(current.experiment.workdir / "predictions.jsonl", lines)
        if writer is not None:
            writer.write(current.step, final, prefix=split)
        current.say(_line(current.step, split, final))
        current.last_metrics = final


def _check_finite(current: Run, logged: dict[str, float]) -> None:
    if logged["skipped_run"] < current.experiment.training.max_skipped:
        return
    good = [step for step in current.checkpoints.steps() if step <= current.step - logged["skipped_run"]]
    where = (
        f"the last good checkpoint is {current.checkpoints.folder / str(good[-1])}" if good else "none was saved yet"
    )
    raise UserError(
        f"the last {int(logged['skipped_run'])} steps up to step {current.step} had no finite gradients and changed "
        f"nothing; {where}; lower config.schedule.peak or look at the data"
    )


def _line(step: int, split: str, values: dict[str, float]) -> str:
    shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items() if name != "documents")
    return f"step {step}  {split}: {shown}"


class Meter:
    """Collects step values on the device; reads them once per log interval."""

    def __init__(self, experiment: Experiment, matmul_peak: float):
        self.experiment, self.peak = experiment, matmul_peak
        self._restart()

    def _restart(self) -> None:
        self.pending: list[dict[str, Any]] = []
        self.tokens, self.flops = 0, 0.0
        self.since = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time spent inside out of the interval."""
        jax.block_until_ready(self.pending)
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def add(self, values: dict[str, Any], batch: dict[str, Any]) -> None:
        """Takes the values of one step, without waiting for them, and counts its work, padding included."""
        self.pending.append(values)
        (rows, length), source = batch["tokens"].shape, batch.get("source")
        source_length = 0 if source is None else source.shape[1]
        self.tokens += rows * (length + source_length)
        forward = flops.forward_flops(self.experiment.model.cfg, rows, length, source_length)
        self.flops += flops.TRAINING_PER_FORWARD * forward

    def wait_for_the_last_but(self, steps: int) -> None:
        """Blocks until at most `steps` of the steps added are still under way."""
        if len(self.pending) > steps:
            jax.block_until_ready(self.pending[-1 - steps])

    def read(self, step: int) -> dict[str, float]:
        """Returns metrics of the interval up to `step` and starts the next one."""
        values = jax.device_get(self.pending)
        seconds = time.perf_counter() - self.since
        sums: dict[str, Any] = {}
        for one in values:
            step_sums = {name[5:]: np.asarray(v, np.float64) for name, v in one.items() if name.startswith("sums/")}
            if all(np.all(np.isfinite(v)) for v in step_sums.values()):  # a skipped step counts in none of them
                sums = {name: sums.get(name, 0.0) + value for name, value in step_sums.items()}
        logged = self.experiment.task.summarize(sums) if sums else {}
        logged |= {name: float(v) for name, v in values[-1].items() if not name.startswith("sums/")}
        logged |= {
            # A skipped step does not advance the optimizer, nor its schedule.
            "learning_rate": float(self.experiment.schedule(max(step - 1 - int(logged["skipped"]), 0))),
            "tokens_per_second": self.tokens / seconds,
            "step_seconds": seconds / len(values),
            "utilisation": peak.utilisation(self.flops / seconds, self.peak),
        }
        self._restart()
        return logged


def describe(experiment: Experiment) -> dict[str, Any]:
    """Returns what a checkpoint says about itself, enough to rebuild model and tokenizer."""
    beside = {"huggingface": experiment.origin, "origins": experiment.task.origins}
    return {
        "model": json.loads(experiment.model.cfg.to_json()),
        "tokenizer": experiment.tokenizer.to_json(),
        "config": experiment.config,
        "versions": checkpoint_files.versions(),
    } | {name: value for name, value in beside.items() if value}


def check_same_run(experiment: Experiment, about: dict[str, Any]) -> None:
    """Checks that a checkpoint belongs to the run that the config describes.

    Raises:
      UserError: architecture, tokenizer, data or optimizer differ; the message names the key.
    """
    now = json.loads(json.dumps(describe(experiment)))
    both = lambda name: (about["config"].get(name, {}), now["config"].get(name, {}))
    sections = {
        "model": tuple(_with_defaults(ModelConfig, values) for values in (about["model"], now["model"])),
        "data": tuple(_with_defaults(Data, values) for values in both("data")),
    } | {name: both(name) for name in ("optimizer", "training", "compute")}
    wrappers = tuple({"wrappers": list(config.get("wrappers", ()))} for config in (about["config"], now["config"]))
    sections |= {"config": wrappers} | {
        name: tuple(_with_defaults(WRAPPERS[name], values) for values in both(name)) for name in wrappers[1]["wrappers"]
    }
    keys = {name: sorted(set().union(*sections[name])) for name in sections if name not in STATEFUL}
    whole = [(name, key, lambda value: value) for name in keys for key in keys[name]]
    for name, key, structure in (*whole, *STRUCTURE):
        old, new = (section.get(key) for section in sections[name])
        if structure(old) != structure(new):
            raise UserError(
                f"{experiment.workdir} holds a run with {name}.{key}={old!r}, but the config says {new!r}; "
                "use another --workdir, or the old value to continue that run"
            )
    if about.get("origins", {}) != now.get("origins", {}):
        named = [" and ".join(each.get("origins", {})) or "nothing" for each in (about, now)]
        raise UserError(
            f"{experiment.workdir} holds a run that learned from {named[0]}, whose weights are not those of {named[1]} "
            "today; use another --workdir, or the old ones (config.distilled.step)"
        )
    if about["tokenizer"] != now["tokenizer"]:
        raise UserError(f"{experiment.workdir} holds a run with another tokenizer; use another --workdir")


def _with_defaults(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """Adds today's defaults of what an older version did not know yet."""
    fields = [field for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING]
    return json.loads(json.dumps({field.name: field.default for field in fields})) | values


def _write_description(experiment: Experiment) -> None:
    if multihost.is_primary():
        text = json.dumps(experiment.config, indent=1, default=str)
        workdir_files.write_whole(experiment.workdir / "config.json", text)
        workdir_files.write_whole(experiment.workdir / "model.json", experiment.model.cfg.to_json())
        if experiment.origin:  # the tokenizer is still the one that the model came with
            workdir_files.carry_tokenizer(Path(experiment.init.source).expanduser(), experiment.workdir)
