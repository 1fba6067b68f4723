"""Who takes part in a comparison over HTTP: what each side can be asked for, and the side that is a server."""

from __future__ import annotations

import base64
import binascii
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedserve.benchmarks.load import Request, Round, Target, ask_once, closed_loop, get, open_loop, poisson_schedule
from embedserve.benchmarks.texts import SEED, WORDS, texts_of

__all__ = ["CROWD", "Party", "PartyError", "Scenario", "Server", "Texts", "first_model"]

CROWD = 32
"""Clients that ask for the rate an open loop takes its share of."""
_CROWD_SECONDS = 2.0
_WARM_UP_TEXTS = 2000


class PartyError(Exception):
    """A party cannot go on. The message says what it did, and what was expected."""


@dataclass(frozen=True)
class Scenario:
    """A kind of load.

    kind: of the texts, a key of `texts.WORDS`, or words of a text from and to. clients: of a closed loop; 0 is an open
    one. size: texts a request. requests: a round's; 0 is as many as are answered in `seconds`. pause: seconds between
    an answer and the same client's next request. share, rate: of an open loop, the share of the best rate that the
    server reached, or requests a second instead.
    """

    name: str
    kind: str | tuple[int, int]
    clients: int
    size: int
    requests: int = 0
    seconds: float = math.inf
    pause: float = 0.0
    share: float = 0.8
    rate: float = 0.0

    @property
    def is_rate(self) -> bool:
        """Whether it is compared by texts a second, and not by latency."""
        return self.clients > 1

    @property
    def words(self) -> tuple[int, int]:
        """Of a text, from and to."""
        return WORDS[self.kind] if isinstance(self.kind, str) else self.kind


class Texts:
    """The texts of one round of a scenario, the same for all parties, made as far as they are wanted."""

    def __init__(self, scenario: Scenario, words: list[str], number: int | str) -> None:
        self._scenario, self._words, self._number = scenario, words, number
        self._made: list[list[str]] = []

    def requests(self, count: int = 0) -> list[list[str]]:
        """The texts of the first `count` requests, a list each; of all of the scenario's, where it says how many."""
        size = self._scenario.size
        count = self._scenario.requests or count
        while len(self._made) < count:
            # A block has a seed of its own, so that what comes first does not depend on how much is made.
            seed = f"{SEED} {self._scenario.name} {self._number} {len(self._made)}"
            texts = texts_of(self._scenario.words, 64 * size, self._words, seed)
            self._made += [texts[start : start + size] for start in range(0, len(texts), size)]
        return self._made[:count]


class Party(ABC):
    """One side of the comparison. All methods raise PartyError and TimeoutError, with which it is out.

    name: in the table. facts: versions and options that its figures depend on, with no paths.
    """

    name: str
    facts: dict[str, Any]

    @abstractmethod
    def vectors(self, texts: list[str], within: float) -> np.ndarray[Any, Any]:
        """[texts, dimension], float32: to see that all parties do the same work. within: seconds."""

    @abstractmethod
    def prepare(self, scenario: Scenario, texts: Texts, within: float) -> None:
        """Warm up, outside all clocks."""

    @abstractmethod
    def run(self, scenario: Scenario, texts: Texts, within: float) -> Round | None:
        """One round; None where this scenario means nothing to this party."""

    def facts_of(self, scenario: Scenario) -> dict[str, Any]:  # noqa: ARG002 - for those that have such
        """Its facts in one scenario."""
        return self.facts


