"""Teams: the threads on which an engine's batches run, and on a CPU, how many of them are best.

A GPU has a team for each batch that its runner takes at once. On a CPU the cores are either one wide team's, or several
narrow teams', which run batches side by side (`schedule.SideBySide`); which teams those are is measured at the start.
The weights are the runner's and there once, however many teams there are.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from embedserve.models.config import ModelConfig
from embedserve.server import bounds
from embedserve.server.runner import Runner
from embedserve.server.schedule import InTurn, Pace, Schedule, SideBySide
from embedserve.server.threads import pin_to

__all__ = ["Layout", "Team", "Teams", "best", "layouts", "make_teams"]

T = TypeVar("T")

_LONGEST_S = 0.100
"""What a narrow team's batch may take: what waits behind it waits no longer, as on the wide team (`bounds.py`)."""

_HARDLY_LONGER = 1.25
"""A narrow team's batch may also take this many times as long as one on the wide team, where that is slow itself."""

_NEAR_BEST = 0.97
"""Below this share of the best rate fewer teams are worth it: each has its batch done sooner."""

_LAUNCH_S = 0.005
"""What the host may need to launch a batch on a GPU: hundreds of kernels at about 10 µs. Not measured yet."""


class Team:
    """A thread that does one thing after another; on a CPU the leader of OpenMP threads, which it has for itself."""

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], object]) -> None:
        """Have the thread call `job`, which must not raise."""
        self._jobs.put(job)

    def call(self, job: Callable[[], T]) -> Future[T]:
        """Have the thread call `job`; its result, or what it raised."""
        future: Future[T] = Future()

        def work() -> None:
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)

        self.submit(work)
        return future

    def close(self) -> None:
        """Let the thread end after what it has to do, and wait for that. Its OpenMP threads end with it."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


@dataclass(frozen=True)
class Teams:
    """What an engine's batches run on: a schedule's teams, and what a batch of each model may have, in tokens."""

    members: Sequence[Team]
    schedule: Schedule
    bounds: Mapping[str, int]

    def close(self) -> None:
        """End all threads, after what they have to do."""
        for team in self.members:
            team.close()


class Layout(NamedTuple):
    """So many teams of so many threads each."""

    teams: int
    threads: int

    def __str__(self) -> str:
        return f"{self.teams} team{'s' * (self.teams > 1)} of {self.threads} thread{'s' * (self.threads > 1)}"


class Measured(NamedTuple):
    """What teams of one layout reach with a model, all of them running: tokens/s together, and the bound of a batch."""

    rate: float
    bound: int


def make_teams(
    runners: Mapping[str, Runner],
    wide: Team,
    *,
    models: Mapping[str, ModelConfig],
    cores: Sequence[int],
    max_batch_tokens: int | None,
    progress: Callable[[str], None],
) -> Teams:
    """The teams for these runners, which were loaded and warmed up on the team `wide`. Blocks for a second or more.

    cores: those that the process may use. max_batch_tokens: the operator's bound, instead of what would be measured.
    """
    infos = {name: runner.info for name, runner in runners.items()}
    own = {name: info.max_batch_tokens for name, info in infos.items()}
    concurrency = min(info.concurrency for info in infos.values())
    if any(info.device != "cpu" for info in infos.values()):
        return Teams([wide, *(Team(f"device-{i}") for i in range(1, concurrency))], InTurn(concurrency, _LAUNCH_S), own)
    threads = next(iter(infos.values())).threads
    # ONNX Runtime has one pool of threads of its own, whoever calls it. Modules of transformers are not for two threads
    # at once: some rewrite their rotary table in each forward pass, by the length of that batch.
    if threads == 1 or any(info.backend != "native" for info in infos.values()):
        return Teams([wide], InTurn(1), own)

    probes = {
        name: _Probe(
            runner,
            bounds.Texts(infos[name].cost, models[name].max_tokens, models[name].vocab_size),
            max_batch_tokens,
        )
        for name, runner in runners.items()
    }
    alone = {name: probe.measure([wide]) for name, probe in probes.items()}
    found = {Layout(1, threads): alone, **_side_by_side(probes, alone, cores, threads)}
    chosen = best(found)
    for layout, rates in found.items():
        reached = ", ".join(f"{name} {measured.rate:,.0f} tokens/s" for name, measured in rates.items())
        progress(f"{layout}{' (chosen)' * (layout == chosen)}: {reached}")
    if chosen.teams == 1:
        return Teams([wide], InTurn(1), own)
    paces = {
        name: Pace(alone[name].rate, alone[name].rate * chosen.teams / narrow.rate)
        for name, narrow in found[chosen].items()
    }
    members = start(chosen, cores, pinned=threads == len(cores))
    limits = {name: narrow.bound for name, narrow in found[chosen].items()}
    return Teams([*members, wide], SideBySide(chosen.teams, paces), limits)


def _side_by_side(
    probes: Mapping[str, _Probe],
    alone: Mapping[str, Measured],
    cores: Sequence[int],
    threads: int,
) -> dict[Layout, dict[str, Measured]]:
    """Measure each layout, fewest teams first, as far as the smallest batch of every model does not take too long."""
    allowed = {name: max(_LONGEST_S, _HARDLY_LONGER * wide.bound / wide.rate) for name, wide in alone.items()}
    found: dict[Layout, dict[str, Measured]] = {}
    for layout in layouts(threads):
        members = start(layout, cores, pinned=threads == len(cores))
        quick = all(probe.is_quick(members, allowed[name]) for name, probe in probes.items())
        if quick:
            found[layout] = {name: probe.measure(members) for name, probe in probes.items()}
        for team in members:
            team.close()
        if not quick:
            break  # more teams have fewer cores each, and take longer still
    return found


def layouts(threads: int) -> list[Layout]:
    """The ways to have several teams of `threads` threads in all: 2, 4, 8 … teams where that comes out even, and a team
    for each thread."""
    halved = [1 << i for i in range(1, threads.bit_length()) if threads % (1 << i) == 0]
    return [Layout(teams, threads // teams) for teams in sorted({*halved, threads} - {1})]


def best(found: Mapping[Layout, Mapping[str, Measured]]) -> Layout:
    """The fewest teams within 3 % of the best rate. With several models the mean of their rates, as ratios, decides."""

    def rate(layout: Layout) -> float:
        return math.exp(float(np.mean([math.log(measured.rate) for measured in found[layout].values()])))

    highest = max(map(rate, found))
    return min(layout for layout in found if rate(layout) >= _NEAR_BEST * highest)


def start(layout: Layout, cores: Sequence[int], *, pinned: bool) -> list[Team]:
    """Narrow teams. pinned: each thread on one of the cores, which are as many; or the kernel moves them."""
    teams = []
    for i in range(layout.teams):
        team = Team(f"team-{i}")
        own = cores[i * layout.threads : (i + 1) * layout.threads] if pinned else None
        team.call(partial(_settle, layout.threads, cores, own)).result()
        teams.append(team)
    return teams


def _settle(threads: int, cores: Sequence[int], own: Sequence[int] | None) -> None:
    """In a team's thread: from now on its operations run on so many threads, on its own cores where it has such."""
    # A thread begins on the cores of the one that started it, which may be pinned to its own.
    os.sched_setaffinity(0, cores)
    # torch gives a thread its default number at the first operation, over what was set before; this is one.
    torch.get_num_threads()
    torch.set_num_threads(threads)
    if own is not None:
        # Large enough to be shared out among all workers.
        pin_to(own, lambda: torch.ones(1 << 20).add_(1.0))


