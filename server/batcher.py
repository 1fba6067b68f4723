"""The rules of the queue: which waiting texts form the next batch.

No sockets, no torch, no clock: the broker calls it, the tests exhaust it. The rules:

- A batch holds items of one lane (texts of one model, or its images, which are called texts below all the same) and
  costs at most the lane's bound. What a text costs depends on the backend: its tokens where batches are packed, and
  rows × longest where they are padded. A text that alone exceeds the bound runs alone.
- Oldest first. The request that has waited longest is always in the next batch, so nothing starves.
- A large request is split. What is left of it after a batch lines up again behind the requests that came in
  meanwhile: one text never waits for the whole of a large job, and large jobs take turns.
- Nothing is bound before an engine asks for it, so a late arrival still joins the next batch.
- Equal texts run once. Each request keeps its own place in line for each of its texts; whichever comes first runs, and
  all others that wait for an equal text get its row, as do those that arrive while it runs. So none is served later
  than without the others, but for the rest of the batch that computes its text already; and one that goes takes
  nothing from the others.
- The texts of a request whose client has gone are dropped while they wait.
- The queue is bounded in tokens. When nothing waits, any request is taken, however large. An equal text counts as any
  other while it waits, for the bound keeps memory as well as time; one that runs already does not wait.
- Texts whose batch died with its engine come back to the front, each request in batches of its own and with nothing
  beside them on the engine: a guilty one then takes no neighbour with it, and none pays for a neighbour. A request
  that is lost when it runs like this is given up; if it was one text that ran, so are the others that were lost
  before and wait for an equal one.
"""

import bisect
from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
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

T = TypeVar("T", bound=Hashable)
"""What the caller knows a text by: equal ones are of one lane, have as many tokens and the same answer."""


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


@dataclass(eq=False, slots=True)
class Work(Generic[K, T]):
    """One request: its texts and their tokens (≥ 1), in order."""

    key: K
    lane: Lane
    texts: Mapping[T, int]
    waiting: dict[T, int]
    """Those that are in no batch, in the same order."""
    unfinished: int
    """Texts that have no result yet, waiting or running."""
    turn: int
    """The place in line: the lowest is served first."""
    suspect: bool = False
    """A batch with texts of this request was lost with its engine."""


class Segment(NamedTuple, Generic[K, T]):
    """The part of a batch that a request has brought into it."""

    work: Work[K, T]
    texts: Sequence[T]


@dataclass(frozen=True, eq=False, slots=True)
class Batch(Generic[K, T]):
    """Texts to run together. Its rows are those of the segments, one segment after the other."""

    id: int
    lane: Lane
    segments: Sequence[Segment[K, T]]
    lengths: Sequence[int]
    """Tokens of each row."""
    claims: dict[Work[K, T], list[T]]
    """All requests that get rows of it, and which: those of the segments, and those that have equal texts."""
    alone: bool
    """It is of a suspect: nothing may run beside it on its engine."""


class Finished(NamedTuple, Generic[K, T]):
    """Texts of a request that a batch has computed; `left` texts of the request remain."""

    work: Work[K, T]
    texts: Sequence[T]
    left: int


