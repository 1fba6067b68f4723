"""Loading a model takes little more memory than its weights."""

from dataclasses import replace
from pathlib import Path

from embedserve.benchmarks import shapes
from embedserve.benchmarks.loading import measure


def test_loading_takes_at_most_a_fifth_more_than_the_weights(tmp_path: Path) -> None:
    # A third of bge-base, stored in half precision: tensors are converted, stacked, and brought into oneDNN's layout.
    base = shapes.SHAPES["bge-base"]
    smaller = replace(base, config=base.config | {"num_hidden_layers": 4, "vocab_size": 10_000})
    shapes.write(tmp_path, smaller, stored="float16")
    report = measure(tmp_path, "cpu", "float32")
    assert report["weights"] > 140e6
    # In memory of its own: a file that is overwritten later changes nothing.
    assert report["kept_own"] >= 0.95 * report["weights"]
    assert report["peak"] <= 1.2 * report["weights"]
