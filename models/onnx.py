"""The ONNX backend: a graph of the model, run by ONNX Runtime on torch's own memory.

Inputs and output are bound by address, so states stay on the device and go through the same pooling kernel as those of
every other backend. What a graph takes and gives is read from the graph; what is not known by name is refused, and a
small batch at the start shows whether shape, width and mask are what they must be.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from embedserve.models.architecture import BertArchitecture
from embedserve.models.batch import Ints, PackedBatch, PackedRows
from embedserve.models.config import ModelConfig
from embedserve.models.errors import BackendError, BatchError, CheckpointError

# The layouts that are published: onnx/ (Hugging Face's own), or beside config.json (older); text_model is a tower of a
# CLIP model. Quantised variants have names of their own and are not looked for: their vectors are others.
_FOLDERS = ("onnx", ".")
_TEXT_STEMS = ("model", "text_model")
_IMAGE_STEMS = ("vision_model",)

# Names that optimum, sentence-transformers and the catalogue's authors give to what we need.
_TOKEN_OUTPUTS = ("last_hidden_state", "token_embeddings")
_POOLED_OUTPUTS = ("sentence_embedding", "text_embeds")
_IMAGE_OUTPUTS = ("image_embeds",)
# Of the right rank, and not what the model's pooling would give: BERT's pre-training head, a classifier.
_NOT_EMBEDDINGS = {"pooler_output", "logits"}

# What a decoder that was exported for generation saw before: nothing, here.
_PAST = re.compile(r"past_key_values\.\d+\.(key|value)")

_DTYPES = {
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
}
_NUMPY = {
    torch.int64: np.dtype(np.int64),
    torch.int32: np.dtype(np.int32),
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
}

# How far a text may move, relative to the norm of its states, when a longer one joins its batch. Float16 graphs stay
# under 0.005; one that does not look at its mask is far above.
_LARGEST_SHIFT = 0.02


# Tokens of the texts that a graph is tried on.
_SAMPLE_LENGTHS = [2, 5]

_Makers = dict[str, Callable[[PackedBatch], Tensor]]


class OnnxBackend:
    """Runs a graph file of the checkpoint, and for models of images a second one; see `Backend`.

    file: the graph of texts. dtype: of its states. That is float32 also where float16 or bfloat16 was asked and only a
    float32 graph is there, which is slower and more exact.
    """

    name = "onnx"
    cost: Literal["packed", "padded"] = "padded"

    def __init__(
        self, config: ModelConfig, device: torch.device, dtype: torch.dtype, *, file: Path | None = None
    ) -> None:
        """Load the graph and try it on a small batch.

        file: the graph of texts, if it is not the one that `find_graph` finds. Raises BackendError if ONNX Runtime or
        its CUDA provider is not there, CheckpointError for a graph that is missing, broken, or not this model's.
        """
        runtime = load_runtime(device)
        self.file = file if file is not None else find_graph(config, dtype)
        self._config, self._device = config, device
        self._graph = _Graph(runtime, self.file, device)
        self._inputs = _text_inputs(self._graph, config)
        self._output, self.dtype = _choose_output(self._graph, (*_TOKEN_OUTPUTS, *_POOLED_OUTPUTS), dtype)
        self.pools = self._pools()
        self._check_mask()
        self._tower = _Tower(runtime, config, device, dtype) if config.images is not None else None

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """See `Backend`."""
        rows, longest, width = len(batch.host.lengths), batch.host.max_seqlen, self._config.dimension
        inputs = {name: make(batch) for name, make in self._inputs.items()}
        if self.pools:
            return self._graph.run(inputs, self._output, (rows, width), self.dtype)
        states = self._graph.run(inputs, self._output, (rows, longest, width), self.dtype)
        if rows * longest == len(batch.host.ids):  # rows of one length
            return states.view(-1, width)
        return states[batch.layout.rows, batch.layout.positions]

    def images(self, pixels: Tensor) -> Tensor:
        """See `Backend`."""
        if self._tower is None:
            raise BatchError("this model takes texts alone, no images")
        return self._tower(pixels)

    def _pools(self) -> bool:
        """Whether the output is a vector a text. Raises CheckpointError if it is neither that nor a state a token."""
        rows, longest, width = len(_SAMPLE_LENGTHS), max(_SAMPLE_LENGTHS), self._config.dimension
        wanted = [(rows, longest, width), (rows, width)]
        if self._output in _TOKEN_OUTPUTS:
            wanted = wanted[:1]
        elif self._output in _POOLED_OUTPUTS:
            wanted = wanted[1:]
        batch = self._sample(_SAMPLE_LENGTHS)
        inputs = {name: make(batch) for name, make in self._inputs.items()}
        return len(self._graph.check_shape(inputs, self._output, wanted)) == 2

    def _check_mask(self) -> None:
        """Raise CheckpointError if padding changes a text's vectors: the graph does not look at its mask."""
        short = _SAMPLE_LENGTHS[0]
        alone = self.hidden_states(self._sample([short])).float()
        beside = self.hidden_states(self._sample(_SAMPLE_LENGTHS))[: len(alone)].float()
        shift = ((alone - beside).norm() / alone.norm()).item()
        if not shift <= _LARGEST_SHIFT:  # NaN is no pass
            raise CheckpointError(
                f"{self.file}: a text of {short} tokens gets other states beside a longer one (relative difference "
                f"{shift:.2g}): the graph does not mask its padding; export it with an attention_mask"
            )

    def _sample(self, lengths: list[int]) -> PackedBatch:
        """Rows of distinct ids, the same ones at every call."""
        # Not the padding's id, from which some graphs count their positions.
        ids = (self._config.pad_token_id + 1 + np.arange(sum(lengths))) % self._config.vocab_size
        host = PackedRows.pack(ids.astype(np.int32), np.array(lengths, dtype=np.int32))

        def there(values: Ints) -> Tensor:
            return torch.from_numpy(values).to(self._device)

        return PackedBatch.from_staged(
            host,
            ids=there(host.ids),
            positions=there(host.positions),
            rows=there(host.rows),
            cu_seqlens=there(host.cu_seqlens),
        )


