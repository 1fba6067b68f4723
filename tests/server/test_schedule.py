"""Which team a batch runs on and when the next one is asked for, on a clock that the tests set."""

import pytest

from embedserve.server.schedule import Estimates, InTurn, Kind, Offer, Pace, SideBySide

WIDE = 2
PAIR = SideBySide(2, {"m": Pace(rate=10_000.0, slower=1.75)})
"""Two narrow teams, 0 and 1, and the wide one: 100 tokens take 10 ms on all cores and 17.5 on a narrow team."""


def offer(tokens: int, *, company: float = 0.0, now: float = 0.0) -> Offer:
    return Offer("m", tokens, company, now)


def test_a_batch_alone_runs_on_all_cores() -> None:
    assert PAIR.place({}, offer(100)) == WIDE


def test_a_batch_with_company_runs_on_a_narrow_team_where_it_is_done_sooner() -> None:
    # One after another on all cores, 100 tokens and their company would take longer than 17.5 ms.
    assert PAIR.place({}, offer(100, company=74)) == WIDE
    assert PAIR.place({}, offer(100, company=76)) == 0


def test_nothing_begins_beside_the_wide_team() -> None:
    assert PAIR.place({WIDE: 1.0}, offer(100, company=1e6)) is None


def test_the_wide_team_begins_only_when_the_narrow_ones_have_ended() -> None:
    # The other team is done in 1 ms: to wait for it and have all cores is 11 ms.
    assert PAIR.place({0: 0.001}, offer(100)) is None
    # In 8 ms: then it is 18 ms, and the free team has it done in 17.5.
    assert PAIR.place({0: 0.008}, offer(100)) == 1
    # Overdue, or never seen before: as if it were about to end.
    assert PAIR.place({0: -5.0}, offer(100)) is None
    assert PAIR.place({0: None}, offer(100)) is None
    assert PAIR.place({0: None}, offer(100, company=100)) == 1


def test_of_many_cores_a_few_texts_do_not_take_one_each() -> None:
    # 64 teams reach four times the rate of the wide one, so each takes 16 times as long as it.
    many = SideBySide(64, {"m": Pace(rate=10_000.0, slower=16.0)})
    assert many.place({}, offer(20, company=100)) == 64
    assert many.place({}, offer(256, company=16 * 256)) == 0


def test_a_batch_is_asked_for_as_soon_as_a_team_is_free() -> None:
    assert PAIR.free_at({}, 5.0) == 5.0
    assert PAIR.free_at({0: 9.0}, 5.0) == 5.0, "one of the narrow teams is"
    assert PAIR.free_at({0: 9.0, 1: 7.0}, 5.0) == 7.0
    assert PAIR.free_at({0: 9.0, 1: None}, 5.0) == 9.0
    assert PAIR.free_at({WIDE: 8.0}, 5.0) == 8.0
    assert PAIR.free_at({WIDE: None}, 5.0) is None, "its end will tell"


def test_a_gpu_has_one_more_batch_than_it_computes_and_no_third() -> None:
    pair = InTurn(2, launch=0.005)
    assert pair.place({}, offer(100)) == 0
    assert pair.place({0: 9.0}, offer(100)) == 1
    assert pair.place({0: 9.0, 1: 9.5}, offer(100)) is None
    assert pair.free_at({}, 5.0) == 5.0
    # It must not run dry: the next one is launched by the time the one that is computed ends.
    assert pair.free_at({0: 9.0}, 5.0) == 9.0
    assert pair.free_at({0: 9.0, 1: 9.5}, 5.0) is None
    assert pair.lead > pair.launch


def test_one_team_asks_by_the_end_of_its_batch() -> None:
    one = InTurn(1)
    assert one.free_at({0: 9.0}, 5.0) == 9.0
    assert one.free_at({0: None}, 5.0) is None
    assert one.place({0: 9.0}, offer(100)) is None


def test_long_texts_have_an_estimate_of_their_own() -> None:
    # Attention costs the square of the length: judged by short texts, a book would seem to end long before it does, and
    # the next batch would be bound behind it all the while.
    def kind(longest: int, share: float = 1.0) -> Kind:
        return Kind("m", "text", share, longest.bit_length())

    estimates = Estimates()
    assert estimates.at_most(kind(8), 8) is None
    estimates.learn(kind(8), 16, 0.016)
    assert estimates.seconds(kind(9), 9) == pytest.approx(0.009)
    assert estimates.seconds(kind(8192), 8192) is None
    assert estimates.at_most(kind(8192), 8192) == pytest.approx(8192 * 0.001 * 2**10)
    estimates.learn(kind(2048), 2048, 1.0)
    assert estimates.at_most(kind(8192), 8192) == pytest.approx(16.0), "the nearer, the closer: hangs shall show"
    estimates.learn(kind(8192), 8192, 4.0)
    assert estimates.at_most(kind(8192), 8192) == pytest.approx(4.0)
    assert estimates.seconds(kind(8192), 8192) == pytest.approx(4.0)
    assert estimates.seconds(kind(10), 10) == pytest.approx(0.010)
    assert estimates.seconds(kind(8, share=0.5), 8) is None, "a narrow team has its own"
