"""Where a model runs and in which dtype: what the operator asked for, or what the machine has."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from embedserve.kernels import int8
from embedserve.models.architecture import ForeignArchitecture
from embedserve.models.config import ModelConfig
from embedserve.models.errors import BatchError, ModelError
from embedserve.server import threads as cpu_threads

__all__ = [
    "DeviceError",
    "OutOfMemoryError",
    "check_compiler",
    "device_name",
    "is_out_of_memory",
    "memory_left",
    "pick_device",
    "pick_dtype",
    "set_threads",
]

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}


class DeviceError(ModelError):
    """The asked device or dtype is not there, or has no room; the message says what is."""


class OutOfMemoryError(BatchError):
    """A single text or image for which the device has not memory enough; the device goes on."""


# Where NVIDIA's driver is loaded.
_DRIVER = Path("/dev/nvidiactl")


def pick_device(asked: str, progress: Callable[[str], None]) -> torch.device:
    """The device that "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:N" means. Raises DeviceError.

    progress: called with a line of text where "auto" takes the CPU of a machine with a GPU.
    """
    if asked == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda:0")
        if _DRIVER.exists():
            progress(f"NVIDIA's driver is loaded, but {_why_no_cuda()}: the CPU, which is far slower")
        return torch.device("cpu")
    kind, _, index = asked.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()) or (kind == "cpu" and index):
        raise DeviceError(f"device {asked!r} is unknown; expected auto, cpu, cuda or cuda:N")
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise DeviceError(f"device {asked!r}: no CUDA device is there ({_why_no_cuda()}); use --device cpu or auto")
    if index and int(index) >= count:
        raise DeviceError(f"device {asked!r}: there are {count} CUDA devices, the last is cuda:{count - 1}")
    return torch.device("cuda", int(index or 0))


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    return f"the driver shows no GPU to this torch, which is for CUDA {torch.version.cuda}"


# Activations of these grow beyond float16's range, and vectors would hold infinities.
_OVERFLOWING = ("qwen3", "gemma")
# bfloat16 in hardware begins with Ampere.
_AMPERE = (8, 0)


def pick_dtype(asked: str, device: torch.device, config: ModelConfig, progress: Callable[[str], None]) -> torch.dtype:
    """The dtype that "auto" or a name means for a model on a device; see `Runner.load`. Raises DeviceError."""
    architecture = config.architecture
    kind = architecture.model_type if isinstance(architecture, ForeignArchitecture) else config.family
    overflows = kind.startswith(_OVERFLOWING)
    if asked == "int8" and device.type != "cpu":
        raise DeviceError("dtype int8 is for the CPU; on a GPU use float16, bfloat16 or auto")
    has_bfloat16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _AMPERE
    if asked == "auto":
        if device.type == "cpu":
            return torch.float32
        if not overflows and config.stored_dtype != "bfloat16":
            return torch.float16
        if has_bfloat16:
            return torch.bfloat16
        progress(f"{device_name(device)} has no bfloat16 and the model may overflow float16: float32, which is slower")
        return torch.float32
    if asked not in _DTYPES:
        raise DeviceError(f"dtype {asked!r} is unknown; expected auto, {', '.join(_DTYPES)}")
    dtype = _DTYPES[asked]
    if device.type == "cpu":
        if reason := _why_not_on_cpu(dtype):
            raise DeviceError(f"dtype {asked} on the CPU: {reason}; use float32 or auto")
        return dtype
    if dtype == torch.float16 and overflows:
        raise DeviceError("dtype float16: activations of this model overflow it; use bfloat16, float32 or auto")
    if dtype == torch.bfloat16 and not has_bfloat16:
        raise DeviceError(f"dtype bfloat16: {device_name(device)} has none; use float16 or float32")
    return dtype


def check_compiler(device: torch.device) -> None:
    """Raise DeviceError where Triton, which makes the kernels of a GPU, cannot begin: it compiles a C module first."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _AMPERE:
        return
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    # Whatever fails of a compiler, its linker, or the folder where the module is to lie.
    except Exception as error:
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DeviceError(
            f"Triton, which makes the kernels for {device}, cannot begin ({said}): it needs a C compiler (gcc, or what "
            "CC names), Python's headers (python3-dev), and a folder that it may write to (TRITON_CACHE_DIR)"
        ) from error


def _why_not_on_cpu(dtype: torch.dtype) -> str | None:
    """Why this CPU should not compute in this dtype; None where it may."""
    cpu: Any = torch.cpu
    if dtype == torch.float16:
        return "it is slower than float32 there and less exact"
    if dtype == torch.bfloat16 and not (cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()):
        return f"{device_name(torch.device('cpu'))} has no arithmetic for it, and takes longer than in float32"
    return int8.why_not() if dtype == torch.int8 else None


def set_threads(asked: int | None) -> int:
    """Have torch's operations on the CPU run on so many threads, None: one a core; how many. Raises DeviceError."""
    if asked is not None and asked < 1:
        raise DeviceError(f"threads {asked}: expected at least 1")
    count = asked if asked is not None else cpu_threads.default_count()
    torch.set_num_threads(count)
    return count


# Of errors that have no class of their own: torch's on the CPU, the CUDA driver's (also through Triton), cuBLAS's, ONNX
# Runtime's.
_NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Failed to allocate memory",
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a computation broke off for want of memory, so that a smaller one may succeed."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return not isinstance(error, ModelError) and any(said in str(error) for said in _NO_MEMORY)


def memory_left(device: torch.device) -> str:
    """What is free, as the end of a sentence; on a CPU nothing is said."""
    if device.type == "cpu":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    return f", of whose {total / 2**30:.1f} GiB {free / 2**30:.1f} are free"


def device_name(device: torch.device) -> str:
    """What the maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