class _Tower:
    """The graph of images: pixels → one vector each. Raises CheckpointError like `OnnxBackend`."""

    def __init__(self, runtime: Any, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        assert config.images is not None
        self._graph = graph = _Graph(runtime, find_graph(config, dtype, _IMAGE_STEMS), device)
        self._output, self._dtype = _choose_output(graph, _IMAGE_OUTPUTS, dtype)
        taken = graph.inputs.get("pixel_values")
        if len(graph.inputs) != 1 or taken not in (torch.float32, torch.float16):
            raise CheckpointError(
                f"{graph.file}: the inputs are {', '.join(graph.inputs)}; expected pixel_values alone, of floats"
            )
        self._taken: torch.dtype = taken
        self._mean, self._std = (
            torch.tensor(three, device=device) for three in (config.images.mean, config.images.std)
        )
        self._width = config.dimension
        size = config.images.size
        black = torch.zeros(2, size, size, 3, dtype=torch.uint8, device=device)
        graph.check_shape({"pixel_values": self._scale(black)}, self._output, [(2, self._width)])

    def __call__(self, pixels: Tensor) -> Tensor:
        return self._graph.run(
            {"pixel_values": self._scale(pixels)}, self._output, (len(pixels), self._width), self._dtype
        )

    def _scale(self, pixels: Tensor) -> Tensor:
        """uint8 [images, size, size, 3] → [images, 3, size, size], as the graph was trained."""
        scaled = (pixels.float() / 255 - self._mean) / self._std
        return scaled.permute(0, 3, 1, 2).to(self._taken).contiguous()


# --- the graph's file -------------------------------------------------------------------------------------------------


def find_graph(config: ModelConfig, dtype: torch.dtype, stems: tuple[str, ...] = _TEXT_STEMS) -> Path:
    """Return the graph of a checkpoint: for float16 `*_fp16.onnx` where it is there, else the float32 one.

    stems: what the file may be called.

    Raises CheckpointError, naming the places, if there is none.
    """
    wanted = [f"{stem}_fp16" for stem in stems] if dtype == torch.float16 else []
    # The folder of config.json first; modules.json may place that below the checkpoint's own.
    folders = list(dict.fromkeys(root / name for root in (config.weights_folder, config.folder) for name in _FOLDERS))
    for stem in (*wanted, *stems):
        for folder in folders:
            file = folder / f"{stem}.onnx"
            if file.is_file():
                return file
    raise CheckpointError(
        f"{config.folder}: no {' or '.join(f'{stem}.onnx' for stem in stems)} in "
        f"{', '.join(str(folder) for folder in folders)}; make it with `embedserve export MODEL --to onnx`, or copy "
        "the one that the model's authors publish"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300]


# --- ONNX Runtime -----------------------------------------------------------------------------------------------------

_CPU_BUILD, _GPU_BUILD = "onnxruntime", "onnxruntime-gpu"
_VERSIONS = ">=1.20"


def load_runtime(device: torch.device) -> Any:
    """Import onnxruntime. Raises BackendError if it is missing or damaged, or cannot run on the device."""
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            f"the onnx backend cannot import ONNX Runtime ({_first_line(error)}); pip install "
            f'"{_CPU_BUILD}{_VERSIONS}", or "{_GPU_BUILD}{_VERSIONS}" for CUDA (in a checkout of embedserve, pip '
            'install ".[onnx]" or ".[onnx-gpu]")'
        ) from error
    both = {_CPU_BUILD, _GPU_BUILD} <= _installed()
    again = (
        f"run `pip uninstall -y {_CPU_BUILD} {_GPU_BUILD}`, then `pip install {_GPU_BUILD}` on a machine with a GPU, "
        f"`pip install {_CPU_BUILD}` elsewhere"
    )
    if not hasattr(onnxruntime, "InferenceSession"):
        # Both builds own the same files: uninstalling one takes them from the other.
        raise BackendError(f"the installation of ONNX Runtime is damaged: the package is empty; {again}")
    if device.type == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        if both:
            raise BackendError(
                f"{_CPU_BUILD} and {_GPU_BUILD} are both installed into the same folder, and the one without CUDA won; "
                f"{again}"
            )
        raise BackendError(
            f"device {device}: this ONNX Runtime has no CUDA provider; run `pip uninstall -y {_CPU_BUILD}`, then "
            f'`pip install "{_GPU_BUILD}{_VERSIONS}"`; or use --device cpu'
        )
    onnxruntime.disable_telemetry_events()
    return onnxruntime