class Server(Party):
    """A server with OpenAI's embeddings API.

    timeout: seconds that a request may take.
    """

    def __init__(self, name: str, target: Target, timeout: float, facts: dict[str, Any] | None = None) -> None:
        self.name, self.target = name, target
        # A folder's name, where the model is one.
        self.facts = {"model": target.model.rstrip("/").rpartition("/")[2], **(facts or {})}
        self._timeout = timeout
        self._reached: dict[tuple[object, int], float] = {}
        self._rates: dict[str, float] = {}

    def vectors(self, texts: list[str], within: float) -> np.ndarray[Any, Any]:
        """Ask, and decode base64 or numbers."""
        status, body = ask_once(self.target, texts, timeout=min(self._timeout, within))
        if status != 200:
            raise PartyError(f"expected 200 and vectors, got {_said(status, body)}")
        try:
            rows = sorted(json.loads(body)["data"], key=lambda row: int(row["index"]))
            vectors = [row["embedding"] for row in rows]
            if vectors and isinstance(vectors[0], str):
                found = np.stack([np.frombuffer(base64.b64decode(vector), dtype="<f4") for vector in vectors])
            else:
                found = np.asarray(vectors, dtype=np.float32)
            if found.ndim != 2 or len(found) != len(texts) or not np.isfinite(found).all():
                raise ValueError(f"an array of the shape {found.shape}, or not finite, for {len(texts)} texts")
        except (ValueError, LookupError, TypeError, binascii.Error) as error:
            raise PartyError(f"its answer with status 200 holds no vectors: {type(error).__name__}: {error}") from error
        return found

    def prepare(self, scenario: Scenario, texts: Texts, within: float) -> None:
        """A few requests; before an open loop that takes a share, a crowd that finds the rate to take it of."""
        few = texts.requests(max(2, scenario.clients, _WARM_UP_TEXTS // scenario.size))
        if scenario.clients == 0:
            if not scenario.rate:
                # Its answers have to be there before the clock ends.
                crowd = self._closed(scenario, few, CROWD, within, seconds=_CROWD_SECONDS)
                self._note(scenario, crowd)
            reached = self._reached.get((scenario.kind, scenario.size), 0.0)
            self._rates[scenario.name] = scenario.rate or scenario.share * reached
            return
        if scenario.requests:
            few = few[: max(2, scenario.clients)]
        self._note(scenario, self._closed(scenario, few, scenario.clients, within, seconds=min(1.0, scenario.seconds)))

    def run(self, scenario: Scenario, texts: Texts, within: float) -> Round | None:
        """One round over HTTP."""
        if scenario.clients:
            asked = texts.requests(self._enough(scenario))
            found = self._closed(scenario, asked, scenario.clients, within, seconds=scenario.seconds)
            self._note(scenario, found)
            return found
        few = texts.requests(20 * CROWD)
        # Another schedule each round, as the texts are others.
        due = poisson_schedule(self._rates[scenario.name], scenario.seconds, f"{SEED} {few[0][0]}") or [0.0]
        # The texts of a round in turn, as many as the rate asks for.
        requests = self._requests([few[place % len(few)] for place in range(len(due))])
        return open_loop(self.target, requests, due, timeout=self._timeout, within=within)

    def facts_of(self, scenario: Scenario) -> dict[str, Any]:
        """With the rate of an open loop, and the one that it is a share of."""
        if scenario.clients:
            return self.facts
        reached = self._reached.get((scenario.kind, scenario.size), 0.0)
        return {
            **self.facts,
            "crowd_requests_per_second": round(reached, 1),
            "rate": round(self._rates[scenario.name], 1),
        }

    def _closed(
        self, scenario: Scenario, texts: Sequence[list[str]], clients: int, within: float, *, seconds: float
    ) -> Round:
        asked = self._requests(texts)
        found = closed_loop(
            self.target,
            asked,
            clients,
            timeout=self._timeout,
            within=within,
            pause=scenario.pause,
            seconds=seconds,
        )
        if not found.answered:
            met = ", ".join(f"{count} x {name}" for name, count in found.errors.items())
            raise PartyError(f"no request of {scenario.name} was answered: {met}")
        return found

    def _note(self, scenario: Scenario, found: Round) -> None:
        key = (scenario.kind, scenario.size)
        self._reached[key] = max(self._reached.get(key, 0.0), found.requests_per_second)

    def _enough(self, scenario: Scenario) -> int:
        """Requests that outlast a round of so many seconds, also if this one is twice as fast as any before."""
        if scenario.requests:
            return scenario.requests
        reached = self._reached[scenario.kind, scenario.size]
        return scenario.clients + math.ceil(2 * reached * scenario.seconds)

    def _requests(self, texts: Sequence[list[str]]) -> list[Request]:
        return [self.target.request(each) for each in texts]


def first_model(target: Target, timeout: float) -> str:
    """The id of the model that a server lists first. Raises PartyError."""
    status, body = get(target, "/models", timeout=timeout)
    if status != 200:
        raise PartyError(f"{target.url}/models: expected 200, got {_said(status, body)}; is this its base_url?")
    try:
        return str(json.loads(body)["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise PartyError(f"{target.url}/models lists no models; name one with --model") from error


def _said(status: int, body: bytes) -> str:
    """An answer that is none, for people; without a status the body says what went wrong."""
    shown = " ".join(body[:300].decode(errors="replace").split())
    return f"{status}: {shown}" if status else shown
