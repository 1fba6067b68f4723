"""Two tables: family → class, backend → class. A new one is one line.

Nothing is imported before it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from embedserve.models.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from embedserve.kernels.dispatch import Kernels
    from embedserve.models.backend import Backend
    from embedserve.models.batch import PackedBatch
    from embedserve.models.config import ModelConfig

FAMILIES = {
    "bert": "embedserve.models.bert:Bert",
    "xlm_roberta": "embedserve.models.xlm_roberta:XlmRoberta",
    "jina_bert": "embedserve.models.jina_bert:JinaBert",
    "jina_clip": "embedserve.models.jina_clip:JinaClip",
    "qwen3": "embedserve.models.qwen3:Qwen3",
}

BACKENDS = {
    "native": "embedserve.models.native:NativeBackend",
    "onnx": "embedserve.models.onnx:OnnxBackend",
    "transformers": "embedserve.models.transformers_backend:TransformersBackend",
}


class Family(Protocol):
    """A family's packed module."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype, kernels: Kernels) -> None:
        """Read the weights onto the device. Raises CheckpointError."""

    def __call__(self, batch: PackedBatch) -> Tensor:
        """Return the last layer's states, [tokens, hidden]."""

    def images(self, pixels: Tensor) -> Tensor:
        """See `Backend.images`; only families of image models have it."""


def backend_for(family_name: str) -> str:
    """The backend that runs a family unless another is asked for: our own, where the family is ours."""
    return "native" if family_name in FAMILIES else "transformers"


def family(name: str) -> type[Family]:
    """Return the class of a family. Raises CheckpointError for an unknown one."""
    if name == "foreign":
        raise CheckpointError(
            f"the native backend has no such architecture, only {', '.join(sorted(FAMILIES))}; "
            "use --backend transformers, or auto"
        )
    loaded: type[Family] = _load(FAMILIES, name, "family")
    return loaded


def backend(name: str) -> type[Backend]:
    """Return the class of a backend. Raises CheckpointError for an unknown one."""
    loaded: type[Backend] = _load(BACKENDS, name, "backend")
    return loaded


def _load(table: dict[str, str], name: str, kind: str) -> Any:
    if name not in table:
        raise CheckpointError(f"unknown {kind} {name!r}; this version has {', '.join(sorted(table))}")
    module, attribute = table[name].split(":")
    return getattr(import_module(module), attribute)
