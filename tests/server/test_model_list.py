"""`embedserve models`: what is known of each model, and whether its files are here."""

import json
from pathlib import Path
from typing import Any

import pytest

from embedserve.models.catalog import CATALOG
from embedserve.server.cli import main


def models(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["models", *arguments])
    assert ended.value.code == 0
    return capsys.readouterr().out


def cells(table: str, name: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"{name} ")]
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


@pytest.fixture
def models_dir(tmp_path: Path) -> Path:
    (tmp_path / "BAAI" / "bge-m3").mkdir(parents=True)
    (tmp_path / "BAAI" / "bge-m3" / "config.json").write_text("{}")
    return tmp_path


def test_the_table_has_a_line_for_each_model(capsys: pytest.CaptureFixture[str], models_dir: Path) -> None:
    table = models(capsys, "--models-dir", str(models_dir))
    assert [line.split()[0] for line in table.splitlines()[1 : len(CATALOG) + 1]] == [entry.id for entry in CATALOG]
    assert cells(table, "BAAI/bge-m3") == [
        "BAAI/bge-m3", "1024", "8192", "multilingual", "text", "dense, sparse, colbert", "-", "MIT",
        "native, onnx, transformers", str(models_dir / "BAAI" / "bge-m3"),
    ]  # fmt: skip
    assert cells(table, "Qwen/Qwen3-Embedding-0.6B") == [
        "Qwen/Qwen3-Embedding-0.6B", "32-1024", "32768", "multilingual", "text", "dense", "query, instruction",
        "Apache-2.0", "native, onnx, transformers", "not here",
    ]  # fmt: skip
    assert cells(table, "jinaai/jina-clip-v1")[4] == "text, image"


def test_what_is_unverified_is_said_below(capsys: pytest.CaptureFixture[str]) -> None:
    words = " ".join(models(capsys).split())
    assert "jinaai/jina-embeddings-v2-base-es: unverified: the order of operations" in words


def test_json_has_all_fields(capsys: pytest.CaptureFixture[str], models_dir: Path) -> None:
    listed: list[dict[str, Any]] = json.loads(models(capsys, "--json", "--models-dir", str(models_dir)))
    assert [model["id"] for model in listed] == [entry.id for entry in CATALOG]
    by_id = {model["id"]: model for model in listed}
    bce = by_id["netease-youdao/bce-embedding-base_v1"]
    assert bce["repository"] == "maidalun1020/bce-embedding-base_v1"
    assert bce["aliases"] == ["bce-embedding-base_v1", "maidalun1020/bce-embedding-base_v1"]
    assert (bce["matryoshka"], bce["folder"], bce["parameters"]) == (None, None, 278_043_648)
    qwen = by_id["Qwen/Qwen3-Embedding-4B"]
    assert qwen["matryoshka"] == {"minimum": 32, "maximum": 2560, "listed": None}
    assert qwen["instruction"] == "Instruct: {instruction}\nQuery:"
    assert by_id["BAAI/bge-m3"]["folder"] == str(models_dir / "BAAI" / "bge-m3")


def test_a_models_directory_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["models", "--models-dir", str(tmp_path / "none")])
    assert ended.value.code == 2
    assert "--models-dir: there is no folder" in capsys.readouterr().err
