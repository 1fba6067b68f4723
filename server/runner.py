"""Runner: a model on its device. A batch of token ids or images in, vectors out; from any number of threads.

ids, lengths → PackedRows (sorted) → staging → backend, or a CUDA graph of it → pool → cut → normalise → check ┐
                                        │                                    └→ sparse and colbert heads       ├→ back
                                        └ the launch of one batch, while the one before it runs                ┘

A batch that the memory does not suffice for is halved, and again, until its parts fit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedserve.kernels import dispatch, heads, pooling
from embedserve.kernels.attention import PROGRAM_LENGTHS
from embedserve.models import registry
from embedserve.models.backend import Backend
from embedserve.models.batch import Ints, PackedBatch, PackedRows
from embedserve.models.config import ModelConfig, read_config
from embedserve.models.errors import BatchError, CheckpointError
from embedserve.models.heads import load_heads
from embedserve.server import bounds, graphs, memory, precision
from embedserve.server import device as devices
from embedserve.server import threads as cpu_threads
from embedserve.server.arrays import ARRAYS, OUTPUTS, Rows, join, output_bits, wants
from embedserve.server.device import DeviceError, OutOfMemoryError, is_out_of_memory
from embedserve.server.staging import staging_of

__all__ = ["DeviceError", "Embedded", "Runner", "RunnerInfo"]

log = logging.getLogger("embedserve.runner")

Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class RunnerInfo:
    """What a runner runs on, for health pages and for the batcher.

    max_batch_tokens bounds a batch's cost: the sum of tokens if cost is "packed", rows times the longest if "padded". A
    single text may exceed it. concurrency: batches at once that are worth it. modalities are "text" and, if the model
    takes them, "image". dimension is the size of an uncut vector.
    """

    device: str
    device_name: str
    dtype: str
    backend: str
    cost: Literal["packed", "padded"]
    max_batch_tokens: int
    concurrency: int
    modalities: tuple[str, ...]
    max_tokens: int
    dimension: int
    threads: int


@dataclass(frozen=True)
class Embedded:
    """A batch's answer, in the caller's order.

    arrays: by the names of `arrays.ARRAYS`; a row that was not to have an output has no elements there. finite: bool
    [rows], false where what the row was to have holds a NaN or an infinity. computed_tokens: padding included.
    """

    arrays: Mapping[str, Rows]
    finite: Flags
    computed_tokens: int

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
        self._staging = staging_of(device)
        self._pool_and_finish = dispatch.choose(device, backend.dtype).pool_and_finish
        self._graphs: Mapping[graphs.Bucket, graphs.CapturedStates] = {}
        self._max_batch_tokens = bounds.SMALLEST
        self._warned: set[int] = set()

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
            "float16", "bfloat16" or "int8"; the last two on a CPU that has them, where their cosine to float32 and
            their gain are told to `progress`.
        backend: "auto" (our own, where the family is ours), or a key of `registry.BACKENDS`.
        threads: of the CPU's operations; None takes all cores that the process may use.
        pin: on the CPU, give each thread a core of its own where they are as many; see `threads.pin`.
        progress: called with a line of text at each step.

        Raises DeviceError for a device or dtype that is not there or cannot be used, or weights that have no room
        there, CheckpointError for a checkpoint that cannot be run.
        """
        if config is None:
            config = read_config(folder)
        place = devices.pick_device(device, progress)
        kind = devices.pick_dtype(dtype, place, config, progress)
        devices.check_compiler(place)
        count = devices.set_threads(threads)
        if place.type == "cpu" and count > (cores := len(cpu_threads.available_cores())):
            progress(
                f"{count} threads on {cores} cores: they will wait for each other, far slower than {cores} threads"
            )
        # Large enough an operation to be shared out among all workers.
        if pin and place.type == "cpu" and cpu_threads.pin(count, lambda: torch.ones(1 << 20).add_(1.0)):
            progress(f"{count} threads, each on a core of its own")
        name = registry.backend_for(config.family) if backend == "auto" else backend
        shown = str(kind).removeprefix("torch.")
        exact = None
        if place.type == "cpu" and kind != torch.float32:
            if name != "native":
                raise DeviceError(f"dtype {shown} on the CPU: the {name} backend has but float32 there; use native")
            # Gone again before the other one comes, so that the two are never in memory together.
            exact = cls.load(
                folder, config=config, device="cpu", dtype="float32", backend=name, threads=count, progress=progress
            )._precision_probe()
        progress(f"loading {folder.name} as {shown} onto {place}, {name} backend")
        started = time.perf_counter()
        try:
            with torch.inference_mode():
                loaded = registry.backend(name)(config, place, kind)
                states = torch.float32 if loaded.dtype == torch.int8 else loaded.dtype
                heads = {} if loaded.pools else load_heads(config, place, states)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceError(
                f"{folder.name} as {shown} does not fit into the memory of {place}{devices.memory_left(place)}; serve "
                "fewer models there, or a smaller one, or use a larger device"
            ) from error
        if missing := set(config.outputs) - {"dense", *heads}:
            raise CheckpointError(
                f"{folder}: the {name} backend's graph pools by itself and gives no token states, which "
                f"{' and '.join(sorted(missing))} output needs; use --backend native"
            )
        progress(f"loaded in {time.perf_counter() - started:.1f} s")
        runner = cls(loaded, config, place, count, heads)
        if place.type == "cpu":
            memory.keep_freed()
        if exact is not None:
            progress(precision.compare(shown, runner._precision_probe(), exact))
        return runner

    @property
    def info(self) -> RunnerInfo:
        """The runner's facts; `max_batch_tokens` is `warm_up`'s work, and the smallest before it."""
        return RunnerInfo(
            device=str(self._device),
            device_name=devices.device_name(self._device),
            dtype=str(self._backend.dtype).removeprefix("torch."),
            backend=self._backend.name,
            cost=self._backend.cost,
            max_batch_tokens=self._max_batch_tokens,
            # ONNX Runtime waits for each batch itself.
            concurrency=1 if self._backend.name == "onnx" else self._staging.concurrency,
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
        model's positions, a dimension is out of range, or an output is not among the model's; OutOfMemoryError, which
        is one, if there is not memory enough for one of the texts alone.
        """
        if outputs is None:
            outputs = np.full(len(lengths), output_bits(("dense",)), np.int32)
        self._check(ids, lengths, dimensions, outputs)
        whole = self._unless_out_of_memory(
            lambda: self._run(ids, lengths, dimensions, outputs), f"a text of {len(ids)} tokens", len(lengths), len(ids)
        )
        if whole is not None:
            return whole
        # By half of the tokens, with a row on both sides.
        ends = np.cumsum(lengths, dtype=np.int64)
        row = min(max(1, int(np.searchsorted(ends, ends[-1] / 2, side="right"))), len(lengths) - 1)
        token = int(ends[row - 1])
        return _joined(
            self.run(ids[:token], lengths[:row], dimensions[:row], outputs[:row]),
            self.run(ids[token:], lengths[row:], dimensions[row:], outputs[row:]),
        )

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
        tokens = rows * images.tokens
        whole = self._unless_out_of_memory(
            lambda: self._run_images(pixels.reshape(rows, size, size, 3), dimensions, tokens), "an image", rows, tokens
        )
        if whole is not None:
            return whole
        row, byte = rows // 2, (rows // 2) * size * size * 3
        return _joined(
            self.run_images(pixels[:byte], dimensions[:row]), self.run_images(pixels[byte:], dimensions[row:])
        )

    def _unless_out_of_memory(self, run: Callable[[], Embedded], one: str, rows: int, tokens: int) -> Embedded | None:
        """What `run` gives, or None where there is not memory enough but a smaller batch may fit.

        Raises OutOfMemoryError, which calls the row `one`, where there is none smaller.
        """
        found = self._attempt(run)
        if found is not None:
            return found
        if rows == 1:
            # Once more: what torch had kept for reuse is free now, also for those who take memory beside it.
            found = self._attempt(run)
            if found is None:
                left = devices.memory_left(self._device)
                raise OutOfMemoryError(f"{one} does not fit into the memory of {self._device}{left}")
            return found
        # Once for batches of like size.
        if tokens.bit_length() not in self._warned:
            self._warned.add(tokens.bit_length())
            log.warning(
                "out of memory: a batch runs in halves; a smaller --max-batch-tokens would avoid it",
                extra={"model": self._config.folder.name, "texts": rows, "tokens": tokens},
            )
        return None

    def _attempt(self, run: Callable[[], Embedded]) -> Embedded | None:
        """What `run` gives, or None where memory ran out; what is kept for reuse is then given back."""
        try:
            return run()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Behind the handler, where the error's traceback no longer keeps the batch's tensors.
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _run(self, ids: Ints, lengths: Ints, dimensions: Ints, outputs: Ints) -> Embedded:
        dense, sparse, colbert = (wants(outputs, output) for output in OUTPUTS)
        rows = PackedRows.pack(ids, lengths)
        bucket = graphs.bucket_for(self._graphs, len(ids), len(lengths))
        staged = rows if bucket is None else rows.in_bucket(bucket.tokens, bucket.rows)
        arrays = {
            "ids": staged.ids,
            "positions": staged.positions,
            "rows": staged.rows,
            "cu_seqlens": staged.cu_seqlens,
        }
        if self._cuts(dimensions):
            arrays["dimensions"] = dimensions[rows.order]
        chosen = None
        if colbert.any() and not colbert.all():
            chosen, tokens = rows.only(colbert[rows.order])
            arrays |= _arrays(chosen, "colbert_") | {"colbert_tokens": tokens.astype(np.int32)}

        def launch(there: Mapping[str, Tensor]) -> dict[str, Tensor]:
            batch = _batch(rows, there)
            if bucket is None:
                states = self._backend.hidden_states(batch)
            else:
                states = self._graphs[bucket].replay([there[name] for name in _arrays(staged)])[: len(ids)]
            found = self._vectors(states, None if self._backend.pools else batch, there, dimensions)
            if sparse.any():
                found["sparse"], found["sparse_finite"] = heads.sparse_weights(
                    states, self._heads["sparse"], batch.layout
                )
            if colbert.any():
                if chosen is not None:
                    states = states.index_select(0, there["colbert_tokens"])
                    batch = _batch(chosen, there, "colbert_")
                found["colbert"], found["colbert_finite"] = heads.colbert_vectors(
                    states, self._heads["colbert"], batch.layout
                )
            return found

        with self._staging.run(arrays, launch) as host:
            finite = rows.restore(host["finite"]) | ~dense
            answer = {"dense": Rows.of_matrix(rows.restore(host["vectors"]), dimensions * dense)}
            if "sparse" in host:
                answer |= self._sparse(rows, host["sparse"], sparse)
                finite[rows.order] &= host["sparse_finite"] | ~sparse[rows.order]
            if "colbert" in host:
                part = rows if chosen is None else chosen
                answer["colbert"] = _colbert(part, host["colbert"], len(lengths))
                finite[part.order] &= host["colbert_finite"]
        padded = self._backend.cost == "padded"
        return Embedded(answer, finite, len(lengths) * rows.max_seqlen if padded else len(staged.ids))

    def _run_images(self, pixels: npt.NDArray[np.uint8], dimensions: Ints, tokens: int) -> Embedded:
        arrays: dict[str, npt.NDArray[np.uint8] | Ints] = {"pixels": pixels}
        if self._cuts(dimensions):
            arrays["dimensions"] = dimensions

        def launch(there: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return self._vectors(self._backend.images(there["pixels"]), None, there, dimensions)

        with self._staging.run(arrays, launch) as host:
            vectors, finite = host["vectors"].copy(), host["finite"].copy()
        return Embedded({"dense": Rows.of_matrix(vectors, dimensions)}, finite, tokens)

    def _cuts(self, dimensions: Ints) -> bool:
        return int(dimensions.min()) < self._config.dimension

    def _vectors(
        self, states: Tensor, batch: PackedBatch | None, there: Mapping[str, Tensor], dimensions: Ints
    ) -> dict[str, Tensor]:
        """Pool, cut, normalise, check: vectors float32 [rows, max(dimensions)], and which are finite.

        states: of the batch's tokens, or of rows that are pooled already, and then there is no batch.
        """
        cut, normalize = there.get("dimensions"), self._config.normalize
        if batch is None:
            vectors, finite = pooling.finish(states.float(), cut, normalize=normalize)
        else:
            vectors, finite = self._pool_and_finish(
                states, batch.layout.cu_seqlens, self._config.pooling, cut, normalize=normalize
            )
        return {"vectors": vectors[:, : int(dimensions.max())], "finite": finite}

    def _sparse(self, rows: PackedRows, weights: Floats, wanted: Flags) -> dict[str, Rows]:
        """bge-m3's weights of the rows that want them: weights float32 [tokens]."""
        kept = np.where(wanted[rows.order][rows.rows], weights, np.float32(0))
        found = heads.sparse_rows(rows.ids, kept, rows.cu_seqlens, self._config.ignored_token_ids)
        back = np.argsort(rows.order)
        return {
            "sparse_ids": Rows.of([found[row][0] for row in back], "<i4"),
            "sparse_weights": Rows.of([found[row][1] for row in back], "<f4"),
        }

    def _check(self, ids: Ints, lengths: Ints, dimensions: Ints, outputs: Ints) -> None:
        if dimensions.shape != lengths.shape or outputs.shape != lengths.shape:
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
        known = output_bits(self._config.outputs)
        if int(np.bitwise_or.reduce(outputs)) & ~known or not int(outputs.min()):
            raise BatchError(f"outputs that this model does not have; it has {', '.join(self._config.outputs)}")

    def _check_dimensions(self, dimensions: Ints) -> None:
        if int(dimensions.min()) < 1 or int(dimensions.max()) > self._config.dimension:
            raise BatchError(
                f"dimensions run from {int(dimensions.min())} to {int(dimensions.max())}; expected 1 to "
                f"{self._config.dimension}"
            )

    @torch.inference_mode()
    def warm_up(self, progress: Callable[[str], None] = lambda _: None, *, max_batch_tokens: int | None = None) -> None:
        """Let the model answer for the first time: allocators and libraries settle, a broken device shows.

        Call it when all models of the device are loaded, for it looks at the memory that is left. On CUDA it captures
        the graphs of small batches. `info.max_batch_tokens` becomes the given number, or the one that is measured.
        Raises CheckpointError if no vector is finite, DeviceError if the longest text does not fit into the memory.
        """
        config = self._config
        texts = bounds.Texts(self._backend.cost, config.max_tokens, config.vocab_size)
        self._probe(*texts.within(bounds.SMALLEST))
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            self._compile(texts)
            if self._backend.name == "native" and self._backend.cost == "packed":
                self._graphs = graphs.capture(self._backend, config, self._device, progress)
        if config.outputs != ("dense",):
            every = np.array([output_bits(config.outputs)], np.int32)
            self.run(np.zeros(2, np.int32), np.array([2], np.int32), np.array([config.dimension], np.int32), every)
        if config.images is not None:
            size = config.images.size
            self.run_images(np.zeros(size * size * 3, np.uint8), np.array([config.dimension], np.int32))
        if on_gpu:
            # Not on a CPU, where it may take a minute, and the memory of the machine is paged.
            self._try_longest(texts)
        if max_batch_tokens is not None:
            self._max_batch_tokens = max_batch_tokens
            return
        bound = bounds.measure(self._probe, texts, self._device)
        self._max_batch_tokens = bound.tokens
        progress(f"batches of up to {bound.tokens} tokens: {bound.reason} ({bound.rate:,.0f} tokens/s)")

    def _compile(self, texts: bounds.Texts) -> None:
        """Run a batch for each of the programs that Triton makes of a kernel, or a request would wait for one."""
        alone = [texts.of(np.array([length], np.int32)) for length in PROGRAM_LENGTHS if length <= texts.max_tokens]
        for ids, lengths in [texts.within(bounds.SMALLEST), *alone]:
            for dimension in (self._config.dimension, 1):
                self._dense(ids, lengths, dimension)

    def _precision_probe(self) -> precision.Probe:
        config = self._config
        return precision.probe(
            lambda ids, lengths: self._dense(ids, lengths, config.dimension).dense,
            bounds.Texts(self._backend.cost, config.max_tokens, config.vocab_size),
        )

    def _dense(self, ids: Ints, lengths: Ints, dimension: int) -> Embedded:
        return self.run(ids, lengths, np.full(len(lengths), dimension, np.int32))

    def _probe(self, ids: Ints, lengths: Ints) -> None:
        """Run a batch. Raises CheckpointError if no vector of it is finite."""
        if not self._dense(ids, lengths, self._config.dimension).finite.any():
            raise CheckpointError(
                f"{self._config.folder}: every vector that the model gives holds a NaN or an infinity; its weights "
                "are damaged, or its activations overflow the dtype: try --dtype float32"
            )

    def _try_longest(self, texts: bounds.Texts) -> None:
        """Raise DeviceError if the longest text that the model takes does not fit into the memory."""
        try:
            self._dense(*texts.of(np.array([texts.max_tokens], np.int32)), self._config.dimension)
        except OutOfMemoryError as error:
            raise DeviceError(
                f"{self._config.folder.name} takes texts of up to {texts.max_tokens} tokens, and {error}; serve fewer "
                "models there, or set a smaller max_seq_length in the model's sentence_bert_config.json"
            ) from error


def _arrays(host: PackedRows, prefix: str = "") -> dict[str, Ints]:
    """What of a batch goes to the device."""
    return {
        f"{prefix}ids": host.ids,
        f"{prefix}positions": host.positions,
        f"{prefix}rows": host.rows,
        f"{prefix}cu_seqlens": host.cu_seqlens,
    }


def _batch(host: PackedRows, there: Mapping[str, Tensor], prefix: str = "") -> PackedBatch:
    """The batch from what is staged of it. A bucket's padding, which lies behind, is left out."""
    tokens, rows = len(host.ids), len(host.lengths)
    return PackedBatch.from_staged(
        host,
        ids=there[f"{prefix}ids"][:tokens],
        positions=there[f"{prefix}positions"][:tokens],
        rows=there[f"{prefix}rows"][:tokens],
        cu_seqlens=there[f"{prefix}cu_seqlens"][: rows + 1],
    )


def _colbert(part: PackedRows, vectors: Floats, rows: int) -> Rows:
    """bge-m3's vectors, float32 [tokens - rows, dim], of a part of `rows` rows."""
    pieces = [np.empty(0, np.float32)] * rows
    # A row of n tokens has n - 1 vectors.
    ends = part.cu_seqlens[1:] - np.arange(1, len(part.order) + 1)
    for row, piece in zip(part.order, np.split(vectors, ends[:-1]), strict=True):
        pieces[row] = piece.reshape(-1)
    return Rows.of(pieces, "<f4")


def _joined(first: Embedded, second: Embedded) -> Embedded:
    """The answer to a batch that ran in two parts."""
    finite = np.concatenate([first.finite, second.finite])
    positions = np.arange(len(finite), dtype=np.int32)
    parts = [(positions[: len(first.finite)], first.arrays), (positions[len(first.finite) :], second.arrays)]
    names = [name for name in ARRAYS if name in first.arrays or name in second.arrays]
    arrays = {name: join(name, len(finite), parts) for name in names}
    return Embedded(arrays, finite, first.computed_tokens + second.computed_tokens)
