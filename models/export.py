"""A checkpoint → an ONNX graph, made by optimum and compared with its source before it counts as made.

Needs the [export] extra, whose transformers is older than the server's: an environment of its own. Nothing here is
needed to serve the graph.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedserve.kernels import pooling
from embedserve.models import manifest, registry
from embedserve.models.architecture import BertArchitecture, ForeignArchitecture
from embedserve.models.backend import Backend
from embedserve.models.batch import PackedBatch, PackedRows
from embedserve.models.config import ModelConfig
from embedserve.models.errors import ExportError
from embedserve.models.json_file import JsonFile
from embedserve.models.onnx import OnnxBackend

# The cosine between a text's vector from the source and from the graph that the worst text must reach.
SMALLEST_COSINE = {torch.float32: 0.9999, torch.float16: 0.999}

# Tokens of the texts that are compared; the tracer sees 16, so anything that it froze shows in the others.
_LENGTHS = (1, 2, 7, 16, 33, 120, 512)

# A protobuf ends at 2 GiB. Beyond this the weights go into a file beside the graph.
_LARGEST_GRAPH_BYTES = 3 << 29

# What made each graph of the folder.
RECORD = "export.json"

_INSTALL = (
    "the export needs optimum, in an environment of its own. In a checkout of embedserve: python -m venv export && "
    'export/bin/pip install ".[export]"'
)


@dataclass(frozen=True)
class Exported:
    """What came out: the graph's file, and how far it is from its source.

    largest_difference: of a token's states, relative to their norm. smallest_cosine: between the vectors of a text.
    """

    file: Path
    largest_difference: float
    smallest_cosine: float

    def __str__(self) -> str:
        return (
            f"{self.file}: largest relative difference from the source {self.largest_difference:.1e}, "
            f"smallest cosine {self.smallest_cosine:.7f}"
        )


def export(
    config: ModelConfig,
    *,
    half: bool = False,
    optimize: bool = False,
    output: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Make `model.onnx`, or `model_fp16.onnx`, and `export.json`, which says what made it.

    half: weights and arithmetic in float16. optimize: ONNX Runtime's fused operators for BERT and its kin, which other
    runtimes do not have. output: the folder to write to, `onnx` of the checkpoint's if absent. progress: called with
    a line of text at each step.

    Nothing is written unless the graph gives the source's vectors, the source being what `serve` runs without ONNX.
    Raises ExportError if the tools are missing, the architecture has no exporter, a graph of other make is in the way,
    or the vectors differ; CheckpointError if the source cannot be read.
    """
    _require_tools()
    _check_exportable(config, optimize)
    folder = output if output is not None else config.folder / "onnx"
    dtype = torch.float16 if half else torch.float32
    file = folder / ("model_fp16.onnx" if half else "model.onnx")
    record = JsonFile.read_optional(folder / RECORD)
    if file.exists() and file.name not in record.values:
        raise ExportError(
            f"{file} is there and was not made by `embedserve export`; move it away, or choose another folder with "
            "--output"
        )
    batch = _sample(config)
    with torch.inference_mode():
        progress(f"running {config.folder} on {len(_LENGTHS)} texts")
        source = registry.backend(registry.backend_for(config.family))(config, torch.device("cpu"), torch.float32)
        expected = _embed(source, config, batch)
        del source
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(prefix=".export-", dir=folder) as place:
                made = Path(place, file.name)
                progress("exporting" + (", optimising" if optimize else "") + (", to float16" if half else ""))
                _make(config, made, half=half, optimize=optimize)
                progress("comparing the graph with its source")
                graph = OnnxBackend(config, torch.device("cpu"), dtype, file=made)
                result = Exported(file, *_compare(expected, _embed(graph, config, batch)))
                del graph
                _judge(result, SMALLEST_COSINE[dtype])
                entry = _provenance(config, result, half=half, optimize=optimize)
                _install(made, file, folder / RECORD, {**record.values, file.name: entry})
                _enter(config.folder, file)
        except OSError as error:
            raise ExportError(
                f"{error.filename or folder}: cannot be written ({error.strerror}); choose another folder with --output"
            ) from error
    return result


# --- what can be exported ---------------------------------------------------------------------------------------------


def _require_tools() -> None:
    try:
        for module in ("onnx", "onnxruntime.transformers.onnx_model", "optimum.exporters.onnx"):
            import_module(module)
    except ImportError as error:
        raise ExportError(f"{_INSTALL} ({error})") from error


def _check_exportable(config: ModelConfig, optimize: bool) -> None:
    from optimum.exporters.onnx import model_configs  # noqa: F401 - fills the table of architectures
    from optimum.exporters.tasks import TasksManager

    architecture = config.architecture
    file = config.weights_folder / "config.json"
    published = "copy the graph that its authors publish into the checkpoint's folder onnx, and serve that"
    if config.family in ("jina_bert", "jina_clip"):
        raise ExportError(f"{file}: optimum has no exporter for {config.family}; {published}")
    if isinstance(architecture, ForeignArchitecture) and architecture.remote_code:
        raise ExportError(f"{file}: field 'auto_map' asks for code of the checkpoint, which is never run; {published}")
    model_type = JsonFile.read(file).string("model_type")
    try:
        tasks = TasksManager.get_supported_tasks_for_model_type(model_type, "onnx", library_name="transformers")
    except KeyError:
        tasks = {}
    if "feature-extraction" not in tasks:
        raise ExportError(
            f"{file}: field 'model_type' is {model_type!r}, for which optimum has no exporter of token states; "
            f"{published}"
        )
    if optimize and not isinstance(architecture, BertArchitecture):
        raise ExportError(
            f"{file}: ONNX Runtime's fused operators are known to fit BERT and its kin, not {model_type!r}; leave "
            "--optimize out"
        )


