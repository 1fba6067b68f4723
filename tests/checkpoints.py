"""Checkpoints of the catalogue's models with random weights: the true widths, one layer, small vocabularies.

Each is written as its authors publish it: the fields of config.json, the names of the tensors, the files of
sentence-transformers, a tokenizer of the true kind, trained on a few lines. `expected` gives the vector that such a
checkpoint makes of token ids, by transformers' own model or by the slow references of tests/models.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from tests.models.jina_reference import flash_names, jina_bert, vision
from tests.models.test_jina_bert import random_tensors
from tests.models.test_jina_clip import random_vision

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and what is a search engine?",
    "Ein Satz auf Deutsch über große Städte und kleine Straßen; ¿dónde está la biblioteca?",
    "def read(path): return open(path).read()  # a function of one line",
    "你好，世界。搜索引擎是什么？这是一个句子。",
] * 3

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

WORD_PIECE = {
    "BAAI/bge-large-en-v1.5": {"lowercase": True},
    "BAAI/bge-large-zh-v1.5": {"lowercase": True},
    "jinaai/jina-embeddings-v2-base-en": {"lowercase": True},
    "jinaai/jina-clip-v1": {"lowercase": True},
}
XLM_ROBERTA = {
    "BAAI/bge-m3": {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "positions": 8194},
    "netease-youdao/bce-embedding-base_v1": {
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "positions": 514,
    },
}
JINA_V2 = {
    "jinaai/jina-embeddings-v2-base-en": "A",
    "jinaai/jina-embeddings-v2-base-de": "A",
    "jinaai/jina-embeddings-v2-base-zh": "A",
    "jinaai/jina-embeddings-v2-base-es": "C",
    "jinaai/jina-embeddings-v2-base-code": "B",
}
QWEN3 = "Qwen/Qwen3-Embedding-0.6B"
JINA_CLIP = "jinaai/jina-clip-v1"
BGE = ("BAAI/bge-large-en-v1.5", "BAAI/bge-large-zh-v1.5")

# Ids up to that of the token that Qwen3 appends, and a few more, as its own files have.
_QWEN3_VOCABULARY = 151669
_END_OF_TEXT = 151643


def write(model: str, models_dir: Path) -> Path:
    """Write a model's folder under models_dir, where `--models-dir` finds it, and return it."""
    folder = models_dir / model
    folder.mkdir(parents=True)
    torch.manual_seed(3)
    if model in BGE:
        _write_bge(folder)
    elif model in XLM_ROBERTA:
        _write_xlm_roberta(folder, **XLM_ROBERTA[model], heads=model == "BAAI/bge-m3")
    elif model in JINA_V2:
        _write_jina_v2(folder, model)
    elif model == JINA_CLIP:
        _write_jina_clip(folder)
    else:
        assert model == QWEN3
        _write_qwen3(folder)
    return folder


def expected(model: str, folder: Path, texts: Sequence[Sequence[int]]) -> Tensor:
    """The dense vectors of texts of token ids, float64 [texts, dimensions], of unit length."""
    if model in JINA_V2 or model == JINA_CLIP:
        stored = load_file(folder / "model.safetensors")
        tensors = random_tensors("A", **_JINA_SIZES) if model == JINA_CLIP else stored
        heads = _JINA_SIZES["num_attention_heads"]
        vectors = [jina_bert(tensors, JINA_V2.get(model, "A"), torch.tensor(list(ids)), heads).mean(0) for ids in texts]
    else:
        vectors = [states[-1 if model == QWEN3 else 0] for states in states_of_transformers(folder, texts)]
    return torch.nn.functional.normalize(torch.stack(vectors))


@torch.inference_mode()
def states_of_transformers(folder: Path, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Each text's last states, float64 [tokens, hidden], by transformers' own model in float32, one text at a time."""
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    return [model(input_ids=torch.tensor([list(ids)])).last_hidden_state[0].double() for ids in texts]


def expected_image(folder: Path, pixels: Tensor) -> Tensor:
    """jina-clip's vector of one image, uint8 [224, 224, 3] → float64 [768], of unit length."""
    vector = vision(load_file(folder / "model.safetensors"), pixels, 12, 16, MEAN, STD)
    return vector / vector.norm()


def heads_of(folder: Path) -> dict[str, dict[str, Tensor]]:
    """bge-m3's further heads: output → weight and bias, float64."""
    return {
        output: {name: t.double() for name, t in load_file(folder / f"{output}_linear.safetensors").items()}
        for output in ("sparse", "colbert")
    }


# --- the families -----------------------------------------------------------------------------------------------------


def _write_bge(folder: Path) -> None:
    tokenizer = _word_piece()
    config = transformers.BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=1024,
        num_attention_heads=16,
        intermediate_size=4096,
        num_hidden_layers=1,
    )
    _save(folder, transformers.BertModel(config), tokenizer, "cls", max_seq_length=512, do_lower_case=True)


def _write_xlm_roberta(folder: Path, *, positions: int, heads: bool, **sizes: int) -> None:
    tokenizer = _unigram()
    config = transformers.XLMRobertaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        num_hidden_layers=1,
        type_vocab_size=1,
        max_position_embeddings=positions,
        layer_norm_eps=1e-5,
        **sizes,
    )
    _save(folder, transformers.XLMRobertaModel(config), tokenizer, "cls", max_seq_length=positions - 2)
    width = sizes["hidden_size"]
    if heads:
        for output, components in (("sparse", 1), ("colbert", width)):
            weight, bias = torch.randn(components, width) * width**-0.5, torch.randn(components) * 0.1
            save_file({"weight": weight.half(), "bias": bias.half()}, folder / f"{output}_linear.safetensors")


