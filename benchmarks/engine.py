"""How many tokens a second does the engine embed, how long does a batch take, and what share of the limit is that?

No HTTP and no tokenizer: random token ids go through the `Runner` that an engine process has. A cell is a number of
texts of a length, which come together; as in the server they run in batches within the engine's bound, and a call is
all of them. Its clock runs around the calls, from arrays on the host to vectors on the host. The limit is the fastest
large matrix product that torch reaches on the same device, in the same dtype and run (see `matrix_rate`), before and
after the cells, of which the highest counts; the arithmetic of a token is `shapes.flops_per_token`.

    embedserve bench engine --shape bge-large --device cuda --dtype float16 --mix

On CUDA, `device_ms` is the time of all kernels of a call, by torch's profiler, outside of the clock.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from embedserve.benchmarks import bench, jsonl, machine, shapes
from embedserve.benchmarks.load import percentile
from embedserve.benchmarks.progress import Progress
from embedserve.benchmarks.texts import SEED
from embedserve.models import catalog
from embedserve.models.config import ModelConfig, read_config
from embedserve.server import config as server_config
from embedserve.server import served, threads
from embedserve.server.config import ConfigError, ServerConfig

threads.set_patience()  # before torch is loaded
import torch  # noqa: E402

from embedserve.kernels import dispatch  # noqa: E402
from embedserve.server.runner import Runner  # noqa: E402

__all__ = ["Cell", "Rate", "cells", "main", "matrix_rate", "measure", "pieces"]

Ints = npt.NDArray[np.int32]
LENGTHS = (16, 32, 128, 256, 512, 2048, 8192)
BATCHES = (1, 8, 32, "full")
# Log-normal, as lengths of passages and queries together are: median, and sigma of the logarithm.
MIX = (64, 1.0)
# A cell of which one call takes longer than so many times the measured seconds, at the best rate so far, is left out.
PATIENCE = 20.0
# Batches of fewer tokens say nothing of larger ones: what a call costs besides its tokens is most of their time.
TELLING_TOKENS = 128


@dataclass(frozen=True)
class Model:
    """What is measured. weights: "checkpoint", or "random" of a shape."""

    name: str
    weights: str
    config: ModelConfig


@dataclass(frozen=True)
class Cell:
    """Texts that come together. length: of each, in tokens; 0 is the mix."""

    length: int
    rows: int

    def lengths(self, longest: int) -> Ints:
        """int32 [rows]."""
        if self.length:
            return np.full(self.rows, self.length, dtype=np.int32)
        median, sigma = MIX
        drawn = np.random.default_rng(SEED).lognormal(math.log(median), sigma, self.rows)
        return np.clip(drawn, 4, longest).astype(np.int32)


def main(options: argparse.Namespace) -> int:
    """Measure each model; the exit status. Raises ConfigError and ModelError."""
    settings = server_config.load(vars(options))
    try:
        for name in options.shape or settings.model:
            with opened(name, settings, random=bool(options.shape)) as model:
                runner = Runner.load(
                    model.config.folder,
                    config=model.config,
                    device=settings.device,
                    dtype=settings.dtype,
                    backend=settings.backend,
                    threads=settings.threads or None,
                    progress=_tell,
                )
                runner.warm_up(_tell, max_batch_tokens=settings.max_batch_tokens or None)
                if options.against:
                    from embedserve.benchmarks import against

                    against.measure(model.name, model.config, runner, options)
                else:
                    sweep(model, runner, options)
    except KeyboardInterrupt:
        return bench.interrupted()
    return 0


@contextmanager
def opened(name: str, settings: ServerConfig, *, random: bool) -> Iterator[Model]:
    """The model of a name as `serve` takes it, or a checkpoint of a shape, in a folder that goes with the block."""
    if not random:
        served_as, folder = served.locate(name, settings.models_dir)
        yield Model(served_as.rpartition("/")[2], "checkpoint", catalog.configure(folder, served_as))
        return
    with tempfile.TemporaryDirectory(prefix="embedserve-bench-") as parent:
        folder = Path(parent) / name
        _tell(f"writing {name} with random weights")
        shapes.write(folder, shapes.SHAPES[name])
        yield Model(name, "random", read_config(folder))


def cells(lengths: Sequence[int], batches: Sequence[int | str], bound: int, longest: int, *, mix: bool) -> list[Cell]:
    """The sweep: "full" is as many texts as fit into `bound` tokens. Lengths beyond `longest` are left out."""
    found = []
    for length in [each for each in lengths if each <= longest]:
        rows = {max(1, bound // length) if batch == "full" else int(batch) for batch in batches}
        found += [Cell(length, count) for count in sorted(rows)]
    return found + [Cell(0, 256)] * mix


def sweep(model: Model, runner: Runner, options: argparse.Namespace) -> None:
    """Measure all cells and append a line each."""
    info = runner.info
    asked = options.lengths or LENGTHS
    todo = cells(asked, options.batches or BATCHES, info.max_batch_tokens, info.max_tokens, mix=options.mix)
    if min(asked) > info.max_tokens:
        raise ConfigError(f"--lengths: {model.name} takes {info.max_tokens} tokens, and all of them are longer")
    for length in asked:
        if length > info.max_tokens and options.lengths:
            _tell(f"{length} tokens are left out: {model.name} takes {info.max_tokens}")
    facts = machine.accelerator(info.device) | {
        name: getattr(info, name) for name in ("dtype", "backend", "threads", "max_batch_tokens")
    }
    if options.resume:
        done = _done(options.output, model.name, facts)
        todo = [cell for cell in todo if cell not in done]
    rate = matrix_rate(info.device, info.dtype)
    fastest = 0.0
    with Progress(len(todo)) as progress:
        progress.print(
            f"{model.name}, {info.dtype}, {info.device_name}, batches of up to {info.max_batch_tokens} tokens; "
            f"a matrix product reaches {rate.flops / 1e12:.3g} TFLOP/s ({rate.product})"
        )
        progress.print(_row("tokens", "texts", "tokens/s", "texts/s", "p50 ms", "p99 ms", "share"))
        for cell in todo:
            length = str(cell.length or "mix")
            progress.step(f"{cell.rows} x {length}")
            tokens = int(cell.lengths(info.max_tokens).sum())
            if fastest and tokens / fastest > PATIENCE * options.seconds:
                progress.print(
                    _row(length, str(cell.rows)) + f"  left out: a call takes about {tokens / fastest:.0f} s"
                )
                progress.step("", 1)
                continue
            found = measure(runner, model.config, cell, options.seconds)
            if tokens >= TELLING_TOKENS:
                fastest = max(fastest, found["tokens_per_second"])
            # Clocks rise and fall: of the rates beside the cells the highest is the limit.
            rate = max(rate, matrix_rate(info.device, info.dtype, seconds=0.1))
            share = found["flops"] and round(found["flops"] / found["seconds_a_call"] / rate.flops, 4)
            line = {
                "benchmark": "sweep",
                "model": model.name,
                "weights": model.weights,
                "length": cell.length,
                "texts": cell.rows,
                **found,
                "matrix_tflops": round(rate.flops / 1e12, 4),
                "matrix_product": rate.product,
                "share_of_matrix_rate": share,
                "machine": facts,
            }
            jsonl.append(line, options.output)
            rates = (f"{found['tokens_per_second']:,.0f}", f"{found['texts_per_second']:,.0f}")
            times = (f"{found['p50_ms']:.2f}", f"{found['p99_ms']:.2f}")
            progress.print(_row(length, str(cell.rows), *rates, *times, f"{share:.1%}" if share else "-"))
            progress.step("", 1)


def _row(*texts: str) -> str:
    return "".join(f"{text:>{width}}" for text, width in zip(texts, (8, 7, 12, 10, 10, 10, 8), strict=False))


def measure(runner: Runner, config: ModelConfig, cell: Cell, seconds: float) -> dict[str, Any]:
    """Call for `seconds` after a warm-up, at least three times; rates, latencies and arithmetic of a call."""
    info = runner.info
    lengths = cell.lengths(info.max_tokens)
    chance = np.random.default_rng(SEED)
    # Several inputs in turn, of which no cache can know the next.
    inputs = [chance.integers(0, config.vocab_size, int(lengths.sum()), dtype=np.int32) for _ in range(4)]
    batches = list(pieces(lengths, info.max_batch_tokens))
    dimensions = np.full(len(lengths), info.dimension, dtype=np.int32)

    def call(ids: Ints) -> None:
        for rows, tokens in batches:
            runner.run(ids[tokens], lengths[rows], dimensions[rows])

    began = time.perf_counter()
    for ids in inputs[:2]:
        call(ids)
        if time.perf_counter() - began > seconds:
            break
    taken: list[float] = []
    others = machine.Others()
    started = time.perf_counter()
    while len(taken) < 3 or time.perf_counter() - started < seconds:
        ids = inputs[len(taken) % len(inputs)]
        before = time.perf_counter()
        call(ids)
        taken.append(time.perf_counter() - before)
        # Three long calls are no better than the first.
        if sum(taken) > 3 * seconds:
            break
    mean = sum(taken) / len(taken)
    flops = [shapes.flops_per_token(config, int(length)) for length in lengths]
    return {
        "tokens": int(lengths.sum()),
        "batches_a_call": len(batches),
        "calls": len(taken),
        "tokens_per_second": round(float(lengths.sum()) / mean, 1),
        "texts_per_second": round(len(lengths) / mean, 2),
        "seconds_a_call": mean,
        "p50_ms": round(percentile(taken, 0.5) * 1e3, 4),
        "p99_ms": round(percentile(taken, 0.99) * 1e3, 4),
        "device_ms": _device_ms(lambda: call(inputs[0])) if info.device.startswith("cuda") else None,
        "flops": None if None in flops else sum(f * int(n) for f, n in zip(flops, lengths, strict=True) if f),
        "cores_used_by_others": others.cores(),
    }


def pieces(lengths: Ints, bound: int) -> Iterator[tuple[slice, slice]]:
    """Batches of at most `bound` tokens, or of one text, in the order given: their rows and their tokens."""
    ends = np.cumsum(lengths)
    row = 0
    while row < len(lengths):
        start = int(ends[row - 1]) if row else 0
        last = max(row + 1, int(np.searchsorted(ends, start + bound, side="right")))
        yield slice(row, last), slice(start, int(ends[last - 1]))
        row = last


class Rate(NamedTuple):
    """FLOP/s, and the product that reached them: "torch.mm", or the class of kernels/."""

    flops: float
    product: str


@torch.inference_mode()
def matrix_rate(device: str, dtype: str, seconds: float = 1.0) -> Rate:
    """The fastest of all large square products in about `seconds`, a first one of each kind not counted.

    Those are torch.mm, and the linear that `dispatch` picks: on the CPU torch.mm is MKL's and reached 0.17 TFLOP/s in
    float32 where oneDNN's, which the engine multiplies with, reached 0.41. Against the former the engine had shares of
    150 %. For int8 it is the linear alone, which brings its input from float32 to 8 bits within the clock.
    """
    place, kind = torch.device(device), getattr(torch, dtype)
    # Large enough that reading is hidden: 8192 reached the highest rate on Hopper in what others have published. On two
    # cores 1024 and 2048 reach the same, within 2 %; many cores need the larger one, busy ones the shorter one.
    sizes = (8192,) if place.type == "cuda" else (1024, 2048)
    products = [(size, *each) for size in sizes for each in _products(place, kind, size).items()]
    return max(
        Rate(2.0 * size**3 / _fastest(call, place, seconds / len(products)), name) for size, name, call in products
    )


def _products(place: torch.device, kind: torch.dtype, size: int) -> dict[str, Callable[[], Any]]:
    """The ways to multiply, by their names."""
    numbers = torch.float32 if kind == torch.int8 else kind
    a, b = (torch.randn(size, size, device=place, dtype=numbers) for _ in range(2))
    linear = dispatch.choose(place, kind).linear(b, None, None)
    found: dict[str, Callable[[], Any]] = {type(linear).__name__: lambda: linear(a)}
    if kind != torch.int8:
        out = torch.empty_like(a)
        found["torch.mm"] = lambda: torch.mm(a, b, out=out)
    return found


def _fastest(call: Callable[[], Any], place: torch.device, seconds: float) -> float:
    """Seconds of the fastest call, at least one after a first."""
    runs = 10 if place.type == "cuda" else 1

    def once() -> float:
        started = time.perf_counter()
        for _ in range(runs):
            call()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        return (time.perf_counter() - started) / runs

    once()
    started, fastest = time.perf_counter(), once()
    while time.perf_counter() - started < seconds:
        fastest = min(fastest, once())
    return fastest


def _device_ms(call: Callable[[], None]) -> float:
    """Milliseconds that the kernels of a call take, whichever stream they run on; the mean of three calls."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiled:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
    # The calls that launched them carry their time once more.
    kernels = [event for event in profiled.key_averages() if event.device_type.name == "CUDA"]
    return round(sum(float(event.self_device_time_total) for event in kernels) / 3e3, 4)


def _done(file: Path, name: str, facts: dict[str, Any]) -> set[Cell]:
    """The cells that a file has of this model on this device."""
    if not file.exists():
        return set()
    same = ("device", "dtype", "backend")
    return {
        Cell(line["length"], line["texts"])
        for line in jsonl.read(file)
        if line.get("benchmark") == "sweep"
        and line["model"] == name
        and all(line["machine"].get(key) == facts[key] for key in same)
    }


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
