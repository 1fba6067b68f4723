"""What do the figures in README.md, docs/benchmarks.md and docs/performance.md say? Made from the newest results.

`python -m embedserve.benchmarks.figures` prints the sections; with `--write` they go into the files, between their
marks.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from embedserve.benchmarks import jsonl

PROJECT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- figures: python -m embedserve.benchmarks.figures --write -->\n", "<!-- end of figures -->\n"

KINDS = {"short": "4 to 16 words", "mixed": "4 to 230 words", "long": "180 to 240 words"}
PEER = "sentence-transformers"


def latest(file: str, key: str) -> dict[str, dict[str, Any]]:
    """The last line of each kind (`key`) in a results file."""
    return {line[key]: line for line in jsonl.read(jsonl.FOLDER / file)}


def number(value: float) -> str:
    """Three digits or so."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def ranged(figure: dict[str, float], digits: int = 2) -> str:
    """A ratio with its spread."""
    return f"{figure['median']:.{digits}f}× ({figure['lowest']:.{digits}f} to {figure['highest']:.{digits}f})"


def _times(line: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How many times better we are than each party."""
    return {name.removeprefix("embedserve / "): times for name, times in line["times_better"].items()}


INFINITY = "infinity"
TARGETS = (
    ("4 clients × 32 short texts", "short", PEER, 1.25),
    ("4 clients × 32 mixed texts", "mixed", PEER, 2.0),
    ("4 clients × 8 long texts", "long", PEER, 1.2),
    ("4 clients × 32 short texts", "short", INFINITY, 2.0),
    ("4 clients × 32 mixed texts", "mixed", INFINITY, 5.0),
    ("8 clients × 1 short text", "single", INFINITY, 5.0),
)
"""Load, scenario, peer, times better that we want to be. Of several settings of the peer the best one counts."""

IDLE_MS = 8.0
"""Median of one text of 16 tokens on an idle server, at most."""

LOADING = 1.2
"""Host memory while a model is loaded, over its weights in the dtype that they run in, at most."""

BUSY = 0.3
"""Cores that others may use while backends are compared: those with several threads suffer more from it."""


def targets() -> str:
    """The table of docs/benchmarks.md."""
    http = latest("http.jsonl", "scenario")
    rows = ["| Load over HTTP | against | target | measured | |", "|---|---|---|---|---|"]
    for load, scenario, peer, wanted in TARGETS:
        named = {name: times for name, times in _times(http[scenario]).items() if name.startswith(peer)}
        best = min(named, key=lambda name: named[name]["median"])
        verdict = "met" if named[best]["median"] >= wanted else "**missed**"
        rows.append(f"| {load} | {best} | ≥ {wanted:g}× | {ranged(named[best])} | {verdict} |")
    idle = http["one"]["parties"]["embedserve"]["p50_ms"]
    verdict = "met" if idle["median"] <= IDLE_MS else "**missed**"
    shown = f"{idle['median']:.1f} ms ({idle['lowest']:.1f} to {idle['highest']:.1f})"
    rows.append(f"| 1 text of 16 tokens, the server idle | – | ≤ {IDLE_MS:g} ms | {shown} | {verdict} |")
    rows += ["", "| Host memory at the peak of loading, over the weights | target | measured | |", "|---|---|---|---|"]
    for shape, line in latest("loading.jsonl", "shape").items():
        measured = line["peak_over_weights"]
        verdict = "met" if measured <= LOADING else "**missed**"
        rows.append(
            f"| {shape}, {line['weights'] / 1e9:.1f} GB in float32 | ≤ {LOADING:g} | {measured:.2f} | {verdict} |"
        )
    return "\n".join([*rows, *shares(), ""])


def shares() -> list[str]:
    """How near the engine came to the matrix rate: the fullest batches of each length, where there are sweeps."""
    cells: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
    for file in ("sweep.jsonl", "gpu.jsonl"):
        if (jsonl.FOLDER / file).exists():
            for line in jsonl.read(jsonl.FOLDER / file):
                if line["benchmark"] == "sweep" and line["share_of_matrix_rate"] is not None:
                    key = (line["machine"]["device"], line["model"], line["machine"]["dtype"])
                    best = cells.setdefault(key, {})
                    if best.get(line["length"], line)["tokens_per_second"] <= line["tokens_per_second"]:
                        best[line["length"]] = line
    lengths = sorted({length for best in cells.values() for length in best if length})
    if not lengths:
        return []
    heads = [f"{length} tokens" for length in lengths] + ["a mix"]
    rows = ["", f"| Engine: tokens/s, share of the matrix rate | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for (device, model, dtype), best in cells.items():
        found = [best.get(length) for length in [*lengths, 0]]
        shown = [
            f"{each['tokens_per_second']:,.0f}, {each['share_of_matrix_rate']:.0%}" if each else "–" for each in found
        ]
        device = "CPU" if device == "cpu" else device
        rows.append(f"| {model}, {dtype}, {device} | {' | '.join(shown)} |")
    return rows


def readme() -> str:
    """The section of README.md."""
    engine, http = latest("engine.jsonl", "texts"), latest("http.jsonl", "scenario")
    machine = engine["mixed"]["machine"]
    rows = [
        f"all-MiniLM-L6-v2, float32, {machine['cores']} cores of an {machine['cpu']} ({machine['cpu_capability']}), "
        f"torch {machine['torch']}, {machine['date']}. Medians of alternating rounds, each line in one run; in "
        "brackets the lowest and the highest. A shared machine: the ratios mean more than the figures.",
        "",
        f"In process, against {PEER} {machine[PEER]} at the best of three batch sizes:",
        "",
        f"| Texts | embedserve, tokens/s | {PEER} | ratio |",
        "|---|---|---|---|",
    ]
    for kind, words in KINDS.items():
        line = engine[kind]
        rates = line["tokens_per_second"]
        rows.append(
            f"| {kind}, {words} | {number(rates['engine']['median'])} | "
            f"{number(rates[line['best_reference']]['median'])} | {ranged(line['engine_times_reference'])} |"
        )
    one = engine["one"]
    times = one["milliseconds"]
    rows += [
        f"| one text of 16 tokens | {number(times['engine']['median'])} ms | "
        f"{number(times[one['best_reference']]['median'])} ms | {ranged(one['engine_times_reference'])} |",
        "",
        f"Over HTTP (base64), against {PEER} in process and Infinity over HTTP:",
        "",
    ]
    parties = [name for name in http["short"]["parties"] if name != "embedserve"]
    rows += [
        f"| Load | embedserve | {' | '.join(f'times {name}' for name in parties)} |",
        "|---|---|" + "---|" * len(parties),
    ]
    loads = {
        "short": "4 clients × 32 short texts",
        "mixed": "4 clients × 32 mixed texts",
        "long": "4 clients × 8 long texts",
        "single": "8 clients × 1 short text",
        "one": "1 client, 1 text of 16 tokens, now and then",
        "open": "Poisson arrivals at 80 % of what each server reached",
    }
    for scenario, load in loads.items():
        line = http[scenario]
        ours = line["parties"]["embedserve"]
        if scenario in ("one", "open"):
            shown = f"{number(ours['p50_ms']['median'])} ms (p99 {number(ours['p99_ms']['median'])} ms)"
            if scenario == "open":
                shown += f" at {number(ours['texts_per_second']['median'])} texts/s"
        else:
            shown = f"{number(ours['texts_per_second']['median'])} texts/s"
        ratios = [ranged(times[name]) if (times := _times(line)).get(name) else "–" for name in parties]
        if scenario == "open":
            theirs = [line["parties"].get(name) for name in parties]
            ratios = [
                f"{number(t['p50_ms']['median'])} ms at {number(t['texts_per_second']['median'])} texts/s" if t else "–"
                for t in theirs
            ]
        rows.append(f"| {load} | {shown} | {' | '.join(ratios)} |")
    return "\n".join([*rows, ""])


def backends() -> str:
    """The table of docs/performance.md."""
    lines = latest("backends.jsonl", "texts")
    line = next(iter(lines.values()))
    machine, others = line["machine"], [each["cores_used_by_others"] for each in lines.values()]
    first = line["compared_with"]
    rows = [
        f"{line['model']}, {machine['cores']} cores of an {machine['cpu']} ({machine['cpu_capability']}), torch "
        f"{machine['torch']}, onnxruntime {machine['onnxruntime']}, transformers {machine['transformers']}, "
        f"{machine['date']}. Medians of {line['rounds']} alternating rounds, and times the rate of {first}, in "
        f"brackets the lowest and the highest. Others used {min(others):.1f} to {max(others):.1f} cores meanwhile"
        + (": **too busy a machine** for more than a first impression." if max(others) > BUSY else "."),
        "",
        f"| | {' | '.join(lines)} | lowest cosine |",
        "|---|" + "---|" * (len(lines) + 1),
    ]
    # A run may have been of fewer sides than another.
    for side in dict.fromkeys(side for each in lines.values() for side in each["milliseconds"]):
        shown, cosines = [], []
        for kind, each in lines.items():
            if side not in each["milliseconds"]:
                shown.append("–")
                continue
            cosines.append(each["lowest_cosine"][side])
            figures, unit = ("milliseconds", "ms") if kind == "one" else ("tokens_per_second", "tokens/s")
            times = "" if side == first else f", {ranged(each['times_its_rate'][side])}"
            shown.append(f"{number(each[figures][side]['median'])} {unit}{times}")
        rows.append(f"| {side} | {' | '.join(shown)} | {min(cosines):.4f} |")
    return "\n".join([*rows, ""])


SECTIONS = {"README.md": readme, "docs/benchmarks.md": targets, "docs/performance.md": backends}


def replaced(text: str, section: str) -> str:
    """`text` with another section between its marks."""
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return text[:start] + section + text[end:]


def main() -> None:
    """Print or write the sections."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"into {', '.join(SECTIONS)}")
    write = parser.parse_args().write
    for file, section in SECTIONS.items():
        if write:
            path = PROJECT / file
            path.write_text(replaced(path.read_text(encoding="utf-8"), section()), encoding="utf-8")
        else:
            print(section())


if __name__ == "__main__":
    main()
