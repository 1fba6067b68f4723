"""Starts the processes, watches them, replaces those that die or freeze, and ends them.

One process with one thread, and no event loop: it only waits for signals and for what its children say. It holds no
request, so nothing that happens to one can happen to it. When it is killed, the kernel kills the others.
"""

import ipaddress
import logging
import os
import secrets
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from embedserve.models.errors import ModelError
from embedserve.server import broker, front_end, threads
from embedserve.server.config import ConfigError, ServerConfig
from embedserve.server.process import BEAT_SECONDS, STOP_SIGNALS, Liveness, become_child, run
from embedserve.server.served import ServedModels, find_models
from embedserve.server.token_arrays import find_vocabulary

__all__ = ["serve"]

log = logging.getLogger("embedserve.supervisor")

FROZEN_AFTER = 10
"""Beats in a row that may stay away. Counted in our own ticks, so that a pause of the whole machine accuses nobody."""

UNBORN_AFTER = 240
"""The same before the first beat, which an engine gives once torch is imported."""

MAX_BACK_OFF = 30.0
"""Seconds between the ends and the starts of a process that does not stay up."""

STEADY_AFTER = 60.0
"""Seconds after which a process counts as steady: the next restart is at once again."""


@dataclass(eq=False)
class _Child:
    """A process to keep running. `main` is what it does, given its end of the socket to us."""

    name: str
    main: Callable[[Liveness, bool], None]
    """Its second argument: whether it takes the place of one that was there before."""
    pid: int = 0
    channel: socket.socket | None = None
    heard: bytes = b""
    ready: bool = False
    was_ready: bool = False
    beating: bool = False
    missed: int = 0
    started: float = 0.0
    failures: int = 0
    start_at: float = 0.0


