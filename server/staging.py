"""Staging: a batch's arrays to the device and its answer back, so that the device never waits for the host.

On CUDA two batches are under way at once, each in a slot of its own:

    host       │ A: fill pinned ┊ launch          │ B: fill pinned ┊ launch         │ wait for A, hand out …
    upload     │                └ copy A          │                └ copy B
    compute    │                    └─ A ─────────┼────────────────────└─ B ────────
    download   │                                  └ copy A's answer

Each arrow is an event; nobody waits for the whole device. Memory is safe without `record_stream`: a slot's buffers are
written again only after its batch's last event, and the answer's tensors are referenced until it has passed. Batches
share the memory of their activations: the allocator hands blocks on in the order of the compute stream.

On the CPU nothing is copied, shared or locked.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["CudaStaging", "HostStaging", "Launch", "Staging", "staging_of"]

Array = npt.NDArray[Any]
Launch = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Inputs on the device → outputs there, by name, without waiting for them."""


class Staging(Protocol):
    """Where a device's batches pass. Any number of threads may call it."""

    concurrency: int
    """Batches at once that are worth it: further ones would wait."""

    def run(self, arrays: Mapping[str, Array], launch: Launch) -> AbstractContextManager[dict[str, Array]]:
        """Launch a batch on copies of `arrays`, int32 or uint8, and wait for its outputs, of any dtype.

        What comes back holds until the block ends: copy what is to stay. Raises what `launch` raises. Call it under
        `torch.inference_mode`, as all others do: buffers that were made there cannot be written elsewhere.
        """
        ...


@functools.cache
def staging_of(device: torch.device) -> Staging:
    """The device's own: all models of a process on one device share its streams, and the order of their batches."""
    return CudaStaging(device) if device.type == "cuda" else HostStaging()


class HostStaging:
    """The CPU: memory is the same on both sides."""

    concurrency = 1

    @contextmanager
    def run(self, arrays: Mapping[str, Array], launch: Launch) -> Iterator[dict[str, Array]]:
        """See `Staging`."""
        # torch warns of arrays that are read-only, as those of frames are.
        there = {
            name: torch.from_numpy(array if array.flags.writeable else array.copy()) for name, array in arrays.items()
        }
        yield {name: output.numpy() for name, output in launch(there).items()}


class CudaStaging:
    """A CUDA device: one stream that computes, one for each direction of copies, and two slots."""

    concurrency = 2

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # The default one: models are loaded on it, so whatever they did stands before their first batch.
        self._compute = torch.cuda.default_stream(device)
        self._upload: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._download: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._launching = threading.Lock()
        self._free: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        for _ in range(self.concurrency):
            self._free.put(_Slot(device))

    @contextmanager
    def run(self, arrays: Mapping[str, Array], launch: Launch) -> Iterator[dict[str, Array]]:
        """See `Staging`. `launch` runs under a lock, with the compute stream current."""
        # For this thread. Else each stream's block below would end by going back to cuda:0, and on another GPU's behalf
        # take some hundred MB for a context there.
        torch.cuda.set_device(self._device)
        slot = self._free.get()
        try:
            there = slot.send(list(arrays.values()), self._upload)
            # One batch's launch at a time, whole: two in turns would keep the activations of both.
            with self._launching, torch.cuda.stream(self._compute):
                self._compute.wait_event(slot.sent)
                launched = launch(dict(zip(arrays, there, strict=True)))
                outputs = [output.contiguous() for output in launched.values()]
                slot.computed.record(self._compute)
            host = dict(zip(launched, slot.bring(outputs, self._download), strict=True))
            # Gives up Python's lock, and sleeps instead of spinning.
            slot.arrived.synchronize()
            del launched, outputs
            yield host
        except BaseException:
            # What was launched may still read and write the slot.
            torch.cuda.synchronize(self._device)
            raise
        finally:
            self._free.put(slot)


class _Slot:
    """Buffers of one batch under way, in bytes, grown as needed: pinned for both directions, and on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sending = self._there = self._coming = torch.empty(0, dtype=torch.uint8)
        self.sent: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.computed: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.arrived: torch.cuda.Event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def send(self, arrays: Sequence[Array], upload: torch.cuda.Stream) -> list[Tensor]:
        """Start the copy to the device, in one piece; `sent` marks its end. The slot's batch before has ended."""
        places, total = _places([array.nbytes for array in arrays])
        with torch.cuda.stream(upload):
            if self._there.numel() < total:
                self._sending = _pinned(total)
                self._there = torch.empty(self._sending.numel(), dtype=torch.uint8, device=self._device)
            host = self._sending.numpy()
            for array, place in zip(arrays, places, strict=True):
                host[place] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            self._there[:total].copy_(self._sending[:total], non_blocking=True)
            self.sent.record(upload)
        return [
            self._there[place].view(_DTYPES[array.dtype]).view(array.shape)
            for array, place in zip(arrays, places, strict=True)
        ]

    def bring(self, outputs: Sequence[Tensor], download: torch.cuda.Stream) -> list[Array]:
        """Start the copies to the host behind `computed`; `arrived` marks their end, and only then the arrays hold."""
        places, total = _places([output.nbytes for output in outputs])
        with torch.cuda.stream(download):
            if self._coming.numel() < total:
                self._coming = _pinned(total)
            host = [
                self._coming[place].view(output.dtype).view(output.shape)
                for output, place in zip(outputs, places, strict=True)
            ]
            download.wait_event(self.computed)
            for here, output in zip(host, outputs, strict=True):
                here.copy_(output, non_blocking=True)
            self.arrived.record(download)
        return [here.numpy() for here in host]


_DTYPES = {np.dtype(np.int32): torch.int32, np.dtype(np.uint8): torch.uint8}
"""Of what goes to the device: integers of texts, pixels."""

# The alignment of an allocation of its own: Triton compiles another kernel for pointers that are aligned less.
_ALIGNMENT = 256


def _places(sizes: Sequence[int]) -> tuple[list[slice], int]:
    """Where pieces of these sizes lie in a buffer, in bytes, and how much they take together."""
    places, end = [], 0
    for size in sizes:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + size
        places.append(slice(start, end))
    return places, end


def _pinned(size: int) -> Tensor:
    """At least so many bytes, with room to grow: pinning takes the driver milliseconds."""
    return torch.empty(1 << max(16, (size - 1).bit_length()), dtype=torch.uint8, pin_memory=True)
