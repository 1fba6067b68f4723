"""How often a client address may ask. The counting happens in the broker, so it holds across all front ends."""

import ipaddress
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Charge", "RateLimiter", "client_address"]

_WINDOW = 1.0
"""Seconds over which requests are counted."""


@dataclass(frozen=True)
class Charge:
    """One request's verdict. `reset`: seconds until nothing counts any more; `retry_after`: until one is allowed."""

    allowed: bool
    remaining: int
    reset: float
    retry_after: float


class RateLimiter:
    """At most `limit` requests of one address within any second: a sliding window, exact at every moment.

    Times are seconds of a clock that never goes back. Memory: one float for each counted request of the last second.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        # By the time of the last counted request, so the idle ones are in front.
        self._times: OrderedDict[str, deque[float]] = OrderedDict()

    def charge(self, address: str, now: float) -> Charge:
        """Count a request of `address` at the time `now`, if it is allowed. A refused request costs nothing."""
        self._forget_idle(now)
        times = self._times.get(address)
        if times is None:
            times = self._times[address] = deque()
        while times and times[0] <= now - _WINDOW:
            times.popleft()
        allowed = len(times) < self.limit
        if allowed:
            times.append(now)
            self._times.move_to_end(address)
        return Charge(
            allowed=allowed,
            remaining=self.limit - len(times),
            reset=times[-1] + _WINDOW - now,
            retry_after=0.0 if allowed else times[0] + _WINDOW - now,
        )

    def _forget_idle(self, now: float) -> None:
        while self._times:
            address, times = next(iter(self._times.items()))
            if times[-1] > now - _WINDOW:
                return
            del self._times[address]


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def client_address(peer: str | None, forwarded: Sequence[str], trusted: Sequence[Network]) -> str:
    """The address to count a request under.

    The peer's own, unless the peer is a trusted proxy: then the last entry of `forwarded` (the values of the
    X-Forwarded-For headers, in order) that is not a trusted proxy itself. Whatever stands before it, anyone may have
    written.
    """
    address = _parse(peer)
    if address is None:
        return peer or "unknown"
    if trusted:
        hops = [hop.strip() for value in forwarded for hop in value.split(",")]
        while hops and any(address in network for network in trusted):
            hop = _parse(hops.pop())
            if hop is None:
                break
            address = hop
    return str(address)


def _parse(text: str | None) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text or "")
    except ValueError:
        return None
    # A dual-stack socket reports IPv4 peers as ::ffff:a.b.c.d: the same client under another name.
    return getattr(address, "ipv4_mapped", None) or address