_JINA_SIZES: dict[str, Any] = {
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "num_hidden_layers": 1,
    "vocab_size": 400,
    "type_vocab_size": 2,
}


def _write_jina_v2(folder: Path, model: str) -> None:
    tokenizer = _word_piece() if model.endswith("base-en") else _byte_level() if model[-2:] in ("es", "de") else None
    if tokenizer is None:
        tokenizer = _byte_level() if model.endswith("code") else _character_bpe()
    tensors = random_tensors(JINA_V2[model], **_JINA_SIZES)
    # As stored: the reference reads the same rounded numbers.
    save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / "model.safetensors")
    _write_json(
        folder / "config.json",
        {
            "architectures": ["JinaBertForMaskedLM"],
            "auto_map": {"AutoModel": "jinaai/jina-bert-implementation--modeling_bert.JinaBertModel"},
            "emb_pooler": "mean",
            "feed_forward_type": "geglu",
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "max_position_embeddings": 8192,
            "model_type": "bert",
            "pad_token_id": 0,
            "position_embedding_type": "alibi",
            "torch_dtype": "float16",
            **_JINA_SIZES,
        },
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    # code and small-en were published without Normalize.
    _write_modules(folder, "mean", 768, normalize=not model.endswith("code"))
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": 8192, "do_lower_case": False})


def _write_jina_clip(folder: Path) -> None:
    kwargs = {name: value for name, value in _JINA_SIZES.items() if name != "type_vocab_size"}
    images = {
        **{"embed_dim": 768, "width": 768, "image_size": 224, "patch_size": 16, "layers": 1, "head_width": 64},
        **{"mlp_ratio": 2.6667, "naive_swiglu": True, "intp_freq": False, "ls_init_value": None},
    }
    texts = flash_names(random_tensors("A", **_JINA_SIZES))
    save_file({**texts, **random_vision(**images), "logit_scale": torch.tensor(2.6592)}, folder / "model.safetensors")
    _write_json(
        folder / "config.json",
        {
            "add_projections": False,
            "architectures": ["JinaCLIPModel"],
            "auto_map": {"AutoModel": "jinaai/jina-clip-implementation--modeling_clip.JinaCLIPModel"},
            "model_type": "jina_clip",
            "projection_dim": 768,
            "text_config": {
                "embed_dim": 768,
                "hf_model_config_kwargs": {"use_flash_attn": False, **kwargs},
                "pooler_type": "mean_pooler",
            },
            "vision_config": images,
        },
    )
    _word_piece().save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "JinaCLIPImageProcessor",
            "size": 224,
            "resize_mode": "shortest",
            "interpolation": "bicubic",
            "mean": MEAN,
            "std": STD,
        },
    )


def _write_qwen3(folder: Path) -> None:
    config = transformers.Qwen3Config(
        vocab_size=_QWEN3_VOCABULARY,
        hidden_size=1024,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
        num_hidden_layers=1,
        max_position_embeddings=32768,
        rope_theta=1e6,
    )
    model = transformers.Qwen3Model(config).to(torch.bfloat16)
    _save(folder, model, _qwen2(), "lasttoken", max_seq_length=32768, max_shard_size="200MB")


def _save(
    folder: Path,
    model: Any,
    tokenizer: Tokenizer,
    pooling: str,
    *,
    max_seq_length: int,
    do_lower_case: bool = False,
    max_shard_size: str = "5GB",
) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # As initialised, biases are 0 and norms 1, so that leaving one out would not show.
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "embed" not in name:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_modules(folder, pooling, model.config.hidden_size)
    _write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": max_seq_length, "do_lower_case": do_lower_case}
    )


def _write_modules(folder: Path, pooling: str, width: int, *, normalize: bool = True) -> None:
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    _write_json(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": f"{i}_{kind}" * bool(i), "type": f"sentence_transformers.models.{kind}"}
            for i, kind in enumerate(kinds)
        ],
    )
    modes = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "lasttoken": "pooling_mode_lasttoken"}
    flags = {flag: mode == pooling for mode, flag in modes.items()}
    _write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **flags})


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


# --- the tokenizers ---------------------------------------------------------------------------------------------------


def _word_piece() -> Tokenizer:
    """BERT's: uncased, `[CLS] A [SEP]`."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=250, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    )
    return tokenizer


def _unigram() -> Tokenizer:
    """XLM-RoBERTa's: SentencePiece's pieces behind `<s> <pad> </s> <unk>`, `<s> A </s>`."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=250, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _between_s(tokenizer)


def _byte_level() -> Tokenizer:
    """RoBERTa's: BPE over bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=350, special_tokens=special, initial_alphabet=alphabet)
    )
    return _between_s(tokenizer)


def _character_bpe() -> Tokenizer:
    """jina-embeddings-v2-base-zh's: lower case, words at white space, BPE over characters."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=350, special_tokens=special))
    return _between_s(tokenizer)


def _between_s(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    )
    return tokenizer


def _qwen2() -> Tokenizer:
    """Qwen3-Embedding's: byte-level BPE behind NFC, and `<|endoftext|>` at the end, at its true id."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    model = json.loads(trained.to_str())["model"]
    vocabulary = {**model["vocab"], **{f"unused {i}": i for i in range(len(model["vocab"]), _END_OF_TEXT)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge) for merge in model["merges"]]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    assert tokenizer.token_to_id("<|endoftext|>") == _END_OF_TEXT
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", _END_OF_TEXT)]),
        ]
    )
    return tokenizer
