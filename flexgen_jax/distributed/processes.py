"""Several processes, each with stages of its own, that run one model by JAX's distributed runtime.

Process 0 leads: it has the requests, and tells the others what to run. What is said and whether all
are alive goes over the runtime's key-value store; arrays go by collectives
(:mod:`~flexgen_jax.distributed.process_hand_over`).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from flexgen_jax.distributed.frames import MessageError
from flexgen_jax.distributed.messages import Newcomers, Run, decode, decode_newcomers, encode
from flexgen_jax.distributed.sentry import Sentry
from flexgen_jax.logs import event

TIMEOUT = 60.0
# After a verdict: how long a process may take to end by itself before it is ended.
T = TypeVar("T")
_GRACE = 5.0
_CHUNK = 1 << 20  # of a message: the store's values travel whole
_MOST_CHUNKS = 1 << 12
_SPACE = "flexgen-jax"
_HEALTH = f"{_SPACE}/health/"


class ProcessError(RuntimeError):
    """Another process of the pipeline is lost, has failed, or never came."""


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = TIMEOUT,
) -> None:
    """``jax.distributed.initialize``, with a time-out for all that waits for other processes.

    To be called before anything else uses JAX. After it an ``LLM`` with several stages spreads them
    over the processes. Those who call ``jax.distributed.initialize`` themselves need not call it.

    Args:
        coordinator_address: ``HOST:PORT`` of process 0. None, like the other two: as the cluster's
            environment has it (Slurm, Open MPI, Kubernetes, ...).
        num_processes: How many there are.
        process_id: Which of them this is, from 0.
        timeout: Seconds after which a process that does not join, or shows no sign of life, is
            considered lost; the others exit.

    Raises:
        ValueError: no address, or one that is taken; or the environment does not say what was not
            given.

    Where not all processes join in time, JAX's runtime aborts those that have; the last line on the
    standard error says so.
    """
    import jax

    if coordinator_address is not None:
        _check_address(coordinator_address, listens=process_id == 0)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would keep SIGTERM for itself.
    jax.config.update("jax_enable_preemption_service", False)
    # The runtime aborts a process that fails to join: nothing can be caught.
    _sentry().expect(
        f"not all of the {num_processes or ''} processes joined"
        f"{f' at {coordinator_address}' if coordinator_address else ''} within {timeout:g} s: "
        "start one with each id, all with the same address, which every machine must be able to "
        "reach"
    )
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=max(1, round(timeout)),
            # The second line of defence: it cannot say which stage was lost.
            heartbeat_timeout_seconds=round(2 * timeout) + 30,
        )
    except RuntimeError as error:
        _sentry().expect()
        raise ValueError(f"cannot join other processes: {error}") from error
    except (ValueError, TypeError) as error:
        _sentry().expect()
        raise ValueError(
            f"which processes there are is not known: {error} Give the coordinator's address, the "
            "number of processes and the id of this one"
        ) from error
    _sentry().expect()
    _pulse(timeout)
    if not leads():
        _sentry().expect("lost process 0, which leads", unless=_state().coordinator_address)


def _check_address(address: str, *, listens: bool) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"the coordinator's address must be HOST:PORT, got {address!r}")
    if not listens:
        return
    # JAX's runtime would crash.
    with socket.socket() as trying:
        trying.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trying.bind(("", int(port)))
        except OSError as error:
            raise ValueError(
                f"the coordinator cannot listen on port {port} of this machine: {error.strerror}; "
                "give all processes another one"
            ) from error


def _own_address() -> str:
    name = socket.gethostname()
    try:
        return f"{socket.gethostbyname(name)} ({name})"
    except OSError:
        return f"nowhere ({name})"


@functools.cache
def _sentry() -> Sentry:
    sentry = Sentry()
    atexit.register(sentry.close)
    return sentry


_pulses: list[_Pulse] = []


def _pulse(timeout: float = TIMEOUT) -> _Pulse:
    """This process's; of the first call's time-out."""
    if not _pulses:
        _pulses.append(_Pulse(timeout))
    return _pulses[0]


def _state() -> Any:
    """Of JAX's runtime: its key-value store has no public name yet."""
    from jax._src import distributed

    return distributed.global_state


def process_count() -> int:
    """How many processes JAX's runtime joins; 1 where it was not started. Starts no backend."""
    state = _state()
    return int(state.num_processes) if state.client is not None else 1


def _end_failed() -> None:
    """At the exit: without the others JAX's runtime would wait for them, and then abort."""
    if Processes.broken:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def leads() -> bool:
    """Whether this is process 0, or the only one. Starts no backend."""
    return process_count() == 1 or _state().process_id == 0


