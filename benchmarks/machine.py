"""What a figure depends on besides the code: processor, accelerator, versions, and who else is at work.

Nothing that names the machine or its owner. Torch is imported by `accelerator` alone: `embedserve bench http` runs
where there is none.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["Others", "accelerator", "describe"]

PACKAGES = (
    *("embedserve", "torch", "triton", "numpy", "tokenizers", "transformers", "sentence-transformers", "onnxruntime"),
    *("uvicorn", "uvloop", "httptools"),
)


def describe() -> dict[str, Any]:
    """The date, the processor and its memory, Python and the packages that are installed; imports none of them."""
    cpu, flags = _processor()
    versions = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu,
        "cpu_capability": "AVX512" if "avx512f" in flags else "AVX2" if "avx2" in flags else platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": ".".join(map(str, sys.version_info[:3])),
        **versions,
    }


def accelerator(device: str) -> dict[str, Any]:
    """`describe` and what is known of a torch device ("cpu", "cuda", "cuda:1"): its name, memory, driver and CUDA."""
    import torch

    chosen = torch.device(device)
    if chosen.type != "cuda":
        return {**describe(), "device": device}
    properties = torch.cuda.get_device_properties(chosen)
    driver = ""
    with suppress(OSError):
        # "NVRM version: NVIDIA UNIX … Kernel Module  570.86.15  Tue …"
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split("\n")[0].split()
        driver = next((word for word in words if word[0].isdigit() and "." in word), "")
    return {
        **describe(),
        "device": properties.name,
        "device_memory_gib": round(properties.total_memory / 2**30, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": driver,
        "cuda": torch.version.cuda,
    }


class Others:
    """The work of all other processes since this was made. Above a few hundredths, absolute figures are too low."""

    def __init__(self) -> None:
        self._before = _worked()

    def cores(self) -> float | None:
        """How many cores they kept busy; None where the kernel does not say (Linux does)."""
        if self._before is None or (now := _worked()) is None:
            return None
        elapsed, everyone, own = (later - earlier for later, earlier in zip(now, self._before, strict=True))
        return round(max(0.0, everyone - own) / elapsed, 2)


def _worked() -> tuple[float, float, float] | None:
    """(now, core-seconds that all processes have worked, core-seconds that this one has)."""
    own = os.times()
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n")[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _, _, interrupts, soft, steal = map(int, fields)
    everyone = (user + nice + system + interrupts + soft + steal) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), everyone, own.user + own.system


def _processor() -> tuple[str, set[str]]:
    """The processor's name and its flags, as Linux knows them."""
    fields: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    return fields.get("model name", platform.processor()), set(fields.get("flags", "").split())
