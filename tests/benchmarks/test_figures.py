"""The figures in the documents are those of the results."""

import pytest

from embedserve.benchmarks.figures import PROJECT, SECTIONS, replaced


@pytest.mark.parametrize("file", SECTIONS)
def test_the_document_has_the_figures_of_the_newest_run(file: str) -> None:
    text = (PROJECT / file).read_text(encoding="utf-8")
    assert replaced(text, SECTIONS[file]()) == text, "python -m embedserve.benchmarks.figures --write"
