"""Reading a checkpoint folder: what changes vectors is applied, or refused by file and field."""

import json
import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from embedserve.models.architecture import BertArchitecture
from embedserve.models.config import read_config
from embedserve.models.errors import CheckpointError

BERT = {
    "architectures": ["BertModel"],
    "hidden_act": "gelu",
    "hidden_size": 48,
    "intermediate_size": 96,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 64,
    "model_type": "bert",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "torch_dtype": "float32",
    "type_vocab_size": 2,
    "vocab_size": 100,
}
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
POOLING = {"word_embedding_dimension": 48, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}

Files = dict[str, Any]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a checkpoint's JSON files; keyword `files` adds or replaces some, None removes one."""

    def make(files: Files | None = None) -> Path:
        whole: Files = {
            "config.json": BERT,
            "modules.json": MODULES,
            "1_Pooling/config.json": POOLING,
            "sentence_bert_config.json": {"max_seq_length": 32, "do_lower_case": False},
            **(files or {}),
        }
        for name, value in whole.items():
            if value is None:
                continue
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        return tmp_path

    return make


def modules(*types: str) -> list[dict[str, Any]]:
    return [{"idx": i, "name": str(i), "path": f"{i}_X" if i else "", "type": t} for i, t in enumerate(types)]


def test_a_sentence_transformers_folder(write: Write) -> None:
    folder = write()
    config = read_config(folder)
    assert config.architecture == BertArchitecture(
        family="bert",
        hidden_size=48,
        num_layers=2,
        num_heads=4,
        intermediate_size=96,
        vocab_size=100,
        position_rows=64,
        position_offset=0,
        type_vocab_size=2,
        layer_norm_eps=1e-12,
        activation="gelu",
    )
    assert (config.family, config.hidden_size, config.vocab_size, config.max_positions) == ("bert", 48, 100, 64)
    assert (config.pooling, config.normalize, config.max_tokens, config.do_lower_case) == ("mean", True, 32, False)
    assert (config.outputs, config.modalities, config.images, config.pad_token_id) == (("dense",), ("text",), None, 0)
    assert (config.stored_dtype, config.similarity, config.default_dimension) == ("float32", "cosine", 48)
    assert config.weights_folder == folder
    assert config.matryoshka is None
    assert "pooling" not in config.assumed
    with pytest.raises(FrozenInstanceError):
        config.hidden_size = 1  # type: ignore[misc]


def test_the_packaged_minilm(minilm: Path) -> None:
    config = read_config(minilm)
    architecture = config.architecture
    assert isinstance(architecture, BertArchitecture)
    assert (architecture.hidden_size, architecture.num_layers, architecture.num_heads) == (384, 6, 12)
    assert (config.pooling, config.normalize, config.max_tokens, config.max_positions) == ("mean", True, 256, 512)


def test_a_plain_folder_gets_the_convention_and_says_so(write: Write) -> None:
    config = read_config(
        write({"modules.json": None, "1_Pooling/config.json": None, "sentence_bert_config.json": None})
    )
    assert (config.pooling, config.normalize, config.max_tokens) == ("mean", False, 64)
    assert config.assumed == {"pooling", "normalize", "max_tokens", "prompts"}


def test_modules_may_lie_in_subfolders(write: Write) -> None:
    entries = [{**MODULES[0], "path": "0_Transformer"}, MODULES[1]]
    folder = write({"modules.json": entries, "config.json": None, "sentence_bert_config.json": None})
    for name, value in {"config.json": BERT, "sentence_bert_config.json": {"max_seq_length": 16}}.items():
        (folder / "0_Transformer").mkdir(exist_ok=True)
        (folder / "0_Transformer" / name).write_text(json.dumps(value))
    config = read_config(folder)
    assert config.weights_folder == folder / "0_Transformer"
    assert (config.max_tokens, config.normalize) == (16, False)


def test_the_module_names_of_sentence_transformers_6(write: Write) -> None:
    config = read_config(
        write(
            {
                "modules.json": modules(
                    "sentence_transformers.base.modules.transformer.Transformer",
                    "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
                    "sentence_transformers.base.modules.normalize.Normalize",
                ),
                "1_X/config.json": {"embedding_dimension": 48, "pooling_mode": "cls", "include_prompt": True},
                "2_X/config.json": {
                    "module_input_name": "sentence_embedding",
                    "module_output_name": "sentence_embedding",
                },
                "sentence_bert_config.json": {
                    "transformer_task": "feature-extraction",
                    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
                    "module_output_name": "token_embeddings",
                },
                "tokenizer_config.json": {"model_max_length": 24},
            }
        )
    )
    assert (config.pooling, config.normalize, config.max_tokens) == ("cls", True, 24)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
        ({}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["max"]}, "max"),
        # As sentence-transformers has it, the flags are dropped where the new field is there.
        ({"pooling_mode": "cls", "pooling_mode_mean_tokens": True}, "cls"),
    ],
)
def test_pooling(write: Write, pooling: dict[str, Any], expected: str) -> None:
    config = read_config(write({"1_Pooling/config.json": {"word_embedding_dimension": 48, **pooling}}))
    assert config.pooling == expected


