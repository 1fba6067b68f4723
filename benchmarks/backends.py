"""Which backend and dtype is the fastest on this CPU, for which texts, and how near to float32?

Each side is a Runner in this process, on the same threads; they take turns, and a machine that slows down slows all.
The first is native in float32; a ratio is to its turn in the same round. The cosine is the lowest of any text's to it.
No tokenizer inside the clock. A side that this machine or model has not is left out, with its reason on stderr.

    python -m embedserve.benchmarks.backends --model ./folder-with-onnx
    python -m embedserve.benchmarks.backends --sides native:float32 native:int8

The backend onnx needs a graph in the model's folder. `make bench-backends` makes one first: `embedserve export`, in an
environment of its own, on a copy of the model in build/, which it gives as the folder.

Ends in one JSON line a kind of text, appended to benchmarks/results/backends.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from embedserve.benchmarks import jsonl, machine
from embedserve.benchmarks.texts import texts_of, vocabulary
from embedserve.models.catalog import configure, locate
from embedserve.models.errors import ModelError
from embedserve.server import threads
from embedserve.server.tokenizer import Tokenizer, Truncate

threads.set_patience()  # before torch is loaded
from embedserve.server.runner import Runner  # noqa: E402

RESULTS = jsonl.FOLDER / "backends.jsonl"
SIDES = ["native:float32", "native:bfloat16", "native:int8", "transformers:float32", "onnx:float32"]
COUNTS = {"short": 192, "mixed": 48, "long": 24, "one": 1}
"""Texts a round."""
# Tokens of a batch; where rows are padded, of texts of like length, as the batcher puts them together.
BATCH = 512


def batches(runner: Runner, lengths: npt.NDArray[np.int32]) -> list[npt.NDArray[np.int64]]:
    """The texts of each batch, by their indexes."""
    padded = runner.info.cost == "padded"
    order = np.argsort(lengths, kind="stable") if padded else np.arange(len(lengths))
    found: list[list[int]] = [[]]
    for text in order:
        longest = max((int(lengths[other]) for other in [*found[-1], text]), default=0)
        cost = longest * (len(found[-1]) + 1) if padded else int(lengths[found[-1]].sum() + lengths[text])
        if found[-1] and cost > BATCH:
            found.append([])
        found[-1].append(int(text))
    return [np.array(batch) for batch in found]


def embed(runner: Runner, texts: list[npt.NDArray[np.int32]]) -> tuple[npt.NDArray[np.float32], float]:
    """The vectors, [texts, hidden], and the seconds that all batches took."""
    lengths = np.array([len(text) for text in texts], np.int32)
    vectors = np.empty((len(texts), runner.info.dimension), np.float32)
    seconds = 0.0
    for batch in batches(runner, lengths):
        ids = np.concatenate([texts[index] for index in batch])
        dimensions = np.full(len(batch), runner.info.dimension, np.int32)
        started = time.perf_counter()
        vectors[batch] = runner.run(ids, lengths[batch], dimensions).dense
        seconds += time.perf_counter() - started
    return vectors, seconds


def main() -> None:
    """Run the comparison and write its lines."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="all-MiniLM-L6-v2", help="a name of the catalogue, or a folder")
    parser.add_argument("--models-dir", type=Path, default=None, help="where the models' folders lie")
    parser.add_argument("--sides", nargs="+", default=SIDES, metavar="BACKEND:DTYPE", help="the first is compared with")
    parser.add_argument("--threads", type=int, default=None, help="of the CPU; all that there are if not given")
    parser.add_argument("--kinds", nargs="+", choices=COUNTS, default=list(COUNTS), help="of texts")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side")
    parser.add_argument("--output", default=str(RESULTS), help="file that the lines are appended to, - for none")
    options = parser.parse_args()

    given = Path(options.model)
    folder = given if given.is_dir() else locate(options.model, options.models_dir)
    config = configure(folder, options.model)
    tokenizer = Tokenizer.load(
        folder / "tokenizer.json",
        max_tokens=config.max_tokens,
        lower_case=config.do_lower_case,
        bert_normalizer=config.bert_normalizer,
    )
    runners: dict[str, Runner] = {}
    for side in options.sides:
        backend, _, dtype = side.partition(":")
        try:
            runners[side] = Runner.load(
                folder, config=config, device="cpu", dtype=dtype, backend=backend, threads=options.threads
            )
        except ModelError as error:
            print(f"{side} is left out: {error}", file=sys.stderr)
            if backend == "onnx":
                print("In a checkout, `make bench-backends` makes the graph of the demo model first.", file=sys.stderr)
    if not runners:
        sys.exit("no side can run")
    first = next(iter(runners))

    for kind in options.kinds:
        encoded = tokenizer.encode(texts_of(kind, COUNTS[kind], vocabulary(folder)), Truncate.END, max_total=1 << 30)
        texts = np.split(np.asarray(encoded.ids, np.int32), np.cumsum(encoded.lengths)[:-1])
        # A latency needs many short calls, a rate few long ones.
        repeats = 20 if kind == "one" else 1
        exact, _ = embed(runners[first], texts)
        cosines = {side: float((embed(runner, texts)[0] * exact).sum(axis=1).min()) for side, runner in runners.items()}
        seconds: dict[str, list[float]] = {side: [] for side in runners}
        others = machine.Others()
        for _ in range(options.rounds):
            for side, runner in runners.items():
                seconds[side].append(statistics.median(embed(runner, texts)[1] for _ in range(repeats)))
        tokens = sum(map(len, texts))
        rates = {side: jsonl.spread([tokens / one for one in taken], 0) for side, taken in seconds.items()}
        # Of each round by itself: its turns are next to each other in time.
        ratios = {
            side: jsonl.spread([ours / one for ours, one in zip(seconds[first], taken, strict=True)], 2)
            for side, taken in seconds.items()
        }
        line = {
            "benchmark": "backends",
            "model": Path(options.model).name,
            "texts": kind,
            "count": len(texts),
            "tokens": tokens,
            "rounds": options.rounds,
            "threads": runners[first].info.threads,
            "milliseconds": {side: jsonl.spread([1e3 * one for one in taken], 2) for side, taken in seconds.items()},
            "tokens_per_second": rates,
            "compared_with": first,
            "times_its_rate": ratios,
            "lowest_cosine": {side: round(cosine, 5) for side, cosine in cosines.items()},
            "cores_used_by_others": others.cores(),
            "machine": machine.describe(),
        }
        print(json.dumps(line), flush=True)
        jsonl.append(line, options.output)


if __name__ == "__main__":
    main()
