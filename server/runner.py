"""Runner: the one owner of a device. A batch of token ids or images in, vectors out; called from one thread.

ids, lengths → PackedRows (sorted) → staged to the device → backend → pool → cut → normalise → check → back, in order
                                                                    └→ sparse and colbert heads, where asked for
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedserve.kernels import heads, pooling
from embedserve.models import registry
from embedserve.models.architecture import ForeignArchitecture
from embedserve.models.backend import Backend
from embedserve.models.batch import Ints, PackedBatch, PackedRows
from embedserve.models.config import ModelConfig, read_config
from embedserve.models.errors import BatchError, CheckpointError, ModelError
from embedserve.models.heads import load_heads
from embedserve.server import threads as cpu_threads
from embedserve.server.arrays import Rows, output_bits, wants

Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# A batch runs at most about this long: what waits behind it waits no longer, and a single text is not held up.
_LONGEST_BATCH_S = {"cpu": 0.100, "cuda": 0.020}
_SMALLEST_BATCH = 256
_LARGEST_BATCH = {"cpu": 8192, "cuda": 262_144}
# Below this share of the best rate a larger batch is worth its latency.
_NEAR_BEST = 0.97
# Texts of the measurement, in tokens, from and to: varied, for a batch of equal lengths hides what small batches cost.
_PROBE_LENGTHS = (8, 256)


class DeviceError(ModelError):
    """The asked device or dtype is not there; the message says what is."""


@dataclass(frozen=True)
class RunnerInfo:
    """What a runner runs on, for health pages and for the batcher.

    max_batch_tokens bounds a batch's cost: the sum of tokens if cost is "packed", rows times the longest if "padded". A
    single text may exceed it. modalities are "text" and, if the model takes them, "image". dimension is the size of an
    uncut vector.
    """

    device: str
    device_name: str
    dtype: str
    backend: str
    cost: Literal["packed", "padded"]
    max_batch_tokens: int
    modalities: tuple[str, ...]
    max_tokens: int
    dimension: int
    threads: int


@dataclass(frozen=True)
class Embedded:
    """A batch's answer, in the caller's order.

    arrays: by the names of `arrays.ARRAYS`; a row that was not to have an output has no elements there. finite: bool
    [rows], false where what the row was to have holds a NaN or an infinity.
    """

    arrays: Mapping[str, Rows]
    finite: Flags

    @property
    def dense(self) -> Floats:
        """The vectors as a matrix, float32 [rows, dimensions], where all rows have one of the same size."""
        rows = self.arrays["dense"]
        matrix: Floats = rows.elements.reshape(len(rows), int(rows.counts[0]))
        return matrix


class Runner:
    """A loaded model on its device. Build it with `load`; then `warm_up` once, then `run` for each batch."""

    def __init__(
        self,
        backend: Backend,
        config: ModelConfig,
        device: torch.device,
        threads: int,
        heads: Mapping[str, heads.Head],
    ) -> None:
        self._backend = backend
        self._heads = heads
        self._config = config
        self._device = device
        self._threads = threads
        self._stage = _Stage(device)
        self._max_batch_tokens = _SMALLEST_BATCH

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        config: ModelConfig | None = None,
        device: str = "auto",
        dtype: str = "auto",
        backend: str = "auto",
        threads: int | None = None,
        pin: bool = False,
        progress: Callable[[str], None] = lambda _: None,
    ) -> Runner:
        """Read a checkpoint onto a device.

        config: what `catalog.configure` made of the folder; read from the folder alone if absent.
        device: "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:N".
        dtype: "auto" (float32 on the CPU; on CUDA float16, or bfloat16 for models that overflow float16), "float32",
            "float16" or "bfloat16".
        backend: "auto" (our own, where the family is ours), or a key of `registry.BACKENDS`.
        threads: of the CPU's operations; None takes all cores that the process may use.
        pin: on the CPU, give each thread a core of its own where they are as many; see `threads.pin`.
        progress: called with a line of text at each step.

        Raises DeviceError for a device or dtype that is not there, CheckpointError for a checkpoint that cannot be run.
        """
        if config is None:
            config = read_config(folder)
        place = _pick_device(device)
        kind = _pick_dtype(dtype, place, config, progress)
        count = _set_threads(threads)
        # Large enough an operation to be shared out among all workers.
        if pin and place.type == "cpu" and cpu_threads.pin(count, lambda: torch.ones(1 << 20).add_(1.0)):
            progress(f"{count} threads, each on a core of its own")
        name = registry.backend_for(config.family) if backend == "auto" else backend
        shown = str(kind).removeprefix("torch.")
        progress(f"loading {folder.name} as {shown} onto {place}, {name} backend")
        started = time.perf_counter()
        with torch.inference_mode():
            loaded = registry.backend(name)(config, place, kind)
            heads = {} if loaded.pools else load_heads(config, place, loaded.dtype)
        if missing := set(config.outputs) - {"dense", *heads}:
            raise CheckpointError(
                f"{folder}: the {name} backend's graph pools by itself and gives no token states, which "
                f"{' and '.join(sorted(missing))} output needs; use --backend native"
            )
        progress(f"loaded in {time.perf_counter() - started:.1f} s")
        return cls(loaded, config, place, count, heads)

    @property
    def info(self) -> RunnerInfo:
        """The runner's facts; `max_batch_tokens` is `warm_up`'s work, and the smallest before it."""
        return RunnerInfo(
            device=str(self._device),
            device_name=_device_name(self._device),
            dtype=str(self._backend.dtype).removeprefix("torch."),
            backend=self._backend.name,
            cost=self._backend.cost,
            max_batch_tokens=self._max_batch_tokens,
            modalities=self._config.modalities,
            max_tokens=self._config.max_tokens,
            dimension=self._config.dimension,
            threads=self._threads,
        )

    @torch.inference_mode()
    def run(self, ids: Ints, lengths: Ints, dimensions: Ints, outputs: Ints | None = None) -> Embedded:
        """Embed a batch of texts.

        ids: int32 [total], the token ids of all texts, one after another. lengths: int32 [rows], tokens of each text.
        dimensions: int32 [rows], components wanted of each vector, 1 to `info.dimension`. outputs: int32 [rows], what
        each text is to have, see `arrays.output_bits`; None is a dense vector each.

        Raises BatchError if the arrays do not fit together, an id is not in the vocabulary, a text is longer than the
        model's positions, a dimension is out of range, or an output is not among the model's.
        """
        self._check(ids, lengths, dimensions, outputs)
        rows = PackedRows.pack(ids, lengths)
        batch, cut = self._stage.send(rows, self._cut(dimensions[rows.order]))
        states = self._backend.hidden_states(batch)
        if self._backend.pools:
            pooled = states.float()
        else:
            pooled = pooling.pool(states, batch.layout.cu_seqlens, self._config.pooling)
        vectors, finite = self._finish(pooled, cut, dimensions)
        vectors, finite = rows.restore(vectors), rows.restore(finite)
        if outputs is None:
            return Embedded({"dense": Rows.of_matrix(vectors, dimensions)}, finite)
        dense = wants(outputs, "dense")
        finite |= ~dense
        arrays = {"dense": Rows.of_matrix(vectors, np.where(dense, dimensions, 0).astype(np.int32))}
        if bool(wants(outputs, "sparse").any()):
            arrays |= self._sparse(states, batch, wants(outputs, "sparse"), finite)
        if bool(wants(outputs, "colbert").any()):
            arrays |= self._colbert(states, batch, wants(outputs, "colbert"), finite)
        return Embedded(arrays, finite)

    @torch.inference_mode()
    def run_images(self, pixels: npt.NDArray[np.uint8], dimensions: Ints) -> Embedded:
        """Embed a batch of images.

        pixels: uint8, all images of [size, size, 3] red, green and blue, one after another, as `config.images` says.
        dimensions: as `run`. Raises BatchError as `run`, and where the model takes no images.
        """
        images = self._config.images
        if images is None:
            raise BatchError("this model takes no images")
        rows, size = len(dimensions), images.size
        if not rows or pixels.size != rows * size * size * 3:
            raise BatchError(f"{pixels.size} bytes of pixels came for {rows} images of {size} by {size}")
        self._check_dimensions(dimensions)
        # Copies: buffers of frames are read-only, and torch warns of such.
        host = torch.from_numpy(pixels.reshape(rows, size, size, 3).copy())
        cut = self._cut(dimensions)
        there = None if cut is None else torch.from_numpy(cut.copy()).to(self._device)
        pooled = self._backend.images(host.to(self._device)).float()
        vectors, finite = self._finish(pooled, there, dimensions)
        return Embedded({"dense": Rows.of_matrix(vectors, dimensions)}, finite)

    def _cut(self, dimensions: Ints) -> Ints | None:
        """The dimensions, or None where no row is cut."""
        return None if int(dimensions.min()) == self._config.dimension else dimensions

    def _finish(self, pooled: Tensor, cut: Tensor | None, dimensions: Ints) -> tuple[Floats, Flags]:
        """Cut, normalise, check: vectors float32 [rows, max(dimensions)] on the host, and which are finite."""
        vectors, finite = pooling.finish(pooled, cut, normalize=self._config.normalize)
        # The first copy waits for the device; the second finds it done.
        host: Floats = vectors[:, : int(dimensions.max())].cpu().numpy()
        flags: Flags = finite.cpu().numpy()
        return host, flags

    def _sparse(self, states: Tensor, batch: PackedBatch, wanted: Flags, finite: Flags) -> dict[str, Rows]:
        """bge-m3's weights of the rows that want them; clears `finite` where they are not."""
        rows = batch.host
        weights, fine = heads.sparse_weights(states, self._heads["sparse"], batch.layout)
        host: Floats = weights.cpu().numpy()
        finite[rows.order] &= fine.cpu().numpy() | ~wanted[rows.order]
        host[~wanted[rows.order][rows.rows]] = 0.0
        found = heads.sparse_rows(rows.ids, host, rows.cu_seqlens, self._config.ignored_token_ids)
        back = np.argsort(rows.order)
        return {
            "sparse_ids": Rows.of([found[row][0] for row in back], "<i4"),
            "sparse_weights": Rows.of([found[row][1] for row in back], "<f4"),
        }

    def _colbert(self, states: Tensor, batch: PackedBatch, wanted: Flags, finite: Flags) -> dict[str, Rows]:
        """bge-m3's vectors of the rows that want them; clears `finite` where they are not."""
        kept = wanted[batch.host.order]
        if not kept.all():
            part, tokens = batch.host.only(kept)
            states = states.index_select(0, torch.from_numpy(tokens).to(self._device))
            batch, _ = self._stage.send(part, None)
        rows = batch.host
        vectors, fine = heads.colbert_vectors(states, self._heads["colbert"], batch.layout)
        host: Floats = vectors.cpu().numpy()
        finite[rows.order] &= fine.cpu().numpy()
        pieces = [np.empty(0, np.float32)] * len(wanted)
        # A row of n tokens has n - 1 vectors.
        ends = rows.cu_seqlens[1:] - np.arange(1, len(rows.order) + 1)
        for row, piece in zip(rows.order, np.split(host, ends[:-1]), strict=True):
            pieces[row] = piece.reshape(-1)
        return {"colbert": Rows.of(pieces, "<f4")}

    def _check(self, ids: Ints, lengths: Ints, dimensions: Ints, outputs: Ints | None) -> None:
        if dimensions.shape != lengths.shape or (outputs is not None and outputs.shape != lengths.shape):
            raise BatchError(f"{len(lengths)} lengths came with {len(dimensions)} dimensions; expected one each")
        if not len(ids) or not len(lengths):
            raise BatchError("a batch needs at least one text")
        # On a GPU an index out of range kills the process's whole CUDA context, so it is caught here.
        if int(ids.min()) < 0 or int(ids.max()) >= self._config.vocab_size:
            raise BatchError(
                f"token ids run from {int(ids.min())} to {int(ids.max())}, but the vocabulary from 0 to "
                f"{self._config.vocab_size - 1}; the tokenizer and the weights do not belong together"
            )
        if int(lengths.max()) > self._config.max_positions:
            raise BatchError(
                f"a text has {int(lengths.max())} tokens, the model takes {self._config.max_positions}; "
                "cut it in the tokenizer"
            )
        self._check_dimensions(dimensions)
        if outputs is not None:
            known = output_bits(self._config.outputs)
            if int(np.bitwise_or.reduce(outputs)) & ~known or not int(outputs.min()):
                raise BatchError(f"outputs that this model does not have; it has {', '.join(self._config.outputs)}")

    def _check_dimensions(self, dimensions: Ints) -> None:
        if int(dimensions.min()) < 1 or int(dimensions.max()) > self._config.dimension:
            raise BatchError(
                f"dimensions run from {int(dimensions.min())} to {int(dimensions.max())}; expected 1 to "
                f"{self._config.dimension}"
            )

    def warm_up(self, progress: Callable[[str], None] = lambda _: None, *, max_batch_tokens: int | None = None) -> None:
        """Let the model answer for the first time: allocators and libraries settle, a broken device shows.

        `info.max_batch_tokens` becomes the given number, or the one that is measured; which takes a second or two.
        Raises CheckpointError if no vector is finite.
        """
        if max_batch_tokens is not None:
            self._max_batch_tokens = max_batch_tokens
            self._probe(_SMALLEST_BATCH)
        else:
            self._measure(progress)
        full = np.array([self._config.dimension], np.int32)
        if self._config.outputs != ("dense",):
            every = np.array([output_bits(self._config.outputs)], np.int32)
            self.run(np.zeros(2, np.int32), np.array([2], np.int32), full, every)
        if self._config.images is not None:
            size = self._config.images.size
            self.run_images(np.zeros(size * size * 3, np.uint8), full)

    def _measure(self, progress: Callable[[str], None]) -> None:
        """Run batches of growing size, and take the smallest within 3 % of the best rate, among those that run in about
        100 ms on a CPU or 20 ms on a GPU."""
        fastest: dict[int, float] = {}
        # Several times: other processes start at the same time, and what they disturb once they leave alone the next.
        for _ in range(3):
            size = _SMALLEST_BATCH
            while size <= _LARGEST_BATCH[self._device.type]:
                fastest[size] = min(fastest.get(size, math.inf), self._probe(self._filled(size)))
                # The next one takes about twice as long.
                if fastest[size] * 2 > _LONGEST_BATCH_S[self._device.type]:
                    break
                size *= 2
        rates = {size: self._filled(size) / seconds for size, seconds in fastest.items()}
        best = max(rates.values())
        self._max_batch_tokens = next(size for size, rate in rates.items() if rate >= _NEAR_BEST * best)
        progress(f"batches of up to {self._max_batch_tokens} tokens, {best:,.0f} tokens/s")

    def _filled(self, bound: int) -> int:
        """Tokens in a batch of this bound: texts are whole, so it falls short by half a text on average."""
        return bound - sum(self._probe_lengths()) // 4

    def _probe_lengths(self) -> tuple[int, int]:
        shortest, longest = _PROBE_LENGTHS
        return min(shortest, self._config.max_tokens), min(longest, self._config.max_tokens)

    def _probe(self, tokens: int) -> float:
        """Seconds of the fastest of three runs of so many tokens."""
        chance = np.random.default_rng(0)
        shortest, longest = self._probe_lengths()
        lengths = chance.integers(shortest, longest, tokens, dtype=np.int32, endpoint=True)
        rows = int(np.searchsorted(np.cumsum(lengths), tokens)) + 1
        lengths = lengths[:rows]
        lengths[-1] -= lengths.sum() - tokens
        ids = chance.integers(0, self._config.vocab_size, tokens, dtype=np.int32)
        dimensions = np.full(rows, self._config.dimension, dtype=np.int32)
        fastest = float("inf")
        for _ in range(3):
            started = time.perf_counter()
            finite = self.run(ids, lengths, dimensions).finite
            if not finite.any():
                raise CheckpointError(
                    f"{self._config.folder}: every vector that the model gives holds a NaN or an infinity; its weights "
                    "are damaged, or its activations overflow the dtype: try --dtype float32"
                )
            fastest = min(fastest, time.perf_counter() - started)
        return fastest


