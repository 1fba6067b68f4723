"""What stands in the place of a file: said by name, never taken for a file that is not there."""

import os
from pathlib import Path

import pytest

from embedserve.models.config import read_config
from embedserve.models.errors import CheckpointError
from embedserve.models.files import present, read_file


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert present(tmp_path / "f")
    assert read_file(tmp_path / "f", 3) == b"abc"
    with pytest.raises(CheckpointError, match="larger"):
        read_file(tmp_path / "f", 2)


def test_what_is_missing_is_missing(tmp_path: Path) -> None:
    assert not present(tmp_path / "f")
    assert not present(tmp_path / "no folder" / "f")
    with pytest.raises(CheckpointError, match="the file is missing"):
        read_file(tmp_path / "f", 9)


@pytest.mark.parametrize("target", ["nowhere", "f"], ids=["dangling", "loop"])
def test_a_link_that_leads_nowhere_is_no_missing_file(tmp_path: Path, target: str) -> None:
    (tmp_path / "f").symlink_to(tmp_path / target)
    assert present(tmp_path / "f")
    with pytest.raises(CheckpointError, match=r"leads nowhere|cannot be read"):
        read_file(tmp_path / "f", 9)


def test_pipes_folders_and_devices_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="not a regular file"):
            read_file(path, 9)


@pytest.mark.parametrize(
    "name",
    ["modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "adapter_config.json"],
)
def test_settings_that_a_copy_lost_are_not_passed_over(tmp_path: Path, minilm: Path, name: str) -> None:
    """Snapshots of the hub's cache are links into another folder, which is easily left behind."""
    for file in minilm.iterdir():
        (tmp_path / file.name).symlink_to(file)
    read_config(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("../blobs/lost")
    with pytest.raises(CheckpointError, match=name):
        read_config(tmp_path)
