"""The page of `embedserve bench report`: whole, and asking nobody for anything."""

import argparse
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from embedserve.benchmarks import bench
from embedserve.benchmarks.report import page
from embedserve.server.config import ConfigError

MACHINE = {
    "cpu": "a CPU <of> two cores",
    "device": "cpu",
    "dtype": "float32",
    "backend": "native",
    "date": "2026-11-21",
}


def spread(median: float) -> dict[str, float]:
    return {"median": median, "lowest": 0.9 * median, "highest": 1.1 * median}


def sweep(length: int, texts: int, rate: float) -> dict[str, Any]:
    return {
        "benchmark": "sweep",
        "model": "minilm",
        "weights": "random",
        "length": length,
        "texts": texts,
        "tokens_per_second": rate,
        "texts_per_second": rate / (length or 64),
        "p50_ms": 5.0,
        "p99_ms": 9.0,
        "share_of_matrix_rate": 0.5,
        "matrix_tflops": 0.1,
        "device_ms": None,
        "machine": MACHINE,
    }


def http(clients: int) -> dict[str, Any]:
    figures = ("texts_per_second", "tokens_per_second", "p50_ms", "p90_ms", "p99_ms")
    party = {**{name: spread(10.0 * (clients or 1)) for name in figures}, "errors": {"503": 2}, "rate": 7.0}
    return {
        "benchmark": "http",
        "scenario": f"short, {clients} clients",
        "words": [4, 16],
        "texts_a_request": 1,
        "clients": clients,
        "parties": {"ours": party, "theirs": party},
        "times_better": {"ours / theirs": spread(2.0)} if clients else {},
        "out": {"gone <away>": "ConnectionRefusedError"},
        "client_limit": {"texts_per_second": 9000},
        "machine": MACHINE,
    }


ENGINE = {
    "benchmark": "engine",
    "model": "minilm",
    "texts": "short",
    "best_reference": "sentence-transformers, 8 a batch",
    "tokens_per_second": {"engine": spread(200), "sentence-transformers, 8 a batch": spread(100)},
    "engine_times_reference": spread(2.0),
    "machine": MACHINE,
}
LINES = [
    sweep(16, 1, 100),
    sweep(16, 1, 4321),
    sweep(128, 8, 900),
    sweep(0, 64, 800),
    http(1),
    http(8),
    http(0),
    ENGINE,
]


class Checker(HTMLParser):
    """Tags that are opened are closed, and nothing is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action"):
                assert (value or "").startswith("#"), f"<{tag} {name}={value}>"
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_loads_nothing() -> None:
    pytest.importorskip("matplotlib")
    written, plots = page(LINES)
    checker = Checker()
    checker.feed(written)
    assert checker.open == []
    assert not {"script", "link", "img", "iframe"} & set(checker.tags)
    assert not re.search(r"@import|url\((?!#)", written)
    assert checker.tags.count("svg") == len(plots) == 3
    assert all(data.startswith(b"\x89PNG") for data in plots.values())


def test_last_line_of_a_cell_counts_and_names_are_escaped() -> None:
    pytest.importorskip("matplotlib")
    written, _ = page(LINES)
    assert "4,321" in written
    assert "<td>100</td>" not in written
    assert "a CPU &lt;of&gt; two cores" in written
    assert "gone &lt;away&gt; could not be measured" in written


def test_same_lines_make_the_same_page() -> None:
    pytest.importorskip("matplotlib")
    assert page(LINES) == page(LINES)


def report(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    bench.add_options(parser)
    return bench.run(parser.parse_args(["report", *arguments]))


def test_command_writes_the_page_and_the_plots_beside_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    assert report(str(results), "-o", str(tmp_path / "page.html")) == 0
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert len(list((tmp_path / "page").glob("*.png"))) == 3


@pytest.mark.parametrize("text", ['{"benchmark"', "[]", '{"benchmark": "sweep"}', '{"benchmark": "other"}', ""])
def test_files_that_are_no_results_are_named(text: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "bad").write_text(text)
    with pytest.raises(ConfigError):
        report(str(tmp_path / "bad"), "-o", str(tmp_path / "page.html"))
    assert not (tmp_path / "page.html").exists()


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="pip install"):
        page(LINES)
