"""How many tokens a second does the engine embed in process, and how many does sentence-transformers, at its best?

Both take the same texts and tokenise them inside the clock. They run in turns, A B A B, in one process and on the same
threads; sentence-transformers sorts by length itself and runs at each of several batch sizes, of which the best counts.
Tokens are counted with the special ones and without padding. Each figure is the median of the rounds, with the lowest
and highest. Then one text of 16 tokens at a time: the latency of an idle engine.

    embedserve bench engine --against sentence-transformers

Ends in one JSON line a kind of text.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from embedserve.benchmarks import jsonl, machine
from embedserve.benchmarks.engine import pieces
from embedserve.benchmarks.progress import Progress
from embedserve.benchmarks.texts import common_words, texts_of
from embedserve.models.config import ModelConfig
from embedserve.server.config import ConfigError
from embedserve.server.runner import Runner
from embedserve.server.tokenizer import Tokenizer, Truncate

__all__ = ["embed_all", "measure"]

COUNTS = {"short": 384, "mixed": 96, "long": 48}
"""Texts a round, at least: as many more as fill the seconds of a round."""
# Half precision on both sides keeps 0.999; another model does not come near.
SAME_WORK = 0.99
ONE = "the quick brown fox jumps over a lazy dog near the old river bank"
REPEATS = 30
"""Calls with the one text a round: latency needs many short calls, a rate few long ones."""


def measure(name: str, config: ModelConfig, runner: Runner, options: argparse.Namespace) -> None:
    """Run the comparison and append its lines. Raises ConfigError where the library cannot load the model."""
    tokenizer = Tokenizer.load(
        config.folder / "tokenizer.json",
        max_tokens=config.max_tokens,
        lower_case=config.do_lower_case,
        bert_normalizer=config.bert_normalizer,
    )
    # Off by our tokenizer, which brings its own threads; sentence-transformers is faster with it.
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    reference = _reference(config, runner)
    words = common_words()
    with Progress(len(options.kinds) * options.rounds) as progress:
        for kind in options.kinds:
            progress.step(kind)
            texts = [ONE]
            if kind != "one":
                texts = texts_of(kind, COUNTS[kind], words)
                embed_all(runner, tokenizer, texts)
                seconds = _timed(partial(embed_all, runner, tokenizer, texts))
                texts = texts_of(kind, COUNTS[kind] * max(1, math.floor(options.seconds / seconds)), words)
            tokens = int(np.asarray(tokenizer.encode(texts, Truncate.END, max_total=1 << 30).lengths).sum())
            sides: dict[str, Callable[[], object]] = {"engine": partial(embed_all, runner, tokenizer, texts)}
            for size in [1] if kind == "one" else options.batch_sizes:
                sides[f"sentence-transformers, {size} a batch"] = partial(
                    reference.encode, texts, batch_size=size, show_progress_bar=False
                )
            few = texts[:32]
            theirs = np.asarray(reference.encode(few, normalize_embeddings=True), dtype=np.float32)
            ours = embed_all(runner, tokenizer, few)
            cosine = float(((ours / np.linalg.norm(ours, axis=1, keepdims=True)) * theirs).sum(axis=1).min())
            if cosine < SAME_WORK:
                raise ConfigError(
                    f"--against sentence-transformers: it does not do the same work with {config.folder.name}, the "
                    f"lowest cosine is {cosine:.3f}; it may lack the model's own code"
                )
            taken, others = _rounds(sides, options.rounds, REPEATS if kind == "one" else 1, progress, kind)
            best = min((side for side in sides if side != "engine"), key=lambda side: statistics.median(taken[side]))
            # A round is a pair taken next to each other in time: its ratio does not see a machine that slows down.
            ratios = [theirs_s / ours_s for ours_s, theirs_s in zip(taken["engine"], taken[best], strict=True)]
            line: dict[str, Any] = {
                "benchmark": "engine",
                "model": name,
                "texts": kind,
                "count": len(texts),
                "tokens": tokens,
                "rounds": options.rounds,
                "engine_times_reference": jsonl.spread(ratios, 2),
                "best_reference": best,
                "lowest_cosine": round(cosine, 6),
                "cores_used_by_others": others,
            }
            if kind == "one":
                line["milliseconds"] = {side: jsonl.spread([s * 1e3 for s in each], 2) for side, each in taken.items()}
            else:
                line["tokens_per_second"] = {
                    side: jsonl.spread([tokens / s for s in each], 0) for side, each in taken.items()
                }
            line["machine"] = machine.accelerator(runner.info.device) | {
                field: getattr(runner.info, field) for field in ("dtype", "backend", "threads", "max_batch_tokens")
            }
            jsonl.append(line, options.output)
            progress.print(_shown(line))


def embed_all(runner: Runner, tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Tokenise, cut into batches within the runner's bound in the order of arrival, run: [texts, dimension]."""
    encoded = tokenizer.encode(texts, Truncate.END, max_total=1 << 30)
    lengths, ids = np.asarray(encoded.lengths, dtype=np.int32), np.asarray(encoded.ids, dtype=np.int32)
    dimensions = np.full(len(lengths), runner.info.dimension, dtype=np.int32)
    return np.concatenate(
        [
            runner.run(ids[tokens], lengths[rows], dimensions[rows]).dense
            for rows, tokens in pieces(lengths, runner.info.max_batch_tokens)
        ]
    )


def _reference(config: ModelConfig, runner: Runner) -> Any:
    """sentence-transformers with the same model, device and dtype."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ConfigError(
            "--against sentence-transformers: it is not installed; pip install sentence-transformers"
        ) from error
    dtype = getattr(torch, runner.info.dtype)
    try:
        return SentenceTransformer(
            str(config.folder), device=runner.info.device, model_kwargs={"dtype": dtype}, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())[:300]
        raise ConfigError(f"--against sentence-transformers: it cannot load {config.folder.name}: {said}") from error


def _rounds(
    sides: dict[str, Callable[[], object]], rounds: int, repeats: int, progress: Progress, kind: str
) -> tuple[dict[str, list[float]], float | None]:
    """Seconds of a call of each side in each round, and how many cores others used meanwhile."""
    for call in sides.values():
        call()
    taken: dict[str, list[float]] = {side: [] for side in sides}
    others = machine.Others()
    for number in range(rounds):
        progress.step(f"{kind}, round {number + 1} of {rounds}")
        for side, call in sides.items():
            taken[side].append(statistics.median(_timed(call) for _ in range(repeats)))
        progress.step(f"{kind}, round {number + 1} of {rounds}", 1)
    return taken, others.cores()


def _timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _shown(line: dict[str, Any]) -> str:
    """A line for people."""
    figures = line.get("milliseconds") or line["tokens_per_second"]
    unit, digits = ("ms", 2) if "milliseconds" in line else ("tokens/s", 0)
    ours, theirs = figures["engine"]["median"], figures[line["best_reference"]]["median"]
    ratio = line["engine_times_reference"]
    return (
        f"{line['texts']:6}  engine {ours:,.{digits}f} {unit}; {line['best_reference']}: {theirs:,.{digits}f} {unit}; "
        f"{ratio['median']:.2f}x ({ratio['lowest']:.2f} to {ratio['highest']:.2f}), cosine {line['lowest_cosine']:.5f}"
    )