class _Stage:
    """Brings a batch's integers to the device: in place on the CPU, in one copy from pinned memory to CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = torch.empty(0, dtype=torch.int32)

    def send(self, rows: PackedRows, dimensions: Ints | None) -> tuple[PackedBatch, Tensor | None]:
        """Return the batch on the device, and dimensions there."""
        if self._device.type == "cpu":
            return PackedBatch.on_cpu(rows), None if dimensions is None else torch.from_numpy(dimensions)
        parts = [rows.ids, rows.positions, rows.rows, rows.cu_seqlens]
        if dimensions is not None:
            parts.append(dimensions)
        sizes = [len(part) for part in parts]
        total = sum(sizes)
        if self._pinned.numel() < total:
            self._pinned = torch.empty(2 * total, dtype=torch.int32, pin_memory=True)
        # Free for reuse: `run` has waited for the previous batch before it returned.
        np.concatenate(parts, out=self._pinned.numpy()[:total])
        there = torch.split(self._pinned[:total].to(self._device, non_blocking=True), sizes)
        batch = PackedBatch.from_staged(rows, ids=there[0], positions=there[1], rows=there[2], cu_seqlens=there[3])
        return batch, there[4] if dimensions is not None else None


def _pick_device(asked: str) -> torch.device:
    if asked == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    kind, _, index = asked.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()) or (kind == "cpu" and index):
        raise DeviceError(f"device {asked!r} is unknown; expected auto, cpu, cuda or cuda:N")
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        built = "this torch is built without CUDA" if torch.version.cuda is None else "the driver shows no GPU"
        raise DeviceError(f"device {asked!r}: no CUDA device is there ({built}); use --device cpu or auto")
    if index and int(index) >= count:
        raise DeviceError(f"device {asked!r}: there are {count} CUDA devices, the last is cuda:{count - 1}")
    return torch.device("cuda", int(index or 0))


# Activations of these grow beyond float16's range, and vectors would hold infinities.
_OVERFLOWING = ("qwen3", "gemma")
# bfloat16 in hardware begins with Ampere.
_AMPERE = (8, 0)


def _pick_dtype(asked: str, device: torch.device, config: ModelConfig, progress: Callable[[str], None]) -> torch.dtype:
    architecture = config.architecture
    kind = architecture.model_type if isinstance(architecture, ForeignArchitecture) else config.family
    overflows = kind.startswith(_OVERFLOWING)
    has_bfloat16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _AMPERE
    if asked == "auto":
        if device.type == "cpu":
            return torch.float32
        if not overflows and config.stored_dtype != "bfloat16":
            return torch.float16
        if has_bfloat16:
            return torch.bfloat16
        progress(f"{_device_name(device)} has no bfloat16 and the model may overflow float16: float32, which is slower")
        return torch.float32
    if asked not in _DTYPES:
        raise DeviceError(f"dtype {asked!r} is unknown; expected auto, {', '.join(_DTYPES)}")
    dtype = _DTYPES[asked]
    if device.type == "cpu" and dtype != torch.float32:
        raise DeviceError(
            f"dtype {asked} on the CPU is not supported: it is slower than float32 there and less exact; use "
            "float32 or auto"
        )
    if dtype == torch.float16 and overflows:
        raise DeviceError("dtype float16: activations of this model overflow it; use bfloat16, float32 or auto")
    if dtype == torch.bfloat16 and not has_bfloat16:
        raise DeviceError(f"dtype bfloat16: {_device_name(device)} has none; use float16 or float32")
    return dtype


def _set_threads(asked: int | None) -> int:
    if asked is not None and asked < 1:
        raise DeviceError(f"threads {asked}: expected at least 1")
    count = asked if asked is not None else cpu_threads.default_count()
    torch.set_num_threads(count)
    return count


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
