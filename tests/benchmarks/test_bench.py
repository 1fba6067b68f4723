"""The options of `embedserve bench`, and the file that it writes: what is wrong is said before anything is measured."""

import argparse
from pathlib import Path

import pytest

from embedserve.benchmarks import bench, jsonl
from embedserve.server.config import ConfigError

URL = "http://127.0.0.1:9/v1"


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_options(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["http", URL, "--clients", "1.5"], "expected a whole number above 0, not '1.5'"),
        (["http", URL, "--texts", "0"], "expected a whole number above 0, not '0'"),
        (["http", URL, "--seconds", "inf"], "expected a number above 0, not 'inf'"),
        (["engine", "--seconds", "soon"], "expected a number above 0, not 'soon'"),
        (["engine", "--batches", "many"], "expected a whole number above 0, not 'many', nor full"),
    ],
)
def test_numbers_that_are_none_are_refused(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(*arguments)
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("tool", [["http", URL], ["engine"]])
def test_file_that_cannot_be_written_is_said_first(tool: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--output: cannot write .*Is a directory"):
        bench.run(parse(*tool, "-o", str(tmp_path)))


def test_full_disk_is_said() -> None:
    with pytest.raises(ConfigError, match="/dev/full: No space left"):
        jsonl.append({}, "/dev/full")


def test_model_beside_a_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match="not both"):
        bench.run(parse("engine", "--shape", "minilm", "--model", "bge-m3", "-o", "-"))


def test_page_needs_another_name_than_its_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ending"):
        bench.run(parse("report", "-o", str(tmp_path / "page")))