def _installed() -> set[str]:
    found = set()
    for name in (_CPU_BUILD, _GPU_BUILD):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
    return found


class _Graph:
    """A loaded graph: named tensors in, one tensor out, all on one device.

    file: where it came from. inputs: dtype of each, None for one that is not torch's. outputs: likewise.
    """

    def __init__(self, runtime: Any, file: Path, device: torch.device) -> None:
        """Load it. Raises CheckpointError, or BackendError if the CUDA provider does not start."""
        self.file = file
        self._device = device
        self._place = (device.type, device.index or 0)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        options = runtime.SessionOptions()
        # What goes wrong is raised as well; its log would only say it twice.
        options.log_severity_level = 4
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
        # It remembers a plan for each shape it meets, and here there are as many as there are batches.
        options.enable_mem_pattern = False
        # Work that CUDA leaves to the CPU is arithmetic on shapes.
        _share_cores(options, torch.get_num_threads() if self._stream is None else 1)
        try:
            # Without the fallback, which would go on on the CPU and print a line.
            self._session = runtime.InferenceSession(str(file), options, providers=self._providers(), enable_fallback=0)
        except Exception as error:  # ONNX Runtime's errors have no base class of their own
            raise CheckpointError(
                f"{file}: ONNX Runtime {runtime.__version__} cannot load the graph ({_first_line(error)}); copy it "
                "again with the data files beside it, or make it with `embedserve export MODEL --to onnx`"
                + ("; with --dtype float32 the other graph is used" if file.stem.endswith("_fp16") else "")
            ) from error
        if self._stream is not None and self._session.get_providers()[0] != "CUDAExecutionProvider":
            raise BackendError(
                f"device {device}: the CUDA provider of ONNX Runtime did not start; {_GPU_BUILD} needs the CUDA and "
                "cuDNN versions that it was built for, see its release notes"
            )
        self.inputs = {node.name: _DTYPES.get(node.type) for node in self._session.get_inputs()}
        self.outputs = {node.name: _DTYPES.get(node.type) for node in self._session.get_outputs()}

    def _providers(self) -> list[Any]:
        if self._stream is None:
            return ["CPUExecutionProvider"]
        cuda = {
            "device_id": str(self._device.index or 0),
            "user_compute_stream": str(self._stream.cuda_stream),
            # torch shares the device; doubling at every growth would starve it.
            "arena_extend_strategy": "kSameAsRequested",
            # float32 means float32: TF32 keeps ten bits. Off is torch's default as well.
            "use_tf32": "1" if torch.backends.cuda.matmul.allow_tf32 else "0",
        }
        return [("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]

    def axes(self, name: str) -> list[int | str | None]:
        """The shape of an input: a number where an axis is fixed."""
        return next(list(node.shape) for node in self._session.get_inputs() if node.name == name)

    def run(self, inputs: Mapping[str, Tensor], output: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an output, whose shape and dtype must be these. Inputs are contiguous tensors on the device."""
        if self._stream is None:
            result = torch.empty(shape, dtype=dtype)
            self._call(inputs, output, result)
            return result
        # The graph runs on the stream that its session was given; what torch does before and after is on another.
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        result = torch.empty(shape, dtype=dtype, device=self._device)
        self._call(inputs, output, result)
        current.wait_stream(self._stream)
        return result

    def check_shape(self, inputs: Mapping[str, Tensor], output: str, wanted: list[tuple[int, ...]]) -> tuple[int, ...]:
        """Run it, and return the shape of the output. Raises CheckpointError if it is not among the wanted ones."""
        try:
            shape = self._call(inputs, output, None)
        except Exception as error:  # as above
            sizes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
            raise CheckpointError(
                f"{self.file}: the graph does not run with {sizes} ({_first_line(error)}); expected one whose axes "
                "for batch and sequence are free"
            ) from error
        if shape not in wanted:
            raise CheckpointError(
                f"{self.file}: output {output!r} has the shape {list(shape)}, but by the model's configuration it is "
                f"{' or '.join(str(list(one)) for one in wanted)}; the graph belongs to another model"
            )
        return shape

    def _call(self, inputs: Mapping[str, Tensor], output: str, result: Tensor | None) -> tuple[int, ...]:
        """Run it into `result`, or into memory of its own. Returns the output's shape. Waits for the device."""
        binding = self._session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_input(name, *self._place, _NUMPY[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        if result is None:
            binding.bind_output(output, *self._place)
        else:
            binding.bind_output(output, *self._place, _NUMPY[result.dtype], tuple(result.shape), result.data_ptr())
        self._session.run_with_iobinding(binding)
        return tuple(binding.get_outputs()[0].shape())


def _share_cores(options: Any, threads: int) -> None:
    """Have the graph run on as many threads, the caller's among them, and wait as `server/threads.py` says.

    A new thread inherits the cores of the one that makes it. Where that one is pinned, all would share its single core:
    batches of 512 tokens of all-MiniLM-L6-v2 then ran at 4,500 tokens/s on two cores, 15,900 with a core each.
    Spinning gains where every thread has its core (a text of 16 tokens beside one busy process: 4.0 ms, 5.5 without),
    costs where they wander (11.6 ms, 6.3 without), and is stopped at the end of each run: torch's threads are on these
    cores as well.
    """
    options.intra_op_num_threads = threads
    own, cores = os.sched_getaffinity(0), set[int]()
    for thread in map(int, os.listdir("/proc/self/task")):
        cores |= os.sched_getaffinity(thread)
    others = sorted(cores - own)
    pinned = len(own) == 1 and 1 < threads == len(others) + 1
    if pinned:
        # Counted from 1.
        options.add_session_config_entry(
            "session.intra_op_thread_affinities", ";".join(str(core + 1) for core in others)
        )
        options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if pinned else "0")


# --- what graphs take and give ----------------------------------------------------------------------------------------


def _text_inputs(graph: _Graph, config: ModelConfig) -> _Makers:
    """How each input of the graph is made from a batch. Raises CheckpointError for an input that is not known."""
    inputs: _Makers = {}
    known = _values(config)
    for name, dtype in graph.inputs.items():
        axes = graph.axes(name)
        if name in known:
            if dtype not in (torch.int64, torch.int32) or len(axes) != 2:
                raise CheckpointError(
                    f"{graph.file}: input {name!r} has the shape {axes}, or is not of integers; expected int64 or "
                    "int32 of [batch, sequence]"
                )
            values, fill = known[name]
            inputs[name] = partial(_pad, values=values, fill=fill, dtype=dtype)
        elif _PAST.fullmatch(name):
            if dtype not in (torch.float32, torch.float16) or len(axes) != 4:
                raise CheckpointError(
                    f"{graph.file}: input {name!r} has the shape {axes}, or is not of floats; expected float32 or "
                    "float16 of [batch, heads, past, head size]"
                )
            inputs[name] = partial(_no_past, axes=axes, dtype=dtype)
        else:
            raise CheckpointError(
                f"{graph.file}: input {name!r} is unknown; known are {', '.join(known)} and past_key_values. "
                "Export the model for feature extraction (embedserve export MODEL --to onnx)"
            )
    if "input_ids" not in inputs:
        raise CheckpointError(
            f"{graph.file}: there is no input input_ids, only {', '.join(inputs) or 'none at all'}; "
            "this is not the graph of a text model"
        )
    return inputs


def _values(config: ModelConfig) -> dict[str, tuple[Callable[[PackedBatch], Tensor], int]]:
    """(what the tokens of a batch have, what the padding has) by input."""
    architecture = config.architecture
    first = architecture.position_offset if isinstance(architecture, BertArchitecture) else 0
    return {
        "input_ids": (lambda batch: batch.ids, config.pad_token_id),
        "attention_mask": (lambda batch: torch.ones_like(batch.ids), 0),
        # Only type 0 occurs in embedding requests.
        "token_type_ids": (lambda batch: torch.zeros_like(batch.ids), 0),
        "position_ids": (lambda batch: batch.layout.positions + first, 0),
    }


def _pad(batch: PackedBatch, values: Callable[[PackedBatch], Tensor], fill: int, dtype: torch.dtype) -> Tensor:
    """Values of the tokens as [rows, max_seqlen], `fill` on the right of each row."""
    shape = (len(batch.host.lengths), batch.host.max_seqlen)
    padded = torch.full(shape, fill, dtype=dtype, device=batch.ids.device)
    padded[batch.layout.rows, batch.layout.positions] = values(batch).to(dtype)
    return padded


def _no_past(batch: PackedBatch, axes: list[int | str | None], dtype: torch.dtype) -> Tensor:
    """An empty past: heads and their size as the graph fixes them."""
    heads, head_dim = (axis if isinstance(axis, int) else 1 for axis in (axes[1], axes[3]))
    return torch.empty(len(batch.host.lengths), heads, 0, head_dim, dtype=dtype, device=batch.ids.device)


def _choose_output(graph: _Graph, names: tuple[str, ...], asked: torch.dtype) -> tuple[str, torch.dtype]:
    """(name, dtype) of the first of these outputs, else of the only one there is. Raises CheckpointError."""
    name = next((name for name in names if name in graph.outputs), None)
    if name is None and len(graph.outputs) == 1 and not graph.outputs.keys() & _NOT_EMBEDDINGS:
        (name,) = graph.outputs
    if name is None:
        raise CheckpointError(
            f"{graph.file}: the outputs are {', '.join(graph.outputs)}; expected one of {', '.join(names)}. Export the "
            "model for feature extraction (embedserve export MODEL --to onnx)"
        )
    dtype = graph.outputs[name]
    if dtype not in (torch.float32, torch.float16):
        raise CheckpointError(
            f"{graph.file}: output {name!r} is neither float32 nor float16; quantised graphs are not supported"
        )
    if asked == torch.float32 and dtype != torch.float32:
        raise CheckpointError(
            f"{graph.file}: output {name!r} is float16, but float32 was asked; make a float32 graph "
            "(embedserve export MODEL --to onnx), or run this one on a GPU with --dtype float16"
        )
    return name, dtype
