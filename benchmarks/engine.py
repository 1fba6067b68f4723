"""How many tokens a second does the engine embed in process, and how many does sentence-transformers, at its best?

Both take the same texts and tokenise them inside the clock. They run in turns, A B A B, in one process and on the same
threads; sentence-transformers sorts by length itself and runs at each of several batch sizes, of which the best counts.
Tokens are counted with the special ones and without padding. Each figure is the median of the rounds, with the lowest
and highest. Then one text of 16 tokens at a time: the latency of an idle engine.

    python -m embedserve.benchmarks.engine
    python -m embedserve.benchmarks.engine --rounds 9 --kinds short --output -

Ends in one JSON line a kind of text, appended to benchmarks/results/engine.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from embedserve.benchmarks import jsonl, machine
from embedserve.benchmarks.texts import texts_of, vocabulary
from embedserve.models.catalog import configure, locate
from embedserve.server import threads
from embedserve.server.tokenizer import Tokenizer, Truncate

threads.set_patience()  # before torch is loaded
import torch  # noqa: E402

from embedserve.server.runner import Runner  # noqa: E402

RESULTS = jsonl.FOLDER / "engine.jsonl"
COUNTS = {"short": 384, "mixed": 96, "long": 48}
"""Texts a round."""


def embed_all(runner: Runner, tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Tokenise, cut into batches within the runner's bound in the order of arrival, run."""
    encoded = tokenizer.encode(texts, Truncate.END, max_total=1 << 30)
    lengths, ids = np.asarray(encoded.lengths, dtype=np.int32), np.asarray(encoded.ids, dtype=np.int32)
    dimensions = np.full(len(lengths), runner.info.dimension, dtype=np.int32)
    ends = np.cumsum(lengths)
    bound = runner.info.max_batch_tokens
    vectors = []
    row = 0
    while row < len(lengths):
        start = int(ends[row - 1]) if row else 0
        last = max(row + 1, int(np.searchsorted(ends, start + bound, side="right")))
        found = runner.run(ids[start : ends[last - 1]], lengths[row:last], dimensions[row:last]).dense
        vectors.append(found)
        row = last
    return np.concatenate(vectors)


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    """Run the comparison and write its lines."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="all-MiniLM-L6-v2", help="a name of the catalogue, or a folder")
    parser.add_argument("--models-dir", type=Path, default=None, help="where the models' folders lie")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", help="of the engine; the reference has the same")
    parser.add_argument("--threads", type=int, default=None, help="of the CPU; all that there are if not given")
    parser.add_argument("--kinds", nargs="+", choices=[*COUNTS, "one"], default=[*COUNTS, "one"], help="of texts")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--scale", type=float, default=1.0, help="times the number of texts a round")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32, 128], help="of sentence-transformers")
    parser.add_argument("--output", default=str(RESULTS), help="file that the lines are appended to, - for none")
    options = parser.parse_args()

    from sentence_transformers import SentenceTransformer

    given = Path(options.model)
    folder = given if given.is_dir() else locate(options.model, options.models_dir)
    config = configure(folder, options.model)
    tokenizer = Tokenizer.load(
        folder / "tokenizer.json",
        max_tokens=config.max_tokens,
        lower_case=config.do_lower_case,
        bert_normalizer=config.bert_normalizer,
    )
    # Off by our tokenizer, which brings its own threads; sentence-transformers is faster with it.
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    # Both on this thread and its OpenMP workers, which therefore are not pinned, as the engine process pins its own:
    # with workers of two threads in one process, libgomp would let all of them wait less patiently.
    runner = Runner.load(
        folder, config=config, device=options.device, dtype=options.dtype, threads=options.threads, progress=print
    )
    runner.warm_up(print)
    dtype = getattr(torch, runner.info.dtype)
    reference = SentenceTransformer(str(folder), device=options.device, model_kwargs={"dtype": dtype})
    words = vocabulary(folder)

    for kind in options.kinds:
        texts = ["the quick brown fox jumps over a lazy dog near the old river bank"]
        if kind != "one":
            texts = texts_of(kind, max(1, round(COUNTS[kind] * options.scale)), words)
        tokens = int(np.asarray(tokenizer.encode(texts, Truncate.END, max_total=1 << 30).lengths).sum())
        # Latency needs many short calls, a rate few long ones.
        repeats = 30 if kind == "one" else 1
        sides: dict[str, Callable[[], object]] = {"engine": partial(embed_all, runner, tokenizer, texts)}
        for size in [1] if kind == "one" else options.batch_sizes:
            sides[f"sentence-transformers, {size} a batch"] = partial(
                reference.encode, texts, batch_size=size, show_progress_bar=False
            )
        difference = float(np.abs(np.asarray(sides["engine"]()) - reference.encode(texts)).max())
        for run in sides.values():
            run()
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        others = machine.Others()
        for _ in range(options.rounds):
            for name, run in sides.items():
                seconds[name].append(statistics.median(timed(run) for _ in range(repeats)))
        cores_used_by_others = others.cores()
        best = min((name for name in sides if name != "engine"), key=lambda name: statistics.median(seconds[name]))
        # Each round is a pair taken next to each other in time, so its ratio does not see a machine that slows down.
        ratios = [theirs / ours for ours, theirs in zip(seconds["engine"], seconds[best], strict=True)]
        line = {
            "benchmark": "engine",
            "model": Path(options.model).name,
            "texts": kind,
            "count": len(texts),
            "tokens": tokens,
            "rounds": options.rounds,
            "engine_times_reference": jsonl.spread(ratios, 2),
            "best_reference": best,
            "largest_difference": difference,
            # What else ran on the machine, in cores: above a few hundredths the absolute figures are too low.
            "cores_used_by_others": cores_used_by_others,
        }
        if kind == "one":
            line["milliseconds"] = {name: jsonl.spread([s * 1e3 for s in taken], 2) for name, taken in seconds.items()}
        else:
            line["tokens_per_second"] = {
                name: jsonl.spread([tokens / s for s in taken], 0) for name, taken in seconds.items()
            }
        line["machine"] = machine.accelerator(options.device) | {
            name: getattr(runner.info, name) for name in ("threads", "dtype", "max_batch_tokens")
        }
        print(json.dumps(line))
        jsonl.append(line, options.output)


if __name__ == "__main__":
    main()
