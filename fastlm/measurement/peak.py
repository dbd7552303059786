"""The fastest matrix product this machine was seen to do: what utilisation is a share of.

Notable: measured, never from a data sheet, so it holds for a laptop too. Operands have the asked
type, results are float32 as everywhere here (on CPU bfloat16 is fast only in that form). The best of
several shapes and repetitions, in about a second, is kept in the cache folder (FASTLM_CACHE, else
~/.cache/fastlm) for each platform, device kind, number of cores, jax version and type. Measured
under load it is too low: deleting the file measures again.
"""

import json
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

_logger = logging.getLogger(__name__)

# (rows, inner, columns): a layer of a small model, and large squares. Accelerators need more work.
SHAPES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "cpu": ((4096, 384, 1536), (1024, 1024, 1024), (2048, 2048, 2048)),
    "gpu": ((4096, 4096, 4096), (8192, 8192, 8192)),
    "tpu": ((4096, 4096, 4096), (8192, 8192, 8192)),
}
# Products sent off before waiting: hides the way to an accelerator, which a CPU does not have.
PRODUCTS_AT_ONCE = {"cpu": 1, "gpu": 16, "tpu": 16}
SECONDS_PER_SHAPE = 0.25


def matmul_peak(dtype: DTypeLike) -> float:
    """Returns the FLOP/s of the fastest product on one device of the default platform.

    On CPU every device shares the same cores, so this is the peak of the whole host.

    Args:
      dtype: of the operands.
    """
    name = jnp.dtype(dtype).name
    path = cache_folder() / f"matmul_peak-{_key(name)}.json"
    cached = _read(path)
    if cached is None:
        cached = measure(name)
        _write(path, cached)
    return cached


def job_peak(dtype: DTypeLike) -> float:
    """Returns the FLOP/s of all devices of the job; CPU devices of one host count once."""
    together = jax.process_count() if jax.default_backend() == "cpu" else jax.device_count()
    return together * matmul_peak(dtype)


def utilisation(flops_per_second: float, peak: float) -> float:
    """Returns the share of `peak` that is used, as a fraction; both in FLOP/s."""
    return flops_per_second / peak


def measure(
    dtype: DTypeLike,
    shapes: tuple[tuple[int, int, int], ...] | None = None,
    *,
    seconds: float = SECONDS_PER_SHAPE,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Returns the best FLOP/s over `shapes` (by default those for this platform), without the cache."""
    platform = jax.default_backend()
    at_once = PRODUCTS_AT_ONCE.get(platform, 1)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    best = 0.0
    for rows, inner, columns in shapes or SHAPES.get(platform, SHAPES["gpu"]):
        a, b = jnp.full((rows, inner), 0.5, dtype), jnp.full((inner, columns), 0.5, dtype)
        work = 2 * rows * inner * columns * at_once
        best = max(best, work / _best_seconds(lambda: product(a, b), at_once, seconds, clock))  # noqa: B023
    return best


def cache_folder() -> Path:
    """Returns the folder for what is worth keeping between runs; not made yet."""
    return Path(os.environ.get("FASTLM_CACHE") or Path.home() / ".cache" / "fastlm")


def _best_seconds(call: Callable[[], Any], at_once: int, budget: float, clock: Callable[[], float]) -> float:
    jax.block_until_ready(call())  # compiles
    best, end = float("inf"), clock() + budget
    # Twice at least: the first one may still find cold caches and a slow clock.
    for repetition in range(1000):
        start = clock()
        jax.block_until_ready([call() for _ in range(at_once)])
        best = min(best, clock() - start)
        if repetition and clock() >= end:
            break
    return best


def _key(dtype: str) -> str:
    kind = jax.devices()[0].device_kind
    parts = (jax.default_backend(), kind, str(_cores()), jax.__version__, dtype)
    return "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", part) for part in parts)


def _cores() -> int:
    """Returns the cores this process may use, which a container or a batch system limits."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(path: Path) -> float | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))["flops_per_second"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(value) if isinstance(value, int | float) and value > 0 else None


def _write(path: Path, value: float) -> None:
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"flops_per_second": value}), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        # Only costs the next start a second.
        _logger.warning("%s: cannot keep the measured peak (%s)", path, error)
