"""The figures in the documents are those of the results."""

from pathlib import Path

import pytest

from embedserve.benchmarks import jsonl
from embedserve.benchmarks.figures import PROJECT, SECTIONS, replaced, shares


@pytest.mark.parametrize("file", SECTIONS)
def test_the_document_has_the_figures_of_the_newest_run(file: str) -> None:
    text = (PROJECT / file).read_text(encoding="utf-8")
    assert replaced(text, SECTIONS[file]()) == text, "python -m embedserve.benchmarks.figures --write"


def test_of_several_batches_the_fastest_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "FOLDER", tmp_path)
    assert shares() == []
    common = {"benchmark": "sweep", "model": "bge-base", "machine": {"device": "a GPU", "dtype": "float16"}}
    for length, rate, share in ((16, 100.0, 0.1), (16, 300.0, 0.3), (16, 200.0, 0.2), (0, 250.0, 0.25)):
        line = {"length": length, "tokens_per_second": rate, "share_of_matrix_rate": share}
        jsonl.append({**common, **line}, tmp_path / "gpu.jsonl")
    assert shares()[-1] == "| bge-base, float16, a GPU | 300, 30% | 250, 25% |"
