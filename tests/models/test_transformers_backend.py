"""The transformers backend: vectors against sentence-transformers on the same folder, and what is refused.

Tiny random models of every architecture that is named in the documents; the weights of the real ones are not here.
"""

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.models.packed import CPU, largest_difference, pack, random_texts, randomise, states_of
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from embedserve.kernels import pooling
from embedserve.models import registry
from embedserve.models.config import ModelConfig, read_config
from embedserve.models.errors import CheckpointError
from embedserve.models.transformers_backend import TransformersBackend

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the reference's own imports
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Normalize, Pooling, Transformer

Fields = dict[str, Any]

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
TEXTS = [
    "x",
    "a short text",
    "",
    "caf\u00e9, \u4e2d\u6587",
    "one that is longer than all of the others here",
    "the end",
]
SIZES: Fields = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "pad_token_id": 1,
    "vocab_size": 260,
}
PADDING_FIRST = {"max_position_embeddings": 66}
DECODER = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 2}

MODERNBERT = {f"{name}_token_id": index for index, name in enumerate(("bos", "pad", "eos", "cls", "sep"))}

# Architecture: (class that is saved, its configuration besides SIZES, pooling).
ARCHITECTURES: dict[str, tuple[str, Fields, str]] = {
    "bert": ("BertModel", {}, "mean"),
    "bert with its heads": ("BertForPreTraining", {}, "cls"),
    "xlm-roberta": ("XLMRobertaModel", {**PADDING_FIRST, "type_vocab_size": 1}, "mean"),
    "roberta with its head": ("RobertaForMaskedLM", PADDING_FIRST, "mean"),
    "camembert": ("CamembertModel", PADDING_FIRST, "mean"),
    "mpnet": ("MPNetModel", PADDING_FIRST, "mean"),
    "mpnet with its head": ("MPNetForMaskedLM", PADDING_FIRST, "mean"),
    "distilbert with its head": (
        "DistilBertForMaskedLM",
        {"dim": 48, "hidden_dim": 80, "n_heads": 3, "n_layers": 2},
        "cls",
    ),
    "albert": ("AlbertModel", {"embedding_size": 20}, "mean"),
    "electra with its head": ("ElectraForPreTraining", {"embedding_size": 20}, "mean"),
    "deberta-v2": (
        "DebertaV2Model",
        {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 20},
        "mean",
    ),
    "modernbert": (
        "ModernBertModel",
        {"num_hidden_layers": 4, "local_attention": 8, "global_attn_every_n_layers": 3},
        "mean",
    ),
    "modernbert with its head": ("ModernBertForMaskedLM", {"num_attention_heads": 4}, "cls"),
    "nomic_bert": ("NomicBertModel", {}, "mean"),
    "gte": ("GteModel", {}, "cls"),
    "eurobert": ("EuroBertModel", {**DECODER, "mask_token_id": 4}, "mean"),
    "jina_embeddings_v3": ("JinaEmbeddingsV3Model", {}, "mean"),
    "qwen2": ("Qwen2ForCausalLM", DECODER, "lasttoken"),
    "qwen3": ("Qwen3Model", {**DECODER, "head_dim": 12}, "lasttoken"),
    "gemma3_text": (
        "Gemma3TextModel",
        {**DECODER, "head_dim": 12, "sliding_window": 8, "use_bidirectional_attention": True},
        "mean",
    ),
    "llama": ("LlamaModel", DECODER, "lasttoken"),
    "mistral": ("MistralModel", {**DECODER, "sliding_window": 8}, "mean"),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """`<s> A </s>`, the padding with id 1, and an id for each byte: transformers reads any other as Qwen2's wrongly."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *sorted(ByteLevel.alphabet())])}
    rust = Tokenizer(BPE(vocabulary, []))
    rust.pre_tokenizer = ByteLevel(add_prefix_space=False)
    rust.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=rust,
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def random_model(kind: str, **fields: Any) -> Any:
    if not hasattr(transformers, kind):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    model_class = getattr(transformers, kind)
    return randomise(model_class(model_class.config_class(**{**SIZES, **fields})))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a random model as a plain folder of transformers, with a tokenizer."""

    def write(kind: str = "BertModel", **fields: Any) -> Path:
        folder = tmp_path / "plain"
        random_model(kind, **fields).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        return folder

    return write


def change(folder: Path, **fields: Any) -> Path:
    """Change fields of config.json; None removes one."""
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    return folder


def load(folder: Path) -> tuple[TransformersBackend, ModelConfig]:
    config = read_config(folder)
    with torch.inference_mode():
        return TransformersBackend(config, CPU, torch.float32), config


@torch.inference_mode()
def embed(backend: TransformersBackend, config: ModelConfig, texts: list[str]) -> npt.NDArray[np.float32]:
    rust = Tokenizer.from_file(str(config.weights_folder / "tokenizer.json"))
    batch = pack([torch.tensor(rust.encode(text).ids) for text in texts])
    pooled = pooling.pool(backend.hidden_states(batch), batch.layout.cu_seqlens, config.pooling)
    vectors, finite = pooling.finish(pooled, None, normalize=config.normalize)
    assert finite.all()
    return batch.host.restore(vectors.numpy())


@pytest.mark.parametrize(("kind", "fields", "mode"), ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_vectors_are_those_of_sentence_transformers(
    checkpoint: Callable[..., Path], tmp_path: Path, kind: str, fields: Fields, mode: str
) -> None:
    plain, folder = checkpoint(kind, **fields), tmp_path / "sentence"
    modules = [Transformer(str(plain)), Pooling(48, pooling_mode=mode), Normalize()]
    SentenceTransformer(modules=modules, prompts={"query": "query: "}, device="cpu").save(str(folder))
    # It saved the encoder alone.
    for file in ("config.json", "model.safetensors"):
        shutil.copy(plain / file, folder / file)
    theirs = SentenceTransformer(str(folder), device="cpu", local_files_only=True)

    backend, config = load(folder)
    found = embed(backend, config, TEXTS)
    expected = theirs.encode(TEXTS)
    assert largest_difference([torch.from_numpy(found)], [torch.from_numpy(expected)]) < 1e-5

    prompted = embed(backend, config, [config.prompts["query"] + text for text in TEXTS])
    expected = theirs.encode(TEXTS, prompt_name="query")
    assert largest_difference([torch.from_numpy(prompted)], [torch.from_numpy(expected)]) < 1e-5
    assert np.abs(prompted - found).max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "fields"), [("BertModel", {}), ("ModernBertModel", MODERNBERT), ("Qwen2Model", DECODER)], ids=str
)
def test_neighbours_and_order_change_nothing(checkpoint: Callable[..., Path], kind: str, fields: Fields) -> None:
    backend, _ = load(checkpoint(kind, **fields))
    texts = random_texts()
    together = states_of(backend.hidden_states, texts)
    assert largest_difference(states_of(backend.hidden_states, texts[::-1])[::-1], together) < 1e-6
    alone = [states_of(backend.hidden_states, [text])[0] for text in texts]
    assert largest_difference(alone, together) < 1e-5


