"""How many tokens a second does the engine embed in process, and how many does sentence-transformers, at its best?

Both take the same texts and tokenise them inside the clock. They run in turns, A B A B, in one process and on the same
threads; sentence-transformers sorts by length itself and runs at each of several batch sizes, of which the best counts.
Tokens are counted with the special ones and without padding. Each figure is the median of the rounds, with the lowest
and highest. Then one text of 16 tokens at a time: the latency of an idle engine.

    python -m benchmarks.engine
    python -m benchmarks.engine --rounds 9 --kinds short --output -

Ends in one JSON line a kind of text, appended to benchmarks/results/engine.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.texts import texts_of, vocabulary
from embedserve.models.catalog import configure, locate
from embedserve.server import threads
from embedserve.server.tokenizer import Tokenizer, Truncate

threads.set_patience()  # before torch is loaded
import torch  # noqa: E402

from embedserve.server.runner import Runner  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "engine.jsonl"
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


def spread(values: list[float], digits: int) -> dict[str, float]:
    """Median, lowest and highest."""
    named = {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
    return {name: round(value, digits) for name, value in named.items()}


def busy_cores() -> tuple[float, float, float]:
    """(now, core-seconds that all processes have worked, core-seconds that this one has); the second only on Linux."""
    own = os.times()
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text(encoding="ascii").split("\n")[0].split()[1:]]
    except OSError:
        fields = [0] * 8
    user, nice, system, _, _, interrupts, soft, steal = fields[:8]
    everyone = (user + nice + system + interrupts + soft + steal) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), everyone, own.user + own.system


def machine(runner: Runner) -> dict[str, Any]:
    """What the figures depend on."""
    packages = ("torch", "sentence-transformers", "transformers", "tokenizers", "numpy")
    info = runner.info
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": info.device_name if info.device == "cpu" else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": info.threads,
        "device": info.device_name,
        "dtype": info.dtype,
        "max_batch_tokens": info.max_batch_tokens,
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT"),
        "python": ".".join(map(str, sys.version_info[:3])),
        **{name: version(name) for name in packages},
    }


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

    lines = []
    for kind in options.kinds:
        texts = ["the quick brown fox jumps over a lazy dog near the old river bank"]
        if kind != "one":
            texts = texts_of(kind, max(1, round(COUNTS[kind] * options.scale)), words)
        tokens = int(np.asarray(tokenizer.encode(texts, Truncate.END, max_total=1 << 30).lengths).sum())
        # Latency needs many short calls, a rate few long ones.
        repeats = 30 if kind == "one" else 1
        sides: dict[str, Callable[[], object]] = {"engine": lambda texts=texts: embed_all(runner, tokenizer, texts)}
        for size in [1] if kind == "one" else options.batch_sizes:
            sides[f"sentence-transformers, {size} a batch"] = lambda texts=texts, size=size: reference.encode(
                texts, batch_size=size, show_progress_bar=False
            )
        difference = float(np.abs(np.asarray(sides["engine"]()) - reference.encode(texts)).max())
        for run in sides.values():
            run()
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        before = busy_cores()
        for _ in range(options.rounds):
            for name, run in sides.items():
                seconds[name].append(statistics.median(timed(run) for _ in range(repeats)))
        elapsed, everyone, own = (later - earlier for later, earlier in zip(busy_cores(), before, strict=True))
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
            "engine_times_reference": spread(ratios, 2),
            "best_reference": best,
            "largest_difference": difference,
            # What else ran on the machine, in cores: above a few hundredths the absolute figures are too low.
            "cores_used_by_others": round(max(0.0, everyone - own) / elapsed, 2),
        }
        if kind == "one":
            line["milliseconds"] = {name: spread([s * 1e3 for s in taken], 2) for name, taken in seconds.items()}
        else:
            line["tokens_per_second"] = {
                name: spread([tokens / s for s in taken], 0) for name, taken in seconds.items()
            }
        lines.append(json.dumps({**line, "machine": machine(runner)}))
        print(lines[-1])
    if options.output != "-":
        with Path(options.output).open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)


if __name__ == "__main__":
    main()
