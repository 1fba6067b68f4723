"""What was measured, as a page: plots and tables from the JSON lines of `embedserve bench`.

One HTML file with its plots inside it, which asks no server for anything, and the plots as PNG files beside it, in a
folder named after it. Of several lines of the same cell or scenario the last counts.
"""

from __future__ import annotations

import argparse
import html
import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from embedserve.benchmarks import bench, jsonl
from embedserve.server.config import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["main", "page"]

Line = dict[str, Any]
# Of the machine, in this order; the rest follows it.
_FACTS = ("device", "driver", "cpu", "cores", "dtype", "backend", "threads", "torch", "python", "date")
FIGURES = ("texts_per_second", "tokens_per_second", "p50_ms", "p90_ms", "p99_ms")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #d8dee4; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } .facts { color: #57606a; } svg { max-width: 100%; height: auto; }
figure { margin: 1rem 0; }
"""


def main(options: argparse.Namespace) -> int:
    """Write the page and its PNG files; the exit status. Raises ConfigError for files that cannot be used."""
    folder = options.output.with_suffix("")
    if folder == options.output:
        raise ConfigError(f"--output: expected a name with an ending, as in {folder}.html: {folder} is for the plots")
    lines = []
    for file in options.files or [bench.OUTPUT]:
        lines += jsonl.read(file)
    written, plots = page(lines)
    try:
        options.output.write_text(written, encoding="utf-8")
        folder.mkdir(exist_ok=True)
        for name, data in plots.items():
            (folder / f"{name}.png").write_bytes(data)
    except OSError as error:
        raise ConfigError(f"--output: cannot write {error.filename}: {error.strerror}") from error
    print(f"{options.output}, and {len(plots)} plots in {folder}")
    return 0


def page(lines: Sequence[Line]) -> tuple[str, dict[str, bytes]]:
    """The HTML of a page, and its plots as PNG by name.

    Raises ConfigError where nothing can be drawn, or matplotlib is missing.
    """
    _matplotlib()
    parts: list[str] = []
    plots: dict[str, bytes] = {}
    for draw in (_sweeps, _comparisons, _servers):
        draw(lines, parts, plots)
    if not parts:
        raise ConfigError("the files have no line that `embedserve bench engine` or `embedserve bench http` writes")
    body = "\n".join(parts)
    title = "embedserve bench"
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><h1>{title}</h1>\n{body}\n</body></html>\n',
        plots,
    )


def _matplotlib() -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            'bench report draws with matplotlib, which is not installed; pip install "matplotlib>=3.9", or install '
            "embedserve with its extra [bench]"
        ) from error
    matplotlib.use("svg")
    # Ids of an SVG would be random; with a salt the same lines make the same page.
    matplotlib.rcParams |= {"svg.hashsalt": "embedserve", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}


def _sweeps(lines: Sequence[Line], parts: list[str], plots: dict[str, bytes]) -> None:
    """The engine's cells: a section a model, device and dtype."""

    def group(line: Line) -> tuple[str, ...]:
        return (line["model"], line["machine"]["device"], line["machine"]["dtype"], line["machine"]["backend"])

    for key, cells in _grouped(lines, "sweep", group, lambda line: (line["length"], line["texts"])):
        name, device, dtype, backend = key
        cells.sort(key=lambda line: (line["length"] or 1 << 30, line["texts"]))
        parts.append(f"<h2>Engine: {_text(name)}, {_text(dtype)}, {_text(backend)}, {_text(device)}</h2>")
        swept = [line for line in cells if line["length"]]
        if swept:
            draws = [partial(_draw_rates, swept), partial(_draw_latencies, swept), partial(_draw_shares, swept)]
            _plot(parts, plots, f"engine-{name}-{dtype}", draws)
        heads = ("tokens × texts", "tokens/s", "texts/s", "p50 ms", "p99 ms", "share of the matrix rate", "device ms")
        rows = [
            (
                f"{line['length'] or 'mix'} × {line['texts']}",
                f"{line['tokens_per_second']:,.0f}",
                f"{line['texts_per_second']:,.1f}",
                f"{line['p50_ms']:,.2f}",
                f"{line['p99_ms']:,.2f}",
                "–" if line["share_of_matrix_rate"] is None else f"{line['share_of_matrix_rate']:.1%}",
                "–" if line["device_ms"] is None else f"{line['device_ms']:,.2f}",
            )
            for line in cells
        ]
        parts.append(_table(heads, rows))
        weights = "random weights of the true shape; " if cells[-1]["weights"] == "random" else ""
        rate = f"{weights}a matrix product reached {cells[-1]['matrix_tflops']:g} TFLOP/s"
        parts.append(_facts(cells[-1]["machine"], rate))


