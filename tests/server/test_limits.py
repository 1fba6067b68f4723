"""The rate limit against its definition, and whose address counts."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedserve.server.limits import RateLimiter, client_address


@given(
    limit=st.integers(1, 6),
    steps=st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 0.7)), max_size=60),
)
def test_never_more_than_the_limit_in_any_second_and_never_fewer(limit: int, steps: list[tuple[str, float]]) -> None:
    limiter, now = RateLimiter(limit), 1000.0
    allowed: dict[str, list[float]] = {"a": [], "b": []}
    for address, pause in steps:
        now += pause
        recent = [t for t in allowed[address] if t > now - 1.0]
        charge = limiter.charge(address, now)
        assert charge.allowed == (len(recent) < limit)
        if charge.allowed:
            allowed[address].append(now)
            assert charge.remaining == limit - len(recent) - 1
        else:
            assert charge.remaining == 0
            assert charge.retry_after == pytest.approx(recent[0] + 1.0 - now)
        assert 0 < charge.reset <= 1.0 + 1e-9


def test_a_refused_request_may_come_back_after_retry_after() -> None:
    limiter = RateLimiter(2)
    limiter.charge("a", 0.0)
    limiter.charge("a", 0.25)
    refused = limiter.charge("a", 0.5)
    assert not refused.allowed
    assert refused.retry_after == 0.5
    assert limiter.charge("a", 0.5 + refused.retry_after).allowed


def test_idle_addresses_are_forgotten() -> None:
    limiter = RateLimiter(5)
    for number in range(1000):
        limiter.charge(f"address {number}", number * 0.01)
    assert len(limiter._times) <= 101


PROXIES = [ipaddress.ip_network("10.0.0.0/8")]


@pytest.mark.parametrize(
    ("peer", "forwarded", "trusted", "expected"),
    [
        ("192.0.2.1", [], [], "192.0.2.1"),
        ("192.0.2.1", ["198.51.100.7"], [], "192.0.2.1"),
        ("192.0.2.1", ["198.51.100.7"], PROXIES, "192.0.2.1"),
        ("10.0.0.1", ["198.51.100.7"], PROXIES, "198.51.100.7"),
        ("10.0.0.1", ["203.0.113.9, 198.51.100.7, 10.2.2.2"], PROXIES, "198.51.100.7"),
        ("10.0.0.1", ["203.0.113.9", "198.51.100.7"], PROXIES, "198.51.100.7"),
        ("10.0.0.1", ["198.51.100.7, nonsense"], PROXIES, "10.0.0.1"),
        ("10.0.0.1", [], PROXIES, "10.0.0.1"),
        ("10.0.0.1", ["10.0.0.2"], PROXIES, "10.0.0.2"),
        ("::ffff:192.0.2.1", [], [], "192.0.2.1"),
        ("2001:db8::1", [], [], "2001:db8::1"),
        (None, [], [], "unknown"),
    ],
)
def test_the_address_that_counts(
    peer: str | None, forwarded: list[str], trusted: list[ipaddress.IPv4Network], expected: str
) -> None:
    assert client_address(peer, forwarded, trusted) == expected
