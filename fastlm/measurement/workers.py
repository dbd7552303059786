"""Processes that take turns: how two programs are timed side by side on a machine that others may be using.

Notable: each variant lives in a process of its own that waits between its turns, so all see the same minutes; what is
reported are medians over turns, and ratios as medians of per-turn ratios. All processes get the same allocator
settings, without which each framework spends its time on page faults. A worker may run another interpreter (PyTorch's),
so this file imports nothing but the standard library.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_ARENA_MAX": "1",
    "JAX_PLATFORMS": "cpu",
}
PAUSE = 0.5  # seconds between turns: threads of the last variant may still be spinning


def environment() -> dict[str, str]:
    """Returns the environment of a worker: this one's, the allocator's settings, and the project to import."""
    return {**os.environ, **ALLOCATOR, "PYTHONPATH": os.getcwd()}


class Ended(SystemExit):
    """A worker ended before it was asked to; what it had to say stands on its standard error."""

    def __init__(self, status: int, command: Sequence[str]) -> None:
        """Takes its exit status and what was run."""
        super().__init__(f"a worker ended with status {status}: {' '.join(command)}")
        self.status = status


class Worker:
    """A running process that answers each line of JSON with one."""

    def __init__(self, *arguments: str, python: str | None = None) -> None:
        """Starts Python with these arguments and waits until it says that it is ready (see `serve`)."""
        self._process = subprocess.Popen(
            [python or sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        self._answer()  # one warms up at a time

    def ask(self, request: Any) -> dict[str, Any]:
        """Returns the worker's answer."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        """The next JSON line; anything else the process prints is skipped."""
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise Ended(self._process.wait(), self._process.args)


def serve(answer: Callable[[Any], dict[str, Any]]) -> None:
    """The body of a worker that is ready: answers requests until there are no more."""
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def timed(call: Callable[[], Any], times: int = 1) -> dict[str, float]:
    """Returns seconds on the clock and seconds of processor time of one call, over so many."""
    start, busy = time.perf_counter(), sum(os.times()[:2])
    for _ in range(times):
        call()
    return {
        "seconds": (time.perf_counter() - start) / times,
        "cpu": (sum(os.times()[:2]) - busy) / times,
    }


def peak_memory() -> float:
    """Returns the most memory this process has had so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def take_turns(asks: dict[str, Callable[[], dict[str, Any]]], turns: int) -> dict[str, list[dict[str, Any]]]:
    """Returns the answers of each variant, one per turn, asked in alternation."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in asks}
    for _ in range(turns):
        for name, ask in asks.items():
            results[name].append(ask())
            time.sleep(PAUSE)
    return results


def close(workers: Iterable[Worker]) -> None:
    """Ends all of them."""
    for worker in workers:
        worker.close()
