"""The rules of the queue: which waiting texts form the next batch.

No sockets, no torch, no clock: the broker calls it, the tests exhaust it. The rules:

- A batch holds items of one lane (texts of one model, or its images, which are called texts below all the same) and
  costs at most the lane's bound. What a text costs depends on the backend: its tokens where batches are packed, and
  rows × longest where they are padded. A text that alone exceeds the bound runs alone.
- Oldest first. The request that has waited longest is always in the next batch, so nothing starves.
- A large request is split. What is left of it after a batch lines up again behind the requests that came in
  meanwhile: one text never waits for the whole of a large job, and large jobs take turns.
- Nothing is bound before an engine asks for it, so a late arrival still joins the next batch.
- The texts of a request whose client has gone are dropped while they wait.
- The queue is bounded in tokens. When nothing waits, any request is taken, however large.
- Texts whose batch died with its engine come back once, to the front, each request in batches of its own: a guilty one
  then takes no neighbour with it. A request that is lost a second time is given up.
"""

import bisect
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Generic, NamedTuple, TypeVar

__all__ = ["Batch", "Batcher", "Bound", "Cost", "Finished", "Lane", "QueueFullError", "Segment", "Work"]


class Lane(NamedTuple):
    """What can run in one batch: items of one modality, ``text`` or ``image``, for one model."""

    model: str
    modality: str = "text"


K = TypeVar("K", bound=Hashable)
"""What the caller knows a request by."""


class Cost(Enum):
    """How a backend's batches are paid for."""

    PACKED = "packed"
    """The sum of the tokens."""
    PADDED = "padded"
    """Rows × longest row, so texts of like length are put together."""


@dataclass(frozen=True)
class Bound:
    """What one batch of a lane may cost: `tokens`, counted as `cost` says."""

    tokens: int
    cost: Cost = Cost.PACKED


class QueueFullError(Exception):
    """`waiting` tokens are in the queue, and the request's `tokens` would pass its bound."""

    def __init__(self, waiting: int, tokens: int) -> None:
        super().__init__(f"{waiting} tokens are waiting, {tokens} more are too many")
        self.waiting = waiting
        self.tokens = tokens


@dataclass(eq=False)
class Work(Generic[K]):
    """One request: the token counts (≥ 1) of its texts, by position."""

    key: K
    lane: Lane
    lengths: Sequence[int]
    waiting: deque[int]
    """Positions that are in no batch, in the order in which they will run."""
    unfinished: int
    """Texts that have no result yet, waiting or running."""
    suspect: bool = False
    """A batch with texts of this request was lost with its engine."""
    turn: int = 0
    """The place in line: the lowest is served first."""


@dataclass(frozen=True, eq=False)
class Segment(Generic[K]):
    """The part of a batch that belongs to one request: positions into its texts, in the batch's row order."""

    work: Work[K]
    positions: Sequence[int]


@dataclass(frozen=True, eq=False)
class Batch(Generic[K]):
    """Texts to run together. Its rows are those of the segments, one segment after the other."""

    id: int
    lane: Lane
    segments: Sequence[Segment[K]]
    lengths: Sequence[int]
    """Tokens of each row."""


@dataclass(frozen=True, eq=False)
class Finished(Generic[K]):
    """A segment whose batch has run: it starts at `first_row` of the batch, and `left` texts of its request remain."""

    segment: Segment[K]
    first_row: int
    left: int


