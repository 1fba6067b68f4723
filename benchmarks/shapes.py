"""Checkpoints of known models' true shapes with random weights, and the arithmetic that a token costs in a model.

Speed does not depend on what weights say, so a shape stands for the model where its weights are not at hand. Vectors
mean nothing. The tokenizer is WordPiece over the words of `texts.common_words`, whatever the model's own is: of texts
made of these words each is a token. Models of other tokenizers are tokenised faster so than with their own.
"""

from __future__ import annotations

import json
import math
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedserve.benchmarks.texts import common_words
from embedserve.models.architecture import (
    BertArchitecture,
    ForeignArchitecture,
    JinaBertArchitecture,
    JinaClipArchitecture,
)
from embedserve.models.config import ModelConfig

__all__ = ["SHAPES", "Shape", "flops_per_token", "parameters", "tensor_shapes", "write"]


@dataclass(frozen=True)
class Shape:
    """config: what config.json has. stored: the dtype that its authors store weights in. pooling: as 1_Pooling says."""

    config: dict[str, Any]
    stored: str
    pooling: str
    max_tokens: int


def _bert(width: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["BertModel"],
        "hidden_act": "gelu",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "model_type": "bert",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": 30522,
        **more,
    }


_M3: dict[str, Any] = {
    "architectures": ["XLMRobertaModel"],
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 8194,
    "model_type": "xlm-roberta",
    "pad_token_id": 1,
    "type_vocab_size": 1,
    "vocab_size": 250002,
}
_JINA: dict[str, Any] = {
    "architectures": ["JinaBertForMaskedLM"],
    "auto_map": {"AutoModel": "jinaai/jina-bert-implementation--modeling_bert.JinaBertModel"},
    "emb_pooler": "mean",
    "feed_forward_type": "geglu",
    "max_position_embeddings": 8192,
    "position_embedding_type": "alibi",
    "vocab_size": 30528,
}
_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 32768,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "vocab_size": 151669,
}
SHAPES = {
    "minilm": Shape(_bert(384, 6, 12), "float32", "mean", 256),
    "bge-base": Shape(_bert(768, 12, 12), "float32", "cls", 512),
    "bge-large": Shape(_bert(1024, 24, 16), "float32", "cls", 512),
    "bge-m3": Shape(_bert(1024, 24, 16, **_M3), "float32", "cls", 8192),
    "jina-v2-base": Shape(_bert(768, 12, 12, **_JINA), "float16", "mean", 8192),
    "qwen3-0.6b": Shape(_QWEN3, "bfloat16", "lasttoken", 32768),
}


def flops_per_token(config: ModelConfig, length: int) -> float | None:
    """Arithmetic of a forward pass, a token of a text of `length` tokens: 2·weights + 4·length·d_q·layers.

    weights: those of the layers' matrices. The second term, attention's, is half of that in a causal model. None for
    architectures whose matrices are not known here.
    """
    sizes = config.architecture
    if isinstance(sizes, JinaClipArchitecture):
        sizes = sizes.text
    if isinstance(sizes, ForeignArchitecture):
        return None
    width, inner = sizes.hidden_size, sizes.intermediate_size
    queries, causal = width, False
    if isinstance(sizes, BertArchitecture):
        weights = 4 * width * width + 2 * width * inner
    elif isinstance(sizes, JinaBertArchitecture):
        weights = 4 * width * width + 3 * width * inner
    else:
        queries, causal = sizes.num_heads * sizes.head_dim, True
        weights = 2 * width * (queries + sizes.num_kv_heads * sizes.head_dim) + 3 * width * inner
    attention = 4 * length * queries * (0.5 if causal else 1.0)
    return sizes.num_layers * (2 * weights + attention)


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint with this config.json."""
    if config["model_type"] == "qwen3":
        return _qwen3_tensors(config)
    width, inner = config["hidden_size"], config["intermediate_size"]
    alibi = config.get("position_embedding_type") == "alibi"
    tables = {"word": config["vocab_size"], "token_type": config["type_vocab_size"]}
    if not alibi:
        tables["position"] = config["max_position_embeddings"]
    shapes: dict[str, tuple[int, ...]] = {
        f"embeddings.{name}_embeddings.weight": (rows, width) for name, rows in tables.items()
    }
    layer: dict[str, tuple[int, ...]] = {
        "attention.self.query": (width, width),
        "attention.self.key": (width, width),
        "attention.self.value": (width, width),
        "attention.output.dense": (width, width),
        "attention.output.LayerNorm": (width,),
    }
    if alibi:
        layer |= {"mlp.wo": (width, inner), "mlp.layernorm": (width,)}
    else:
        layer |= {"intermediate.dense": (inner, width), "output.dense": (width, inner), "output.LayerNorm": (width,)}
    named: dict[str, tuple[int, ...]] = {"embeddings.LayerNorm": (width,)}
    for index in range(config["num_hidden_layers"]):
        named |= {f"encoder.layer.{index}.{name}": shape for name, shape in layer.items()}
        if alibi:
            shapes[f"encoder.layer.{index}.mlp.gated_layers.weight"] = (2 * inner, width)
    for name, shape in named.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def _qwen3_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    layer = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, queries),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (config["vocab_size"], width)}
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    return {**shapes, "norm.weight": (width,)}


def write(folder: Path, shape: Shape, *, stored: str | None = None) -> None:
    """Write the checkpoint as sentence-transformers does: weights, settings, tokenizer. stored: another dtype."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, stored or shape.stored)
    tensors = {}
    for name, size in tensor_shapes(shape.config).items():
        # Norms near one keep the activations of 28 layers in float16's range; 0.02 is what BERT is initialised with.
        mean = 1.0 if len(size) == 1 and name.endswith("weight") else 0.0
        tensors[name] = torch.empty(size, dtype=dtype).normal_(mean, 0.02, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", {**shape.config, "torch_dtype": str(dtype).removeprefix("torch.")})
    _write_tokenizer(folder, shape)
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" * bool(i), "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    _write_json(folder / "modules.json", modules)
    flags = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "lasttoken": "pooling_mode_lasttoken"}
    modes = {flag: mode == shape.pooling for mode, flag in flags.items()}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    _write_json(
        folder / "1_Pooling" / "config.json", {"word_embedding_dimension": shape.config["hidden_size"], **modes}
    )
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": shape.max_tokens, "do_lower_case": False})


def parameters(config: dict[str, Any]) -> int:
    """Numbers in a checkpoint with this config.json."""
    return sum(math.prod(shape) for shape in tensor_shapes(config).values())


def _write_tokenizer(folder: Path, shape: Shape) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = [*special, *characters, *(f"##{each}" for each in characters), *common_words()]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.max_tokens,
        **{f"{name.strip('[]').lower()}_token": name for name in special},
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