class Batcher(Generic[K, T]):
    """The queue of all requests of all lanes. At most `max_queue_tokens` tokens wait in it."""

    def __init__(self, max_queue_tokens: int) -> None:
        self.max_queue_tokens = max_queue_tokens
        self.waiting_tokens = 0
        self.waiting_texts = 0
        self._works: dict[K, Work[K, T]] = {}
        self._lines: dict[Lane, OrderedDict[K, Work[K, T]]] = {}
        self._waiting: dict[T, dict[Work[K, T], None]] = {}
        """Text → the requests that wait for it."""
        self._batches: dict[int, Batch[K, T]] = {}
        self._running: dict[T, Batch[K, T]] = {}
        """Text → the batch that computes it for all. Suspects' are not among them."""
        self._last_turn = 0
        self._first_turn = 0
        self._last_batch = 0

    def __len__(self) -> int:
        """Requests that are waiting, running or both."""
        return len(self._works)

    def add(self, key: K, lane: Lane, texts: Mapping[T, int]) -> Work[K, T]:
        """Queue a request: its texts and their tokens. Raises `QueueFullError` when it does not fit behind those that
        wait."""
        if key in self._works:
            raise ValueError(f"a request with the key {key!r} is here already")
        if not texts or min(texts.values()) < 1:
            raise ValueError("a request needs texts, and each at least one token")
        running = self._running
        if running.keys().isdisjoint(texts):
            waiting = dict(texts)
        else:
            waiting = {text: tokens for text, tokens in texts.items() if text not in running}
        tokens = sum(waiting.values())
        if tokens and self.waiting_tokens and self.waiting_tokens + tokens > self.max_queue_tokens:
            raise QueueFullError(self.waiting_tokens, tokens)
        self._last_turn += 1
        work = Work(key, lane, texts, waiting, len(texts), self._last_turn)
        self._works[key] = work
        if len(waiting) < len(texts):
            for text in texts:
                if text not in waiting:
                    running[text].claims.setdefault(work, []).append(text)
        if waiting:
            self._wait(work, waiting)
            self._lines.setdefault(lane, OrderedDict())[key] = work
        return work

    def cancel(self, key: K) -> Work[K, T] | None:
        """Forget a request. What waits of it alone does not run; what runs is left out of `finish`."""
        work = self._works.pop(key, None)
        if work is not None and work.waiting:
            for text in work.waiting:
                self._leave_text(work, text)
            self._count(work.waiting.values(), -1)
            work.waiting.clear()
            self._leave_line(work)
        return work

    def cancel_lane(self, lane: Lane) -> list[Work[K, T]]:
        """Forget every request of a lane that still has texts waiting: no engine is there to run them."""
        keys = list(self._lines.get(lane, ()))
        return [work for key in keys if (work := self.cancel(key)) is not None]

    def take(self, bounds: Mapping[Lane, Bound], *, idle: bool = True) -> Batch[K, T] | None:
        """The next batch for an engine that serves the lanes of `bounds`; None when nothing waits for it, or what is
        next has to run alone and the engine is not `idle`.

        The lane whose first request has waited longest goes first.
        """
        heads = [next(iter(line.values())) for lane, line in self._lines.items() if lane in bounds]
        if not heads:
            return None
        head = min(heads, key=lambda work: work.turn)
        if head.suspect and not idle:
            return None
        bound = bounds[head.lane]
        candidates = [head] if head.suspect else (w for w in self._lines[head.lane].values() if not w.suspect)
        pick = _pick_packed if bound.cost is Cost.PACKED else _pick_alike
        segments = list(pick(candidates, bound.tokens))

        lengths: list[int] = []
        claims: dict[Work[K, T], list[T]] = {}
        for picker, texts in segments:
            claims.setdefault(picker, []).extend(texts)
            for text in texts:
                lengths.append(picker.waiting.pop(text))
                for work in self._sharers(text, picker):
                    claims.setdefault(work, []).append(text)
                    self._count([work.waiting.pop(text)], -1)
        self._count(lengths, -1)
        for work in claims:
            if not work.waiting:
                self._leave_line(work)
        for segment in segments:
            if segment.work.waiting:
                self._last_turn += 1
                segment.work.turn = self._last_turn
                self._lines[head.lane].move_to_end(segment.work.key)

        self._last_batch += 1
        batch = Batch(self._last_batch, head.lane, segments, lengths, claims, head.suspect)
        self._batches[batch.id] = batch
        if not batch.alone:
            for segment in segments:
                for text in segment.texts:
                    self._running[text] = batch
        return batch

    def finish(self, batch_id: int) -> list[Finished[K, T]]:
        """A batch has run: what each request gets of it, those that were cancelled left out.

        A request without texts left is forgotten.
        """
        finished = []
        for work, texts in self._end(batch_id).claims.items():
            if self._works.get(work.key) is work:
                work.unfinished -= len(texts)
                finished.append(Finished(work, texts, work.unfinished))
                if not work.unfinished:
                    del self._works[work.key]
        return finished

    def give_back(self, batch_id: int, *, ran: bool) -> list[Work[K, T]]:
        """A batch was lost with its engine: its texts line up again, in front of all others.

        If it `ran`, each of its requests may have been the reason; one that ran alone was, and is given up: forgotten,
        and returned.
        """
        batch = self._end(batch_id)
        here = [work for work in batch.claims if self._works.get(work.key) is work]
        if ran and batch.alone:
            if len(batch.lengths) == 1:
                [guilty] = batch.segments[0].texts
                here += [work for work in self._waiting.get(guilty, ()) if work.suspect]
            for work in here:
                self.cancel(work.key)
            return here
        for work in sorted(here, key=lambda work: work.turn, reverse=True):
            work.suspect = work.suspect or ran
            texts = batch.claims[work]
            self._wait(work, {text: work.texts[text] for text in texts})
            back = {*texts, *work.waiting}
            work.waiting = {text: tokens for text, tokens in work.texts.items() if text in back}
            self._first_turn -= 1
            work.turn = self._first_turn
            line = self._lines.setdefault(work.lane, OrderedDict())
            line[work.key] = work
            line.move_to_end(work.key, last=False)
        return []

    def _wait(self, work: Work[K, T], texts: Mapping[T, int]) -> None:
        for text in texts:
            self._waiting.setdefault(text, {})[work] = None
        self._count(texts.values(), +1)

    def _sharers(self, text: T, picker: Work[K, T]) -> Iterable[Work[K, T]]:
        """The requests that get a text's row because `picker` has it run; neither they nor it wait for it any more.

        Suspects share with nobody: what kills an engine may be in any text of theirs.
        """
        works = self._waiting.pop(text)
        if len(works) == 1:
            return ()
        del works[picker]
        sharers = [] if picker.suspect else [work for work in works if not work.suspect]
        for work in sharers:
            del works[work]
        if works:
            self._waiting[text] = works
        return sharers

    def _leave_text(self, work: Work[K, T], text: T) -> None:
        works = self._waiting[text]
        del works[work]
        if not works:
            del self._waiting[text]

    def _leave_line(self, work: Work[K, T]) -> None:
        line = self._lines[work.lane]
        del line[work.key]
        if not line:
            del self._lines[work.lane]

    def _end(self, batch_id: int) -> Batch[K, T]:
        batch = self._batches.pop(batch_id)
        if not batch.alone:
            for segment in batch.segments:
                for text in segment.texts:
                    del self._running[text]
        return batch

    def _count(self, tokens: Collection[int], sign: int) -> None:
        self.waiting_texts += sign * len(tokens)
        self.waiting_tokens += sign * sum(tokens)


