"""The command line as a user meets it: what it prints, and its exit status."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from embedserve.models import export
from embedserve.models.catalog import locate
from embedserve.models.config import ModelConfig
from embedserve.server.cli import COMMANDS, main
from tests.models.hub_stand_in import COMMIT, Hub, Repository

FILES = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"weights"}


@pytest.fixture
def stand_in() -> Iterator[Hub]:
    with Hub() as running:
        yield running


def embedserve(*arguments: object, status: int = 0, **environment: str) -> list[str]:
    """Run the command as a process; its lines of output."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("EMBEDSERVE_", "HF_"))}
    done = subprocess.run(
        [sys.executable, "-m", "embedserve.server.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**clean, **environment},
        timeout=60,
        check=False,
    )
    assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
    return done.stdout.splitlines()


def status(*arguments: object) -> object:
    """Run the command here; its exit status."""
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    return ended.value.code


def test_from_the_hub_through_one_file_into_a_closed_network(stand_in: Hub, tmp_path: Path) -> None:
    stand_in.repositories["acme/mini"] = Repository(FILES)
    models, bundle, closed = tmp_path / "models", tmp_path / "models.tar", tmp_path / "closed"

    lines = embedserve("pull", "acme/mini", "--to", models, HF_ENDPOINT=stand_in.url)
    assert lines[0] == f"acme/mini at {COMMIT}, from {stand_in.url}"
    assert lines[-1] == f"serve it with: embedserve serve --models-dir {models} --model acme/mini"

    lines = embedserve("pack", models, "-o", bundle)
    assert lines == [f"acme/mini  3 files, 11 B, revision {COMMIT}", f"{bundle}  10.2 kB"]
    assert embedserve("verify", bundle) == ["acme/mini: OK"]

    embedserve("unpack", bundle, EMBEDSERVE_MODELS_DIR=str(closed))
    assert locate("acme/mini", closed) == closed / "acme" / "mini"
    (closed / "acme" / "mini" / "model.safetensors").write_bytes(b"weighta")
    [line] = embedserve("verify", closed, status=1)
    assert line.startswith("acme/mini: changed     model.safetensors: SHA-256 ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pull", "acme/nothing", "--to", "weights"], "has no such model"),
        (["pull", "nothing", "--to", "weights"], "not in the catalogue"),
        (["pull", "acme/mini"], "expected a models directory to write to: --to DIR, or EMBEDSERVE_MODELS_DIR"),
        (["unpack", "weights.tar"], "expected a models directory to write to: --to DIR, or EMBEDSERVE_MODELS_DIR"),
        (["pack", "nowhere", "-o", "bundle.tar"], "nowhere: no such folder"),
        (["pack", "nowhere"], "the following arguments are required: -o/--output"),
        (["verify", "nowhere"], "nowhere: no such folder or bundle"),
        (["unpack", "nowhere.tar", "--to", "weights"], "nowhere.tar: not a bundle"),
        (["convert", "nowhere"], "nowhere: no such folder"),
        (["nothing"], "invalid choice: 'nothing'"),
        ([], "the following arguments are required: COMMAND"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_line_and_status_2(
    stand_in: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", stand_in.url)
    monkeypatch.chdir(tmp_path)
    assert status(*arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("embedserve: ")
    assert words in line
    assert not list(tmp_path.iterdir())


def test_the_models_directory_of_the_settings_is_written_to(stand_in: Hub, tmp_path: Path) -> None:
    stand_in.repositories["acme/mini"] = Repository(FILES)
    (tmp_path / "embedserve.toml").write_text('models_dir = "~/from-file"')
    home = {"HOME": str(tmp_path), "HF_ENDPOINT": stand_in.url}
    embedserve("pull", "acme/mini", EMBEDSERVE_MODELS_DIR="~/from-environment", **home)
    embedserve("pull", "acme/mini", "--config", tmp_path / "embedserve.toml", **home)
    embedserve("pull", "acme/mini", "--to=~/from-flag", EMBEDSERVE_MODELS_DIR="~/other", **home)
    assert sorted(path.parents[2].name for path in tmp_path.glob("*/acme/mini/config.json")) == [
        "from-environment",
        "from-file",
        "from-flag",
    ]


@pytest.mark.parametrize("command", [["pull", "acme/mini"], ["unpack", "weights.tar"]])
def test_a_python_package_is_no_models_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    (tmp_path / "__init__.py").touch()
    assert status(*command, "--to", tmp_path) == 2
    assert f"{tmp_path} is a Python package, it has __init__.py" in capsys.readouterr().err


@pytest.mark.parametrize("named", ["{folder}", "own={folder}", "all-minilm-l6-v2"])
def test_export_takes_a_model_as_serve_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    taken: list[ModelConfig] = []

    def exported(config: ModelConfig, **_: object) -> str:
        taken.append(config)
        return "exported"

    monkeypatch.setattr(export, "export", exported)
    folder = locate("all-MiniLM-L6-v2", None)
    assert status("export", named.format(folder=folder), "--to", "onnx", "-o", tmp_path) == 0
    assert [config.folder for config in taken] == [folder]
    assert capsys.readouterr().out == "exported\n"


def test_convert_says_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": torch.ones(2, 2)}, tmp_path / "pytorch_model.bin")
    assert status("convert", tmp_path, "--remove") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert status("convert", tmp_path) == 0
    assert capsys.readouterr().out.splitlines() == [
        "pytorch_model.bin → model.safetensors",
        f"nothing to do: {tmp_path} holds no pickle without safetensors beside it",
    ]


def test_help_lists_every_command_and_each_has_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("--help") == 0
    listed = capsys.readouterr().out
    for word, command in COMMANDS.items():
        assert f"\n    {word} " in listed
        assert status(word, "--help") == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert shown.startswith(f"usage: embedserve {word} ")
        assert command.help[1:] in shown


def test_a_server_s_command_line_brings_no_heavy_library_in() -> None:
    code = (
        "import sys, embedserve.server.cli; "
        "print({'torch', 'transformers', 'huggingface_hub', 'onnxruntime'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"
