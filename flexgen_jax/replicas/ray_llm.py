"""Many replicas of a model, in the workers of a Ray cluster, used like one ``LLM``."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import WARNING
from typing import TYPE_CHECKING, Any

from flexgen_jax.engine.effects import OnLogits
from flexgen_jax.engine.executor import ExecutionError
from flexgen_jax.engine.snapshots import Snapshot
from flexgen_jax.llm import LLM
from flexgen_jax.logs import event
from flexgen_jax.planning.auto import Demand, part_of_this_machine
from flexgen_jax.planning.blocks import Block
from flexgen_jax.replicas.ray_cluster import (
    RETRIES,
    Settled,
    WorkerError,
    import_ray,
    missing_model,
)
from flexgen_jax.report import Report, Sum
from flexgen_jax.requests.outputs import RequestOutput
from flexgen_jax.weights.checkpoint import is_store
from scheduling.placement import Placement
from scheduling.policy import Policy
from storage.store import StorageError

if TYPE_CHECKING:
    from scheduling.hardware import Hardware

_SEARCHING = ("device_memory", "host_memory", "fixed", "allow")
_POLL = 1.0  # seconds: Ray's waiting is not interrupted otherwise


@dataclasses.dataclass(frozen=True)
class _About:
    """Of a worker: what results and predictions depend on."""

    software: dict[str, str]
    identity: dict[str, Any]
    hardware: Hardware


@dataclasses.dataclass(frozen=True)
class _Done:
    """A block that was run: the completions of its requests, and what adds up of its report."""

    outputs: list[RequestOutput]
    sums: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Failed:
    """What came instead. ``again``: another attempt may come out otherwise."""

    message: str
    again: bool


class Worker:
    """What a Ray actor is made of: an ``LLM`` that runs a block a call.

    Args:
        arguments: Of the ``LLM``.
        beside: How many workers share the machine.
    """

    def __init__(self, arguments: Mapping[str, Any], beside: int) -> None:
        self._arguments, self._beside = dict(arguments), beside
        self._llm: LLM | None = None

    def about(self) -> _About | _Failed:
        """Of its machine; the model is not loaded yet."""
        model = self._arguments["model"]
        if not is_store(model):
            return _Failed(str(missing_model(model)), again=False)
        plain = {k: v for k, v in self._arguments.items() if k not in _SEARCHING}
        with LLM(**{**plain, "policy": "auto"}) as llm:
            return _About(llm.software(), llm.identity(), llm.hardware)

    def choose(self, job: Demand) -> tuple[Policy, str | None] | _Failed:
        """Policy ``"auto"``, for one of the workers of this machine."""
        arguments = self._arguments
        given = {"device_memory", "host_memory"} & {k for k, v in arguments.items() if v}
        if self._beside > 1 and not given:
            arguments = {**arguments, **part_of_this_machine(self._beside)}
        try:
            self._close()
            self._llm = LLM(**arguments)
            return self._llm.choose_policy(job), self._llm.why
        except (ValueError, StorageError, OSError) as error:
            return _Failed(str(error), again=False)

    def run(self, block: Block, policy: Policy) -> _Done | _Failed:
        """Runs it under ``policy``, like an ``LLM`` of its own."""
        done: list[_Done] = []

        def keep(_: int, outputs: list[RequestOutput], report: Report) -> None:
            done.append(_Done(outputs, report.sums()))

        try:
            self._opened(policy).run_each([block], keep)
        except (ExecutionError, StorageError, OSError) as error:
            return _Failed(str(error), again=True)
        except ValueError as error:
            return _Failed(str(error), again=False)
        return done[0]

    def _opened(self, policy: Policy) -> LLM:
        if self._llm is None or self._llm.policy != policy:
            self._close()
            plain = {k: v for k, v in self._arguments.items() if k not in _SEARCHING}
            self._llm = LLM(**{**plain, "policy": policy})
        return self._llm

    def _close(self) -> None:
        if self._llm is not None:
            self._llm.close()
            self._llm = None


class Replicas(LLM):
    """An ``LLM`` whose blocks are run by the workers of the Ray cluster that is connected.

    It loads no weights itself. A worker that dies is begun anew by Ray, which gives its block to it
    again; a block that fails is given to another worker, ``RETRIES`` times in all. A run that is
    interrupted or fails closes it.

    Args:
        workers: How many, and what Ray keeps for each.
        arguments: Of the ``LLM``; the model is a weight store, at the same path on every machine.

    Raises:
        ValueError: a worker has no such model, or they differ in software or devices.
        WorkerError: a worker cannot start.
    """

    def __init__(self, workers: Settled, arguments: Mapping[str, Any]) -> None:
        self._workers: list[Any] = []
        super().__init__(**arguments)
        ray = import_ray()
        options = {**workers.remote(), "max_restarts": -1, "max_task_retries": RETRIES}
        if len(self._devices) > 1:
            count = str(len(self._devices))
            options["runtime_env"] = {"env_vars": {"JAX_NUM_CPU_DEVICES": count}}
        make = ray.remote(Worker).options(**options)
        self._workers = [make.remote(dict(arguments), workers.beside) for _ in range(workers.count)]
        # Those that the cluster has no room for come later, or never: no block waits for them.
        self._coming = {worker.about.remote(): i for i, worker in enumerate(self._workers)}
        self._idle: list[int] = []
        self._about: _About | None = None
        try:
            while not self._idle:
                self._welcome(ray.wait(list(self._coming), timeout=_POLL)[0])
        except BaseException:
            self.close()
            raise
        assert self._about is not None
        self.hardware = self._about.hardware

    def _welcome(self, refs: Iterable[Any]) -> None:
        """Takes in workers that have come."""
        for ref in refs:
            found = _answer(ref)
            self._about = self._about or found
            for name in ("software", "identity"):
                mine, theirs = getattr(self._about, name), getattr(found, name)
                if mine != theirs:
                    raise ValueError(
                        f"the workers differ, and so would their results: one has {theirs}, "
                        f"another one {mine}. Give all the same versions, model and accelerator"
                    )
            self._idle.append(self._coming.pop(ref))

    @staticmethod
    def _stage_devices(num_stages: int) -> list[Any]:
        return [None] * num_stages

    def _load(self, placements: Sequence[Placement]) -> None:
        """The workers do."""

    @property
    def num_replicas(self) -> int:
        return len(self._workers)

    def software(self) -> dict[str, str]:
        assert self._about is not None
        return self._about.software

    def _searched(self, job: Demand) -> tuple[Policy, str]:
        ref = self._workers[self._idle[0]].choose.remote(job)
        while not import_ray().wait([ref], timeout=_POLL)[0]:
            pass
        policy, why = _answer(ref)
        return policy, why or ""

    def run_each(
        self,
        blocks: Sequence[Block],
        on_block: Callable[[int, list[RequestOutput], Report], None],
        *,
        progress: Callable[[int], None] | None = None,
        on_logits: OnLogits | None = None,
        snapshot_of: Callable[[int], Snapshot] | None = None,
    ) -> None:
        if self._closed:
            raise ValueError("this LLM is closed; make another one")
        if on_logits is not None or snapshot_of is not None:
            raise ValueError("logits and snapshots of a running block are for one process only")
        self._validate(blocks)
        ray = import_ray()
        waiting = collections.deque(range(len(blocks)))
        attempts: collections.Counter[int] = collections.Counter()
        running: dict[Any, tuple[int, int]] = {}  # block and worker, by what is waited for
        done: dict[int, _Done] = {}
        following = 0
        try:
            while following < len(blocks):
                while waiting and self._idle:
                    number, worker = waiting.popleft(), self._idle.pop(0)
                    ref = self._workers[worker].run.remote(blocks[number], self.policy)
                    running[ref] = number, worker
                for ref in ray.wait([*running, *self._coming], timeout=_POLL)[0]:
                    if ref in self._coming:
                        self._welcome([ref])
                        continue
                    number, worker = running.pop(ref)
                    self._idle.append(worker)  # at the end: what failed is another's turn
                    found = _answer(ref, again=attempts[number] < RETRIES)
                    if isinstance(found, _Failed):
                        attempts[number] += 1
                        event("block failed", level=WARNING, block=number, why=found.message)
                        waiting.appendleft(number)
                        continue
                    done[number] = found
                    if progress is not None:
                        progress(found.sums["generated_tokens"])
                while following in done:
                    found = done.pop(following)
                    on_block(following, found.outputs, self._report(blocks[following], found))
                    following += 1
        finally:
            if running:
                self.close()  # interrupted or failed: they are at work for nothing

    def _report(self, block: Block, done: _Done) -> Report:
        """Without a timeline: there are as many as workers. ``seconds`` is what passes here."""
        empty = Report.empty(
            self.policy, self.plan([block]), self.schedule_name, self.hardware.name, self.why
        )
        return Sum(empty, 0).add_sums({**done.sums, "seconds": 0.0}).total()

    def close(self) -> None:
        ray = import_ray()
        for worker in self._workers:
            with contextlib.suppress(Exception):
                ray.kill(worker)
        self._workers = []
        super().close()


def _answer(ref: Any, *, again: bool = False) -> Any:
    """What came of a call.

    Args:
        again: A ``_Failed`` that may come out otherwise is returned.

    Raises:
        ValueError: it failed, and would again. WorkerError: it failed too often.
    """
    from ray.exceptions import RayError

    try:
        found = import_ray().get(ref)
    except RayError as error:
        first = str(error).strip().splitlines()
        raise WorkerError(f"a worker failed: {first[0] if first else error!r}") from error
    if isinstance(found, _Failed) and not (again and found.again):
        raise WorkerError(found.message) if found.again else ValueError(found.message)
    return found
