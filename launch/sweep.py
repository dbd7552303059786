"""The one sweep command: every combination of grid values, over seeds, into one table of results.

    launch/local.sh launch/sweep.py --config configs/lm_tiny.py --grid schedule.peak=1e-3,3e-4 \\
        --grid model.layers=4,8 --seeds 3 --out runs/sweep1 [--jobs 2] [-- --config.training.steps=500]

Runs happen here (`--where local`), as a Slurm array (`--where slurm`, with `--options="--partition gpu"` and the like
for launch/slurm.sh) or over the workers of a TPU pod (`--where tpu --workers N`, with `--options` for
launch/tpu_pod.sh; worker i takes the runs i, i + N, ...). The same command again goes on where the sweep stopped:
finished runs are kept, others are started again and resume from their own checkpoints; when all are finished it
only writes the table. After a Slurm sweep that is how the table is made.

Notable: nothing is kept but what lies in --out, so there is no server and no database. Standard library only: this
file never imports jax, it starts programs. Left out: early stopping and adaptive search.
"""

import argparse
import itertools
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import sweep_table
from sweep_runs import (
    LocalRunner,
    Run,
    SweepError,
    check_same_command,
    core_shares,
    directory_name,
    local_command,
    status,
)

ROOT = Path(__file__).resolve().parent.parent


class _Parser(argparse.ArgumentParser):
    """One line per mistake."""

    def error(self, message: str) -> NoReturn:
        raise SweepError(f"{message} (see --help)")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the command line; what follows a bare `--` goes to every run as `extra`.

    Raises:
      SweepError: an option is unknown, missing or has a bad value.
    """
    split = list(argv).index("--") if "--" in argv else len(argv)
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", required=True, help="the config file of every run")
    parser.add_argument("--out", required=True, type=Path, help="directory of the sweep")
    parser.add_argument("--grid", action="append", default=[], metavar="KEY=V1,V2", help="config key and its values")
    parser.add_argument("--seeds", type=_positive, default=1, help="seeds 0 .. N-1 for every combination")
    parser.add_argument("--metric", default="bits_per_byte", help="the entry of result.json's metrics to table")
    parser.add_argument("--maximize", action="store_true", help="sort the table with the largest first")
    parser.add_argument("--where", choices=("local", "slurm", "tpu"), default="local")
    parser.add_argument("--jobs", type=_positive, default=1, help="runs at the same time (local, slurm)")
    parser.add_argument("--workers", type=_positive, help="workers of the TPU pod")
    parser.add_argument("--options", default="", help="options for launch/slurm.sh or launch/tpu_pod.sh, one string")
    parser.add_argument("--command", default="-m fastlm.train", help="what Python runs")
    parser.add_argument("--shard", metavar="I/N", help="only runs I, I+N, ...; I may name an environment variable")
    parser.add_argument("--dry-run", action="store_true", help="print each command and run none")
    options = parser.parse_args(list(argv)[:split])
    options.extra = list(argv)[split + 1 :]
    if (options.where == "tpu") != (options.workers is not None):
        raise SweepError("--workers N (how many workers the pod has) goes with --where tpu, and is needed there")
    if options.where == "tpu" and options.out.is_absolute():
        raise SweepError("with --where tpu, --out must be relative to the repository root: it is fetched to there")
    return options


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def grid_axis(text: str) -> list[tuple[str, str]]:
    """Reads `key=v1,v2` as [(key, v1), (key, v2)]; commas in brackets or quotes do not separate.

    Raises:
      SweepError: no key, an empty or a repeated value.
    """
    key, _, values = text.partition("=")
    parts, depth, quote = [""], 0, ""
    for character in values:
        if quote or character in "'\"":
            quote = "" if character == quote else quote or character
        else:
            depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    if not key or not all(parts) or depth or quote:
        raise SweepError(f"--grid '{text}' is not of the form key=value1,value2")
    if len(set(parts)) < len(parts):
        raise SweepError(f"--grid '{text}' names a value twice")
    return [(key.removeprefix("config."), part) for part in parts]


def plan(options: argparse.Namespace) -> list[Run]:
    """Lists all runs of the sweep, in an order that depends on nothing but the arguments.

    Raises:
      SweepError: a key is swept twice.
    """
    axes = [grid_axis(text) for text in options.grid]
    keys = [axis[0][0] for axis in axes]
    repeated = sorted({key for key in keys if keys.count(key) > 1 or key == "seed"})
    if repeated:
        raise SweepError(f"--grid sweeps '{repeated[0]}' twice; give all its values once, and seeds by --seeds")
    return [_run(options, values, seed) for values in itertools.product(*axes) for seed in range(options.seeds)]


def _run(options: argparse.Namespace, values: tuple[tuple[str, str], ...], seed: int) -> Run:
    workdir = options.out / directory_name(values) / f"seed{seed}"
    own = [f"--config.{key}={value}" for key, value in (*values, ("seed", str(seed)))]
    common = [*shlex.split(options.command), "--config", options.config, "--workdir", str(workdir)]
    return Run(values, seed, workdir, (*common, *options.extra, *own))


def shard_of(runs: Sequence[Run], shard: str | None) -> list[Run]:
    """Picks the runs I, I+N, ... of `shard` "I/N", where I is a number or the name of an environment variable.

    Raises:
      SweepError: `shard` is malformed.
    """
    if shard is None:
        return list(runs)
    index, _, count = shard.partition("/")
    index = os.environ.get(index, index)
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise SweepError(f"--shard '{shard}' is not I/N with I from 0 to N-1")
    return list(runs)[int(index) :: int(count)]


def run_local(options: argparse.Namespace, pending: Sequence[Run]) -> int:
    """Runs `pending` on this machine; returns 143 when stopped by a signal, else 0."""
    if options.dry_run:
        shares = core_shares(options.jobs) if options.jobs > 1 else [None]
        for index, run in enumerate(pending):
            print(shlex.join(local_command(run, [sys.executable], shares[index % len(shares)])))
        return 0
    runner = LocalRunner([sys.executable], options.jobs, _report)
    runner.run_all(pending)
    return 143 if runner.stopped else 0


def _report(run: Run) -> None:
    found = status(run)
    print(f"{found.word}: {run.workdir}{': ' + found.reason if found.reason else ''} (log: {run.log})", flush=True)


def _again(options: argparse.Namespace, shard: str) -> list[str]:
    """This sweep's own command for another machine, which does only `shard`."""
    flags = [f"--grid={text}" for text in options.grid]
    flags += [f"--seeds={options.seeds}", f"--metric={options.metric}", f"--command={options.command}"]
    flags += ["--maximize"] if options.maximize else []
    extra = ["--", *options.extra] if options.extra else []
    return ["launch/sweep.py", f"--config={options.config}", f"--out={options.out}", *flags, f"--shard={shard}", *extra]