@torch.inference_mode()
def test_a_real_model_has_the_vectors_of_its_packed_family(minilm: Path) -> None:
    backend, config = load(minilm)
    native = registry.backend("native")(config, CPU, torch.float32)
    texts = random_texts([3, 9, 40, 9, 200], first=1000, vocab=config.vocab_size)
    found, expected = (states_of(one.hidden_states, texts) for one in (backend, native))
    assert largest_difference(found, expected) < 1e-5


def test_transformers_is_imported_by_this_backend_alone_and_without_network(checkpoint: Callable[..., Path]) -> None:
    program = f"""
import sys, torch
from pathlib import Path
from embedserve.models import native, registry, transformers_backend
from embedserve.models.config import read_config
assert "transformers" not in sys.modules and "huggingface_hub" not in sys.modules
config = read_config(Path({str(checkpoint())!r}))
registry.backend("transformers")(config, torch.device("cpu"), torch.float32)
import huggingface_hub.constants
assert huggingface_hub.constants.HF_HUB_OFFLINE and huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# What would give other vectors than the checkpoint's authors had is refused, with the reason.


def refused(folder: Path, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as raised:
        load(folder)
    assert str(folder) in str(raised.value)


REMOTE = {"AutoConfig": "configuration_new.NewConfig", "AutoModel": "modeling_new.NewModel"}


def test_an_architecture_that_needs_code_of_the_checkpoint_is_refused(checkpoint: Callable[..., Path]) -> None:
    folder = change(checkpoint(), model_type="new", auto_map=REMOTE)
    refused(folder, '"new"; .*no such architecture.*auto_map.*never run')


def test_an_architecture_that_nobody_knows_is_refused(checkpoint: Callable[..., Path]) -> None:
    refused(change(checkpoint(), model_type="perceptron"), "perceptron.*no such architecture; a newer version")


def test_code_under_the_name_of_an_architecture_that_transformers_has_is_refused(
    checkpoint: Callable[..., Path],
) -> None:
    """gte-Qwen2 does so: its own code attends in both directions, qwen2 in one."""
    refused(
        change(checkpoint("Qwen2Model", **DECODER), auto_map=REMOTE), "auto_map.*never run.*qwen2 of transformers may"
    )


def test_code_that_transformers_took_over_is_not_needed(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("NomicBertModel")
    expected, _ = load(folder)
    found, _ = load(change(folder, auto_map=REMOTE, rotary_emb_base=1000, prenorm=False))
    texts = random_texts()
    assert largest_difference(*(states_of(one.hidden_states, texts) for one in (found, expected))) == 0


def test_fields_that_only_the_code_would_have_read_are_refused(checkpoint: Callable[..., Path]) -> None:
    folder = change(checkpoint("NomicBertModel"), auto_map=REMOTE, rotary_emb_base=10000)
    refused(folder, "rotary_emb_base.*10000.*computes with 1000")


def test_a_jina_bert_that_calls_itself_bert_is_refused(checkpoint: Callable[..., Path]) -> None:
    refused(change(checkpoint(), position_embedding_type="alibi"), "jina_bert.*--backend native")


def change_tensors(folder: Path, changes: dict[str, torch.Tensor | None]) -> Path:
    """Replace, add, or with None remove tensors of model.safetensors."""
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoder.layer.0.intermediate.dense.weight": None}, r"has no encoder\.layer\.0\.intermediate"),
        ({"encoder.layer.0.mlp.gated_layers.weight": torch.ones(2, 2)}, r"no use for encoder\.layer\.0\.mlp"),
        (
            {"embeddings.word_embeddings.weight": torch.ones(259, 48)},
            r"word_embeddings\.weight is \[259, 48\] .* \[260, 48\]",
        ),
        ({"classifier.weight": torch.ones(2, 48)}, "no use for classifier"),
    ],
    ids=["missing", "left over", "misshapen", "a classifier's head"],
)
def test_weights_that_do_not_fit_are_refused(checkpoint: Callable[..., Path], changes: Fields, said: str) -> None:
    refused(change_tensors(checkpoint(), changes), said)


def test_a_pooler_may_be_missing_or_left_over(checkpoint: Callable[..., Path]) -> None:
    load(change_tensors(checkpoint(), {"pooler.dense.weight": None, "pooler.other.weight": torch.ones(2)}))


def test_a_damaged_file_is_refused(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    refused(folder, "model.safetensors: not a readable")


def test_a_configuration_that_transformers_refuses_is_ours_to_refuse(checkpoint: Callable[..., Path]) -> None:
    refused(change(checkpoint("ElectraModel"), hidden_act="step"), "transformers cannot load it: .*step")


def test_an_encoder_with_a_decoder_is_refused(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("T5Model", d_model=48, d_ff=80, d_kv=16, num_heads=3, decoder_start_token_id=1)
    refused(folder, "t5 is an encoder with a decoder")


def test_a_model_of_something_else_than_texts_is_refused(checkpoint: Callable[..., Path]) -> None:
    vision = {"num_attention_heads": 3, "image_size": 8, "patch_size": 4, "num_hidden_layers": 1}
    folder = checkpoint("CLIPModel", text_config=SIZES, vision_config={**vision, "hidden_size": 48})
    refused(folder, "CLIPModel of transformers gives no states for token ids alone")


def test_texts_that_would_not_fit_the_table_of_positions_are_refused_at_once(checkpoint: Callable[..., Path]) -> None:
    """LUKE's positions begin behind the padding's row, which its config.json does not say."""
    folder = checkpoint("LukeModel", entity_vocab_size=5, entity_emb_size=8, max_position_embeddings=60)
    refused(folder, "may have 60 tokens.*position_embeddings.*for 58; set max_seq_length")


def test_layers_behind_the_pooling_are_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """embeddinggemma has two."""
    folder = tmp_path / "sentence"
    fields = {**DECODER, "head_dim": 12, "use_bidirectional_attention": True}
    modules = [Transformer(str(checkpoint("Gemma3TextModel", **fields))), Pooling(48), Dense(48, 20), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    refused(folder, "Dense.*not supported")