@pytest.mark.parametrize(
    ("sentence", "tokenizer", "expected"),
    [
        ({"max_seq_length": 32}, {"model_max_length": 16}, 32),
        ({"max_seq_length": 500}, {}, 64),
        ({"max_seq_length": None}, {"model_max_length": 16}, 16),
        ({}, {"model_max_length": 1000000000000000019884624838656}, 64),
        ({}, {"model_max_length": 1e30}, 64),
        ({}, {}, 64),
    ],
)
def test_max_tokens(write: Write, sentence: Files, tokenizer: Files, expected: int) -> None:
    config = read_config(write({"sentence_bert_config.json": sentence, "tokenizer_config.json": tokenizer}))
    assert config.max_tokens == expected


def test_the_older_file_names_of_max_seq_length_count(write: Write) -> None:
    files = {"sentence_bert_config.json": None, "sentence_roberta_config.json": {"max_seq_length": 20}}
    assert read_config(write(files)).max_tokens == 20


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gelu", "gelu"), ("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu", "relu")],
)
def test_activations(write: Write, name: str, expected: str) -> None:
    architecture = read_config(write({"config.json": {**BERT, "hidden_act": name}})).architecture
    assert isinstance(architecture, BertArchitecture)
    assert architecture.activation == expected


def test_prompts_and_the_default_prompt(write: Write) -> None:
    settings = {
        "__version__": {"sentence_transformers": "6.2.0"},
        "model_type": "SentenceTransformer",
        "prompts": {"query": "query: ", "document": None},
        "default_prompt_name": "query",
        "similarity_fn_name": "dot",
        "truncate_dim": 24,
    }
    config = read_config(write({"config_sentence_transformers.json": settings}))
    assert config.prompts == {"query": "query: ", "document": ""}
    assert (config.default_prompt_name, config.default_prompt) == ("query", "query: ")
    assert (config.similarity, config.default_dimension) == ("dot", 24)


def test_excluding_the_prompt_without_a_prompt_changes_nothing(write: Write) -> None:
    config = read_config(write({"1_Pooling/config.json": {**POOLING, "include_prompt": False}}))
    assert not config.include_prompt
    assert config.default_prompt == ""


@pytest.mark.parametrize(
    ("fields", "allowed", "refused"),
    [
        ({"is_matryoshka": True}, [1, 17, 48], [0, 49]),
        ({"matryoshka_dimensions": [12, 24]}, [12, 24, 48], [1, 13, 49]),
        ({"is_matryoshka": True, "matryoshka_dimensions": [24, 48]}, [24, 48], [12]),
    ],
)
def test_matryoshka(write: Write, fields: Files, allowed: list[int], refused: list[int]) -> None:
    sizes = read_config(write({"config.json": {**BERT, **fields}})).matryoshka
    assert sizes is not None
    assert all(sizes.allows(size) for size in allowed)
    assert not any(sizes.allows(size) for size in refused)


@pytest.mark.parametrize("fields", [{"is_matryoshka": False, "matryoshka_dimensions": [12]}, {"is_matryoshka": False}])
def test_not_matryoshka(write: Write, fields: Files) -> None:
    assert read_config(write({"config.json": {**BERT, **fields}})).matryoshka is None


