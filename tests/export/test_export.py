"""Graphs made by `embedserve export`, against the models they were made from. Needs the [export] extra."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3Model,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from embedserve.models import export as exporting
from embedserve.models import registry
from embedserve.models.batch import PackedBatch, PackedRows
from embedserve.models.catalog import locate
from embedserve.models.config import ModelConfig, read_config
from embedserve.models.errors import CheckpointError, ExportError
from embedserve.models.export import RECORD, Exported, export
from embedserve.models.manifest import Manifest, differences, sum_of
from embedserve.models.onnx import OnnxBackend
from embedserve.server.runner import Runner

pytest.importorskip("optimum.exporters.onnx", reason="run with `make test-export`, in the environment of [export]")

CPU = torch.device("cpu")
LENGTHS = [3, 40, 1, 17, 17]

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertModel(
        BertConfig(
            vocab_size=101,
            hidden_size=96,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=200,
            max_position_embeddings=60,
        ),
        add_pooling_layer=False,
    ),
    "xlm_roberta": lambda: XLMRobertaModel(
        XLMRobertaConfig(
            vocab_size=101,
            hidden_size=96,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=200,
            max_position_embeddings=62,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
        ),
        add_pooling_layer=False,
    ),
    "qwen3": lambda: Qwen3Model(
        Qwen3Config(
            vocab_size=101,
            hidden_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=200,
            max_position_embeddings=60,
        )
    ),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., ModelConfig]:
    """Writes a tiny random model of a family, with changes to its config.json, and returns its configuration."""

    def write(family: str, **changes: Any) -> ModelConfig:
        folder = tmp_path / family
        torch.manual_seed(7)
        model = FAMILIES[family]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
        if changes:
            file = folder / "config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        return read_config(folder)

    return write


def difference_from_source(config: ModelConfig, dtype: torch.dtype = torch.float32) -> float:
    """The largest, of a token's states relative to their norm, on texts that the export did not see."""
    ids = np.random.default_rng(9).integers(2, config.vocab_size, sum(LENGTHS), dtype=np.int32)
    batch = PackedBatch.on_cpu(PackedRows.pack(ids, np.array(LENGTHS, dtype=np.int32)))
    with torch.inference_mode():
        expected = registry.backend("native")(config, CPU, torch.float32).hidden_states(batch)
        found = OnnxBackend(config, CPU, dtype).hidden_states(batch).float()
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_gives_its_sources_vectors(checkpoint: Callable[..., ModelConfig], family: str) -> None:
    config = checkpoint(family)
    assert config.family == family
    made = export(config)
    assert made.file == config.folder / "onnx" / "model.onnx"
    assert made.smallest_cosine > 0.999999
    assert made.largest_difference < 1e-4
    assert difference_from_source(config) < 1e-4


@pytest.mark.parametrize("family", ["bert", "xlm_roberta"])
def test_fused_operators_change_nothing(checkpoint: Callable[..., ModelConfig], family: str) -> None:
    config = checkpoint(family)
    made = export(config, optimize=True)
    operators = {node.op_type for node in onnx.load(str(made.file)).graph.node}
    assert {"Attention", "SkipLayerNormalization"} <= operators
    assert difference_from_source(config) < 1e-4


@pytest.mark.parametrize(
    ("family", "optimize"),
    [("bert", False), ("bert", True), ("xlm_roberta", False), ("xlm_roberta", True), ("qwen3", False)],
)
def test_float16(checkpoint: Callable[..., ModelConfig], family: str, optimize: bool) -> None:
    config = checkpoint(family)
    made = export(config, half=True, optimize=optimize)
    assert made.file.name == "model_fp16.onnx"
    assert made.smallest_cosine > 0.9999
    assert OnnxBackend(config, CPU, torch.float16).dtype == torch.float16
    assert difference_from_source(config, torch.float16) < 2e-2


def test_verify_knows_of_the_graph(checkpoint: Callable[..., ModelConfig]) -> None:
    folder = checkpoint("bert").folder
    files = {path.name: sum_of(path) for path in folder.iterdir()}
    Manifest("a/model", files).write(folder)
    export(read_config(folder))
    written = Manifest.read(folder)
    assert written is not None
    assert {"onnx/model.onnx", f"onnx/{RECORD}"} <= set(written.files)
    assert not differences(folder, written)


def test_the_runner_serves_what_was_exported(checkpoint: Callable[..., ModelConfig]) -> None:
    config = checkpoint("bert")
    export(config)
    ids = np.random.default_rng(9).integers(1, 101, sum(LENGTHS), dtype=np.int32)
    request = ids, np.array(LENGTHS, dtype=np.int32), np.full(len(LENGTHS), 96, dtype=np.int32)
    found, expected = (
        Runner.load(config.folder, device="cpu", backend=name, threads=1).run(*request).dense
        for name in ("onnx", "native")
    )
    assert np.abs(found - expected).max() < 1e-5


def test_minilm_with_its_real_weights(tmp_path: Path) -> None:
    made = export(read_config(locate("all-MiniLM-L6-v2", None)), output=tmp_path)
    assert made.file == tmp_path / "model.onnx"
    assert made.smallest_cosine > 0.999999
    assert made.largest_difference < 1e-4