class Supervisor:
    """Keeps the children of one server running."""

    def __init__(self, config: ServerConfig, models: ServedModels, listener: socket.socket) -> None:
        self._config = config
        self._models = models
        self._listener = listener
        # Abstract: no file to leave behind. The name is random, and the broker asks the kernel who connects.
        self._broker_address = f"\0embedserve-{os.getpid()}-{secrets.token_hex(16)}"
        self._broker_listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._broker_listener.bind(self._broker_address)
        self._broker_listener.listen(128)
        self._selector = selectors.DefaultSelector()
        self._children = [_Child("broker", self._broker)]
        # Where every model is relayed, there is nothing for an engine to do.
        devices = config.device.split(",") if models.local else []
        for device, cores in zip(devices, _share_cores(devices), strict=True):
            self._children.append(_Child("engine", partial(self._engine, device, cores)))
        for _ in range(config.front_ends or _front_ends_for(config.device.split(","))):
            self._children.append(_Child("front end", self._front_end))
        self._stopping = False
        self._stop_signals: list[str] = []
        self._kill_at = 0.0
        self._announced = False
        self._fatal: str | None = None

    # --------------------------------------------------------------------------------------- what the children do

    def _broker(self, alive: Liveness, again: bool) -> None:
        config = self._config
        self._listener.close()
        names = [model.id for model in self._models.local]
        state = broker.Broker(
            names,
            max_queue_tokens=config.max_queue_tokens,
            rate_limit=config.rate_limit,
            cache_bytes=config.cache_mib << 20,
            resumed=again,
        )
        run(lambda: broker.serve(self._broker_listener, state, alive))

    def _engine(self, device: str, cores: set[int], alive: Liveness, _again: bool) -> None:
        self._listener.close()
        self._broker_listener.close()
        os.sched_setaffinity(0, cores)
        threads.set_patience(pinned=threads.can_pin(self._config.threads or threads.default_count()))
        from embedserve.server import engine  # brings torch, which no other process shall have

        config = self._config
        options = engine.EngineOptions(
            models={model.id: model.config for model in self._models.local},
            device=device,
            dtype=config.dtype,
            backend=config.backend,
            threads=config.threads or None,
            max_batch_tokens=config.max_batch_tokens or None,
        )
        run(lambda: engine.serve(options, self._broker_address, alive))

    def _front_end(self, alive: Liveness, _again: bool) -> None:
        self._broker_listener.close()
        run(lambda: front_end.serve(self._config, self._models, self._listener, self._broker_address, alive))

    # ---------------------------------------------------------------------------------------------------- the loop

    def run(self) -> int:
        """Keep the children running until a signal ends it. The exit status."""
        wake, woken = socket.socketpair()
        for end in (wake, woken):
            end.setblocking(False)
        signal.set_wakeup_fd(woken.fileno())
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_stop_signal)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)  # so that it wakes us
        self._selector.register(wake, selectors.EVENT_READ)

        print(f"embedserve: listening on {_url(self._listener)}", flush=True)
        next_tick = time.monotonic() + BEAT_SECONDS
        while self._fatal is None and not self._ended():
            self._start_due()
            for key, _ in self._selector.select(max(0.0, next_tick - time.monotonic())):
                if key.fileobj is wake:
                    wake.recv(4096)
                    self._stop()
                else:
                    self._hear(key.data)
            self._reap()
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + BEAT_SECONDS
                self._tick()
        self._kill_all()
        if self._fatal is not None:
            print(f"embedserve: {self._fatal}", file=sys.stderr)
            return 2
        return 0

    def _ended(self) -> bool:
        return self._stopping and not any(child.pid for child in self._children if child.name == "front end")

    def _on_stop_signal(self, number: int, _frame: object) -> None:
        self._stop_signals.append(signal.Signals(number).name)

    def _stop(self) -> None:
        """Act on the signals so far: the first begins the end, a second one hastens it."""
        if self._stopping:
            if len(self._stop_signals) > 1:
                self._kill_at = 0.0
            return
        if not self._stop_signals:
            return
        self._stopping = True
        self._kill_at = time.monotonic() + self._config.shutdown_seconds + 2.0
        log.info("stopping", extra={"signal": self._stop_signals[0]})
        self._listener.close()
        for child in self._children:
            if child.pid and child.name == "front end":
                os.kill(child.pid, signal.SIGTERM)

    def _tick(self) -> None:
        for child in self._children:
            if child.pid:
                child.missed += 1
                if child.missed > (FROZEN_AFTER if child.beating else UNBORN_AFTER):
                    log.error("a process is frozen: killing it", extra={"role": child.name, "pid": child.pid})
                    os.kill(child.pid, signal.SIGKILL)
                    child.missed = 0
            if child.pid and child.failures and time.monotonic() - child.started > STEADY_AFTER:
                child.failures = 0
        if self._stopping and time.monotonic() > self._kill_at:
            self._kill_all()

    def _start_due(self) -> None:
        for child in self._children:
            if child.pid or time.monotonic() < child.start_at:
                continue
            if not (self._stopping and child.name == "front end"):
                self._start(child)

    def _start(self, child: _Child) -> None:
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        # A signal between the fork and `become_child` would run our handler in the child.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            ours, theirs = socket.socketpair()
            pid = os.fork()
        except OSError as error:  # no memory, no process, no file descriptor left: perhaps later
            child.failures += 1
            child.start_at = time.monotonic() + max(1.0, _back_off(child.failures))
            log.error("a process cannot be started", extra={"role": child.name, "reason": error.strerror})
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            return
        if pid == 0:
            self._be(child, theirs, parent)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        theirs.close()
        ours.setblocking(False)
        child.pid, child.channel = pid, ours
        child.heard, child.ready, child.beating, child.missed = b"", False, False, 0
        child.started = time.monotonic()
        self._selector.register(ours, selectors.EVENT_READ, child)

    def _be(self, child: _Child, channel: socket.socket, parent: int) -> NoReturn:
        """In the new process, which never returns."""
        status = 1
        alive = Liveness(channel)
        try:
            become_child(f"es {child.name}", parent, finishes=child.name == "front end")
            self._selector.close()
            for other in self._children:
                if other.channel is not None:
                    other.channel.close()
            child.main(alive, child.was_ready)
            status = 0
        except (ModelError, ConfigError) as error:
            alive.failed(str(error))
        except BaseException:
            log.exception("a process failed", extra={"role": child.name})
        finally:
            # No return into the supervisor's code, and no waiting for threads that may hang.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    # ------------------------------------------------------------------------------------------ what children say

    def _hear(self, child: _Child) -> None:
        if child.channel is None:
            return
        try:
            data = child.channel.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._forget_channel(child)
            return
        *lines, child.heard = (child.heard + data).split(b"\n")
        for line in lines:
            word, _, rest = line.decode(errors="replace").partition(" ")
            if word == "beat":
                child.beating, child.missed = True, 0
            elif word == "ready":
                child.ready = child.was_ready = True
                self._announce()
            elif word == "progress":
                log.info(rest)
            elif word == "failed" and not child.was_ready:
                self._fatal = rest
            elif word == "failed":
                log.error("%s", rest, extra={"role": child.name})

    def _announce(self) -> None:
        if not self._announced and not self._stopping and all(child.ready for child in self._children):
            self._announced = True
            print(f"embedserve: ready on {_url(self._listener)}", flush=True)

    def _forget_channel(self, child: _Child) -> None:
        if child.channel is not None:
            self._selector.unregister(child.channel)
            child.channel.close()
            child.channel = None

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for child in self._children:
                if child.pid == pid:
                    self._hear(child)
                    self._bury(child, os.waitstatus_to_exitcode(status))

    def _bury(self, child: _Child, exit_code: int) -> None:
        pid, child.pid = child.pid, 0
        self._forget_channel(child)
        if self._stopping and child.name == "front end":
            return
        child.failures += 1
        delay = _back_off(child.failures)
        child.start_at = time.monotonic() + delay
        reason = f"signal {-exit_code}" if exit_code < 0 else f"status {exit_code}"
        log.error(
            "a process ended; another takes its place",
            extra={"role": child.name, "pid": pid, "reason": reason, "in_seconds": delay},
        )

    def _kill_all(self) -> None:
        for child in self._children:
            if child.pid:
                os.kill(child.pid, signal.SIGKILL)
                os.waitpid(child.pid, 0)
                child.pid = 0


