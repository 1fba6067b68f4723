"""Which share of the device's memory or arithmetic limit does each operation of kernels/ reach?

For the layer sizes of known models, batches of some tokens and rows of some lengths: plain torch, our Triton kernel and
the library's, in turns, in one run. The limit of a call is the larger of two times: the bytes that it must at least
move, at the rate at which this device copies memory, and its arithmetic, at the rate of a large matrix product in the
same dtype, both the highest of that run so far. Its share is that time over the call's; `bound` says which it was.

On CUDA calls are captured in a graph and timed by events, so that the host's launches are not in the clock. Calls
follow each other on the same tensors: what fits into the device's cache is read from there, as it is between the layers
of a model, and may pass 100 %. So may float32 where three products of TF32's stand for one. On the CPU there is no
Triton; oneDNN's linears stand beside torch's.

    python -m embedserve.benchmarks.kernels --device cuda --dtypes float16 bfloat16 float32
    python -m embedserve.benchmarks.kernels --shapes minilm --tokens 16 512 --output -

A JSON line an operation and size goes to benchmarks/results/kernels.jsonl. `difference` is the largest one from plain
torch, relative to its largest number: a figure of a kernel that computes something else would be worth nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from embedserve.benchmarks import bench, jsonl, machine, shapes
from embedserve.benchmarks.engine import matrix_rate  # before torch: see there
from embedserve.benchmarks.progress import Progress

import torch  # isort: skip
import torch.nn.functional as F  # isort: skip
from torch import Tensor  # isort: skip

from embedserve.kernels import dispatch, gated, rotary
from embedserve.kernels.activation import ACTIVATIONS
from embedserve.kernels.alibi import alibi_slopes
from embedserve.kernels.attention import Layout, attend_varlen
from embedserve.kernels.dispatch import REFERENCE, Kernels

__all__ = ["Case", "Sizes", "cases", "main", "rows_of"]

Run = Callable[[], Any]

RESULTS = jsonl.FOLDER / "kernels.jsonl"
SHAPES = ("bge-large", "bge-base", "jina-v2-base", "qwen3-0.6b", "minilm")
LENGTHS = (16, 128, 512, 8192)
EPS = 1e-12
# Of a measurement on CUDA: its calls take about a millisecond, far above what an event can resolve.
SLICE = 1e-3
LEAST_ROUNDS, MOST_ROUNDS, MOST_CALLS = 5, 50, 100


@dataclass(frozen=True)
class Sizes:
    """What a layer's operations depend on. family: "bert", "jina" or "qwen3"."""

    family: str
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    pooling: str
    max_tokens: int

    @staticmethod
    def of(name: str) -> Sizes:
        """Those of a shape of `shapes.SHAPES`."""
        shape = shapes.SHAPES[name]
        config = shape.config
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        alibi = config.get("position_embedding_type") == "alibi"
        return Sizes(
            family="qwen3" if config["model_type"] == "qwen3" else "jina" if alibi else "bert",
            hidden=hidden,
            inner=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads", heads),
            head_dim=config.get("head_dim", hidden // heads),
            pooling=shape.pooling.removesuffix("token"),
            max_tokens=shape.max_tokens,
        )


@dataclass(frozen=True)
class Case:
    """An operation at a size, by several implementations of the same result, "torch" first.

    bytes: read and written at least, once each. flops: of its products. written: tensors that calls change.
    """

    operation: str
    rows: str
    runs: dict[str, Run]
    bytes: int
    flops: float = 0.0
    written: tuple[Tensor, ...] = ()


def main() -> int:
    """Measure all cases; the exit status: 1 where an implementation failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, help="of a batch (default: 16 512, on CUDA also 16384)")
    parser.add_argument("--operations", nargs="+", help="only these, as the table names them")
    parser.add_argument("--seconds", type=float, default=0.2, help="of each case")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file that lines are appended to, - for none")
    options = parser.parse_args()
    on_cuda = torch.device(options.device).type == "cuda"
    if on_cuda:
        # Events and graphs belong to the current device.
        torch.cuda.set_device(options.device)
    dtypes = options.dtypes or (["float16", "bfloat16"] if on_cuda else ["float32"])
    batches = options.tokens or ([16, 512, 16384] if on_cuda else [16, 512])
    status = 0
    try:
        with torch.inference_mode(), Progress(len(dtypes) * len(options.shapes) * len(batches)) as progress:
            for dtype in dtypes:
                status |= _table(options, dtype, batches, progress)
    except KeyboardInterrupt:
        return bench.interrupted()
    return status


def _table(options: argparse.Namespace, dtype: str, batches: Sequence[int], progress: Progress) -> int:
    """Measure and print all cases of one dtype; the exit status."""
    device, kind, status = torch.device(options.device), getattr(torch, dtype), 0
    facts = machine.accelerator(options.device)
    copied, multiplied = copy_rate(device), matrix_rate(options.device, dtype).flops
    progress.print(f"{facts['device']}, {dtype}; in µs, and as a share of the limit")
    for name in options.shapes:
        for tokens in batches:
            # Clocks rise and fall, and others work here too: of the rates beside the cases the highest is the limit.
            copied = max(copied, copy_rate(device, seconds=0.1))
            multiplied = max(multiplied, matrix_rate(options.device, dtype, seconds=0.1).flops)
            progress.step(f"{name}, {tokens} tokens", 1)
            progress.print(f"copies at {copied / 1e9:,.0f} GB/s, products at {multiplied / 1e12:,.2f} TFLOP/s")
            for case in cases(Sizes.of(name), tokens, device, kind):
                if options.operations and case.operation not in options.operations:
                    continue
                others = machine.Others()
                found, failed = measure(case, device, options.seconds)
                status |= bool(failed)
                limit = max(case.bytes / copied, case.flops / multiplied)
                line = {
                    "benchmark": "kernels",
                    "operation": case.operation,
                    "shape": name,
                    "tokens": tokens,
                    "rows": case.rows,
                    "dtype": dtype,
                    "bytes": case.bytes,
                    "flops": case.flops,
                    "bound": "memory" if case.bytes / copied >= case.flops / multiplied else "arithmetic",
                    "limit_us": round(limit * 1e6, 3),
                    "us": {each: jsonl.spread([1e6 * t for t in times], 3) for each, times in found.items()},
                    "share": {each: round(limit / statistics.median(times), 4) for each, times in found.items()},
                    "difference": differences(case, set(found)),
                    "failed": failed,
                    "cores_used_by_others": others.cores(),
                    "copy_gb_s": round(copied / 1e9, 2),
                    "matrix_tflops": round(multiplied / 1e12, 4),
                    "machine": facts,
                }
                jsonl.append(line, options.output)
                progress.print(_row(line))
    return status


def _row(line: dict[str, Any]) -> str:
    figures = [f"{name} {line['us'][name]['median']:,.1f} ({line['share'][name]:.0%})" for name in line["us"]]
    figures += [f"{name} failed: {why}" for name, why in line["failed"].items()]
    sizes = f"{line['operation']:16} {line['shape']:12} {line['tokens']:6} {line['rows']:>14}"
    return f"{sizes}  {line['bound']:10}  {'   '.join(figures)}"


# --- what is measured -------------------------------------------------------------------------------------------------


def rows_of(tokens: int, longest: int) -> Iterator[tuple[str, list[int]]]:
    """Ways to make up a batch of `tokens`: rows of equal length, and a long one among rows of two tokens."""
    for length in LENGTHS:
        if length <= min(tokens, longest):
            yield f"{tokens // length} x {length}", [length] * (tokens // length)
    long = min(tokens // 2, longest)
    if long >= 256:
        short = (tokens - long) // 2
        yield f"{long}, {short} x 2", [long] + [2] * short


def cases(sizes: Sizes, tokens: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """All operations of a family at one number of tokens."""
    made = _Inputs(sizes, tokens, device, dtype)
    for rows, lengths in rows_of(tokens, sizes.max_tokens):
        layout = layout_of(lengths, device)
        yield made.attention(rows, lengths, layout)
        yield made.pooling(rows, lengths, layout)
    if sizes.family == "qwen3":
        yield from (made.rms_norm(), made.add_rms_norm(), made.norm_rotate(), made.glu("silu", gate_first=True))
        yield made.gated("silu", gate_first=True)
    else:
        yield from (made.embedding(), made.layer_norm(), made.add_layer_norm())
        if sizes.family == "jina":
            yield from (made.glu("gelu", gate_first=True), made.gated("gelu", gate_first=True))
        else:
            yield from (made.bias_activation("gelu"), made.linear("linear gelu", sizes.inner, "gelu"))
    yield made.linear("linear qkv", (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim, None)


class _Inputs:
    """Makes the tensors of a case, random ones, and the calls on them."""

    def __init__(self, sizes: Sizes, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        self._sizes, self._tokens, self._device, self._dtype = sizes, tokens, device, dtype
        self._tables = tables(device, dtype)
        self._item = dtype.itemsize

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self._device, dtype=self._dtype)

    def _states(self) -> Tensor:
        return self._random(self._tokens, self._sizes.hidden)

    def _runs(self, field: str, call: Callable[[Any], Any]) -> dict[str, Run]:
        """A call for each table that has an implementation of its own."""
        reference = getattr(REFERENCE, field)
        return {
            name: lambda table=table: call(getattr(table, field))  # type: ignore[misc]
            for name, table in self._tables.items()
            if table is REFERENCE or getattr(table, field) is not reference
        }

    def attention(self, rows: str, lengths: list[int], layout: Layout) -> Case:
        sizes, tokens = self._sizes, sum(lengths)
        heads, kv_heads, causal = sizes.heads, sizes.kv_heads, sizes.family == "qwen3"
        qkv = self._random(tokens, heads + 2 * kv_heads, sizes.head_dim)
        q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
        slopes = alibi_slopes(heads, self._device) if sizes.family == "jina" else None
        runs = self._runs("attend", lambda attend: attend(q, k, v, layout, causal=causal, slopes=slopes))
        if "triton" in runs and slopes is None and self._item == 2:
            runs["varlen"] = lambda: attend_varlen(q, k, v, layout, causal=causal)
        pairs = sum(length**2 for length in lengths) * (0.5 if causal else 1.0)
        moved = (qkv.numel() + tokens * heads * sizes.head_dim) * self._item
        return Case("attention", rows, runs, moved, 4 * pairs * heads * sizes.head_dim)

    def pooling(self, rows: str, lengths: list[int], layout: Layout) -> Case:
        hidden, mode, count = self._sizes.hidden, self._sizes.pooling, len(lengths)
        states = self._random(sum(lengths), hidden)
        cut = torch.full((count,), hidden // 2, dtype=torch.int32, device=self._device)
        runs = self._runs("pool_and_finish", lambda pool: pool(states, layout.cu_seqlens, mode, cut, normalize=True))
        read = sum(lengths) if mode in ("mean", "max") else count
        return Case(f"pool {mode}", rows, runs, read * hidden * self._item + count * hidden * 4)

    def embedding(self) -> Case:
        hidden, vocabulary = self._sizes.hidden, 30522
        words, weight, bias = self._random(vocabulary, hidden), self._random(hidden), self._random(hidden)
        positions = torch.arange(self._tokens, dtype=torch.int32, device=self._device) % 512
        table = self._random(512, hidden) if self._sizes.family == "bert" else None
        ids = torch.randint(vocabulary, (self._tokens,), dtype=torch.int32, device=self._device)
        runs = self._runs("embed", lambda embed: embed(ids, words, positions, table, weight, bias, EPS))
        position_rows = 0 if table is None else min(self._tokens, 512)
        return Case("embed", "", runs, (2 * self._tokens + position_rows) * hidden * self._item)

    def layer_norm(self) -> Case:
        x, weight, bias = self._states(), self._random(self._sizes.hidden), self._random(self._sizes.hidden)
        runs = self._runs("layer_norm", lambda norm: norm(x, weight, bias, EPS))
        return Case("layer_norm", "", runs, 2 * x.nbytes)

    def add_layer_norm(self) -> Case:
        x, residual = self._states(), self._states()
        weight, bias = self._random(self._sizes.hidden), self._random(self._sizes.hidden)
        runs = self._runs("add_layer_norm", lambda norm: norm(x, residual, weight, bias, EPS))
        return Case("add_layer_norm", "", runs, 3 * x.nbytes, written=(x,))

    def rms_norm(self) -> Case:
        x, weight = self._states(), self._random(self._sizes.hidden)
        runs = self._runs("rms_norm", lambda norm: norm(x, weight, EPS))
        runs["library"] = lambda: F.rms_norm(x, weight.shape, weight, EPS)
        return Case("rms_norm", "", runs, 2 * x.nbytes)

    def add_rms_norm(self) -> Case:
        x, residual, weight = self._states(), self._states(), self._random(self._sizes.hidden)
        runs = self._runs("add_rms_norm", lambda norm: norm(x, residual, weight, EPS))
        return Case("add_rms_norm", "", runs, 4 * x.nbytes, written=(x, residual))

    def norm_rotate(self) -> Case:
        sizes = self._sizes
        heads = sizes.heads + sizes.kv_heads
        qk = self._random(self._tokens, heads + sizes.kv_heads, sizes.head_dim)[:, :heads]
        weight = self._random(heads, sizes.head_dim)
        positions = torch.arange(self._tokens, dtype=torch.int32, device=self._device)
        cos, sin = rotary.rotary_angles(positions, sizes.head_dim, 1e6)
        runs = self._runs("norm_rotate", lambda turn: turn(qk, weight, EPS, cos, sin))
        return Case("norm_rotate", "", runs, 2 * qk.nbytes + cos.nbytes + sin.nbytes, written=(qk,))

    def bias_activation(self, activation: str) -> Case:
        y, bias = self._random(self._tokens, self._sizes.inner), self._random(self._sizes.inner)
        runs: dict[str, Run] = {"torch": lambda: ACTIVATIONS[activation](y + bias)}
        if "triton" in self._tables:
            from embedserve.kernels.activation_triton import apply_bias

            runs["triton"] = lambda: apply_bias(y, bias, activation)
        return Case(f"bias {activation}", "", runs, 2 * y.nbytes, written=(y,))

    def glu(self, activation: str, *, gate_first: bool) -> Case:
        both = self._random(self._tokens, 2 * self._sizes.inner)
        runs: dict[str, Run] = {"torch": lambda: gated.glu(both, activation, gate_first)}
        if "triton" in self._tables:
            from embedserve.kernels import activation_triton

            runs["triton"] = lambda: activation_triton.glu(both, activation, gate_first)
        return Case(f"glu {activation}", "", runs, both.nbytes * 3 // 2)

    def gated(self, activation: str, *, gate_first: bool) -> Case:
        hidden, inner = self._sizes.hidden, self._sizes.inner
        x, weight = self._states(), self._random(2 * inner, hidden) * hidden**-0.5
        prepared = {
            name: table.gated(weight, None, activation, gate_first)
            for name, table in self._tables.items()
            if table is REFERENCE or table.gated is not REFERENCE.gated
        }
        runs: dict[str, Run] = {name: lambda linear=linear: linear(x) for name, linear in prepared.items()}  # type: ignore[misc]
        moved = x.nbytes + weight.nbytes + self._tokens * inner * self._item
        return Case(f"gated {activation}", "", runs, moved, 4.0 * self._tokens * hidden * inner)

    def linear(self, operation: str, out: int, activation: str | None) -> Case:
        hidden = self._sizes.hidden
        x, weight, bias = self._states(), self._random(out, hidden) * hidden**-0.5, self._random(out)
        prepared = {
            name: table.linear(weight, bias, activation)
            for name, table in self._tables.items()
            if table is REFERENCE or table.linear is not REFERENCE.linear
        }
        runs: dict[str, Run] = {name: lambda linear=linear: linear(x) for name, linear in prepared.items()}  # type: ignore[misc]
        moved = x.nbytes + weight.nbytes + self._tokens * out * self._item
        return Case(operation, "", runs, moved, 2.0 * self._tokens * hidden * out)


def tables(device: torch.device, dtype: torch.dtype) -> dict[str, Kernels]:
    """The tables of `kernels.dispatch` that run here: plain torch first."""
    found = {"torch": REFERENCE}
    if device.type == "cuda" and not dispatch.choose(device, dtype).pads:
        from embedserve.kernels.attention_triton import attend_triton

        found["triton"] = dispatch.fused(attend_triton)
    elif device.type == "cpu" and (chosen := dispatch.choose(device, dtype)) is not REFERENCE:
        found["onednn"] = chosen
    return found


def layout_of(lengths: Sequence[int], device: torch.device) -> Layout:
    """Rows of these lengths, which stand in runs of equal ones already."""
    sizes = np.array(lengths, dtype=np.int32)
    starts = np.array([0, *accumulate(lengths)], dtype=np.int32)
    edges = np.flatnonzero(np.diff(sizes, prepend=0))
    counts = np.diff(edges, append=len(sizes))
    runs = tuple((int(starts[e]), int(n), int(sizes[e])) for e, n in zip(edges, counts, strict=True))
    rows = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    positions = np.arange(starts[-1], dtype=np.int32) - starts[rows]
    on = [torch.from_numpy(part).to(device) for part in (starts, rows, positions)]
    return Layout(on[0], on[1], on[2], max(lengths), runs)


# --- how it is measured -----------------------------------------------------------------------------------------------


def measure(case: Case, device: torch.device, seconds: float) -> tuple[dict[str, list[float]], dict[str, str]]:
    """(seconds of a call in each round, by implementation; why others failed). Implementations take turns."""
    pristine = [tensor.clone() for tensor in case.written]
    clocks: dict[str, Callable[[], float]] = {}
    failed = {}
    for name, run in case.runs.items():
        try:
            clocks[name] = _events(run, device) if device.type == "cuda" else _counter(run)
        # Whatever a compiler or a library says about one of them, the others are measured, and the exit status tells.
        except Exception as error:
            failed[name] = (str(error).strip() or type(error).__name__).partition("\n")[0][:200]
    times: dict[str, list[float]] = {name: [] for name in clocks}
    started = time.perf_counter()
    for count in range(MOST_ROUNDS if clocks else 0):
        if count >= LEAST_ROUNDS and time.perf_counter() - started > seconds:
            break
        for name, clock in clocks.items():
            _restore(case, pristine)
            times[name].append(clock())
    _restore(case, pristine)
    return times, failed


def _counter(run: Run) -> Callable[[], float]:
    """Times calls on the host, as many at a time as take a millisecond."""
    run()
    started = time.perf_counter()
    run()
    calls = _calls(time.perf_counter() - started)

    def clock() -> float:
        started = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - started) / calls

    return clock


def _events(run: Run, device: torch.device) -> Callable[[], float]:
    """Times calls on a GPU by events around a graph of them."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    # Compiles, and lets libraries take memory of their own, outside of the graph.
    for _ in range(2):
        torch.cuda.synchronize(device)
        first.record()
        run()
        last.record()
        torch.cuda.synchronize(device)
    calls = _calls(first.elapsed_time(last) / 1e3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()

    def clock() -> float:
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3 / calls

    clock()
    return clock


def _calls(seconds: float) -> int:
    return max(1, min(MOST_CALLS, round(SLICE / seconds)))


def _restore(case: Case, pristine: Sequence[Tensor]) -> None:
    for tensor, before in zip(case.written, pristine, strict=True):
        tensor.copy_(before)


def differences(case: Case, names: set[str]) -> dict[str, float]:
    """The largest difference of each implementation from "torch", relative to the largest number there."""
    pristine = [tensor.clone() for tensor in case.written]
    results = {}
    for name in case.runs:
        if name in names:
            found = case.runs[name]()
            results[name] = (found[0] if isinstance(found, tuple) else found).double().clone()
            _restore(case, pristine)
    if "torch" not in results:
        return {}
    expected = results.pop("torch")
    scale = expected.abs().max().item()
    return {name: float(f"{(each - expected).abs().max().item() / scale:.2g}") for name, each in results.items()}


def copy_rate(device: torch.device, seconds: float = 0.5) -> float:
    """Bytes/s of a large copy, read and written ones together: the fastest of those that fit into `seconds`."""
    size = 1 << (30 if device.type == "cuda" else 27)
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    clock = _events if device.type == "cuda" else lambda run, _: _counter(run)
    timed = clock(lambda: target.copy_(source), device)
    started, fastest = time.perf_counter(), timed()
    while time.perf_counter() - started < seconds:
        fastest = min(fastest, timed())
    return 2 * size / fastest


if __name__ == "__main__":
    sys.exit(main())