def _series(swept: list[Line]) -> dict[str, list[Line]]:
    """What a line of a plot joins: cells of as many texts, where several lengths have them, and the fullest of each."""
    counts = [line["texts"] for line in swept]
    lengths = sorted({line["length"] for line in swept})
    fullest = {length: max(line["texts"] for line in swept if line["length"] == length) for length in lengths}
    found = {
        f"{count}": [line for line in swept if line["texts"] == count]
        for count in sorted(set(counts))
        if counts.count(count) > 1
    }
    return {**found, "most": [line for line in swept if line["texts"] == fullest[line["length"]]]}


def _draw_rates(swept: list[Line], axes: Axes) -> None:
    for label, row in _series(swept).items():
        axes.plot([line["length"] for line in row], [line["tokens_per_second"] for line in row], "o-", label=label)
    axes.set(xlabel="tokens of a text", ylabel="tokens/s", title="Rate")
    _doubling(axes, [line["length"] for line in swept])
    _decades(axes)
    axes.legend(fontsize=7, title="texts")


def _draw_latencies(swept: list[Line], axes: Axes) -> None:
    for row in _series(swept).values():
        axes.plot([line["length"] for line in row], [line["p50_ms"] for line in row], "o-")
    axes.set(xlabel="tokens of a text", ylabel="ms, median", title="Latency")
    _doubling(axes, [line["length"] for line in swept])
    _decades(axes)


def _doubling(axes: Axes, values: Sequence[int]) -> None:
    """A horizontal axis of doublings, with the measured values at its ticks."""
    places = sorted(set(values))
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [str(place) for place in places])
    axes.minorticks_off()


def _decades(axes: Axes) -> None:
    """A vertical axis of powers of ten with 2 and 5 between them: figures may all lie within one of them."""
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.minorticks_off()


def _draw_shares(swept: list[Line], axes: Axes) -> None:
    best: dict[int, float] = {}
    for line in swept:
        best[line["length"]] = max(best.get(line["length"], 0.0), line["share_of_matrix_rate"] or 0.0)
    axes.bar([str(length) for length in best], [100 * share for share in best.values()])
    axes.set(xlabel="tokens of a text", ylabel="%", title="Best share of the matrix rate")


def _comparisons(lines: Sequence[Line], parts: list[str], plots: dict[str, bytes]) -> None:
    """The engine against sentence-transformers."""

    def group(line: Line) -> tuple[str, ...]:
        return (line["model"], line["machine"]["device"])

    for (name, device), cells in _grouped(lines, "engine", group, lambda line: (line["texts"],)):
        parts.append(f"<h2>Engine against sentence-transformers: {_text(name)}, {_text(device)}</h2>")
        if rated := [line for line in cells if "tokens_per_second" in line]:
            _plot(parts, plots, f"against-{name}", [partial(_draw_sides, rated)])
        rows = []
        for line in cells:
            figures = line.get("milliseconds") or line["tokens_per_second"]
            unit = "ms" if "milliseconds" in line else "tokens/s"
            best = line["best_reference"]
            sides = (f"{_spread(figures['engine'])} {unit}", f"{_spread(figures[best])} {unit}")
            rows.append((line["texts"], *sides, best, f"{_spread(line['engine_times_reference'])} ×"))
        parts.append(_table(("texts", "engine", "sentence-transformers", "at its best", "ratio"), rows))
        parts.append(_facts(cells[-1]["machine"]))


def _draw_sides(rated: list[Line], axes: Axes) -> None:
    for offset, label in ((-0.2, "engine"), (0.2, "sentence-transformers, at its best")):
        spreads = [line["tokens_per_second"]["engine" if offset < 0 else line["best_reference"]] for line in rated]
        x = [place + offset for place in range(len(rated))]
        axes.bar(x, [each["median"] for each in spreads], 0.38, yerr=_errors(spreads), label=label)
    axes.set_xticks(range(len(rated)), [line["texts"] for line in rated])
    axes.set(ylabel="tokens/s", title="Rate")
    axes.legend(fontsize=7)