def _back_off(failures: int) -> float:
    """Seconds to wait before the next start: none after the first failure, then 1, 2, 4 … up to `MAX_BACK_OFF`."""
    return 0.0 if failures == 1 else min(MAX_BACK_OFF, 2.0 ** min(failures - 2, 10))


def _share_cores(devices: list[str]) -> list[set[int]]:
    """The cores of each engine: all of them, except that engines on the CPU share them out."""
    cores = sorted(os.sched_getaffinity(0))
    on_cpu = [index for index, device in enumerate(devices) if device == "cpu"]
    shares = [set(cores) for _ in devices]
    if 1 < len(on_cpu) <= len(cores):
        for number, index in enumerate(on_cpu):
            shares[index] = set(cores[number :: len(on_cpu)])
    return shares


def _front_ends_for(devices: list[str]) -> int:
    """One where the CPU runs the models too; beside GPUs, one for each four cores."""
    cpus = {"cpu"} if os.path.exists("/dev/nvidiactl") else {"cpu", "auto"}
    on_cpu = cpus.issuperset(devices)
    return 1 if on_cpu else max(1, len(os.sched_getaffinity(0)) // 4)


def _listen(config: ServerConfig) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # `::` means every address, and a user of it expects IPv4 too.
        both = family == socket.AF_INET6 and config.host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address[:2], family=family, backlog=2048, dualstack_ipv6=both)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"cannot listen on {config.host}, port {config.port}: {reason}. Choose another with --port (0 takes a free "
            "one), or --host"
        ) from None


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(config: ServerConfig) -> int:
    """Serve until a signal ends it. The exit status.

    Raises `ConfigError`, `ModelError`, `TokenizerError` or `VocabularyError` where it cannot begin.
    """
    listener = _listen(config)
    models = find_models(config)
    if config.cl100k_file is not None:
        find_vocabulary(config.cl100k_file)  # a wrong file shall show now, not in some request
    if not config.keys and not _is_loopback(listener):
        log.warning("the server is open to the network: no --api-key is set")
    if models.relayed:
        from embedserve.server.relay import Relay  # brings an HTTP client, which few servers need

        Relay(models.relayed)  # a wrong URL, proxy or certificate shall show now, not in each front end
    for relayed in models.relayed:
        log.info("relaying", extra={"model": relayed.id, "upstream": relayed.upstream.base_url})
    for model in models.local:
        facts = {"model": model.id, "max_tokens": model.config.max_tokens}
        facts |= {"pooling": model.config.pooling, "normalize": model.config.normalize}
        log.info("serving", extra=facts)
        if model.config.assumed & {"pooling", "normalize"}:
            log.warning("the model's files do not say how it pools: this is a convention", extra=facts)
        if model.entry is not None and (missing := set(model.entry.outputs) - set(model.config.outputs)):
            facts = {"model": model.id, "outputs": ", ".join(sorted(missing))}
            log.warning("the model's folder lacks the weights of some of its outputs", extra=facts)
    return Supervisor(config, models, listener).run()


def _is_loopback(listener: socket.socket) -> bool:
    host = listener.getsockname()[0]
    return bool(ipaddress.ip_address(host).is_loopback)
