"""Checkpoints for the tests of this folder: the packaged MiniLM, and tiny random BERTs written to disk."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.models.packed import randomise
from transformers import BertConfig, BertModel

from embedserve.models.catalog import locate

# An odd shape on purpose: no size is a power of two or equal to another, except head_dim 32 as MiniLM has it.
TINY: dict[str, Any] = {
    "architectures": ["BertModel"],
    "hidden_act": "gelu",
    "hidden_size": 96,
    "intermediate_size": 200,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 60,
    "model_type": "bert",
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
    "vocab_size": 101,
}


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_sentence_files(folder: Path, *, pooling: str = "mean", normalize: bool = True, width: int = 96) -> None:
    """modules.json and 1_Pooling as sentence-transformers 6 writes them, in the boolean form of its older versions."""
    modules = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    write_json(
        folder / "modules.json",
        [
            {
                "idx": i,
                "name": str(i),
                "path": f"{i}_{kind}" if i else "",
                "type": f"sentence_transformers.models.{kind}",
            }
            for i, kind in enumerate(modules)
        ],
    )
    write_json(
        folder / "1_Pooling" / "config.json",
        {"word_embedding_dimension": width, f"pooling_mode_{pooling}": True, "include_prompt": True}
        if pooling != "mean"
        else {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True},
    )


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2 weights, from the package of the dev extra."""
    return locate("all-MiniLM-L6-v2", None)


@pytest.fixture
def install_command() -> Callable[[str], str]:
    """Gives the command that installs what an extra of pyproject.toml asks for."""
    project = Path(__file__).parents[2] / "pyproject.toml"
    extras = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    return lambda extra: " ".join(["pip install", *(f'"{requirement}"' for requirement in extras[extra])])


@pytest.fixture
def tiny_bert() -> Callable[..., BertModel]:
    """Makes a transformers BertModel with random weights of a tiny shape; keywords change the configuration."""

    def make(**changes: Any) -> BertModel:
        fields = {name: value for name, value in {**TINY, **changes}.items() if name != "model_type"}
        model = BertModel(BertConfig(**fields), add_pooling_layer=False)
        randomise(model)
        return model

    return make


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_bert: Callable[..., BertModel]) -> Callable[..., Path]:
    """Writes a tiny random BERT as a sentence-transformers folder and returns the folder.

    tensors: what to save instead of the model's own; config: changed fields of config.json (None removes one).
    """

    def write(
        *,
        config: dict[str, Any] | None = None,
        tensors: dict[str, torch.Tensor] | None = None,
        pooling: str = "mean",
        normalize: bool = True,
    ) -> Path:
        folder = tmp_path / "model"
        merged = {name: value for name, value in {**TINY, **(config or {})}.items() if value is not None}
        write_json(folder / "config.json", merged)
        write_sentence_files(folder, pooling=pooling, normalize=normalize, width=merged["hidden_size"])
        save_file(tensors if tensors is not None else dict(tiny_bert().state_dict()), folder / "model.safetensors")
        return folder

    return write
