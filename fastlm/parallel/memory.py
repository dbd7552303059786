"""How much memory is left: where a device has its own, of the fullest one here; else of the host."""

from pathlib import Path

import jax


def free_bytes() -> int | None:
    """Returns bytes that are free for arrays on each device of this process; None where nobody says."""
    told = [device.memory_stats() or {} for device in jax.local_devices()]
    if all("bytes_limit" in stats for stats in told):
        return min(stats["bytes_limit"] - stats["bytes_in_use"] for stats in told)
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return None
    free = 1024 * int(lines["MemAvailable"].split()[0])
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    return free if limit is None or used is None else min(free, limit - used)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such controller here, or "max"
        return None