# --- what is written --------------------------------------------------------------------------------------------------


def test_a_record_says_what_made_each_graph(checkpoint: Callable[..., ModelConfig]) -> None:
    config = checkpoint("bert")
    export(config)
    export(config, half=True, optimize=True)
    folder = config.folder / "onnx"
    assert sorted(file.name for file in folder.iterdir()) == [RECORD, "model.onnx", "model_fp16.onnx"]
    record = json.loads((folder / RECORD).read_text())
    assert record["model.onnx"]["options"] == {"fp16": False, "optimize": False}
    assert record["model_fp16.onnx"]["options"] == {"fp16": True, "optimize": True}
    assert record["model.onnx"]["versions"]["optimum-onnx"] == "0.1.0"
    assert list(record["model.onnx"]["source_sha256"]) == ["model.safetensors"]


def test_a_graph_of_other_make_is_not_overwritten_one_of_ours_is(checkpoint: Callable[..., ModelConfig]) -> None:
    config = checkpoint("bert")
    published = config.folder / "onnx" / "model.onnx"
    published.parent.mkdir()
    published.write_bytes(b"the authors' own")
    with pytest.raises(ExportError, match="was not made by `embedserve export`"):
        export(config)
    assert published.read_bytes() == b"the authors' own"
    published.unlink()
    export(config)
    export(config, optimize=True)
    assert difference_from_source(config) < 1e-4


def test_weights_too_large_for_a_graph_lie_beside_it(
    checkpoint: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = checkpoint("bert")
    monkeypatch.setattr(exporting, "_LARGEST_GRAPH_BYTES", 0)
    export(config, optimize=True)
    data = config.folder / "onnx" / "model.onnx_data"
    assert data.stat().st_size > 100_000
    assert difference_from_source(config) < 1e-4

    data.rename(data.with_name("elsewhere"))
    with pytest.raises(CheckpointError, match=r"onnx/model\.onnx: ONNX Runtime .* cannot load the graph"):
        OnnxBackend(config, CPU, torch.float32)

    data.with_name("elsewhere").rename(data)
    monkeypatch.undo()
    export(config)
    assert not data.exists()  # it belonged to the graph before


def test_a_graph_that_differs_from_its_source_is_thrown_away(
    checkpoint: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = checkpoint("bert")
    export(config)
    before = (config.folder / "onnx" / "model.onnx").read_bytes()
    make = exporting._make

    def with_other_weights(config: ModelConfig, file: Path, **options: bool) -> None:
        make(config, file, **options)
        model = onnx.load(str(file))
        table = next(one for one in model.graph.initializer if "word_embeddings" in one.name)
        values = onnx.numpy_helper.to_array(table)
        table.CopyFrom(onnx.numpy_helper.from_array(values[::-1].copy(), table.name))
        onnx.save_model(model, str(file))

    monkeypatch.setattr(exporting, "_make", with_other_weights)
    with pytest.raises(ExportError, match=r"expected a cosine of at least 0\.9999, so the graph was thrown away"):
        export(config)
    assert sorted(file.name for file in (config.folder / "onnx").iterdir()) == [RECORD, "model.onnx"]
    assert (config.folder / "onnx" / "model.onnx").read_bytes() == before


def test_not_a_number_is_not_like_its_source() -> None:
    with pytest.raises(ExportError, match="thrown away"):
        exporting._judge(Exported(Path("model.onnx"), float("nan"), float("nan")), 0.9999)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"position_embedding_type": "alibi", "feed_forward_type": "geglu"},
            "optimum has no exporter for jina_bert; copy the graph that its authors publish",
        ),
        ({"model_type": "nomic_bert"}, "field 'model_type' is 'nomic_bert', for which optimum has no exporter"),
        (
            {"model_type": "nomic_bert", "auto_map": {"AutoModel": "modeling.NomicBert"}},
            "field 'auto_map' asks for code of the checkpoint, which is never run",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused_with_the_way_out(
    checkpoint: Callable[..., ModelConfig], changes: dict[str, Any], message: str
) -> None:
    config = checkpoint("bert", **changes)
    with pytest.raises(ExportError, match=message) as caught:
        export(config)
    assert str(config.folder / "config.json") in str(caught.value)
    assert not (config.folder / "onnx").exists()


def test_fused_operators_are_for_bert_and_its_kin(checkpoint: Callable[..., ModelConfig]) -> None:
    with pytest.raises(ExportError, match="not 'qwen3'; leave --optimize out"):
        export(checkpoint("qwen3"), optimize=True)


def test_a_folder_that_cannot_be_written_is_named(checkpoint: Callable[..., ModelConfig], tmp_path: Path) -> None:
    occupied = tmp_path / "occupied"
    occupied.write_text("a file")
    with pytest.raises(ExportError, match=r"occupied: cannot be written .*--output"):
        export(checkpoint("bert"), output=occupied)


def test_a_source_that_cannot_be_read_is_not_exported(checkpoint: Callable[..., ModelConfig]) -> None:
    config = checkpoint("bert")
    weights = config.folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        export(config)
    assert not (config.folder / "onnx").exists()