def _servers(lines: Sequence[Line], parts: list[str], plots: dict[str, bytes]) -> None:
    """The comparisons over HTTP: a section a kind of text and texts a request."""

    def group(line: Line) -> tuple[str, ...]:
        lowest, highest = line["words"]
        return (f"{lowest} to {highest} words, {line['texts_a_request']} texts a request", line["machine"]["cpu"])

    for number, (key, found) in enumerate(_grouped(lines, "http", group, lambda line: (line["scenario"],)), 1):
        parts.append(f"<h2>HTTP: {_text(key[0])}</h2>")
        closed = sorted((line for line in found if line["clients"]), key=lambda line: int(line["clients"]))
        if len({line["clients"] for line in closed}) > 1:
            figures = ("texts_per_second", "p50_ms", "p99_ms")
            _plot(parts, plots, f"http-{number}", [partial(_draw_clients, closed, figure) for figure in figures])
        heads = ("load", "server", "texts/s", "tokens/s", "p50 ms", "p90 ms", "p99 ms", "errors")
        rows: list[tuple[str, ...]] = []
        for line in [*closed, *(line for line in found if not line["clients"])]:
            for name, party in line["parties"].items():
                load = f"{line['clients']} clients" if line["clients"] else f"open, {party['rate']:g} requests/s"
                errors = ", ".join(f"{count} × {error}" for error, count in party["errors"].items()) or "0"
                rows.append((load, name, *(_spread(party.get(figure)) for figure in FIGURES), errors))
            for pair, ratio in line["times_better"].items():
                rows.append((f"{line['clients']} clients", pair, f"{_spread(ratio)} ×"))
        parts.append(_table(heads, rows))
        limit = max(line["client_limit"]["texts_per_second"] for line in found)
        parts.append(_facts(found[-1]["machine"], f"the client alone reached {limit:,.0f} texts/s against a stub"))
        for name, why in found[-1].get("out", {}).items():
            parts.append(f"<p>{_text(name)} could not be measured: {_text(why)}</p>")


def _draw_clients(closed: list[Line], figure: str, axes: Axes) -> None:
    for name in dict.fromkeys(name for line in closed for name in line["parties"]):
        row = [line for line in closed if line["parties"].get(name, {}).get(figure)]
        spreads = [line["parties"][name][figure] for line in row]
        x = [line["clients"] for line in row]
        axes.errorbar(x, [each["median"] for each in spreads], _errors(spreads), fmt="o-", label=name)
    label = "texts/s" if figure == "texts_per_second" else f"ms, {figure.removesuffix('_ms')}"
    axes.set(xlabel="clients", ylabel=label, ylim=(0, None))
    _doubling(axes, [line["clients"] for line in closed])
    axes.legend(fontsize=7)


def _grouped(
    lines: Sequence[Line],
    benchmark: str,
    group: Callable[[Line], tuple[str, ...]],
    cell: Callable[[Line], tuple[object, ...]],
) -> list[tuple[tuple[str, ...], list[Line]]]:
    """The lines of a benchmark by group, of each cell the last one."""
    found: dict[tuple[str, ...], dict[tuple[object, ...], Line]] = {}
    for line in lines:
        if line.get("benchmark") == benchmark:
            try:
                cells = found.setdefault(group(line), {})
                cells.pop(cell(line), None)
                cells[cell(line)] = line
            except (LookupError, TypeError) as error:
                raise ConfigError(
                    f"a line of {benchmark} has not what it should: {error!r}; measure it again"
                ) from error
    return [(key, list(cells.values())) for key, cells in found.items()]


def _plot(parts: list[str], plots: dict[str, bytes], name: str, draws: Sequence[Callable[[Axes], None]]) -> None:
    """Axes side by side: an SVG in the page, and a PNG."""
    from matplotlib.figure import Figure

    figure: Figure = Figure(figsize=(4.0 * len(draws), 3.2), layout="constrained")
    for number, draw in enumerate(draws, 1):
        draw(figure.add_subplot(1, len(draws), number))
    drawn = io.StringIO()
    # Without a date the same lines make the same page; without the head of an XML file it is part of one.
    figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    svg = drawn.getvalue()
    parts.append(f"<figure>{svg[svg.index('<svg') :]}</figure>")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=140)
    plots["".join(c if c.isalnum() or c in "-." else "-" for c in name)] = data.getvalue()


def _errors(spreads: Sequence[dict[str, float]]) -> list[list[float]]:
    """Distances from the medians to the lowest and the highest, as matplotlib takes them."""
    return [
        [each["median"] - each["lowest"] for each in spreads],
        [each["highest"] - each["median"] for each in spreads],
    ]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(each)}</th>" for each in heads)
    body = "\n".join("<tr>" + "".join(f"<td>{_text(each)}</td>" for each in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _facts(machine: dict[str, Any], more: str = "") -> str:
    ordered = [name for name in _FACTS if machine.get(name)] + [name for name in machine if name not in _FACTS]
    shown = [f"{name} {machine[name]}" for name in ordered if machine[name] is not None]
    return f'<p class="facts">{_text("; ".join([more] * bool(more) + shown))}</p>'


def _spread(figure: dict[str, float] | None) -> str:
    if figure is None:
        return "–"
    digits = 0 if figure["highest"] >= 1000 else 1 if figure["highest"] >= 50 else 2
    median, lowest, highest = (f"{figure[name]:,.{digits}f}" for name in ("median", "lowest", "highest"))
    return median if lowest == highest else f"{median} ({lowest} to {highest})"


def _text(value: object) -> str:
    return html.escape(str(value))