def run_slurm(options: argparse.Namespace, runs: Sequence[Run], pending: Sequence[Run]) -> int:
    """Submits an array with one element per pending run; returns sbatch's status."""
    indices = ",".join(str(index) for index, run in enumerate(runs) if run in pending)
    array = ["--name", options.out.name, "--array", f"{indices}%{options.jobs}"]
    shard = _again(options, f"SLURM_ARRAY_TASK_ID/{len(runs)}")
    command = ["launch/slurm.sh", *array, *shlex.split(options.options), "--", *shard]
    return _call(command, options.dry_run)


def run_tpu(options: argparse.Namespace, runs: Sequence[Run]) -> int:
    """Runs shard i on worker i of the pod, follows all, and fetches their results; returns the worst status."""
    to_pod = shlex.split(options.options)

    def work(index: int) -> int:
        one = [*to_pod, "--worker", str(index)]
        start = ["launch/tpu_pod.sh", "run", *one, "--alone", "--", *_again(options, f"{index}/{options.workers}")]
        follow = ["launch/tpu_pod.sh", "follow", *one]
        return _call(start, options.dry_run) or _call(follow, options.dry_run)

    needed = min(options.workers, len(runs))
    with ThreadPoolExecutor(1 if options.dry_run else needed) as pool:
        worst = max(pool.map(work, range(needed)))
    fetch = ["launch/tpu_pod.sh", "fetch", *to_pod, "--workers", str(needed), "--", str(options.out)]
    return _call(fetch, options.dry_run) or worst


def _call(command: Sequence[str], dry_run: bool) -> int:
    if dry_run:
        print(shlex.join(command))
        return 0
    return subprocess.run(command, check=False, cwd=ROOT).returncode


def sweep(options: argparse.Namespace) -> int:
    """Runs what is not finished, then writes and prints the table; returns the exit status.

    The status is 0 when every run of this call is finished, 1 when some are not, 143 when stopped by a signal.
    """
    runs = plan(options)
    chosen = shard_of(runs, options.shard)
    for run in chosen:
        check_same_command(run)
    pending = [run for run in chosen if status(run).word != "finished"]
    print(f"{len(chosen)} runs, {len(chosen) - len(pending)} of them finished already", file=sys.stderr)
    code = _dispatch(options, runs, pending) if pending else 0
    if options.dry_run:
        return code
    table = sweep_table.rows(runs, options.metric, options.maximize)
    sweep_table.write(table, options.metric, options.out)
    print(sweep_table.markdown(table, options.metric), end="")
    submitted = options.where == "slurm" and pending and not code
    return code or int(not submitted and any(status(run).word != "finished" for run in chosen))


def _dispatch(options: argparse.Namespace, runs: Sequence[Run], pending: Sequence[Run]) -> int:
    if options.where == "slurm":
        return run_slurm(options, runs, pending)
    return run_tpu(options, runs) if options.where == "tpu" else run_local(options, pending)


def main(argv: Sequence[str]) -> int:
    """Runs a sweep; a mistake of the user's is one line on stderr and status 2."""
    os.chdir(ROOT)
    try:
        return sweep(parse(argv))
    except SweepError as error:
        print(f"error: sweep.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
