"""`embedserve models`: what is known of each model, whether its files are here, and what else is."""

import errno
import json
import os
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


def write_model(folder: Path, **changes: object) -> None:
    config = {
        "model_type": "bert", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1,
        "intermediate_size": 16, "max_position_embeddings": 64, "vocab_size": 50, "type_vocab_size": 2,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


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


@pytest.fixture
def others(models_dir: Path) -> Path:
    """Three models beside those of the catalogue: one by its name, one broken, one in the hub's cache."""
    write_model(models_dir / "own")
    write_model(models_dir / "acme" / "broken", hidden_size="many")
    write_model(models_dir / "models--acme--cached" / "snapshots" / ("a" * 40), model_type="modernbert")
    write_model(models_dir / ".acme.pull")
    (models_dir / "empty" / "folder").mkdir(parents=True)
    return models_dir


def test_models_outside_the_catalogue_stand_below_it(capsys: pytest.CaptureFixture[str], others: Path) -> None:
    table = models(capsys, "--models-dir", str(others))
    rows = table.splitlines()[len(CATALOG) + 1 :]
    assert rows[:2] == ["", "Not in the catalogue:"]
    assert [row.split()[0] for row in rows[2 : rows.index("", 2)]] == ["acme/broken", "acme/cached", "own"]
    assert cells(table, "own") == [
        "own", "8", "64", "-", "text", "dense", "-", "-", "native, onnx, transformers", str(others / "own"),
    ]  # fmt: skip
    assert cells(table, "acme/cached")[-2] == "transformers, onnx"
    assert cells(table, "acme/broken")[1:-1] == ["-"] * 8
    assert f"acme/broken: cannot be served: {others / 'acme' / 'broken' / 'config.json'}: field 'hidden_size'" in (
        " ".join(table.split())
    )


def test_json_says_of_a_folder_what_its_files_say(capsys: pytest.CaptureFixture[str], others: Path) -> None:
    listed = json.loads(models(capsys, "--json", "--models-dir", str(others)))
    assert len({tuple(model) for model in listed}) == 1
    assert [model["in_catalogue"] for model in listed] == [True] * len(CATALOG) + [False] * 3
    broken, _, own = listed[-3:]
    assert (own["dimensions"], own["max_tokens"], own["family"], own["fault"]) == (8, 64, "bert", None)
    assert (broken["dimensions"], broken["folder"]) == (None, str(others / "acme" / "broken"))
    assert "field 'hidden_size'" in broken["fault"]


def test_files_of_a_known_model_that_cannot_be_served_are_told(
    capsys: pytest.CaptureFixture[str], models_dir: Path
) -> None:
    listed = json.loads(models(capsys, "--json", "--models-dir", str(models_dir)))
    [m3] = [model for model in listed if model["id"] == "BAAI/bge-m3"]
    assert m3["folder"] == str(models_dir / "BAAI" / "bge-m3")
    assert "config.json: field 'model_type'" in m3["fault"]


def test_a_folder_that_cannot_be_read_does_not_hide_the_others(
    capsys: pytest.CaptureFixture[str], others: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = Path.lstat

    def denied(path: Path) -> os.stat_result:  # what a folder of mode 000 does to all but root
        if path.parent in (others / "own", others / "BAAI" / "bge-m3"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr(Path, "lstat", denied)
    table = models(capsys, "--models-dir", str(others))
    assert cells(table, "BAAI/bge-m3")[-1] == "cannot be read"
    words = " ".join(table.split())
    assert f"BAAI/bge-m3: cannot be served: {others / 'BAAI' / 'bge-m3' / 'modules.json'}: cannot be looked at" in words
    assert f"own: cannot be served: {others / 'own' / 'config.json'}: cannot be looked at" in words
    assert cells(table, "acme/cached")[1] == "8"


def test_a_directory_that_cannot_be_read_is_an_error(
    capsys: pytest.CaptureFixture[str], models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(SystemExit) as ended:
        main(["models", "--models-dir", str(models_dir)])
    assert ended.value.code == 2
    assert f"--models-dir: {models_dir} cannot be read (Permission denied)" in capsys.readouterr().err


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
