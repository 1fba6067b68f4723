"""The batcher against a model of its rules."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from embedserve.server.batcher import Batch, Batcher, Bound, Cost, QueueFullError

MODELS = ("a", "b")


def cost(lengths: list[int], kind: Cost) -> int:
    return sum(lengths) if kind is Cost.PACKED else len(lengths) * max(lengths)


class BatcherMachine(RuleBasedStateMachine):
    """Random requests, batches, losses and cancellations; plain sets beside the queue tell what is right."""

    @initialize(
        limit=st.integers(20, 400),
        bounds=st.tuples(*(st.builds(Bound, st.integers(5, 60), st.sampled_from(Cost)) for _ in MODELS)),
    )
    def start(self, limit: int, bounds: tuple[Bound, Bound]) -> None:
        self.batcher: Batcher[int] = Batcher(limit)
        self.bounds = dict(zip(MODELS, bounds, strict=True))
        self.requests: dict[int, tuple[str, list[int]]] = {}
        self.waiting: dict[int, set[int]] = {}
        self.done: dict[int, list[int]] = {}
        self.losses: dict[int, int] = {}
        self.running: list[Batch[int]] = []
        self.next_key = 0

    # ------------------------------------------------------------------------------------------------------- rules

    @rule(model=st.sampled_from(MODELS), lengths=st.lists(st.integers(1, 80), min_size=1, max_size=12))
    def add(self, model: str, lengths: list[int]) -> None:
        key, self.next_key = self.next_key, self.next_key + 1
        waiting = self.waiting_tokens()
        if waiting and waiting + sum(lengths) > self.batcher.max_queue_tokens:
            with pytest.raises(QueueFullError):
                self.batcher.add(key, model, lengths)
            return
        self.batcher.add(key, model, lengths)
        self.requests[key] = (model, lengths)
        self.waiting[key] = set(range(len(lengths)))
        self.done[key] = []
        self.losses[key] = 0

    @rule(models=st.sets(st.sampled_from(MODELS), min_size=1))
    def take(self, models: set[str]) -> None:
        # Asked again by an engine that has the lowest turn first: the head of the line is always in the batch.
        heads = {w.key: w.turn for line in self.batcher._lines.values() for w in line.values() if w.lane in models}
        batch = self.batcher.take({model: self.bounds[model] for model in models})
        if batch is None:
            assert not any(self.waiting[key] for key in self.requests if self.requests[key][0] in models)
            return
        bound = self.bounds[batch.lane]
        assert batch.lane in models
        assert len(batch.lengths) == 1 or cost(list(batch.lengths), bound.cost) <= bound.tokens
        keys = [segment.work.key for segment in batch.segments]
        assert len(keys) == len(set(keys))
        assert min(heads, key=heads.__getitem__) in keys, "the oldest is served"
        if any(segment.work.suspect for segment in batch.segments):
            assert len(batch.segments) == 1, "a suspect runs alone"
        expected_lengths = []
        for segment in batch.segments:
            key = segment.work.key
            assert set(segment.positions) <= self.waiting[key], "nothing twice"
            if bound.cost is Cost.PACKED:
                rest = sorted(self.waiting[key])
                assert list(segment.positions) == rest[: len(segment.positions)], "in order within a request"
            self.waiting[key] -= set(segment.positions)
            expected_lengths += [self.requests[key][1][p] for p in segment.positions]
        assert list(batch.lengths) == expected_lengths
        self.running.append(batch)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        batch = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        finished = self.batcher.finish(batch.id)
        rows = [(f.segment.work.key, list(f.segment.positions), f.first_row, f.left) for f in finished]
        expected, row = [], 0
        for segment in batch.segments:
            key = segment.work.key
            if key in self.requests:
                self.done[key] += segment.positions
                left = len(self.requests[key][1]) - len(self.done[key])
                expected.append((key, list(segment.positions), row, left))
                if not left:
                    assert sorted(self.done[key]) == list(range(len(self.requests[key][1]))), "each text exactly once"
                    self.forget(key)
            row += len(segment.positions)
        assert rows == expected

    @precondition(lambda self: self.running)
    @rule(data=st.data(), ran=st.booleans())
    def lose(self, data: st.DataObject, ran: bool) -> None:
        batch = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        given_up = {work.key for work in self.batcher.give_back(batch.id, ran=ran)}
        expected = set()
        for segment in batch.segments:
            key = segment.work.key
            if key not in self.requests:
                continue
            if ran and self.losses[key]:
                expected.add(key)
                self.forget(key)
                continue
            self.losses[key] += ran
            self.waiting[key] |= set(segment.positions)
        assert given_up == expected, "given up after the second loss, not before"

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.requests)))
        assert self.batcher.cancel(key) is not None
        assert self.batcher.cancel(key) is None
        self.forget(key)

    @rule(model=st.sampled_from(MODELS))
    def cancel_lane(self, model: str) -> None:
        gone = {work.key for work in self.batcher.cancel_lane(model)}
        expected = {key for key, (name, _) in self.requests.items() if name == model and self.waiting[key]}
        assert gone == expected
        for key in expected:
            self.forget(key)

    # -------------------------------------------------------------------------------------------------- invariants

    def forget(self, key: int) -> None:
        del self.requests[key], self.waiting[key], self.done[key]

    def waiting_tokens(self) -> int:
        return sum(self.requests[key][1][p] for key, positions in self.waiting.items() for p in positions)

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "batcher"):
            return
        assert self.batcher.waiting_tokens == self.waiting_tokens()
        assert self.batcher.waiting_texts == sum(map(len, self.waiting.values()))
        assert len(self.batcher) == len(self.requests)

    def teardown(self) -> None:
        """Whatever happened, what waits can be run to the end: nothing is lost, and nothing starves."""
        if not hasattr(self, "batcher"):
            return
        for _ in range(1 + sum(map(len, self.waiting.values()))):
            self.take(set(MODELS))
        assert not any(self.waiting.values())


TestBatcher = BatcherMachine.TestCase
TestBatcher.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)

PACKED = {"m": Bound(10)}


def positions(batch: Batch[str] | None) -> dict[str, list[int]]:
    assert batch is not None
    return {segment.work.key: list(segment.positions) for segment in batch.segments}


def test_a_small_request_waits_for_one_batch_of_a_large_one() -> None:
    batcher: Batcher[str] = Batcher(1000)
    batcher.add("large", "m", [5] * 20)
    assert positions(batcher.take(PACKED)) == {"large": [0, 1]}
    batcher.add("small", "m", [5])
    assert positions(batcher.take(PACKED)) == {"large": [2, 3]}, "it had lined up again before the small one came"
    assert positions(batcher.take(PACKED)) == {"small": [0], "large": [4]}


def test_large_requests_take_turns() -> None:
    batcher: Batcher[str] = Batcher(1000)
    batcher.add("one", "m", [5] * 4)
    batcher.add("two", "m", [5] * 4)
    order = [next(iter(positions(batcher.take(PACKED)))) for _ in range(4)]
    assert order == ["one", "two", "one", "two"]


def test_a_late_arrival_joins_the_next_batch() -> None:
    batcher: Batcher[str] = Batcher(1000)
    batcher.add("early", "m", [3])
    batcher.add("late", "m", [3])
    assert positions(batcher.take(PACKED)) == {"early": [0], "late": [0]}


def test_a_text_over_the_bound_runs_alone() -> None:
    batcher: Batcher[str] = Batcher(1000)
    batcher.add("long", "m", [50])
    batcher.add("next", "m", [1])
    assert positions(batcher.take(PACKED)) == {"long": [0]}
    assert positions(batcher.take(PACKED)) == {"next": [0]}


def test_padded_batches_group_by_length() -> None:
    batcher: Batcher[str] = Batcher(10_000)
    batcher.add("mixed", "m", [4, 100, 5, 90, 4, 95])
    bounds = {"m": Bound(300, Cost.PADDED)}
    assert positions(batcher.take(bounds)) == {"mixed": [0, 2, 4]}
    assert positions(batcher.take(bounds)) == {"mixed": [1, 3, 5]}


def test_an_idle_queue_takes_any_request_and_a_full_one_none() -> None:
    batcher: Batcher[str] = Batcher(10)
    batcher.add("huge", "m", [8] * 100)
    with pytest.raises(QueueFullError) as caught:
        batcher.add("more", "m", [1])
    assert (caught.value.waiting, caught.value.tokens) == (800, 1)


def test_suspects_run_alone_and_are_given_up_when_lost_again() -> None:
    batcher: Batcher[str] = Batcher(1000)
    batcher.add("poison", "m", [2])
    batcher.add("neighbour", "m", [2])
    both = batcher.take(PACKED)
    assert both is not None
    assert batcher.give_back(both.id, ran=True) == []
    first = batcher.take(PACKED)
    assert positions(first) == {"poison": [0]}
    assert first is not None
    assert [work.key for work in batcher.give_back(first.id, ran=True)] == ["poison"]
    assert positions(batcher.take(PACKED)) == {"neighbour": [0]}


def test_a_bound_batch_that_had_not_begun_makes_no_suspects() -> None:
    batcher: Batcher[str] = Batcher(1000)
    batcher.add("one", "m", [2])
    batcher.add("two", "m", [2])
    batch = batcher.take(PACKED)
    assert batch is not None
    batcher.give_back(batch.id, ran=False)
    assert positions(batcher.take(PACKED)) == {"one": [0], "two": [0]}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(9, 40))
def test_the_queue_drains_in_as_few_batches_as_first_come_first_served_allows(lengths: list[int], bound: int) -> None:
    batcher: Batcher[int] = Batcher(10_000)
    for key, length in enumerate(lengths):
        batcher.add(key, "m", [length])
    batches = []
    while (batch := batcher.take({"m": Bound(bound)})) is not None:
        batches.append(list(batch.lengths))
    assert [length for batch in batches for length in batch] == lengths
    for this, following in itertools.pairwise(batches):
        assert sum(this) + following[0] > bound, "no room was left unused"