REFUSED_CONFIGS: list[tuple[Files, str]] = [
    ({"model_type": None}, "model_type"),
    ({"model_type": 7}, "model_type"),
    ({"architectures": ["JinaBertForMaskedLM"]}, "JinaBERT"),
    ({"auto_map": {"AutoModel": "jinaai/jina-bert-implementation--modeling_bert.JinaBertModel"}}, "JinaBERT"),
    ({"feed_forward_type": "geglu"}, "JinaBERT"),
    ({"emb_pooler": "mean"}, "JinaBERT"),
    ({"auto_map": {"AutoModel": "modeling_new.NewModel"}}, "auto_map"),
    ({"architectures": ["NewModel"]}, "architectures"),
    ({"architectures": "BertModel"}, "architectures"),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
    ({"position_embedding_type": 1}, "position_embedding_type"),
    ({"is_decoder": True}, "is_decoder"),
    ({"is_decoder": "no"}, "is_decoder"),
    ({"add_cross_attention": True}, "add_cross_attention"),
    ({"hidden_act": "silu"}, "hidden_act"),
    ({"hidden_act": 3}, "hidden_act"),
    ({"hidden_size": 50}, "hidden_size"),
    ({"hidden_size": -48}, "hidden_size"),
    ({"hidden_size": "48"}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"hidden_size": 48.0}, "hidden_size"),
    ({"hidden_size": 10**9}, "hidden_size"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"num_attention_heads": 0}, "num_attention_heads"),
    ({"intermediate_size": None}, "intermediate_size"),
    ({"vocab_size": 10**12}, "vocab_size"),
    ({"max_position_embeddings": 0}, "max_position_embeddings"),
    ({"type_vocab_size": 0}, "type_vocab_size"),
    ({"layer_norm_eps": 0}, "layer_norm_eps"),
    ({"layer_norm_eps": math.nan}, "layer_norm_eps"),
    ({"layer_norm_eps": "small"}, "layer_norm_eps"),
    ({"pad_token_id": 100}, "pad_token_id"),
    ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"is_matryoshka": "yes"}, "is_matryoshka"),
    ({"matryoshka_dimensions": [0]}, "matryoshka_dimensions"),
    ({"matryoshka_dimensions": [96]}, "matryoshka_dimensions"),
    ({"matryoshka_dimensions": 24}, "matryoshka_dimensions"),
]


@pytest.mark.parametrize(("fields", "named"), REFUSED_CONFIGS, ids=[json.dumps(f) for f, _ in REFUSED_CONFIGS])
def test_config_json_is_refused(write: Write, fields: Files, named: str) -> None:
    changed = {name: value for name, value in {**BERT, **fields}.items() if value is not None}
    with pytest.raises(CheckpointError, match=named) as raised:
        read_config(write({"config.json": changed}))
    assert "config.json" in str(raised.value)