class Batcher(Generic[K]):
    """The queue of all requests of all lanes. At most `max_queue_tokens` tokens wait in it."""

    def __init__(self, max_queue_tokens: int) -> None:
        self.max_queue_tokens = max_queue_tokens
        self.waiting_tokens = 0
        self.waiting_texts = 0
        self._works: dict[K, Work[K]] = {}
        self._lines: dict[Lane, OrderedDict[K, Work[K]]] = {}
        self._running: dict[int, Batch[K]] = {}
        self._last_turn = 0
        self._first_turn = 0
        self._last_batch = 0

    def __len__(self) -> int:
        """Requests that are waiting, running or both."""
        return len(self._works)

    def add(self, key: K, lane: Lane, lengths: Sequence[int]) -> Work[K]:
        """Queue a request. Raises `QueueFullError` when it does not fit behind those that wait."""
        tokens = sum(lengths)
        if self.waiting_tokens and self.waiting_tokens + tokens > self.max_queue_tokens:
            raise QueueFullError(self.waiting_tokens, tokens)
        if key in self._works:
            raise ValueError(f"a request with the key {key!r} is here already")
        if not lengths or min(lengths) < 1:
            raise ValueError("a request needs texts, and each at least one token")
        work = Work(key, lane, lengths, waiting=deque(range(len(lengths))), unfinished=len(lengths))
        self._works[key] = work
        self._count(work, work.waiting, +1)
        self._line_up(work)
        return work

    def cancel(self, key: K) -> Work[K] | None:
        """Forget a request. What waits of it does not run; what runs is left out of `finish`."""
        work = self._works.pop(key, None)
        if work is not None and work.waiting:
            self._count(work, work.waiting, -1)
            work.waiting.clear()
            self._leave_line(work)
        return work

    def cancel_lane(self, lane: Lane) -> list[Work[K]]:
        """Forget every request of a lane that still has texts waiting: no engine is there to run them."""
        keys = list(self._lines.get(lane, ()))
        return [work for key in keys if (work := self.cancel(key)) is not None]

    def take(self, bounds: Mapping[Lane, Bound]) -> Batch[K] | None:
        """The next batch for an engine that serves the lanes of `bounds`; None when nothing waits for it.

        The lane whose first request has waited longest goes first.
        """
        heads = [next(iter(line.values())) for lane, line in self._lines.items() if lane in bounds]
        if not heads:
            return None
        head = min(heads, key=lambda work: work.turn)
        bound = bounds[head.lane]
        # A suspect shares its batch with nobody.
        candidates = [head] if head.suspect else (w for w in self._lines[head.lane].values() if not w.suspect)
        pick = _pick_packed if bound.cost is Cost.PACKED else _pick_alike
        segments = [Segment(work, positions) for work, positions in pick(candidates, bound.tokens)]

        for segment in segments:
            work, taken = segment.work, set(segment.positions)
            work.waiting = deque(position for position in work.waiting if position not in taken)
            self._count(work, segment.positions, -1)
            self._leave_line(work)
            if work.waiting:
                self._line_up(work)
        self._last_batch += 1
        lengths = [segment.work.lengths[position] for segment in segments for position in segment.positions]
        batch = Batch(self._last_batch, head.lane, segments, lengths)
        self._running[batch.id] = batch
        return batch

    def finish(self, batch_id: int) -> list[Finished[K]]:
        """A batch has run: its segments, without those whose requests were cancelled.

        A request without texts left is forgotten.
        """
        finished, row = [], 0
        for segment in self._running.pop(batch_id).segments:
            work = segment.work
            if self._works.get(work.key) is work:
                work.unfinished -= len(segment.positions)
                finished.append(Finished(segment, row, work.unfinished))
                if not work.unfinished:
                    del self._works[work.key]
            row += len(segment.positions)
        return finished

    def give_back(self, batch_id: int, *, ran: bool) -> list[Work[K]]:
        """A batch was lost with its engine: its texts line up again, in front of all others.

        If it `ran`, each of its requests may have been the reason, and those that were suspect before are given up:
        forgotten, and returned.
        """
        given_up = []
        for segment in reversed(self._running.pop(batch_id).segments):
            work = segment.work
            if self._works.get(work.key) is not work:
                continue
            if ran and work.suspect:
                self.cancel(work.key)
                given_up.append(work)
                continue
            work.suspect = work.suspect or ran
            if work.waiting:
                self._leave_line(work)
            work.waiting.extendleft(reversed(segment.positions))
            self._count(work, segment.positions, +1)
            self._line_up(work, in_front=True)
        return given_up

    def _line_up(self, work: Work[K], *, in_front: bool = False) -> None:
        line = self._lines.setdefault(work.lane, OrderedDict())
        line[work.key] = work
        if in_front:
            self._first_turn -= 1
            work.turn = self._first_turn
            line.move_to_end(work.key, last=False)
        else:
            self._last_turn += 1
            work.turn = self._last_turn

    def _leave_line(self, work: Work[K]) -> None:
        line = self._lines[work.lane]
        del line[work.key]
        if not line:
            del self._lines[work.lane]

    def _count(self, work: Work[K], positions: Iterable[int], sign: int) -> None:
        for position in positions:
            self.waiting_texts += sign
            self.waiting_tokens += sign * work.lengths[position]


def _pick_packed(works: Iterable[Work[K]], bound: int) -> Iterable[tuple[Work[K], list[int]]]:
    """Texts in line until the first one that no longer fits."""
    room = bound
    for work in works:
        positions: list[int] = []
        for position in work.waiting:
            length = work.lengths[position]
            if length > room and not (room == bound and not positions):
                break
            positions.append(position)
            room -= length
        if positions:
            yield work, positions
        if len(positions) < len(work.waiting) or room <= 0:
            return


_WINDOW = 4
"""How many batches' worth of waiting texts `_pick_alike` chooses from: more groups better, and delays more."""


def _pick_alike(works: Iterable[Work[K]], bound: int) -> Iterable[tuple[Work[K], list[int]]]:
    """The first text in line, and from those near it the ones most like it in length."""
    window: list[tuple[int, int, Work[K], int]] = []
    tokens = 0
    for work in works:
        for position in work.waiting:
            window.append((work.lengths[position], len(window), work, position))
            tokens += work.lengths[position]
            if tokens >= _WINDOW * bound:
                break
        if tokens >= _WINDOW * bound:
            break
    first = window[0]
    window.sort(key=lambda text: text[:2])
    low = bisect.bisect_left(window, first[:2], key=lambda text: text[:2])
    high = low + 1
    while True:
        ways = []
        if low > 0:
            ways.append((first[0] - window[low - 1][0], low - 1, high))
        if high < len(window):
            ways.append((window[high][0] - first[0], low, high + 1))
        ways = [way for way in ways if (way[2] - way[1]) * window[way[2] - 1][0] <= bound]
        if not ways:
            break
        _, low, high = min(ways)
    chosen = sorted(window[low:high], key=lambda text: text[1])
    picked: dict[K, tuple[Work[K], list[int]]] = {}
    for _, _, work, position in chosen:
        picked.setdefault(work.key, (work, []))[1].append(position)
    return picked.values()