class _Pulse:
    """Shows signs of life from the joining on, and notes those of the others.

    Attributes:
        found: All that processes say of themselves, by the last look at the store.
        interval: Seconds between two signs.
    """

    def __init__(self, timeout: float) -> None:
        state = _state()
        self._client, self._index = state.client, state.process_id
        self.timeout, self.interval = timeout, min(1.0, timeout / 40)
        self.found: dict[str, str] = {}
        self._sayings: dict[str, str] = {}
        self._ended = threading.Event()
        thread = threading.Thread(target=self._beat, name="flexgen-pulse", daemon=True)
        atexit.register(thread.join, _GRACE)
        atexit.register(self._ended.set)
        thread.start()

    def say(self, name: str, value: str) -> None:
        """Lets the others know, with the next sign of life; who says it first is right."""
        self._sayings.setdefault(name, value)

    def _beat(self) -> None:
        beats = 0
        while not self._ended.wait(self.interval):
            beats += 1
            # It fails where nobody answers, and then process 0 shows no sign of life either.
            with contextlib.suppress(Exception):
                self._client.key_value_set(
                    f"{_HEALTH}alive/{self._index}", str(beats), allow_overwrite=True
                )
                self.found = dict(self._client.key_value_dir_get(_HEALTH))
            for name, value in list(self._sayings.items()):
                with contextlib.suppress(Exception):  # another process was first
                    self._client.key_value_set(f"{_HEALTH}{name}", value)


