"""When a batch will end, which team it runs on, and when to ask for the next one. No clock, no threads, no torch.

A team is what runs one batch at a time (`teams.py`); here it is a number. `running` says of each team that is busy when
it is expected to be done, in seconds of any clock, or None where nothing is known yet.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

__all__ = ["Estimates", "InTurn", "Kind", "Offer", "Pace", "Schedule", "SideBySide"]

Running = Mapping[int, float | None]


class Kind(NamedTuple):
    """Batches whose tokens cost alike.

    Apart by the length of the longest text, as `int.bit_length` has it, for attention costs its square: a token of a
    text of 8192 costs many times what one of a short text does. share: see `Schedule`.
    """

    model: str
    modality: str
    share: float
    length: int


class Estimates:
    """How long a batch will run, by what a token has cost lately in batches of its kind."""

    def __init__(self) -> None:
        self._seconds_per_token: dict[Kind, float] = {}

    def seconds(self, kind: Kind, tokens: int) -> float | None:
        """None before the first batch of its kind."""
        cost = self._seconds_per_token.get(kind)
        return None if cost is None else cost * tokens

    def at_most(self, kind: Kind, tokens: int) -> float | None:
        """A bound for a batch of any kind: its own cost, or that of the next shorter texts that are known, as if all of
        it grew with the length. None at first."""
        shorter = [
            (other.length, cost)
            for other, cost in self._seconds_per_token.items()
            if other[:3] == kind[:3] and other.length <= kind.length
        ]
        if not shorter:
            return None
        length, cost = max(shorter)
        return cost * 2.0 ** (kind.length - length) * tokens

    def learn(self, kind: Kind, tokens: int, seconds: float) -> None:
        """A batch of so many tokens has taken so long."""
        known, sample = self._seconds_per_token.get(kind), seconds / tokens
        self._seconds_per_token[kind] = sample if known is None else 0.8 * known + 0.2 * sample


class Offer(NamedTuple):
    """A batch that could begin at `now`: its tokens, and the `company` it has, tokens that wait behind it or are likely
    to come while it runs."""

    model: str
    tokens: int
    company: float
    now: float


class Schedule(Protocol):
    """Who runs what when."""

    @property
    def concurrency(self) -> int:
        """Batches that may run at once."""
        ...

    @property
    def lead(self) -> float:
        """Seconds before a team is free at which the next batch is asked for."""
        ...

    @property
    def in_turn(self) -> bool:
        """Whether a batch that was begun waits on the device for those before it."""
        ...

    def share(self, team: int) -> float:
        """The part of the device that a team has."""
        ...

    def place(self, running: Running, offer: Offer) -> int | None:
        """The team on which the batch begins, or None where it waits."""
        ...

    def free_at(self, running: Running, now: float) -> float | None:
        """When the next batch can begin; None if that is not known."""
        ...


_ROUND_TRIP = 0.003
"""Seconds to the broker and back, until a batch is here."""


@dataclass(frozen=True)
class InTurn:
    """A device that computes one batch after another. More teams than one: the next is launched while one is computed.

    launch: seconds that the host needs to give a batch to the device.
    """

    teams: int
    launch: float = 0.0
    in_turn = True

    @property
    def concurrency(self) -> int:
        """See `Schedule`."""
        return self.teams

    @property
    def lead(self) -> float:
        """See `Schedule`."""
        return _ROUND_TRIP + self.launch

    def share(self, _team: int) -> float:
        """See `Schedule`."""
        return 1.0

    def place(self, running: Running, _offer: Offer) -> int | None:
        """See `Schedule`."""
        return next((team for team in range(self.teams) if team not in running), None)

    def free_at(self, running: Running, now: float) -> float | None:
        """See `Schedule`."""
        if not running:
            return now
        # With every team busy, the first that ends says so. With one to spare, the device is what must not run dry.
        ends = [end for end in running.values() if end is not None]
        return max(ends) if len(ends) == len(running) and (len(running) < self.teams or self.teams == 1) else None


class Pace(NamedTuple):
    """How fast a model is: `rate`, tokens/s on all threads of a CPU, and how many times `slower` on a narrow team."""

    rate: float
    slower: float


@dataclass(frozen=True)
class SideBySide:
    """A CPU: narrow teams, 0 to `teams` - 1, with a part of the cores each, and a wide one, number `teams`, with all.

    Several batches on narrow teams finish sooner than one after another on the wide one: 1.10 to 1.17 times the rate on
    two cores (MiniLM, batches of 256 and 512 tokens), about 1.8 times when other processes want the cores as well, for
    every thread of a wide team waits for the slowest at each of a hundred regions of a forward pass. A single batch is
    done sooner on the wide team. The two never run together.
    """

    teams: int
    paces: Mapping[str, Pace]
    in_turn = False
    lead = _ROUND_TRIP

    @property
    def concurrency(self) -> int:
        """See `Schedule`."""
        return self.teams

    def share(self, team: int) -> float:
        """See `Schedule`."""
        return 1.0 if team == self.teams else 1.0 / self.teams

    def place(self, running: Running, offer: Offer) -> int | None:
        """On the narrow team or the wide one, by which has this batch done sooner: now and alone on its cores, or with
        its company and all cores, once those have ended that run."""
        narrow = self._free(running)
        if self.teams in running or narrow is None:
            return None
        rate, slower = self.paces[offer.model]
        left = max((end - offer.now for end in running.values() if end is not None), default=0.0)
        if slower * offer.tokens <= max(0.0, left) * rate + offer.tokens + offer.company:
            return narrow
        return None if running else self.teams

    def free_at(self, running: Running, now: float) -> float | None:
        """See `Schedule`."""
        if self.teams in running:
            return running[self.teams]
        if self._free(running) is not None:
            return now
        ends = [end for end in running.values() if end is not None]
        return min(ends) if ends else None

    def _free(self, running: Running) -> int | None:
        return next((team for team in range(self.teams) if team not in running), None)
