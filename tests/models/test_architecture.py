"""config.json → Architecture: the family is recognised, and what would change vectors is applied or refused by name."""

from pathlib import Path
from typing import Any

import pytest

from embedserve.models.architecture import (
    BertArchitecture,
    ForeignArchitecture,
    JinaBertArchitecture,
    JinaClipArchitecture,
    Qwen3Architecture,
    VisionArchitecture,
    read_architecture,
)
from embedserve.models.errors import CheckpointError
from embedserve.models.json_file import JsonFile

Fields = dict[str, Any]

# The published files, without what does not matter to a forward pass.
BGE_M3: Fields = {
    "architectures": ["XLMRobertaModel"],
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 8194,
    "model_type": "xlm-roberta",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "output_past": True,
    "pad_token_id": 1,
    "position_embedding_type": "absolute",
    "torch_dtype": "float32",
    "type_vocab_size": 1,
    "vocab_size": 250002,
}
JINA_V2_BASE_EN: Fields = {
    "architectures": ["JinaBertForMaskedLM"],
    "auto_map": {"AutoModel": "jinaai/jina-bert-implementation--modeling_bert.JinaBertModel"},
    "attn_implementation": "torch",
    "emb_pooler": "mean",
    "feed_forward_type": "geglu",
    "hidden_act": "gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 8192,
    "model_max_length": 8192,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "position_embedding_type": "alibi",
    "type_vocab_size": 2,
    "vocab_size": 30528,
}
QWEN3_06B: Fields = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151669,
}
JINA_CLIP: Fields = {
    "add_projections": False,
    "architectures": ["JinaCLIPModel"],
    "logit_scale_init_value": 2.6592,
    "model_type": "jina_clip",
    "projection_dim": 768,
    "text_config": {
        "embed_dim": 768,
        "hf_model_config_kwargs": {"use_flash_attn": False},
        "hf_model_name_or_path": "jinaai/jina-bert-flash-implementation",
        "model_type": "jina_clip_text",
        "pooler_type": "mean_pooler",
        "proj_bias": False,
        "proj_type": None,
    },
    "vision_config": {
        "embed_dim": 768,
        "fused_layer_norm": False,
        "head_width": 64,
        "image_size": 224,
        "intp_freq": False,
        "layers": 12,
        "ls_init_value": None,
        "mlp_ratio": 2.6667,
        "model_type": "jina_clip_vision",
        "naive_swiglu": True,
        "patch_dropout": 0.1,
        "patch_size": 16,
    },
}


def read(fields: Fields) -> Any:
    return read_architecture(JsonFile(Path("config.json"), fields))


def test_bge_m3_has_8192_positions_behind_its_padding() -> None:
    found = read(BGE_M3)
    assert isinstance(found, BertArchitecture)
    assert (found.family, found.position_rows, found.position_offset, found.max_positions) == (
        "xlm_roberta",
        8194,
        2,
        8192,
    )
    assert (found.hidden_size, found.num_layers, found.num_heads, found.layer_norm_eps) == (1024, 24, 16, 1e-5)


@pytest.mark.parametrize("model_type", ["roberta", "camembert"])
def test_roberta_is_the_same_family(model_type: str) -> None:
    fields = {**BGE_M3, "model_type": model_type, "architectures": ["RobertaModel"], "max_position_embeddings": 514}
    assert read(fields).max_positions == 512


def test_jina_v2_is_no_bert() -> None:
    found = read(JINA_V2_BASE_EN)
    assert found == JinaBertArchitecture(
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        intermediate_size=3072,
        vocab_size=30528,
        max_positions=8192,
        type_vocab_size=2,
        layer_norm_eps=1e-12,
        activation="gelu",
    )


@pytest.mark.parametrize("name", ["architectures", "auto_map", "emb_pooler", "feed_forward_type"])
def test_one_of_jinas_fields_is_enough(name: str) -> None:
    others = {"architectures", "auto_map", "emb_pooler", "feed_forward_type", "position_embedding_type"} - {name}
    fields = {key: value for key, value in JINA_V2_BASE_EN.items() if key not in others}
    assert isinstance(read(fields), JinaBertArchitecture)


def test_qwen3() -> None:
    found = read(QWEN3_06B)
    assert found == Qwen3Architecture(
        hidden_size=1024,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=3072,
        vocab_size=151669,
        max_positions=32768,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
    )