class _Probe:
    """Measures teams with one model, in batches of growing size, or of the one that the operator has given."""

    def __init__(self, runner: Runner, texts: bounds.Texts, max_batch_tokens: int | None) -> None:
        self._runner = runner
        self._texts = texts
        self._given = max_batch_tokens
        self._smallest = max_batch_tokens or bounds.SMALLEST

    def is_quick(self, teams: Sequence[Team], allowed: float) -> bool:
        """Whether the smallest batch runs in so many seconds."""
        for _ in range(3):
            seconds = self._seconds(teams, self._smallest)
            # What is disturbed once is tried again; what is far too slow would take seconds more.
            if seconds <= allowed or seconds > 4 * allowed:
                return seconds <= allowed
        return False

    def measure(self, teams: Sequence[Team]) -> Measured:
        """Run batches on all teams at once."""
        samples: dict[int, bounds.Sample] = {}
        # Several times: what other processes disturb once they leave alone the next.
        for _ in range(3):
            size = self._smallest
            while True:
                seconds = self._seconds(teams, size)
                known = samples.get(size)
                samples[size] = bounds.Sample(
                    len(self._texts.within(size)[0]), seconds if known is None else min(known.seconds, seconds), 0
                )
                # The next one takes about twice as long.
                if self._given is not None or 2 * samples[size].seconds > _LONGEST_S:
                    break
                size *= 2
            if samples[self._smallest].seconds > bounds.ONCE_IS_ENOUGH * _LONGEST_S:
                break
        bound = bounds.choose(samples, longest_s=_LONGEST_S, memory=None)
        return Measured(len(teams) * bound.rate, bound.tokens)

    def _seconds(self, teams: Sequence[Team], size: int) -> float:
        """What a batch takes while each team runs two of them, one after the other: on the slowest team."""
        ids, lengths = self._texts.within(size)
        dimensions = np.full(len(lengths), self._runner.info.dimension, np.int32)

        def run() -> float:
            begun = time.perf_counter()
            for _ in range(2):
                self._runner.run(ids, lengths, dimensions)
            return (time.perf_counter() - begun) / 2

        running = [team.call(run) for team in teams]
        return max(future.result() for future in running)
