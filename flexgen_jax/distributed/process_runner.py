"""Blocks over the stages of several processes: one leads, the others follow, all fail together."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax

from flexgen_jax._version import __version__
from flexgen_jax.distributed.messages import Newcomers, Run
from flexgen_jax.distributed.process_hand_over import ProcessHandOver
from flexgen_jax.distributed.processes import Processes, process_count
from flexgen_jax.distributed.stage_devices import stage_devices
from flexgen_jax.engine.effects import OnLogits, OnPrefill, OnTokens
from flexgen_jax.engine.local_runner import LocalRunner
from flexgen_jax.engine.runner import Finished, OnFinished, Runner
from flexgen_jax.engine.snapshots import Snapshot
from flexgen_jax.engine.waiting import More
from flexgen_jax.planning.blocks import Block
from flexgen_jax.planning.planner import Planner, in_place
from flexgen_jax.planning.stage_layout import layers_of
from flexgen_jax.requests.request import Request
from scheduling.policy import Policy
from scheduling.stages import hosts_of
from scheduling.workload import Workload

if TYPE_CHECKING:
    from flexgen_jax.requests.tokenization import Tokenizer
    from flexgen_jax.weights.checkpoint import StoredModel


def runner_of(num_stages: int, **options: Any) -> Runner:
    """What runs so many stages: this process, or all that JAX's runtime joins.

    Args:
        options: Of a :class:`LocalRunner`.

    Raises:
        ValueError: there are too few devices, or more processes than stages.
    """
    devices = stage_devices(num_stages)
    local = LocalRunner(devices, **options)
    if num_stages == 1 or process_count() == 1:
        return local
    return ProcessRunner(local, devices)


class ProcessRunner(Runner):
    """Runs the stages of this process in step with the other processes.

    Process 0 leads: it is given the blocks and sends them to the others, which follow. It joins
    them when the model is opened. All processes make theirs alike.

    Args:
        local: Runs what is here.
        devices: Of all stages.
    """

    def __init__(self, local: LocalRunner, devices: Sequence[Any]) -> None:
        super().__init__()
        self._local, self._devices = local, devices
        self._hosts = hosts_of(len(devices), process_count())
        self._joined: Processes | None = None
        self._placed: Policy | None = None
        self._digests: dict[tuple[Workload, bool], bytes] = {}

    @property
    def hosts(self) -> tuple[int, ...]:
        return self._hosts

    @property
    def stages(self) -> Sequence[int]:
        return self._local.stages

    @property
    def _processes(self) -> Processes:
        assert self._joined is not None
        return self._joined

    @property
    def leads(self) -> bool:
        return self._processes.leads

    def open(self, model: StoredModel, tokenizer: Tokenizer | None) -> None:
        super().open(model, tokenizer)
        self._local.open(model, tokenizer)
        if self._joined is None:
            self._join(model)

    def _join(self, model: StoredModel) -> None:
        layers = layers_of(model.config, len(self._devices))
        held = [
            [stage for stage, host in enumerate(self._hosts) if host == index]
            for index in range(process_count())
        ]
        names = [
            f"stage {' and '.join(map(str, stages))}, layers {layers[stages[0]].start} to "
            f"{layers[stages[-1]].stop - 1}"
            for stages in held
        ]
        self._joined = Processes(names)
        self._local.hand_over = ProcessHandOver(
            self._joined,
            self._devices,
            layers,
            width=model.config.hidden_size,
            dtype=model.dtype,
        )

    def place(self, policy: Policy) -> None:
        self._placed = policy
        self._local.place(policy)

    def check(self) -> None:
        super().check()
        if not self.leads:
            raise ValueError(
                f"process {self._processes.index} has no requests of its own: process 0 leads; "
                "call follow()"
            )

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
        if snapshot_of is not None:
            raise ValueError("the state of a running block cannot be saved over several processes")
        with self._failing_together():
            settings = self._settings(planner, blocks)
            self._processes.send(Run(settings, planner.policy, list(blocks), more is not None))
            self._local.run(
                planner,
                blocks,
                on_finished,
                progress=progress,
                on_logits=on_logits,
                on_prefill=on_prefill,
                more=None if more is None else functools.partial(self._told, more),
            )

    def _told(self, more: More) -> Sequence[Request] | None:
        """Who comes next; all processes are told."""
        rows = more()
        self._processes.send(Newcomers(list(rows or ()), over=rows is None))
        return rows

    def _heard(self) -> Sequence[Request] | None:
        """Likewise, from process 0."""
        newcomers = self._processes.receive_newcomers()
        return None if newcomers.over else newcomers.rows

    def follow(self, planner_under: Callable[[Policy], Planner]) -> None:
        """See :meth:`Runner.follow`.

        Raises:
            ProcessError: another process is lost or has failed.
            ExecutionError: an op failed here; the other processes end, too.
            ValueError: this process leads; or its model, software or settings are not those of
                process 0.
        """
        if self.leads:
            super().follow(planner_under)
        with self._failing_together():
            while (message := self._processes.receive()) is not None:
                planner, blocks = planner_under(message.policy), message.blocks
                mine = self._settings(planner, blocks)
                for name in dict.fromkeys((*message.settings, *mine)):
                    value, own = message.settings.get(name), mine.get(name)
                    if own != value:
                        raise ValueError(
                            f"{name} is {own} here and {value} in process 0: start all "
                            "processes with the same model, options and software"
                        )
                more = self._heard if message.more else None
                self._local.run(planner, blocks, _ignore, more=more)

    @contextlib.contextmanager
    def _failing_together(self) -> Iterator[None]:
        """What fails here is known to all processes; what failed elsewhere is what is raised."""
        try:
            yield
        except BaseException as error:
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        if self._joined is not None:
            stopped = isinstance(error, KeyboardInterrupt)
            self._joined.fail("interrupted" if stopped else str(error) or type(error).__name__)

    def _settings(self, planner: Planner, blocks: Sequence[Block]) -> dict[str, str]:
        """What has to be the same in all processes, as texts."""
        assert self._placed is not None
        orders = hashlib.sha256()
        for block in blocks:
            orders.update(self._digest(planner, planner.workload(block)))
        settings = {
            "the software": f"flexgen-jax {__version__}, jax {jax.__version__}",
            "the model": self.identity(),
            "the seed": self._local.seed,
            "the schedule": f"{planner.schedule_name} ({orders.hexdigest()[:8]})",
            **in_place(self._placed),
        }
        return {name: str(value) for name, value in settings.items()}

    def _digest(self, planner: Planner, workload: Workload) -> bytes:
        """Of the order of its ops; most blocks of a job are alike."""
        key = workload, planner.policy.overlap
        if key not in self._digests:
            found = hashlib.sha256()
            for op in planner.order(workload):
                found.update(repr(op).encode())
            self._digests[key] = found.digest()
        return self._digests[key]

    def close(self, error: BaseException | None = None) -> None:
        if error is not None:
            self._fail(error)
        if not self._closed and self._joined is not None:
            self._joined.close()
        self._closed = True
        self._local.close()


def _ignore(number: int, finished: Finished) -> None:
    """Results are process 0's."""
