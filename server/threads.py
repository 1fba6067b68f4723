"""The CPU threads of an engine: how many, on which cores, how they wait for each other.

Import this before torch: libgomp reads its settings when it is loaded.
"""

import os
import threading
from pathlib import Path

# By default a thread that waits for the others at the end of a parallel region spins for milliseconds; when anything
# else wants its core (a front end, the broker), it keeps the very thread it waits for from running, at every one of the
# hundred regions of a forward pass. Measured on two cores beside one busy process: 16 tokens in 667 ms by default, 7.3
# with this bound; alone 2.6 and 2.8. (OMP_WAIT_POLICY=passive: 5.7 alone.)
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__all__ = ["available_cores", "default_count", "pin"]


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


def pin() -> bool:
    """Give the calling thread and each of its OpenMP workers a core of its own. Whether it was done.

    Left to itself, the kernel wakes a worker on the core of the thread that wakes it, and takes milliseconds to move it
    away; meanwhile both share one core. Measured on two cores, 16 tokens after a pause of 20 ms: 8.0 ms as it comes,
    3.6 pinned.

    Only where there are as many threads as cores, so that nothing is lost by it: with fewer, the kernel may know a core
    that is less busy. Call it before the thread's first parallel operation, which starts the workers.
    """
    import torch

    cores = available_cores()
    if len(cores) < 2 or torch.get_num_threads() != len(cores):
        return False
    before = _threads()
    torch.ones(1 << 20).add_(1.0)  # large enough to be shared out among all workers
    workers = sorted(_threads() - before)
    if len(workers) != len(cores) - 1:
        return False  # another OpenMP than libgomp, or one that had its workers before
    for thread, core in zip([threading.get_native_id(), *workers], cores, strict=True):
        os.sched_setaffinity(thread, {core})
    return True


def _threads() -> set[int]:
    return set(map(int, os.listdir("/proc/self/task")))