ST = "sentence_transformers.models."
REFUSED_FILES: list[tuple[Files, str, str]] = [
    (
        {"config_sentence_transformers.json": {"prompts": {"q": "x" * 8193}}},
        "config_sentence_transformers",
        "prompts.q",
    ),
    ({"config_sentence_transformers.json": '{"prompts": {"q": "\\ud800"}}'}, "config_sentence", "surrogates"),
    ({"config.json": None}, "config.json", "--models-dir"),
    ({"modules.json": modules(ST + "Transformer", ST + "Pooling", ST + "Dense")}, "modules.json", "Dense"),
    ({"modules.json": modules(ST + "Transformer", ST + "CNN", ST + "Pooling")}, "modules.json", "CNN"),
    ({"modules.json": modules(ST + "Router")}, "modules.json", "Router"),
    ({"modules.json": modules(ST + "Transformer", "custom_code.Pooling")}, "modules.json", "custom_code"),
    ({"modules.json": modules(ST + "Transformer")}, "modules.json", "Pooling"),
    ({"modules.json": modules(ST + "Transformer", ST + "Normalize", ST + "Pooling")}, "modules.json", "order"),
    ({"modules.json": []}, "modules.json", "none"),
    ({"modules.json": {"0": "x"}}, "modules.json", "list"),
    ({"modules.json": [1]}, "modules.json", "list"),
    ({"modules.json": "[{"}, "modules.json", "JSON"),
    ({"modules.json": [{"path": ""}]}, "modules.json", "type"),
    ({"modules.json": [{"type": ST + "Transformer"}]}, "modules.json", "path"),
    ({"modules.json": [{**MODULES[0], "kwargs": ["task"]}, MODULES[1]]}, "modules.json", "kwargs"),
    ({"modules.json": [{**MODULES[0], "path": "../elsewhere"}, MODULES[1]]}, "modules.json", "inside"),
    ({"modules.json": [{**MODULES[0], "path": "/etc"}, MODULES[1]]}, "modules.json", "inside"),
    ({"modules.json": [{**MODULES[0], "path": "a/../../b"}, MODULES[1]]}, "modules.json", "inside"),
    ({"modules.json": [{**MODULES[0], "path": "..\\b"}, MODULES[1]]}, "modules.json", "inside"),
    ({"2_Normalize/config.json": {"module_input_name": "token_embeddings"}}, "2_Normalize", "module_input_name"),
    ({"1_Pooling/config.json": None}, "1_Pooling", "missing"),
    ({"1_Pooling/config.json": {**POOLING, "pooling_mode_cls_token": True}}, "1_Pooling", "combined"),
    ({"1_Pooling/config.json": {**POOLING, "pooling_mode": ["cls", "mean"]}}, "1_Pooling", "combined"),
    ({"1_Pooling/config.json": {**POOLING, "pooling_mode": []}}, "1_Pooling", "pooling_mode"),
    ({"1_Pooling/config.json": {**POOLING, "pooling_mode": "weightedmean"}}, "1_Pooling", "weightedmean"),
    ({"1_Pooling/config.json": {**POOLING, "pooling_mode": 3}}, "1_Pooling", "pooling_mode"),
    (
        {"1_Pooling/config.json": {"word_embedding_dimension": 48, "pooling_mode_mean_sqrt_len_tokens": True}},
        "1_Pooling",
        "mean_sqrt_len_tokens",
    ),
    ({"1_Pooling/config.json": {**POOLING, "pooling_mode_mean_tokens": 1}}, "1_Pooling", "true or false"),
    ({"1_Pooling/config.json": {**POOLING, "attention": True}}, "1_Pooling", "attention"),
    ({"1_Pooling/config.json": {**POOLING, "word_embedding_dimension": 96}}, "1_Pooling", "96"),
    ({"1_Pooling/config.json": {"pooling_mode": "mean"}}, "1_Pooling", "word_embedding_dimension"),
    (
        {
            "1_Pooling/config.json": {**POOLING, "include_prompt": False},
            "config_sentence_transformers.json": {"prompts": {"query": "q: "}},
        },
        "config_sentence_transformers.json",
        "include_prompt",
    ),
    ({"config.json": None}, "config.json", "missing"),
    ({"config.json": "not json"}, "config.json", "JSON"),
    ({"config.json": "[]"}, "config.json", "object"),
    ({"config.json": "[" * 100_000}, "config.json", "JSON"),
    ({"sentence_bert_config.json": {"max_seq_length": 0}}, "sentence_bert_config.json", "max_seq_length"),
    ({"sentence_bert_config.json": {"max_seq_length": "256"}}, "sentence_bert_config.json", "max_seq_length"),
    ({"sentence_bert_config.json": {"do_lower_case": "true"}}, "sentence_bert_config.json", "do_lower_case"),
    ({"sentence_bert_config.json": {"strip": True}}, "sentence_bert_config.json", "strip"),
    ({"sentence_bert_config.json": {"transformer_task": "fill-mask"}}, "sentence_bert_config.json", "fill-mask"),
    ({"sentence_bert_config.json": {"query_length": 32}}, "sentence_bert_config.json", "query_length"),
    (
        {"sentence_bert_config.json": {"tokenizer_args": {"model_max_length": 9}}},
        "sentence_bert_config.json",
        "tokenizer_args",
    ),
    ({"sentence_bert_config.json": {"model_args": {"subfolder": "x"}}}, "sentence_bert_config.json", "model_args"),
    (
        {"sentence_bert_config.json": {"processing_kwargs": {"text": {"truncation": False}}}},
        "sentence_bert_config.json",
        "processing_kwargs",
    ),
    (
        {"sentence_bert_config.json": {}, "tokenizer_config.json": {"model_max_length": -1}},
        "tokenizer_config.json",
        "model_max_length",
    ),
    (
        {"config_sentence_transformers.json": {"model_type": "SparseEncoder"}},
        "config_sentence_transformers.json",
        "model_type",
    ),
    ({"config_sentence_transformers.json": {"prompts": ["q"]}}, "config_sentence_transformers.json", "prompts"),
    ({"config_sentence_transformers.json": {"prompts": {"q": 1}}}, "config_sentence_transformers.json", "prompts"),
    (
        {"config_sentence_transformers.json": {"default_prompt_name": "query"}},
        "config_sentence_transformers.json",
        "default_prompt_name",
    ),
    (
        {"config_sentence_transformers.json": {"similarity_fn_name": "maxsim"}},
        "config_sentence_transformers.json",
        "similarity_fn_name",
    ),
    ({"config_sentence_transformers.json": {"truncate_dim": 0}}, "config_sentence_transformers.json", "truncate_dim"),
    ({"adapter_config.json": {"peft_type": "LORA"}}, "adapter_config.json", "merge"),
]


@pytest.mark.parametrize(
    ("files", "file", "named"), REFUSED_FILES, ids=[f"{file}: {named}" for _, file, named in REFUSED_FILES]
)
def test_other_files_are_refused(write: Write, files: Files, file: str, named: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        read_config(write(files))
    assert file in str(raised.value)
    assert named in str(raised.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        read_config(tmp_path / "nowhere")


def test_a_weight_file_under_the_wrong_name_is_not_read_whole(write: Write) -> None:
    folder = write()
    with (folder / "config.json").open("wb") as file:
        file.truncate(1 << 32)
    with pytest.raises(CheckpointError, match="larger than"):
        read_config(folder)
