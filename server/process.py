"""What the processes under the supervisor have in common: how they start, show that they live, and end.

Each has a socket to the supervisor. Over it go lines of text: ``beat`` twice a second, ``ready`` once, ``progress …``
while something long goes on, ``failed …`` before an exit that another start would not mend. When the supervisor has
gone, the socket ends; the kernel kills the process as well, which also reaches one that is stopped or hangs.
"""

import asyncio
import ctypes
import os
import signal
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop

__all__ = ["BEAT_SECONDS", "STOP_SIGNALS", "Liveness", "become_child", "on_sigterm", "run"]

BEAT_SECONDS = 0.5
"""Seconds between two signs of life."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


def become_child(name: str, parent: int, *, finishes: bool) -> None:
    """The first thing a forked process does, with the stop signals blocked.

    `name` (15 bytes at most) is what `ps` and `top` show. A process that `finishes` what it does on SIGTERM gets the
    signal when it calls `on_sigterm`, even if it came before; the others wait for the supervisor to end them. Ctrl-C
    and a hang-up reach every process of a terminal; only the supervisor acts on them.
    """
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the kernel knew that we want to know
        os._exit(1)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL if finishes else signal.SIG_IGN)
    waits = {signal.SIGTERM} if finishes else set()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, set(STOP_SIGNALS) - waits)


def on_sigterm(action: Callable[[], None]) -> None:
    """From now on, have the event loop call `action` on SIGTERM; one that came before counts."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, action)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


class Liveness:
    """The child's end of the socket to the supervisor."""

    def __init__(self, channel: socket.socket) -> None:
        channel.setblocking(False)
        self._channel = channel

    def ready(self) -> None:
        """Say that this process does its work from now on."""
        self._say("ready")

    def progress(self, message: str) -> None:
        """Say how far a long start has come."""
        self._say(f"progress {message}")

    def failed(self, message: str) -> None:
        """Say why this process ends, where a second try would end the same way."""
        self._say(f"failed {message}")

    async def beat(self) -> bool:
        """Give a sign of life after a while. False when the supervisor has gone: then it is time to end."""
        await asyncio.sleep(BEAT_SECONDS)
        return self._say("beat")

    def _say(self, line: str) -> bool:
        try:
            self._channel.send(line.replace("\n", " ").encode() + b"\n")
        except BlockingIOError:
            pass  # the supervisor is slow to read; it will find a full socket's worth of beats
        except OSError:
            return False
        return True


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a process's main coroutine on uvloop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
