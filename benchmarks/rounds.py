"""Turns of several parties at the same load, A B A B, and the figures of them.

A round's clock runs from the first request to the last answer; a figure is the median of the rounds with the lowest and
highest, and a ratio is taken inside each round, between neighbours in time. Texts are new each round. Who fails is out,
and said to be; the others go on. A scenario's line is written when its rounds are over, or with those that were whole
when something ended the run.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from embedserve.benchmarks import jsonl
from embedserve.benchmarks.load import Round, closed_loop
from embedserve.benchmarks.parties import CROWD, Party, PartyError, Scenario, Server, Texts
from embedserve.benchmarks.progress import Progress
from embedserve.benchmarks.stub import Stub
from embedserve.benchmarks.texts import texts_of

__all__ = ["Figures", "Run", "ratios", "summary", "table"]

Figures = dict[str, list[Round]]
T = TypeVar("T")
# Below it two parties do not do the same work: half precision keeps 0.999.
SAME_WORK = 0.999
LIMIT_SECONDS = 0.5
# A median of fewer says nothing. They may take more than the scenario's share: of the time that others leave.
LEAST_ROUNDS = 3


class Run:
    """The rounds of all scenarios.

    out: the parties that failed, and why. errors: what requests of all parties met instead of a 200, and how often.
    """

    def __init__(
        self, options: argparse.Namespace, words: list[str], machine: dict[str, Any], progress: Progress
    ) -> None:
        """options: rounds, output, encoding_format; limit: seconds from now that all of it may take."""
        self.out: dict[str, str] = {}
        self.errors: Counter[str] = Counter()
        self._options, self._words, self._machine, self._progress = options, words, machine, progress
        self._until = time.monotonic() + float(options.limit)
        self._cosines: dict[str, float] = {}
        self._dimension = 384

    def measure(self, parties: Sequence[Party], scenarios: Sequence[Scenario]) -> None:
        """All scenarios, as far as the time goes. KeyboardInterrupt passes, with what was whole written."""
        self._compare_vectors(parties)
        self._progress.total = len(scenarios) * self._options.rounds * len(self._playing(parties))
        for number, scenario in enumerate(scenarios):
            if not self._playing(parties):
                return
            # What one scenario leaves of its time, the others have.
            share = self._left() / (len(scenarios) - number)
            self._measure(scenario, parties, time.monotonic() + share)

    def _measure(self, scenario: Scenario, parties: Sequence[Party], until: float) -> None:
        limit = self._client_limit(scenario)
        for party in self._playing(parties):
            self._progress.step(f"{scenario.name}, warm-up, {party.name}")
            self._try(party, party.prepare, scenario, Texts(scenario, self._words, "warm-up"))
        figures: Figures = {party.name: [] for party in self._playing(parties)}
        longest = 0.0
        try:
            for number in range(1, self._options.rounds + 1):
                started = time.monotonic()
                if started + longest > (self._until if number <= LEAST_ROUNDS else until):
                    self._progress.step(f"{scenario.name}: no time for round {number} of {self._options.rounds}")
                    break
                texts = Texts(scenario, self._words, number)
                found: dict[str, Round] = {}
                for party in self._playing(parties):
                    self._progress.step(f"{scenario.name}, round {number} of {self._options.rounds}, {party.name}")
                    if (round_ := self._try(party, party.run, scenario, texts)) is not None:
                        found[party.name] = round_
                    self._progress.step("", 1)
                # Only now: a round is whole or not there.
                for name, round_ in found.items():
                    figures[name].append(round_)
                longest = max(longest, time.monotonic() - started)
        finally:
            measured = {name: rounds for name, rounds in figures.items() if rounds}
            if measured:
                self._write(scenario, parties, measured, limit)

    def _try(
        self, party: Party, work: Callable[[Scenario, Texts, float], Any], scenario: Scenario, texts: Texts
    ) -> Any:
        """What the work gives; None if it failed, with which the party is out."""
        try:
            return work(scenario, texts, self._left())
        except TimeoutError:
            self._fail(party, f"{scenario.name} did not end in time")
        except (PartyError, OSError) as error:
            self._fail(party, str(error))
        return None

    def _fail(self, party: Party, why: str) -> None:
        self.out[party.name] = why
        self._progress.print(f"{party.name} is out: {why}")

    def _playing(self, parties: Sequence[Party]) -> list[Party]:
        return [party for party in parties if party.name not in self.out]

    def _left(self) -> float:
        return max(0.1, self._until - time.monotonic())

    def _compare_vectors(self, parties: Sequence[Party]) -> None:
        texts = texts_of("mixed", 8, self._words)
        found = {}
        for party in parties:
            self._progress.step(f"vectors of {party.name}")
            try:
                vectors = party.vectors(texts, self._left())
            except TimeoutError:
                self._fail(party, "its first vectors did not come in time")
            except (PartyError, OSError) as error:
                self._fail(party, str(error))
            else:
                found[party.name] = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
        if not found:
            return
        (first, ours), *others = found.items()
        self._dimension = ours.shape[1]
        for name, vectors in others:
            if vectors.shape != ours.shape:
                said = f"vectors of {ours.shape[1]} and {vectors.shape[1]} components"
            else:
                cosine = self._cosines[f"{first} / {name}"] = round(float((ours * vectors).sum(axis=1).min()), 6)
                said = f"cosine {cosine:.4f}" if cosine < SAME_WORK else ""
            if said:
                self._progress.print(f"{first} and {name} do not do the same work: {said}")

    def _client_limit(self, scenario: Scenario) -> dict[str, float]:
        """What this client reaches against a server that answers with a constant."""
        self._progress.step(f"{scenario.name}: the client's own limit")
        with Stub(self._dimension) as stub:
            target = stub.target(scenario.size, self._options.encoding_format)
            texts = Texts(scenario, self._words, "limit").requests(max(64, 4000 // scenario.size))
            requests = [target.request(each) for each in texts]
            clients = scenario.clients or CROWD
            found = closed_loop(target, requests, clients, timeout=30, within=60, seconds=LIMIT_SECONDS)
        return {
            "texts_per_second": round(found.texts_per_second),
            "p50_ms": round(found.latency(0.5) * 1e3, 3),
            "cpu_us_a_request": round(found.cpu_seconds / len(found.samples) * 1e6, 1),
        }

    def _write(self, scenario: Scenario, parties: Sequence[Party], figures: Figures, limit: dict[str, float]) -> None:
        counts = [counted_tokens(rounds) for rounds in figures.values()]
        tokens_a_text = next((count for count in counts if count), 0.0)
        found = {
            party.name: {
                **party.facts_of(scenario),
                **summary(party, scenario, figures[party.name], tokens_a_text),
                **({"out": self.out[party.name]} if party.name in self.out else {}),
            }
            for party in parties
            if party.name in figures
        }
        for each in found.values():
            self.errors.update(each["errors"])
        line = {
            "benchmark": "http",
            "scenario": scenario.name,
            "texts": scenario.kind if isinstance(scenario.kind, str) else "words",
            "words": scenario.words,
            "loop": "closed" if scenario.clients else "open",
            "clients": scenario.clients,
            "texts_a_request": scenario.size,
            "requests_a_round": scenario.requests or None,
            "seconds_a_round": scenario.seconds if math.isfinite(scenario.seconds) else None,
            "encoding_format": self._options.encoding_format,
            "rounds": max(map(len, figures.values())),
            "tokens_a_text": tokens_a_text,
            "parties": found,
            "times_better": ratios(scenario, figures),
            "cosines": self._cosines,
            "out": self.out,
            "client_limit": limit,
            "machine": self._machine,
        }
        jsonl.append(line, self._options.output)
        self._progress.print(table(line) + "\n")


def summary(party: Party, scenario: Scenario, rounds: Sequence[Round], tokens_a_text: float) -> dict[str, Any]:
    """The figures of one party in one scenario.

    tokens_a_text: what the first party counted; servers that count characters instead would look fast.
    """
    errors: dict[str, int] = {}
    for round_ in rounds:
        for name, count in round_.errors.items():
            errors[name] = errors.get(name, 0) + count
    found: dict[str, Any] = {"requests": sum(len(round_.samples) for round_ in rounds), "errors": errors}
    # Pauses between requests make a rate meaningless.
    if not scenario.pause:
        found["texts_per_second"] = jsonl.spread([round_.texts_per_second for round_ in rounds], 1)
        found["tokens_per_second"] = jsonl.spread([round_.texts_per_second * tokens_a_text for round_ in rounds], 0)
    # One call of everything has no latency worth the name.
    if any(len(round_.samples) > 1 for round_ in rounds):
        for share in (50, 90, 99):
            found[f"p{share}_ms"] = jsonl.spread([round_.latency(share / 100) * 1e3 for round_ in rounds], 2)
    if isinstance(party, Server):
        found["prompt_tokens_a_text"] = counted_tokens(rounds)
        # How busy the client was, of one core: near 1 it is the client that was measured.
        found["client_cores"] = jsonl.spread([round_.cpu_seconds / round_.seconds for round_ in rounds], 3)
        found["sent_late_p99_ms"] = jsonl.spread([round_.lateness(0.99) * 1e3 for round_ in rounds], 2)
    return found


def counted_tokens(rounds: Sequence[Round]) -> float:
    """Tokens a text, as the party counts them; 0 if it does not."""
    answered = [sample for round_ in rounds for sample in round_.answered]
    return round(sum(sample.tokens for sample in answered) / max(1, sum(sample.texts for sample in answered)), 2)


def ratios(scenario: Scenario, figures: Figures) -> dict[str, dict[str, float] | None]:
    """How many times better the first party is than each other: texts a second, or median latency."""
    (first, ours), *others = figures.items()
    found: dict[str, dict[str, float] | None] = {}
    # An open loop has its own rate for each party.
    for name, theirs in others if scenario.clients else ():
        # Who failed has fewer rounds.
        pairs = list(zip(ours, theirs, strict=False))
        if scenario.is_rate:
            values = [a.texts_per_second / b.texts_per_second if b.answered else math.nan for a, b in pairs]
        else:
            values = [b.latency(0.5) / a.latency(0.5) for a, b in pairs]
        found[f"{first} / {name}"] = jsonl.spread(values, 2)
    return found


def table(line: dict[str, Any]) -> str:
    """A scenario for people."""
    loop = f"Poisson arrivals of {line['texts_a_request']} texts a request"
    if line["clients"]:
        loop = f"{line['clients']} clients, {line['texts_a_request']} texts a request"
    round_ = f"{line['requests_a_round']} requests" if line["requests_a_round"] else f"{line['seconds_a_round']:g} s"
    rows = [f"{line['scenario']}: {loop}, {line['tokens_a_text']} tokens a text, {line['rounds']} rounds of {round_}"]
    heads = ("texts/s", "tokens/s", "p50 ms", "p90 ms", "p99 ms")
    rows.append(f"  {'':26}" + "".join(f"{name:>24}" for name in heads) + "  errors")
    for party, found in line["parties"].items():
        names = ("texts_per_second", "tokens_per_second", "p50_ms", "p90_ms", "p99_ms")
        cells = [_cell(found.get(name)) for name in names]
        errors = ", ".join(f"{count} x {name}" for name, count in found["errors"].items()) or "-"
        rows.append(f"  {party:26}" + "".join(f"{cell:>24}" for cell in cells) + f"  {errors}")
        if not line["clients"]:
            reached = found["crowd_requests_per_second"]
            rows.append(
                f"  {'':26}  at {found['rate']} requests/s" + (f" of {reached} that it reached" if reached else "")
            )
    for pair, better in line["times_better"].items():
        rows.append(f"  {pair}: {_cell(better)} x")
    limit = line["client_limit"]
    rows.append(
        f"  the client's limit: {limit['texts_per_second']:,.0f} texts/s, p50 {limit['p50_ms']} ms, "
        f"{limit['cpu_us_a_request']} us a request"
    )
    return "\n".join(rows)


def _cell(found: dict[str, float] | None) -> str:
    if found is None:
        return "-"
    digits = 0 if found["highest"] >= 1000 else 1 if found["highest"] >= 50 else 2
    median, lowest, highest = (f"{found[name]:,.{digits}f}" for name in ("median", "lowest", "highest"))
    return median if lowest == highest else f"{median} ({lowest}–{highest})"
