"""CUDA graphs of small batches: hundreds of kernels launched as one.

A text of 16 tokens keeps a GPU busy for less time than the host takes to launch its kernels one by one. A graph holds
them with all their addresses and sizes, so it needs fixed shapes: a batch is filled up to its bucket, see
`PackedRows.in_bucket`, with at least half of the bucket its own, two thirds from 64 tokens on. Only the states of the
tokens come out of a graph. Pooling and heads follow on the batch's own rows, launched as after any batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from embedserve.models.backend import Backend
from embedserve.models.batch import PackedBatch, PackedRows
from embedserve.models.config import ModelConfig

__all__ = ["BUCKETS", "Bucket", "CapturedStates", "bucket_for", "capture"]


@dataclass(frozen=True)
class Bucket:
    """The shape of a graph: tokens and rows, those of padding among them."""

    tokens: int
    rows: int

    def takes(self, tokens: int, rows: int) -> bool:
        """Whether a batch fits, with a row for its padding if it needs any."""
        return tokens <= self.tokens and rows + (tokens < self.tokens) <= self.rows


# Empty rows are not free: FlashAttention starts a block of threads for each of them, head and 128 tokens of the bucket.
# So there is a graph for a text alone, and one for texts of eight tokens on average. With more than 512 tokens the
# larger models keep a GPU busy for longer than their launches take.
BUCKETS = tuple(
    Bucket(tokens, rows)
    for tokens in (16, 32, 64, 96, 128, 192, 256, 384, 512)
    for rows in dict.fromkeys((2, max(2, tokens // 8)))
)

# Device memory for all graphs of a model.
_LARGEST_POOL = 256 << 20
# A graph runs the kernels that an eager run of the same shape would: nothing but the order of a sum may differ.
_LEAST_COSINE = 0.9999
# The same tokens without padding run in other shapes and are rounded otherwise; a padding that leaks is far below.
_LEAST_COSINE_UNPADDED = 0.99


def bucket_for(buckets: Iterable[Bucket], tokens: int, rows: int) -> Bucket | None:
    """The first of the buckets, ascending, that takes a batch of so many tokens and rows; None if there is none."""
    return next((bucket for bucket in buckets if bucket.takes(tokens, rows)), None)


class CapturedStates:
    """`Backend.hidden_states` for one bucket, as a graph."""

    def __init__(
        self,
        backend: Backend,
        config: ModelConfig,
        bucket: Bucket,
        device: torch.device,
        pool: Any,
        stream: torch.cuda.Stream,
    ) -> None:
        """Capture it. pool: the graphs that share memory; stream: to capture on, one for all of them, not the default.

        Raises RuntimeError where the backend does what no graph can hold, such as waiting for the device.
        """
        # One row as long as the bucket: kernels that are told the longest row get the bound that holds for any batch.
        host = _random_rows([bucket.tokens], config.vocab_size).in_bucket(bucket.tokens, bucket.rows)
        batch = _on_device(host, device)
        self._inputs = [batch.ids, batch.layout.positions, batch.layout.rows, batch.layout.cu_seqlens]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            # Twice beforehand: kernels are compiled, and libraries take memory of their own, outside of the graph.
            for _ in range(2):
                backend.hidden_states(batch)
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may go on with what a capture forbids.
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._states = backend.hidden_states(batch)
        torch.cuda.current_stream(device).wait_stream(stream)

    def replay(self, inputs: Sequence[Tensor]) -> Tensor:
        """States [bucket.tokens, hidden] of int32 ids, positions, rows, cu_seqlens in the bucket's shape.

        Launched on the current stream. They hold until what is launched there with the next replay.
        """
        torch._foreach_copy_(self._inputs, list(inputs))
        self._graph.replay()
        return self._states


def capture(
    backend: Backend, config: ModelConfig, device: torch.device, progress: Callable[[str], None]
) -> dict[Bucket, CapturedStates]:
    """Graphs of all buckets that the model's positions, and the memory for graphs, allow; ascending.

    Each is compared with the eager run. One that differs is left out, and its batches run eagerly; `progress` says so.
    Call it under `torch.inference_mode`, while nothing else runs on the device.
    """
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    captured: dict[Bucket, CapturedStates] = {}
    taken = 0
    # The largest first: the memory that it needs serves the others too.
    for bucket in reversed([bucket for bucket in BUCKETS if bucket.tokens <= config.max_positions]):
        shown = f"no CUDA graph for batches of up to {bucket.tokens} tokens in {bucket.rows} rows"
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        try:
            # Leaving it makes the default stream current again, which a capture that fails would not.
            with torch.cuda.stream(torch.cuda.default_stream(device)):
                states = CapturedStates(backend, config, bucket, device, pool, stream)
                grown = torch.cuda.memory_reserved(device) - before
                different = _difference(backend, config, states, bucket, device)
        except RuntimeError as error:
            # What one graph cannot hold, the others cannot either.
            progress(f"{shown}, or fewer: {_first_line(error)}")
            break
        if different:
            progress(f"{shown}: {different}")
        elif taken + grown > _LARGEST_POOL:
            progress(f"{shown}: it would take {grown >> 20} MiB, of {_LARGEST_POOL >> 20} for all")
        else:
            captured[bucket], taken = states, taken + grown
    if captured:
        progress(f"CUDA graphs for batches of up to {max(b.tokens for b in captured)} tokens, {taken >> 20} MiB")
    return dict(reversed(captured.items()))


def _difference(
    backend: Backend, config: ModelConfig, captured: CapturedStates, bucket: Bucket, device: torch.device
) -> str:
    """What is wrong with the graph's states of a batch with padding; empty if nothing is."""
    tokens = bucket.tokens - bucket.tokens // 8
    # Its last row is that of the padding.
    lengths = [tokens] if bucket.rows == 2 else [1, tokens // 4, tokens - tokens // 4 - 1]
    host = _random_rows(lengths, config.vocab_size)
    filled = _on_device(host.in_bucket(bucket.tokens, bucket.rows), device)
    # The bound that the graph was told: the same kernels run.
    layout = replace(filled.layout, max_seqlen=bucket.tokens)
    padded = replace(filled, layout=layout)
    found = captured.replay([padded.ids, layout.positions, layout.rows, layout.cu_seqlens])[:tokens].clone()
    for expected, least, which in (
        (backend.hidden_states(padded)[:tokens], _LEAST_COSINE, "the same batch run eagerly"),
        (backend.hidden_states(_on_device(host, device)), _LEAST_COSINE_UNPADDED, "the batch without padding"),
    ):
        cosine = F.cosine_similarity(found.float(), expected.float()).min().item()
        if not cosine >= least:  # NaN is no pass
            return f"its states have a cosine of {cosine:.6f} with {which}; expected {least}"
    return ""


def _random_rows(lengths: list[int], vocab_size: int) -> PackedRows:
    ids = np.random.default_rng(0).integers(0, vocab_size, sum(lengths), dtype=np.int32)
    return PackedRows.pack(ids, np.array(lengths, np.int32))


def _on_device(host: PackedRows, device: torch.device) -> PackedBatch:
    parts = (torch.from_numpy(part).to(device) for part in (host.ids, host.positions, host.rows, host.cu_seqlens))
    ids, positions, rows, cu_seqlens = parts
    return PackedBatch.from_staged(host, ids=ids, positions=positions, rows=rows, cu_seqlens=cu_seqlens)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