def test_qwen3_as_transformers_5_writes_it() -> None:
    fields = {key: value for key, value in QWEN3_06B.items() if key not in ("rope_theta", "rope_scaling")}
    fields |= {
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
        "layer_types": ["full_attention"] * 28,
        "dtype": "bfloat16",
    }
    assert read(fields) == read(QWEN3_06B)


def test_jina_clip() -> None:
    found = read(JINA_CLIP)
    assert isinstance(found, JinaClipArchitecture)
    assert found.text == read(JINA_V2_BASE_EN)
    assert found.vision == VisionArchitecture(
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        intermediate_size=2048,
        image_size=224,
        patch_size=16,
        rotary=True,
        rope_scale=1.0,
        qkv_bias=True,
        sub_norm=True,
    )
    assert found.vision.grid == 14


def test_what_none_of_our_families_runs_is_foreign() -> None:
    fields = {"model_type": "modernbert", "hidden_size": 768, "vocab_size": 50368, "max_position_embeddings": 8192}
    assert read(fields) == ForeignArchitecture("modernbert", 768, 50368, 8192, remote_code=False)
    assert read({**fields, "auto_map": {"AutoModel": "x.Y"}}).remote_code
    mpnet = read({**fields, "model_type": "mpnet", "max_position_embeddings": 514})
    assert mpnet.max_positions == 512


def clip(tower: str, **fields: Any) -> Fields:
    return {**JINA_CLIP, tower: {**JINA_CLIP[tower], **fields}}


REFUSED: list[tuple[Fields, str]] = [
    ({**BGE_M3, "position_embedding_type": "relative_key"}, "position_embedding_type"),
    ({**BGE_M3, "architectures": ["NewModel"]}, "architectures"),
    ({**BGE_M3, "auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
    ({**BGE_M3, "max_position_embeddings": 2}, "max_position_embeddings"),
    ({**BGE_M3, "pad_token_id": -1}, "pad_token_id"),
    ({**BGE_M3, "is_decoder": True}, "is_decoder"),
    ({**JINA_V2_BASE_EN, "position_embedding_type": "absolute"}, "JinaBERT"),
    ({**JINA_V2_BASE_EN, "feed_forward_type": "original"}, "feed_forward_type"),
    ({**JINA_V2_BASE_EN, "emb_pooler": "cls"}, "emb_pooler"),
    ({**QWEN3_06B, "attention_bias": True}, "attention_bias"),
    ({**QWEN3_06B, "use_sliding_window": True}, "use_sliding_window"),
    ({**QWEN3_06B, "layer_types": ["sliding_attention"]}, "layer_types"),
    ({**QWEN3_06B, "hidden_act": "gelu"}, "hidden_act"),
    ({**QWEN3_06B, "num_key_value_heads": 5}, "num_key_value_heads"),
    ({**QWEN3_06B, "head_dim": 63}, "head_dim"),
    ({**QWEN3_06B, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.type"),
    ({**QWEN3_06B, "rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type"),
    ({**QWEN3_06B, "rope_theta": "big"}, "rope_theta"),
    ({**QWEN3_06B, "is_causal": False}, "is_causal"),
    ({**JINA_CLIP, "add_projections": True}, "add_projections"),
    ({**JINA_CLIP, "text_config": []}, "text_config"),
    (clip("text_config", proj_type="mlp"), "text_config.proj_type"),
    (clip("text_config", pooler_type="cls_pooler"), "text_config.pooler_type"),
    (clip("text_config", hf_model_config_kwargs={"num_hidden_layers": 0}), "hf_model_config_kwargs.num_hidden_layers"),
    (clip("text_config", embed_dim=512), "text_config.embed_dim"),
    (clip("vision_config", width=1024, embed_dim=1024), "vision_config.width"),
    (clip("vision_config", pt_hw_seq_len=16), "vision_config.pt_hw_seq_len"),
    (clip("vision_config", naive_swiglu=False), "vision_config.naive_swiglu"),
    (clip("vision_config", ls_init_value=0.1), "vision_config.ls_init_value"),
    (clip("vision_config", patch_size=15), "vision_config.patch_size"),
    (clip("vision_config", head_width=50), "vision_config.head_width"),
    ({"model_type": "modernbert", "vocab_size": 9}, "hidden_size"),
    ({"model_type": "modernbert", "hidden_size": 9}, "vocab_size"),
]


@pytest.mark.parametrize(("fields", "named"), REFUSED, ids=[named for _, named in REFUSED])
def test_what_would_give_other_vectors_is_refused_by_name(fields: Fields, named: str) -> None:
    with pytest.raises(CheckpointError, match=named.replace(".", r"\.")):
        read(fields)
