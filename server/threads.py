"""The CPU threads of an engine: how many, on which cores, how they wait. Imports no torch: see `set_patience`."""

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["available_cores", "can_pin", "default_count", "pin", "pin_to", "set_patience"]


def set_patience(*, pinned: bool = False) -> None:
    """Say for how long a thread that waits for the others spins before it sleeps. Before torch, and libgomp, is loaded.

    By default it is milliseconds. When anything else wants a core (a front end, the broker), such a thread may keep the
    very one it waits for from running, at every one of the hundred regions of a forward pass: 16 tokens took 667 ms
    beside one busy process on two cores, 7.3 with a bound of 1000 turns (2.6 and 2.8 alone; OMP_WAIT_POLICY=passive:
    5.7 alone). Threads that are pinned are never in each other's way, and gain from waiting longer: 3.6 ms beside the
    busy process with 20,000 turns, 7.1 with 1000.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "20000" if pinned else "1000")


def available_cores() -> list[int]:
    """The cores that this process may be put on."""
    return sorted(os.sched_getaffinity(0))


def default_count() -> int:
    """As many threads as there are cores, or as a container's quota is worth, which `available_cores` does not show."""
    cores = len(available_cores())
    try:
        # cgroup v2: microseconds of CPU in a period, or "max".
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def can_pin(count: int) -> bool:
    """Whether there are as many threads as cores, so that nothing is lost by giving each a core of its own.

    With fewer, the kernel may know a core that is less busy.
    """
    return count > 1 and count == len(available_cores())


def pin(count: int, start_workers: Callable[[], object]) -> bool:
    """Give the calling thread and each of its OpenMP workers, `count` in all, a core of its own. Whether it was done.

    Left to itself, the kernel wakes a worker on the core of the thread that wakes it, and takes milliseconds to move it
    away; meanwhile both share one core. Measured on two cores, 16 tokens after a pause of 20 ms: 8.0 ms as it comes,
    3.6 pinned.

    Only where `can_pin`; `start_workers` as `pin_to` has it.
    """
    return can_pin(count) and pin_to(available_cores(), start_workers)


def pin_to(cores: Sequence[int], start_workers: Callable[[], object]) -> bool:
    """Put the calling thread and its OpenMP workers, as many as there are cores in all, on a core each; whether it was
    done.

    `start_workers` is the calling thread's first parallel operation: what it starts are the workers.
    """
    before = _threads()
    start_workers()
    workers = sorted(_threads() - before)
    if len(workers) != len(cores) - 1:
        return False  # another OpenMP than libgomp, or one that had its workers before
    for thread, core in zip([threading.get_native_id(), *workers], cores, strict=True):
        os.sched_setaffinity(thread, {core})
    return True


def _threads() -> set[int]:
    return set(map(int, os.listdir("/proc/self/task")))
