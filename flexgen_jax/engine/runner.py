"""What runs blocks: here, over several processes, or in workers elsewhere.

A runner holds the weights and the devices. It knows no prompt, no job and no report: it is given
blocks with the plan for them, and hands back what each of them came to.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from flexgen_jax._version import __version__
from flexgen_jax.engine.effects import OnLogits, OnPrefill, OnTokens
from flexgen_jax.engine.snapshots import Snapshot
from flexgen_jax.engine.waiting import More
from flexgen_jax.planning.blocks import Block
from flexgen_jax.planning.planner import Planner
from flexgen_jax.planning.refilling import Life
from flexgen_jax.requests.outputs import RequestOutput
from flexgen_jax.requests.request import Request
from scheduling.hardware import Hardware
from scheduling.limits import Limits
from scheduling.policy import Policy, Tier
from scheduling.timeline import Timeline

if TYPE_CHECKING:
    from flexgen_jax.requests.tokenization import Tokenizer
    from flexgen_jax.weights.checkpoint import StoredModel


@dataclasses.dataclass(frozen=True)
class Finished:
    """What a block came to, or a part of it: of a rolling block the results come as they are there.

    Attributes:
        requests: Those that are finished, one for each row: a prompt's completions one after
            another, those that the block has.
        outputs: Of each of ``requests``.
        ended: Whether it is the block's last part.
        peak_bytes: The most that each tier held.
        process_bytes: The most resident memory that the process has had so far.
        counts: Seconds, compilations and bytes since the part before, by the names that a
            ``Report`` has for them.
        timeline: Measured, with the last part; None where several blocks run at once, which have
            none together. ``passes``: over the weights, that it has;
            ``timeline_compile_seconds``: of compiling.
        lives: With the last part of a rolling block: what its requests turned out to be, in the
            order in which they came.
    """

    requests: tuple[Request, ...]
    outputs: list[RequestOutput]
    peak_bytes: Mapping[Tier, int]
    counts: Mapping[str, Any]
    ended: bool = True
    timeline: Timeline | None = None
    passes: int = 0
    timeline_compile_seconds: float = 0.0
    lives: Sequence[Life] = ()
    process_bytes: int = 0

    @property
    def generated_tokens(self) -> int:
        """New tokens of all requests."""
        return sum(len(c.token_ids) for output in self.outputs for c in output.outputs)


OnFinished = Callable[[int, Finished], None]


@dataclasses.dataclass(frozen=True)
class Machine:
    """Of another machine: what predictions and policy ``"auto"`` go by."""

    hardware: Hardware
    limits: Limits


class Runner(abc.ABC):
    """What runs blocks. First a model is opened, then its weights are placed, then blocks run."""

    def __init__(self) -> None:
        self._model: StoredModel | None = None
        self._tokenizer: Tokenizer | None = None
        self._closed = False

    @property
    def num_replicas(self) -> int:
        """How many blocks run at once."""
        return 1

    @property
    def takes_more(self) -> bool:
        """Whether a rolling block may go on with requests that are not known when it begins."""
        return True

    @property
    def hosts(self) -> tuple[int, ...]:
        """Of the stages, as a ``Workload`` has them. Known when a model is open."""
        return ()

    @property
    def machine(self) -> Machine | None:
        """Where blocks run; None: here. Known when a model is open."""
        return None

    @property
    @abc.abstractmethod
    def stages(self) -> Sequence[int]:
        """Which pipeline stages' weights this process has to open."""

    @property
    def leads(self) -> bool:
        """Whether requests are given to this process."""
        return True

    @property
    def model(self) -> StoredModel:
        """Whose weights these are."""
        assert self._model is not None
        return self._model

    def identity(self) -> dict[str, Any]:
        """What tells these weights from others, as plain JSON."""
        return self.model.identity()

    def software(self) -> dict[str, str]:
        """What results depend on beside model, policy and requests: versions, and the device."""
        kind = jax.local_devices()[0].device_kind
        return {"flexgen-jax": __version__, "jax": jax.__version__, "device": kind}

    def open(self, model: StoredModel, tokenizer: Tokenizer | None) -> None:
        """Takes a model; its weights are not read yet. Again: the same one in another format."""
        self._model, self._tokenizer = model, tokenizer

    @abc.abstractmethod
    def place(self, policy: Policy) -> None:
        """Puts the weights where ``policy`` wants them, once."""

    def check(self) -> None:
        """Raises ``ValueError`` if no requests can be given to it."""
        if self._closed:
            raise ValueError("this LLM is closed; make another one")

    @abc.abstractmethod
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
        """Runs ``blocks``, whose schedule was checked.

        Args:
            on_finished: Given a block's place in ``blocks`` and what it came to, in their order; of
                a rolling block several times, each time a part.
            more: Gives the rows that come after those of a single rolling block, some at a time;
                None: no more.
            progress: Told the number of new tokens whenever some are booked.
            on_logits: Given (step, batch, logits [rows, vocab]) of every head computation.
            on_prefill: Told (done, of), whenever one more layer is through with a batch's first
                prompts; on any thread. Workers elsewhere tell nothing.
            snapshot_of: Given a block's place, says where its state is kept while it runs.

        Raises:
            ValueError: something of this that it does not do.
            ExecutionError: an op failed.
            StorageError: a snapshot is damaged.
        """

    def follow(self, planner_under: Callable[[Policy], Planner]) -> None:
        """Does its part of what the leading process runs, until that closes its runner.

        Args:
            planner_under: Has the weights placed, unless they are, and gives the planner.

        Raises:
            ValueError: this process leads.
        """
        raise ValueError("there is nobody to follow: this is process 0, or the only one")

    @abc.abstractmethod
    def close(self, error: BaseException | None = None) -> None:
        """Gives back memory, file handles and processes.

        Args:
            error: Why, if not because all is done.
        """