def _pick_packed(works: Iterable[Work[K, T]], bound: int) -> Iterator[Segment[K, T]]:
    """Texts in line until the first one that no longer fits."""
    picked: set[T] = set()
    room = bound
    for work in works:
        texts: list[T] = []
        for text, tokens in work.waiting.items():
            if text in picked:
                continue
            if picked and tokens > room:
                room = 0
                break
            picked.add(text)
            texts.append(text)
            room -= tokens
        if texts:
            yield Segment(work, texts)
        if room <= 0:
            return


_WINDOW = 4
"""How many batches' worth of waiting texts `_pick_alike` chooses from: more groups better, and delays more."""


def _pick_alike(works: Iterable[Work[K, T]], bound: int) -> Iterator[Segment[K, T]]:
    """The first text in line, and from those near it the ones most like it in length."""
    window = list(_window(works, _WINDOW * bound))
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
    picked: dict[Work[K, T], list[T]] = {}
    for _, _, work, text in sorted(window[low:high], key=lambda text: text[1]):
        picked.setdefault(work, []).append(text)
    for work, texts in picked.items():
        yield Segment(work, texts)


def _window(works: Iterable[Work[K, T]], bound: int) -> Iterator[tuple[int, int, Work[K, T], T]]:
    """The first texts in line, each once, until they have `bound` tokens: (tokens, place in line, request, text)."""
    seen: set[T] = set()
    total = 0
    for work in works:
        for text, tokens in work.waiting.items():
            if text not in seen:
                yield tokens, len(seen), work, text
                seen.add(text)
                total += tokens
                if total >= bound:
                    return
