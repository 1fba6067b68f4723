"""`embedserve export` where its tools are missing; what it makes is tested in tests/export, in its environment."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from embedserve.models.config import read_config
from embedserve.models.errors import ExportError
from embedserve.models.export import export


def test_missing_tools_come_with_the_command(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optimum", None)
    folder = checkpoint()
    with pytest.raises(ExportError, match=r'In a checkout of embedserve: .*export/bin/pip install "\.\[export\]"'):
        export(read_config(folder))
    assert not (folder / "onnx").exists()
