"""The batcher against a model of its rules."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from embedserve.server.batcher import Batch, Batcher, Bound, Cost, Lane, QueueFullError

MODELS = ("a", "b")
Text = tuple[str, int]
"""Model and number. Few numbers, so that texts are often equal."""

TOKENS = [1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 80, 4, 4, 7, 9, 30]


def cost(lengths: list[int], kind: Cost) -> int:
    return sum(lengths) if kind is Cost.PACKED else len(lengths) * max(lengths)


class BatcherMachine(RuleBasedStateMachine):
    """Random requests, batches, losses and cancellations; plain sets beside the queue tell what is right."""

    @initialize(
        limit=st.integers(20, 400),
        bounds=st.tuples(*(st.builds(Bound, st.integers(5, 60), st.sampled_from(Cost)) for _ in MODELS)),
    )
    def start(self, limit: int, bounds: tuple[Bound, Bound]) -> None:
        self.batcher: Batcher[int, Text] = Batcher(limit)
        self.bounds = dict(zip(MODELS, bounds, strict=True))
        self.requests: dict[int, dict[Text, int]] = {}
        self.waiting: dict[int, set[Text]] = {}
        self.suspects: set[int] = set()
        self.running: dict[int, tuple[Batch[int, Text], dict[int, set[Text]]]] = {}
        """Each batch, and what each request gets of it."""
        self.next_key = 0

    # ------------------------------------------------------------------------------------------------------- rules

    @rule(model=st.sampled_from(MODELS), numbers=st.lists(st.integers(0, len(TOKENS) - 1), min_size=1, unique=True))
    def add(self, model: str, numbers: list[int]) -> None:
        key, self.next_key = self.next_key, self.next_key + 1
        texts = {(model, number): TOKENS[number] for number in numbers}
        shared = {text: gets for batch, gets in self.running.values() if not batch.alone for text in rows(batch)}
        waits = texts.keys() - shared.keys()
        tokens, waiting = sum(texts[text] for text in waits), self.waiting_tokens()
        if tokens and waiting and waiting + tokens > self.batcher.max_queue_tokens:
            with pytest.raises(QueueFullError):
                self.batcher.add(key, Lane(model), texts)
            return
        self.batcher.add(key, Lane(model), texts)
        self.requests[key] = texts
        self.waiting[key] = waits
        for text in texts.keys() & shared.keys():
            shared[text].setdefault(key, set()).add(text)

    @rule(models=st.sets(st.sampled_from(MODELS), min_size=1), idle=st.booleans())
    def take(self, models: set[str], idle: bool) -> None:
        # Asked again by an engine that has the lowest turn first: the head of the line is always in the batch.
        lines = [line for lane, line in self.batcher._lines.items() if lane.model in models]
        head = min((work for line in lines for work in line.values()), key=lambda work: work.turn, default=None)
        batch = self.batcher.take({Lane(model): self.bounds[model] for model in models}, idle=idle)
        if batch is None:
            assert head is None or (head.key in self.suspects and not idle), "none only where none may run"
            return
        assert head is not None
        bound = self.bounds[batch.lane.model]
        assert batch.lane.model in models
        assert len(batch.lengths) == 1 or cost(list(batch.lengths), bound.cost) <= bound.tokens
        texts = rows(batch)
        assert len(texts) == len(set(texts)), "equal texts have one row"
        assert list(batch.lengths) == [TOKENS[number] for _, number in texts]
        assert head.key == batch.segments[0].work.key, "the oldest is served"
        if batch.alone:
            assert idle
            assert {segment.work.key for segment in batch.segments} == {head.key} <= self.suspects
            gets = {head.key: set(texts)}
        else:
            computed = {text for other, _ in self.running.values() if not other.alone for text in rows(other)}
            assert computed.isdisjoint(texts), "what runs already does not run again"
            gets = {key: self.waiting[key] & set(texts) for key in self.requests if key not in self.suspects}
        for segment in batch.segments:
            key, own = segment.work.key, set(segment.texts)
            assert own <= self.waiting[key], "nothing twice"
            if bound.cost is Cost.PACKED:
                order = [text for text in self.requests[key] if text in own]
                assert list(segment.texts) == order, "in order within a request"
        gets = {key: own for key, own in gets.items() if own}
        assert {work.key: set(own) for work, own in batch.claims.items()} == gets, "all who wait for them get them"
        for key, own in gets.items():
            self.waiting[key] -= own
        self.running[batch.id] = (batch, gets)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        batch, gets = self.running.pop(data.draw(st.sampled_from(sorted(self.running))))
        finished = {f.work.key: (set(f.texts), f.left) for f in self.batcher.finish(batch.id)}
        expected = {}
        for key, own in gets.items():
            if key in self.requests:
                left = len(self.waiting[key]) + sum(len(other.get(key, ())) for _, other in self.running.values())
                expected[key] = (own, left)
                if not left:
                    self.forget(key)
        assert finished == expected

    @precondition(lambda self: self.running)
    @rule(data=st.data(), ran=st.booleans())
    def lose(self, data: st.DataObject, ran: bool) -> None:
        batch, gets = self.running.pop(data.draw(st.sampled_from(sorted(self.running))))
        given_up = {work.key for work in self.batcher.give_back(batch.id, ran=ran)}
        here = gets.keys() & self.requests.keys()
        expected = set()
        if ran and batch.alone:
            expected |= here
            if len(batch.lengths) == 1:
                expected |= {
                    key for key in self.suspects & self.requests.keys() if self.waiting[key] & set(rows(batch))
                }
        else:
            self.suspects |= here if ran else set()
            for key in here:
                self.waiting[key] |= gets[key]
        assert given_up == expected, "given up after a loss alone, not before"
        for key in expected:
            self.forget(key)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.requests)))
        assert self.batcher.cancel(key) is not None
        assert self.batcher.cancel(key) is None
        self.forget(key)

    @rule(model=st.sampled_from(MODELS))
    def cancel_lane(self, model: str) -> None:
        gone = {work.key for work in self.batcher.cancel_lane(Lane(model))}
        expected = {key for key, texts in self.requests.items() if next(iter(texts))[0] == model and self.waiting[key]}
        assert gone == expected
        for key in expected:
            self.forget(key)

    # -------------------------------------------------------------------------------------------------- invariants

    def forget(self, key: int) -> None:
        del self.requests[key], self.waiting[key]

    def waiting_tokens(self) -> int:
        return sum(TOKENS[number] for texts in self.waiting.values() for _, number in texts)

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "batcher"):
            return
        assert self.batcher.waiting_tokens == self.waiting_tokens()
        assert self.batcher.waiting_texts == sum(map(len, self.waiting.values()))
        assert len(self.batcher) == len(self.requests)

    @invariant()
    def nothing_is_kept_for_nobody(self) -> None:
        if not hasattr(self, "batcher"):
            return
        assert self.batcher._waiting.keys() == set().union(*self.waiting.values())
        shared = [text for batch, _ in self.running.values() if not batch.alone for text in rows(batch)]
        assert sorted(self.batcher._running) == sorted(shared)

    def teardown(self) -> None:
        """Whatever happened, what waits can be run to the end: nothing is lost, and nothing starves."""
        if not hasattr(self, "batcher"):
            return
        for _ in range(1 + sum(map(len, self.waiting.values()))):
            self.take(set(MODELS), idle=True)
        assert not any(self.waiting.values())


def rows(batch: Batch[int, Text]) -> list[Text]:
    return [text for segment in batch.segments for text in segment.texts]


TestBatcher = BatcherMachine.TestCase
TestBatcher.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)

PACKED = {Lane("m"): Bound(10)}


def texts(*tokens: int, first: int = 0) -> dict[int, int]:
    """Texts of so many tokens, numbered from `first` on; equal numbers are equal texts."""
    return {first + number: count for number, count in enumerate(tokens)}


def taken(batch: Batch[str, int] | None) -> dict[str, list[int]]:
    """What each request has brought into a batch."""
    assert batch is not None
    return {segment.work.key: list(segment.texts) for segment in batch.segments}


def shared(batch: Batch[str, int] | None) -> dict[str, list[int]]:
    """What each request gets of a batch."""
    assert batch is not None
    return {work.key: sorted(own) for work, own in batch.claims.items()}


def test_a_small_request_waits_for_one_batch_of_a_large_one() -> None:
    batcher: Batcher[str, int] = Batcher(1000)
    batcher.add("large", Lane("m"), texts(*[5] * 20))
    assert taken(batcher.take(PACKED)) == {"large": [0, 1]}
    batcher.add("small", Lane("m"), texts(5, first=100))
    assert taken(batcher.take(PACKED)) == {"large": [2, 3]}, "it had lined up again before the small one came"
    assert taken(batcher.take(PACKED)) == {"small": [100], "large": [4]}


def test_large_requests_take_turns() -> None:
    batcher: Batcher[str, int] = Batcher(1000)
    batcher.add("one", Lane("m"), texts(*[5] * 4))
    batcher.add("two", Lane("m"), texts(*[5] * 4, first=100))
    order = [next(iter(taken(batcher.take(PACKED)))) for _ in range(4)]
    assert order == ["one", "two", "one", "two"]


def test_a_late_arrival_joins_the_next_batch() -> None:
    batcher: Batcher[str, int] = Batcher(1000)
    batcher.add("early", Lane("m"), texts(3))
    batcher.add("late", Lane("m"), texts(3, first=100))
    assert taken(batcher.take(PACKED)) == {"early": [0], "late": [100]}


def test_a_text_over_the_bound_runs_alone() -> None:
    batcher: Batcher[str, int] = Batcher(1000)
    batcher.add("long", Lane("m"), texts(50))
    batcher.add("next", Lane("m"), texts(1, first=100))
    assert taken(batcher.take(PACKED)) == {"long": [0]}
    assert taken(batcher.take(PACKED)) == {"next": [100]}


def test_padded_batches_group_by_length() -> None:
    batcher: Batcher[str, int] = Batcher(10_000)
    batcher.add("mixed", Lane("m"), texts(4, 100, 5, 90, 4, 95))
    bounds = {Lane("m"): Bound(300, Cost.PADDED)}
    assert taken(batcher.take(bounds)) == {"mixed": [0, 2, 4]}
    assert taken(batcher.take(bounds)) == {"mixed": [1, 3, 5]}


def test_an_idle_queue_takes_any_request_and_a_full_one_none() -> None:
    batcher: Batcher[str, int] = Batcher(10)
    batcher.add("huge", Lane("m"), texts(*[8] * 100))
    with pytest.raises(QueueFullError) as caught:
        batcher.add("more", Lane("m"), texts(1, first=1000))
    assert (caught.value.waiting, caught.value.tokens) == (800, 1)


# ------------------------------------------------------------------------------------------------------- equal texts


def test_equal_texts_run_once_and_go_to_all_that_wait() -> None:
    batcher: Batcher[str, int] = Batcher(1000)
    batcher.add("one", Lane("m"), {1: 2, 2: 3})
    batcher.add("two", Lane("m"), {2: 3, 3: 2})
    batcher.add("three", Lane("m"), {1: 2})
    batch = batcher.take(PACKED)
    assert taken(batch) == {"one": [1, 2], "two": [3]}
    assert shared(batch) == {"one": [1, 2], "two": [2, 3], "three": [1]}
    assert batch is not None
    assert sorted(batch.lengths) == [2, 2, 3]
    assert {(f.work.key, f.left) for f in batcher.finish(batch.id)} == {("one", 0), ("two", 0), ("three", 0)}
    assert len(batcher) == 0


def test_a_text_that_runs_already_is_not_queued_again() -> None:
    batcher: Batcher[str, int] = Batcher(4)
    batcher.add("first", Lane("m"), {1: 4})
    batch = batcher.take(PACKED)
    assert batch is not None
    batcher.add("filler", Lane("m"), {2: 4})
    batcher.add("second", Lane("m"), {1: 4})  # the queue is full, but it takes no room in it
    assert [f.work.key for f in batcher.finish(batch.id)] == ["first", "second"]


def test_a_small_request_is_not_held_up_by_an_equal_text_at_the_end_of_a_large_one() -> None:
    batcher: Batcher[str, int] = Batcher(1000)
    batcher.add("large", Lane("m"), texts(*[5] * 20))
    batcher.take(PACKED)
    batcher.add("small", Lane("m"), {19: 5})
    batcher.take(PACKED)
    batch = batcher.take(PACKED)
    assert taken(batch) == {"small": [19], "large": [4]}
    assert shared(batch) == {"small": [19], "large": [4, 19]}, "and the large one need not run it again"


def test_who_hangs_up_takes_nothing_from_those_with_equal_texts() -> None:
    batcher: Batcher[str, int] = Batcher(1000)
    for key in ("first", "second", "third"):
        batcher.add(key, Lane("m"), {1: 5})
    batcher.cancel("first")
    batch = batcher.take(PACKED)
    assert taken(batch) == {"second": [1]}
    batcher.cancel("second")
    assert batch is not None
    assert [f.work.key for f in batcher.finish(batch.id)] == ["third"]


# -------------------------------------------------------------------------------------------------------------- losses


def test_suspects_run_alone_and_are_given_up_when_lost_again() -> None:
    batcher: Batcher[str, int] = Batcher(1000)
    batcher.add("poison", Lane("m"), {1: 2})
    batcher.add("neighbour", Lane("m"), {2: 2})
    both = batcher.take(PACKED)
    assert both is not None
    assert batcher.give_back(both.id, ran=True) == []
    assert batcher.take(PACKED, idle=False) is None, "nor beside another batch"
    first = batcher.take(PACKED)
    assert taken(first) == {"poison": [1]}
    assert first is not None
    assert first.alone
    assert [work.key for work in batcher.give_back(first.id, ran=True)] == ["poison"]
    assert taken(batcher.take(PACKED)) == {"neighbour": [2]}


def test_two_batches_lost_at_once_are_one_loss() -> None:
    batcher: Batcher[str, int] = Batcher(1000)
    batcher.add("large", Lane("m"), texts(8, 8))
    running = [batcher.take(PACKED), batcher.take(PACKED)]
    for batch in reversed(running):
        assert batch is not None
        assert batcher.give_back(batch.id, ran=True) == []
    assert [taken(batcher.take(PACKED)) for _ in running] == [{"large": [0]}, {"large": [1]}]


def test_no_request_pays_for_the_neighbours_of_an_equal_text() -> None:
    batcher: Batcher[str, int] = Batcher(1000)
    batcher.add("poison", Lane("m"), {1: 2, 2: 2})
    batcher.add("innocent", Lane("m"), {2: 2})
    both = batcher.take(PACKED)
    assert both is not None
    batcher.give_back(both.id, ran=True)
    poison = batcher.take(PACKED)
    assert shared(poison) == {"poison": [1, 2]}, "suspects share nothing"
    assert poison is not None
    batcher.add("later", Lane("m"), {2: 2})
    assert [work.key for work in batcher.give_back(poison.id, ran=True)] == ["poison"]
    assert shared(batcher.take(PACKED)) == {"innocent": [2]}
    assert shared(batcher.take(PACKED)) == {"later": [2]}


def test_a_text_that_kills_when_it_runs_by_itself_is_not_tried_for_each_who_sent_it() -> None:
    batcher: Batcher[str, int] = Batcher(1000)
    for key in ("one", "two", "three"):
        batcher.add(key, Lane("m"), {1: 2})
    together = batcher.take(PACKED)
    assert together is not None
    batcher.give_back(together.id, ran=True)
    alone = batcher.take(PACKED)
    assert alone is not None
    assert sorted(work.key for work in batcher.give_back(alone.id, ran=True)) == ["one", "three", "two"]
    assert len(batcher) == 0


def test_a_bound_batch_that_had_not_begun_makes_no_suspects() -> None:
    batcher: Batcher[str, int] = Batcher(1000)
    batcher.add("one", Lane("m"), {1: 2})
    batcher.add("two", Lane("m"), {2: 2})
    batch = batcher.take(PACKED)
    assert batch is not None
    batcher.give_back(batch.id, ran=False)
    assert taken(batcher.take(PACKED)) == {"one": [1], "two": [2]}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(9, 40))
def test_the_queue_drains_in_as_few_batches_as_first_come_first_served_allows(lengths: list[int], bound: int) -> None:
    batcher: Batcher[int, int] = Batcher(10_000)
    for key, length in enumerate(lengths):
        batcher.add(key, Lane("m"), {key: length})
    batches = []
    while (batch := batcher.take({Lane("m"): Bound(bound)})) is not None:
        batches.append(list(batch.lengths))
    assert [length for batch in batches for length in batch] == lengths
    for this, following in itertools.pairwise(batches):
        assert sum(this) + following[0] > bound, "no room was left unused"
