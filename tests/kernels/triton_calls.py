"""Calls Triton kernels from tests: in a process with Triton's interpreter, and on a GPU where there is one.

The interpreter's switch, TRITON_INTERPRET, is read when Triton is first imported, hence the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

INTERPRETER = "interpreter"
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PLACES = [INTERPRETER, pytest.param("cuda", marks=GPU)]


@dataclass(frozen=True)
class Packed:
    """A tensor on its way between processes, with all of the memory that it is a view of; numpy has no bfloat16."""

    memory: npt.NDArray[np.float32] | npt.NDArray[np.int32]
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def memory_of(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())


def pack(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    memory = memory_of(value.cpu() if value.is_cuda else value)
    numbers = memory.float() if memory.is_floating_point() else memory
    return Packed(numbers.numpy(), value.dtype, tuple(value.shape), value.stride(), value.storage_offset())


def unpack(value: Any, device: str) -> Any:
    if not isinstance(value, Packed):
        return value
    memory = torch.from_numpy(value.memory).to(device, value.dtype)
    return memory.as_strided(value.shape, value.stride, value.offset)


def run(name: str, device: str, packed: list[Any]) -> list[Any]:
    """Call `module:function` of embedserve.kernels; its result, and its arguments as they are after it."""
    module, function = name.split(":")
    arguments = [unpack(one, device) for one in packed]
    result = getattr(import_module(f"embedserve.kernels.{module}"), function)(*arguments)
    return [pack(result.contiguous()), *(pack(memory_of(one)) if isinstance(one, Tensor) else one for one in arguments)]


@contextmanager
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton interprets its kernels."""
    pytest.importorskip("triton", reason="Triton is published for Linux alone")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            # The process starts with the first call.
            pool.submit(int).result(100)
        yield pool


@contextmanager
def calls(place: str) -> Iterator[Callable[..., Tensor]]:
    """Gives `call("module:function", *arguments)`, which leaves in tensors what the function has written to them."""

    def call(name: str, *arguments: Any) -> Tensor:
        result, *after = run_there(name, [pack(one) for one in arguments])
        for argument, written in zip(arguments, after, strict=True):
            if isinstance(argument, Tensor):
                memory_of(argument).copy_(unpack(written, "cpu"))
        found: Tensor = unpack(result, "cpu")
        return found

    if place != INTERPRETER:
        run_there = lambda name, packed: run(name, place, packed)  # noqa: E731
        yield call
        return
    with interpreter() as pool:
        run_there = lambda name, packed: pool.submit(run, name, "cpu", packed).result(100)  # noqa: E731
        yield call
