"""Blocks in the workers of a Ray cluster, each of which has a model of its own."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import WARNING
from typing import TYPE_CHECKING, Any

from flexgen_jax.engine.effects import OnLogits, OnPrefill, OnTokens
from flexgen_jax.engine.executor import ExecutionError
from flexgen_jax.engine.runner import Finished, Machine, OnFinished, Runner
from flexgen_jax.engine.snapshots import Snapshot
from flexgen_jax.engine.waiting import More
from flexgen_jax.llm import LLM
from flexgen_jax.logs import event
from flexgen_jax.planning.auto import part_of_this_machine
from flexgen_jax.planning.blocks import Block
from flexgen_jax.planning.planner import Planner
from flexgen_jax.planning.schedule_names import portable
from flexgen_jax.replicas.ray_cluster import (
    RETRIES,
    Settled,
    WorkerError,
    import_ray,
    missing_model,
)
from flexgen_jax.weights.checkpoint import is_ready
from scheduling.policy import Policy
from storage.store import StorageError

if TYPE_CHECKING:
    from flexgen_jax.requests.tokenization import Tokenizer
    from flexgen_jax.weights.checkpoint import StoredModel

_LIMITS = ("device_memory", "host_memory")
_SEARCHING = (*_LIMITS, "fixed", "allow", "forbid", "lengths")
_POLL = 1.0  # seconds: Ray's waiting is not interrupted otherwise


def replicated(workers: Settled, arguments: Mapping[str, Any]) -> LLM:
    """An ``LLM`` whose blocks are run by the workers of the Ray cluster that is connected.

    It loads no weights itself. A worker that dies is begun anew by Ray, which gives its block to it
    again; a block that fails is given to another worker, ``RETRIES`` times in all. A run that is
    interrupted or fails closes it.

    Args:
        workers: How many, and what Ray keeps for each.
        arguments: Of the ``LLM``; the model is a weight store, at the same path on every machine,
            and so is the file of a schedule that is given as ``FILE.py:NAME``.

    Raises:
        ValueError: a worker has no such model, or they differ in software or devices.
        WorkerError: a worker cannot start.
    """
    return LLM(**arguments, runner=RayRunner(workers, arguments))


@dataclasses.dataclass(frozen=True)
class _About:
    """Of a worker: what results, predictions and the choice of a policy depend on."""

    software: dict[str, str]
    identity: dict[str, Any]
    machine: Machine


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
        self._plain = {k: v for k, v in self._arguments.items() if k not in _SEARCHING}
        self._limits = {k: v for k, v in self._arguments.items() if k in _LIMITS and v}
        self._llm: LLM | None = None

    def about(self) -> _About | _Failed:
        """Of its machine, or its part of it; the model is not loaded yet."""
        model = self._arguments["model"]
        if not is_ready(model):
            return _Failed(str(missing_model(model)), again=False)
        limits = self._limits
        if self._beside > 1 and not limits:
            limits = part_of_this_machine(self._beside)
        with LLM(**{**self._plain, "policy": "auto", **limits}) as llm:
            machine = Machine(llm.hardware, llm.limits)
            return _About(llm.runner.software(), llm.runner.identity(), machine)

    def run(self, block: Block, policy: Policy) -> Finished | _Failed:
        """Runs it under ``policy``; without a timeline, which only its own process would have."""
        done: list[Finished] = []
        try:
            llm = self._opened(policy)
            llm.runner.run(llm.planner, [block], lambda _, finished: done.append(finished))
        except (ExecutionError, StorageError, OSError) as error:
            return _Failed(str(error), again=True)
        except ValueError as error:
            return _Failed(str(error), again=False)
        return _whole(done)

    def _opened(self, policy: Policy) -> LLM:
        if self._llm is None or self._llm.policy != policy:
            self._close()
            self._llm = LLM(**{**self._plain, "policy": policy, **self._limits})
        return self._llm

    def _close(self) -> None:
        if self._llm is not None:
            self._llm.close()
            self._llm = None


class RayRunner(Runner):
    """Hands blocks to actors that each have an ``LLM``; see :func:`replicated`.

    The actors are made when the model is opened.
    """

    def __init__(self, workers: Settled, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        schedule = portable(arguments.get("schedule", "zigzag"))
        self._settled, self._arguments = workers, {**arguments, "schedule": schedule}
        self._workers: list[Any] = []
        self._coming: dict[Any, int] = {}
        self._idle: list[int] = []
        self._about: _About | None = None

    def open(self, model: StoredModel, tokenizer: Tokenizer | None) -> None:
        super().open(model, tokenizer)
        if self._about is not None:
            return
        ray = import_ray()
        options = {**self._settled.remote(), "max_restarts": -1, "max_task_retries": RETRIES}
        if (count := self._num_stages()) > 1:
            options["runtime_env"] = {"env_vars": {"JAX_NUM_CPU_DEVICES": str(count)}}
        make = ray.remote(Worker).options(**options)
        self._workers = [
            make.remote(self._arguments, self._settled.beside) for _ in range(self._settled.count)
        ]
        # Those that the cluster has no room for come later, or never: no block waits for them.
        self._coming = {worker.about.remote(): i for i, worker in enumerate(self._workers)}
        try:
            while not self._idle:
                self._welcome(ray.wait(list(self._coming), timeout=_POLL)[0])
        except BaseException:
            self.close()
            raise

    def _num_stages(self) -> int:
        policy, fixed = self._arguments.get("policy"), self._arguments.get("fixed") or {}
        return policy.num_stages if isinstance(policy, Policy) else fixed.get("num_stages", 1)

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

    @property
    def num_replicas(self) -> int:
        return len(self._workers)

    @property
    def takes_more(self) -> bool:
        return False

    @property
    def machine(self) -> Machine | None:
        return None if self._about is None else self._about.machine

    @property
    def stages(self) -> Sequence[int]:
        return ()

    def software(self) -> dict[str, str]:
        assert self._about is not None
        return self._about.software

    def place(self, policy: Policy) -> None:
        """The workers do, when blocks come."""

    def run(
        self,
        planner: Planner,
        blocks: Sequence[Block],
        on_finished: OnFinished,
        *,
        progress: OnTokens | None = None,
        on_logits: OnLogits | None = None,
        on_prefill: OnPrefill | None = None,
        snapshot_of: Callable[[int], Snapshot] | None = None,
        more: More | None = None,
    ) -> None:
        assert more is None
        if on_logits is not None or snapshot_of is not None:
            raise ValueError("logits and snapshots of a running block are for one process only")
        ray = import_ray()
        waiting = collections.deque(range(len(blocks)))
        attempts: collections.Counter[int] = collections.Counter()
        running: dict[Any, tuple[int, int]] = {}  # block and worker, by what is waited for
        done: dict[int, Finished] = {}
        following = 0
        try:
            while following < len(blocks):
                while waiting and self._idle:
                    number, worker = waiting.popleft(), self._idle.pop(0)
                    ref = self._workers[worker].run.remote(blocks[number], planner.policy)
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
                        progress(found.generated_tokens)
                while following in done:
                    found = done.pop(following)
                    # Of several at once; what passes here is for others to measure.
                    counts = {**found.counts, "seconds": 0.0}
                    on_finished(following, dataclasses.replace(found, counts=counts))
                    following += 1
        finally:
            if running:
                self.close()  # interrupted or failed: they are at work for nothing

    def close(self, error: BaseException | None = None) -> None:
        self._closed = True
        ray = import_ray()
        for worker in self._workers:
            with contextlib.suppress(Exception):
                ray.kill(worker)
        self._workers = []


def _whole(parts: Sequence[Finished]) -> Finished:
    """What a block came to, of its parts; without a timeline."""
    counts = {name: sum(part.counts[name] for part in parts) for name in parts[-1].counts}
    return dataclasses.replace(
        parts[-1],
        requests=tuple(request for part in parts for request in part.requests),
        outputs=[output for part in parts for output in part.outputs],
        counts=counts,
        timeline=None,
    )


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
