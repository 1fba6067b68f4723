"""Batch bounds: how many tokens a batch of a model may have, measured when the engine starts. The least of three:

    memory   what fits beside the weights of all models with a reserve left, by the peaks of growing batches; on CUDA
    time     what runs in about 20 ms on a GPU, 100 ms on a CPU: a text that arrives waits no longer for its own batch
    rate     the smallest batch within 3 % of the best rate: beyond it tokens wait and nothing is gained

On a CPU memory is not asked: a token of all-MiniLM-L6-v2 takes 40 KB there, so what runs in 100 ms takes tens of MiB.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from embedserve.models.batch import Ints

__all__ = ["ONCE_IS_ENOUGH", "SMALLEST", "Bound", "Embed", "Sample", "Texts", "choose", "measure", "room"]

Embed = Callable[[Ints, Ints], object]
"""Runs a batch, ids [tokens] and lengths [rows], to its end."""

SMALLEST = 256
"""Tokens of the first batch that is tried, and the least bound."""

ONCE_IS_ENOUGH = 4
"""Times that the smallest batch passes the longest that a batch may take: it is the bound then whatever it takes, and a
large model on a few cores needs half a minute to repeat it."""

_LARGEST = {"cpu": 8192, "cuda": 262_144}
_LONGEST_S = {"cpu": 0.100, "cuda": 0.020}
# Below this share of the best rate a larger batch is worth its latency.
_NEAR_BEST = 0.97
# Texts of the measurement, in tokens, from and to: varied, for a batch of equal lengths hides what small batches cost.
# Where rows are padded the batcher puts like lengths together, and so does the measurement.
_LENGTHS = {"packed": (8, 256), "padded": (128, 128)}
# Left free on a GPU: what libraries take at their first call, what the allocator loses in gaps, the driver's own.
_RESERVE_SHARE, _SMALLEST_RESERVE = 0.05, 512 << 20


@dataclass(frozen=True)
class Sample:
    """What a batch of so many tokens took: seconds of its fastest run, and bytes at the peak (0 on a CPU)."""

    tokens: int
    seconds: float
    peak: int

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Bound:
    """The bound of a batch in tokens, the rate there in tokens/s, and what keeps it from being larger."""

    tokens: int
    rate: float
    reason: str


@dataclass(frozen=True)
class Texts:
    """The texts of the measurement: random ids. cost: see `Backend`; max_tokens: of a text."""

    cost: Literal["packed", "padded"]
    max_tokens: int
    vocab_size: int

    def within(self, bound: int) -> tuple[Ints, Ints]:
        """A batch, the same one each time: ids int32 [tokens], lengths int32 [rows]."""
        shortest, longest = (min(length, self.max_tokens) for length in _LENGTHS[self.cost])
        # Texts are whole, so a batch falls short of its bound by half a text on average.
        tokens = bound - min((shortest + longest) // 4, bound // 2)
        lengths = np.random.default_rng(0).integers(shortest, longest, tokens, dtype=np.int32, endpoint=True)
        lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), tokens)) + 1]
        lengths[-1] -= lengths.sum() - tokens
        return self.of(lengths)

    def of(self, lengths: Ints) -> tuple[Ints, Ints]:
        """The batch of texts of these lengths."""
        ids = np.random.default_rng(1).integers(0, self.vocab_size, int(lengths.sum()), dtype=np.int32)
        return ids, lengths


def measure(embed: Embed, texts: Texts, device: torch.device) -> Bound:
    """Run batches of growing size, and choose. It takes a second or two."""
    longest_s, memory = _LONGEST_S[device.type], room(device)
    samples: dict[int, Sample] = {}
    # Several times: other processes start at the same time, and what they disturb once they leave alone the next.
    for _ in range(3):
        size = SMALLEST
        while size <= _LARGEST[device.type]:
            found = _sample(embed, device, *texts.within(size))
            known = samples.get(size, found)
            samples[size] = Sample(found.tokens, min(known.seconds, found.seconds), max(known.peak, found.peak))
            # The next one takes about twice as much of both.
            if samples[size].seconds * 2 > longest_s or (memory is not None and samples[size].peak * 2 > memory):
                break
            size *= 2
        if samples[SMALLEST].seconds > ONCE_IS_ENOUGH * longest_s:
            break
    return choose(samples, longest_s=longest_s, memory=memory)


def choose(samples: Mapping[int, Sample], *, longest_s: float, memory: int | None) -> Bound:
    """The bound, from samples by the bound that each was within, ascending; memory: bytes for a batch, None for any."""
    quick = {size: one for size, one in samples.items() if one.seconds <= longest_s}
    quick = quick or {min(samples): samples[min(samples)]}
    best = max(one.rate for one in quick.values())
    size, chosen = next((size, one) for size, one in quick.items() if one.rate >= _NEAR_BEST * best)
    fitting = _fitting(samples, memory)
    if fitting < size:
        return Bound(max(SMALLEST, int(fitting)), chosen.rate, "larger ones do not fit into the device's memory")
    if size < max(quick):
        reason = "larger ones do not raise the rate"
    elif size < max(samples) or chosen.seconds * 2 > longest_s:
        reason = f"larger ones run for more than {1000 * longest_s:.0f} ms"
    elif fitting < 2 * size:
        reason = "twice as many do not fit into the device's memory"
    else:
        reason = "larger ones were not tried"
    return Bound(size, chosen.rate, reason)


def _fitting(samples: Mapping[int, Sample], memory: int | None) -> float:
    """The bound at which a batch takes all the memory: by the line through the two largest samples, or zero and one."""
    if memory is None:
        return math.inf
    (_, one), (size, other) = [(0, Sample(0, 0.0, 0)), *sorted(samples.items())][-2:]
    a_token = (other.peak - one.peak) / (other.tokens - one.tokens)
    return size + (memory - other.peak) / a_token if a_token > 0 else math.inf


def room(device: torch.device) -> int | None:
    """Bytes of the device's memory that a batch may take, what the allocator keeps for reuse among them; None: any."""
    if device.type == "cpu":
        return None
    free, total = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + kept - max(int(_RESERVE_SHARE * total), _SMALLEST_RESERVE)


def _sample(embed: Embed, device: torch.device, ids: Ints, lengths: Ints) -> Sample:
    """The fastest of three runs."""
    fastest, peak = math.inf, 0
    for _ in range(3):
        before = _start_peak(device)
        started = time.perf_counter()
        embed(ids, lengths)
        fastest = min(fastest, time.perf_counter() - started)
        peak = max(peak, _peak(device) - before)
    return Sample(len(ids), fastest, peak)


def _start_peak(device: torch.device) -> int:
    """Bytes that are allocated now, from where the next peak counts."""
    if device.type == "cpu":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device) -> int:
    return 0 if device.type == "cpu" else torch.cuda.max_memory_allocated(device)