# --- making the graph -------------------------------------------------------------------------------------------------


def _make(config: ModelConfig, file: Path, *, half: bool, optimize: bool) -> None:
    """Write the graph to `file`, in a folder of its own. Raises ExportError."""
    import onnx
    from onnxruntime.transformers.onnx_model import OnnxModel
    from onnxruntime.transformers.optimizer import optimize_model
    from optimum.exporters.onnx import main_export

    plain = file.with_name("exported") / "model.onnx"
    try:
        with _quiet():
            main_export(
                str(config.weights_folder),
                output=plain.parent,
                task="feature-extraction",
                # Not sentence_transformers: the graph ends at token states, and pooling stays ours.
                library_name="transformers",
                framework="pt",
                dtype="fp32",
                device="cpu",
                local_files_only=True,
                trust_remote_code=False,
                # It compares one short batch; `_compare` does more.
                do_validation=False,
            )
            if not half and not optimize:
                for part in plain.parent.glob("model.onnx*"):
                    part.rename(file.with_name(part.name))
                return
            if optimize:
                sizes = config.architecture
                assert isinstance(sizes, BertArchitecture)  # _check_exportable saw to it
                # Fusions only (opt_level 0): what ONNX Runtime does by itself it does at loading, for the device there.
                model: Any = optimize_model(
                    str(plain), "bert", num_heads=sizes.num_heads, hidden_size=sizes.hidden_size, opt_level=0
                )
                if not any(model.get_fused_operator_statistics().values()):
                    raise ExportError(
                        f"{config.folder}: ONNX Runtime found nothing to fuse in this graph; leave --optimize out"
                    )
            else:
                model = OnnxModel(onnx.load(str(plain)))
            if half:
                model.convert_float_to_float16(keep_io_types=False)
            size = sum(len(tensor.raw_data) for tensor in model.model.graph.initializer)
            onnx.save_model(
                model.model,
                str(file),
                save_as_external_data=size > _LARGEST_GRAPH_BYTES,
                location=f"{file.name}_data",
            )
    except (ExportError, OSError):
        raise
    except Exception as error:  # optimum, the tracer and the optimiser raise what they like
        raise ExportError(f"{config.folder}: the export failed ({type(error).__name__}: {error})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """The tracer warns of every size that it reads, the optimiser tells of each fusion: the comparison says more."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _enter(checkpoint: Path, file: Path) -> None:
    """Enter the graph into the checkpoint's manifest, if it has one and holds the graph, or `verify` would object."""
    if not file.resolve().is_relative_to(checkpoint.resolve()):
        return
    made = [file, file.with_name(f"{file.name}_data"), file.with_name(RECORD)]
    names = [path.resolve().relative_to(checkpoint.resolve()).as_posix() for path in made]
    there = [name for name, path in zip(names, made, strict=True) if path.exists()]
    manifest.record(checkpoint, there, removed=[name for name in names if name not in there])


def _install(made: Path, file: Path, record_file: Path, record: dict[str, Any]) -> None:
    """Move a graph and its data to their place, and write the record. At no moment is there a graph with other data."""
    data, new_data = file.with_name(f"{file.name}_data"), made.with_name(f"{made.name}_data")
    file.unlink(missing_ok=True)
    if new_data.exists():
        new_data.replace(data)
    else:
        data.unlink(missing_ok=True)
    draft = made.with_name(RECORD)
    draft.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    # Before the graph: one without a record would be in the way of the next export.
    draft.replace(record_file)
    made.replace(file)


def _provenance(config: ModelConfig, result: Exported, *, half: bool, optimize: bool) -> dict[str, Any]:
    packages = ("embedserve", "optimum", "optimum-onnx", "transformers", "torch", "onnx", "onnxruntime")
    return {
        "options": {"fp16": half, "optimize": optimize},
        "largest_relative_difference": result.largest_difference,
        "smallest_cosine": result.smallest_cosine,
        "source_sha256": {file.name: _sha256(file) for file in sorted(config.weights_folder.glob("*.safetensors"))},
        "versions": {name: _version(name) for name in packages},
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# --- comparing it with its source -------------------------------------------------------------------------------------


def _sample(config: ModelConfig) -> PackedBatch:
    """Texts of random ids, of several lengths up to what the model takes."""
    lengths = np.array([min(length, config.max_tokens) for length in _LENGTHS], dtype=np.int32)
    ids = np.random.default_rng(0).integers(0, config.vocab_size - 1, lengths.sum(), dtype=np.int32)
    # Not the padding's id, from which some graphs count their positions.
    ids += ids >= config.pad_token_id
    return PackedBatch.on_cpu(PackedRows.pack(ids, lengths))


def _embed(backend: Backend, config: ModelConfig, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """(states [tokens, hidden], unit vectors [rows, hidden]), float32."""
    states = backend.hidden_states(batch).float()
    pooled = pooling.pool(states, batch.layout.cu_seqlens, config.pooling)
    return states, pooling.finish(pooled, None, normalize=True)[0]


def _compare(expected: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """(largest difference of a token relative to its norm, smallest cosine of a text)."""
    differences = (found[0] - expected[0]).norm(dim=1) / expected[0].norm(dim=1)
    cosines = (found[1].double() * expected[1].double()).sum(dim=1)
    return differences.max().item(), cosines.min().item()


def _judge(result: Exported, smallest_cosine: float) -> None:
    if not result.smallest_cosine >= smallest_cosine:  # NaN is no pass
        raise ExportError(
            f"{result}; expected a cosine of at least {smallest_cosine}, so the graph was thrown away. In float16 a "
            "model may overflow: export it without --fp16. Otherwise try without --optimize"
        )