class Processes:
    """What an ``LLM`` shares with those of the other processes, from its making to its end.

    Args:
        names: Of each process, what it has: for messages.

    Attributes:
        index: Of this process. ``count``: how many there are.
    """

    broken = False  # of any of this process's
    _made = 0

    def __init__(self, names: Sequence[str]) -> None:
        state = _state()
        self._client = state.client
        self.index, self.count = int(state.process_id), int(state.num_processes)
        self._names = [f"process {i} ({name})" for i, name in enumerate(names)]
        self._pulse = _pulse()
        self._interval = self._pulse.interval
        # Every process makes its LLMs in the same order.
        if not Processes._made:
            atexit.register(_end_failed)
        Processes._made += 1
        self._space, self._name = f"{_SPACE}/{Processes._made}", f"{Processes._made}"
        self._sent = self._received = 0
        self._over = False  # nothing more is to be received
        self._verdict: str | None = None
        self._known = threading.Event()
        self._closing, self._ended = threading.Event(), threading.Event()
        self._suspicious = self._failed = False
        if not self.leads:
            _sentry().expect(
                f"lost {self._names[0]}, which leads: JAX's runtime has ended "
                f"{self._names[self.index]}",
                unless=state.coordinator_address,
            )
        self._lost: set[int] = set()
        # Beside the pulse, since whoever asks a coordinator that hangs does not come back.
        self._thread = threading.Thread(target=self._watch, name="flexgen-watch", daemon=True)
        self._thread.start()
        event("joined", process=self.index, of=self.count, has=names[self.index])

    @property
    def leads(self) -> bool:
        """Whether this is process 0."""
        return self.index == 0

    def send(self, message: Run | Newcomers | None) -> None:
        """To all others; they get messages in order. None: there are no more."""
        data = encode(message)
        chunks = [data[i : i + _CHUNK] for i in range(0, len(data), _CHUNK)]
        name = f"{self._space}/message/{self._sent}"
        for place, chunk in enumerate(chunks):
            self._client.key_value_set_bytes(f"{name}/{place}", chunk)
        self._client.key_value_set(name, str(len(chunks)))
        # The last but one has been read: what the last one tells of takes all processes.
        if self._sent >= 2:
            self._client.key_value_delete(f"{self._space}/message/{self._sent - 2}")
        self._sent += 1

    def receive(self) -> Run | None:
        """The next message; waits for it. None: there are no more.

        Raises:
            ProcessError: another process is lost or has failed, or what came is no message.
        """
        message = self._receive(decode)
        self._over = message is None
        return message

    def receive_newcomers(self) -> Newcomers:
        """The next message, which says who comes next; waits for it.

        Raises:
            ProcessError: another process is lost or has failed, or what came is no such message.
        """
        return self._receive(decode_newcomers)

    def _receive(self, decoded: Callable[[bytes], T]) -> T:
        name = f"{self._space}/message/{self._received}"
        while True:
            self.check()
            try:
                count = self._client.blocking_key_value_get(name, 1000)
                break
            except Exception as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise self.explained(error) from error
        try:
            message = decoded(self._chunks(name, count))
        except MessageError as error:
            raise self.misspoken(0, error) from error
        self._received += 1
        return message

    def _chunks(self, name: str, count: str) -> bytes:
        if not (count.isascii() and count.isdecimal() and len(count) < 5):
            raise MessageError(f"expected how many parts a message has, got {count[:40]!r}")
        if not 0 < int(count) <= _MOST_CHUNKS:
            raise MessageError(f"a message has 1 to {_MOST_CHUNKS} parts, not {count}")
        parts = []
        for place in range(int(count)):
            try:
                parts.append(self._client.blocking_key_value_get_bytes(f"{name}/{place}", 10_000))
            except Exception as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise self.explained(error) from error
                raise MessageError(
                    f"a message of {count} parts was announced, and part {place} has not come"
                ) from error
        return b"".join(parts)

    def misspoken(self, index: int, error: MessageError) -> ProcessError:
        """What to raise if process ``index`` has sent what is no message."""
        return ProcessError(
            f"{self._names[index]} does not speak as it should: {error}. Something else may have "
            "the coordinator's address: look there, and start all processes again"
        )

    def check(self) -> None:
        """Raises ``ProcessError`` if another process is lost or has failed."""
        if self._verdict is not None:
            raise ProcessError(self._verdict)

    def explained(self, error: BaseException) -> ProcessError:
        """Why working with the others has failed: waits until it is known, or for the time-out."""
        self._suspicious = True
        if self._known.wait(self._pulse.timeout):
            return ProcessError(self._verdict)
        hint = ""
        if "Gloo context initialization failed" in str(error):
            hint = (
                f". Gloo listens where a machine's own name leads, which is {_own_address()} here: "
                "on each machine it has to be an address that the others can reach, see /etc/hosts"
            )
        return ProcessError(f"working with the other processes failed: {error}{hint}")

    def fail(self, why: str) -> None:
        """Tells the others that this one has failed, so that they end too; the first counts."""
        self._failed = Processes.broken = True
        if self._verdict is None:
            said = f"{self._names[self.index]} failed: {why}"[:2000]
            self._pulse.say(f"{self._name}/verdict", said)

    def _watch(self) -> None:
        """Looks for who shows no sign of life, and whether somebody has failed."""
        seen = {i: ("", time.monotonic()) for i in range(self.count) if i != self.index}
        while not self._ended.wait(self._interval / 2):
            found, now = self._pulse.found, time.monotonic()
            verdict = found.get(f"{_HEALTH}{self._name}/verdict")
            patience = 5 * self._interval if self._suspicious else self._pulse.timeout
            for other, (value, since) in seen.items():
                beat = found.get(f"{_HEALTH}alive/{other}", value)
                if beat != value:
                    seen[other] = beat, now
                # Who was not heard of yet may still be on its way: JAX's runtime looks after that.
                elif value and now - since > patience and verdict is None:
                    self._lost.add(other)
                    verdict = f"lost {self._names[other]}: no sign of life for {now - since:.0f} s"
                    self._pulse.say(f"{self._name}/verdict", verdict)
            if verdict is not None:
                self._end(verdict)
                return

    def _end(self, verdict: str) -> None:
        self._verdict = verdict
        self._known.set()
        event("processes end", level=logging.ERROR, why=verdict)
        if not self._closing.wait(_GRACE):
            # A thread hangs in a collective, which nothing can interrupt.
            print(f"Error: {verdict}", file=sys.stderr, flush=True)
            self._leave()
            os._exit(1)

    def _leave(self) -> None:
        """Says that the others need not wait for this one."""
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{_HEALTH}{self._name}/left/{self.index}", "")

    def _part(self) -> None:
        """After a failure: sees to it that the others know why. The store is in process 0."""
        if self._verdict is None:
            self._known.wait(3 * self._interval)
        if not self.leads:
            self._leave()
            return
        others = {
            f"{_HEALTH}{self._name}/left/{i}" for i in range(1, self.count) if i not in self._lost
        }
        deadline = time.monotonic() + _GRACE + 3 * self._interval
        while time.monotonic() < deadline and not others <= self._pulse.found.keys():
            time.sleep(self._interval / 4)

    def close(self) -> None:
        """Ends the watch. Of process 0, unless it failed: what it sends is at its end: ``None``."""
        if self._ended.is_set():
            return
        if not self.leads and not self._over:
            self.fail("closed its LLM before process 0 did")
        elif self.leads and not self._failed:
            self.send(None)
        self._closing.set()
        if self._failed:
            self._part()
        self._ended.set()
        _sentry().expect()
        self._thread.join(timeout=_GRACE)
