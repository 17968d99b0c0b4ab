"""What ``policy="auto"`` decides: ``scheduling.search`` for this model and this machine."""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from flexgen_jax.arguments import expect
from flexgen_jax.models.family import Config
from flexgen_jax.planning.block_sizes import block_sizes
from flexgen_jax.planning.blocks import Block, Room, make_blocks, padded_length
from flexgen_jax.planning.byte_sizes import device_memory
from flexgen_jax.planning.capacities import capacity_for
from flexgen_jax.planning.default_job import GEN_LEN, PROMPT_LEN
from flexgen_jax.planning.lengths import Lengths
from flexgen_jax.planning.memory_need import MemoryLimits
from flexgen_jax.planning.stage_layout import stage_starts
from flexgen_jax.requests.request import Request
from flexgen_jax.requests.sampling_params import SamplingParams
from flexgen_jax.weights.weight_format import WeightFormat
from scheduling.hardware import Hardware
from scheduling.limits import Limits
from scheduling.policy import Policy
from scheduling.remembered import Blocks
from scheduling.schedules import Schedule
from scheduling.search import Found, search
from scheduling.shapes import CHOICES, EXACT
from scheduling.sizes import BatchSizes, ExpertSizes
from scheduling.workload import Experts, Workload
from storage.disk import DiskContext
from storage.memory import available_memory
from storage.pinned_memory import pinned_limit

# Of the memory there is; the rest is for the programs, the system, and what others take meanwhile.
MEMORY_SHARE, DISK_SHARE = 0.8, 0.9
PLAN_ERROR = 0.09  # of a limit that is to be kept
_LOOKED_AT = 5  # blocks of a job whose lengths differ
_MOST_REQUESTS = 8192


@dataclasses.dataclass(frozen=True)
class Uniform:
    """A job of prompts of one length, as many as there is room for."""

    prompt_len: int = PROMPT_LEN
    gen_len: int = GEN_LEN

    def within(self, config: Config) -> Uniform:
        """The same, or as much of it as the model has positions for."""
        room = config.max_position_embeddings
        gen_len = min(self.gen_len, max(1, room // 4))
        return Uniform(min(self.prompt_len, room - gen_len), gen_len)

    def requests(self, count: int) -> list[Request]:
        """So many."""
        params = SamplingParams(temperature=0.0, max_tokens=self.gen_len, ignore_eos=True)
        prompt = (0,) * self.prompt_len
        return [Request(i, None, prompt, params) for i in range(count)]


Demand = Uniform | Sequence[Request]


@dataclasses.dataclass(frozen=True)
class Model:
    """What a plan has to know of a model.

    Attributes:
        dtype: Of weights, cache and hidden states, quantisation aside.
        stored: How the weights there are stored; None: there are none yet.
        slots: Of the workload.
        hosts: Of the stages, as a ``Workload`` has them.
    """

    config: Config
    dtype: str
    stored: WeightFormat | None = None
    slots: Mapping[str, int] = dataclasses.field(default_factory=dict)
    chunk_positions: int = DiskContext().chunk_positions
    hosts: tuple[int, ...] = ()

    @property
    def stored_nbytes(self) -> int:
        """Bytes of the weights as they are stored; 0: there are none yet."""
        entries = {} if self.stored is None else self.stored.entries(self.config)
        return sum(entry.nbytes for entry in entries.values())

    def form(self, policy: Policy) -> WeightFormat:
        """How weights are stored under ``policy``."""
        if self.stored is not None and self.stored.bits == policy.weight_bits:
            return self.stored
        group = policy.group_size if policy.weight_bits else None
        return WeightFormat.usual(self.dtype, policy.weight_bits, group)

    def workload(self, block: Block, policy: Policy) -> Workload:
        """Of a block, with sizes."""
        form = self.form(policy)
        sizes = block_sizes(
            block,
            self.config,
            form,
            policy,
            chunk_positions=self.chunk_positions,
            hosts=self.hosts,
        )
        workload = block.workload(len(self.config.units), self.slots)
        if sizes.experts is not None and "weight_slots" not in self.slots:
            # One for the next layer, which is loaded before this one's experts are known.
            workload = dataclasses.replace(workload, weight_slots=3)
        return dataclasses.replace(
            workload,
            experts=_experts(sizes.experts),
            stages=stage_starts(self.config, policy.num_stages),
            num_groups=policy.groups,
            hosts=self.hosts,
            sizes=sizes,
        )

    def blocks_of(self, job: Demand, lengths: Lengths | None = None) -> Blocks:
        """What ``search`` asks for. Of many blocks a few stand for all.

        The room that a block takes is that of the limits; the steps that it takes are those that
        are expected. Of blocks that are refilled each stands for as many requests as it has rows,
        amid a long job: a row is somebody else's after the mean length, and the cache is as full
        as it is on average.

        Args:
            lengths: Of the requests; None: all run to their limits.
        """
        forecast = _Forecast(lengths)
        room = None if isinstance(job, Uniform) else Room.of(job)

        @functools.lru_cache(maxsize=64)  # a search asks for each shape again and again
        def of_shape(size: int, count: int) -> tuple[list[Block], list[float]]:
            requests: Sequence[Request]
            if isinstance(job, Uniform):
                requests, times = job.requests(size * count), 1 / (size * count)
            else:
                requests = _some(job)
                times = len(job) / len(requests)
            made = list(make_blocks(requests, device_batch_size=size, num_device_batches=count))
            picked = sorted({round(i) for i in _spread(len(made), _LOOKED_AT)})
            ends = [*picked[1:], len(made)]
            counts = [times * (end - i) for i, end in zip(picked, ends, strict=True)]
            return [made[i] for i in picked], counts

        @functools.lru_cache(maxsize=64)
        def standing(size: int, count: int) -> list[_Standing]:
            return [_Standing.of(block, room, forecast) for block in of_shape(size, count)[0]]

        def blocks(policy: Policy) -> list[tuple[Workload, float]]:
            shape = policy.device_batch_size, policy.num_device_batches
            several, counts = of_shape(*shape)
            if policy.refill:
                workloads = [
                    each.workload(self.workload(each.block, policy), forecast)
                    for each in standing(*shape)
                ]
            else:
                workloads = [forecast.ended(self.workload(block, policy)) for block in several]
            return list(zip(workloads, counts, strict=True))

        return blocks


class _Standing(NamedTuple):
    """A block as it is amid a job of many like it, whose rows come and go.

    Attributes:
        steps: That a row takes on average.
        alike: Whether rows that begin together end together.
    """

    block: Block
    steps: int
    alike: bool

    @classmethod
    def of(cls, block: Block, room: Room | None, forecast: _Forecast) -> _Standing:
        """Of a block that begins and ends at once.

        Args:
            room: Of each row; None: the job is endless, and all of it like the block.
        """
        room = room or Room.of(block.requests)
        rolling = Block(tuple(dataclasses.replace(b, room=room) for b in block.batches))
        steps = max(1, round(forecast.mean(block.requests)))
        return cls(rolling, steps, forecast.alike(block.requests))

    def workload(self, whole: Workload, forecast: _Forecast) -> Workload:
        """Of so many steps; ``whole`` is that of all steps that there may be."""
        assert whole.sizes is not None
        shorter = {  # most batches are one and the same
            id(batch): dataclasses.replace(
                batch,
                num_steps=self.steps,
                standing=None if self.alike else _standing(batch, forecast),
            )
            for batch in whole.sizes.batches
        }
        batches = tuple(shorter[id(batch)] for batch in whole.sizes.batches)
        sizes = dataclasses.replace(whole.sizes, batches=batches)
        return dataclasses.replace(whole, num_steps=self.steps, sizes=sizes)


def _experts(sizes: ExpertSizes | None) -> Experts | None:
    return None if sizes is None else Experts(frozenset(sizes.units), sizes.count, sizes.chosen)


class _Forecast:
    """How long requests run; looked up once for each limit."""

    def __init__(self, lengths: Lengths | None) -> None:
        self._lengths = lengths
        self._expected = functools.cache(lengths.expected if lengths else float)
        self._longest = functools.cache(lengths.longest_of if lengths else lambda _, most: most)

    def mean(self, requests: Sequence[Request]) -> float:
        """New tokens of one of them, on average."""
        return math.fsum(self._expected(r.max_tokens) for r in requests) / len(requests)

    def alike(self, requests: Sequence[Request]) -> bool:
        """Whether rows that begin together end together."""
        limits = {r.max_tokens for r in requests}
        if self._lengths is None or self._lengths.sample[0] >= max(limits):
            return len(limits) == 1
        return self._lengths.alike

    def ended(self, workload: Workload) -> Workload:
        """A block that takes as many steps as its longest request, its batches likewise."""
        if self._lengths is None:
            return workload
        assert workload.sizes is not None
        batches = tuple(
            dataclasses.replace(batch, num_steps=self.steps(batch.rows, batch.num_steps))
            for batch in workload.sizes.batches
        )
        rows = sum(batch.rows for batch in batches)
        return dataclasses.replace(
            workload,
            num_steps=self.steps(rows, workload.num_steps),
            sizes=dataclasses.replace(workload.sizes, batches=batches),
        )

    def steps(self, count: int, limit: int) -> int:
        """Of the longest of ``count`` requests that may take ``limit``."""
        return max(1, round(self._longest(count, limit)))


def _standing(batch: BatchSizes, forecast: _Forecast) -> int:
    """Positions in a cache whose oldest row is about as old as one of its rows gets."""
    oldest = batch.prompt_len + forecast.steps(batch.rows, batch.num_steps)
    return capacity_for(oldest, batch.capacity)


def kind_of(job: Demand) -> object:
    """Equal for jobs so alike that one policy serves both."""
    if isinstance(job, Uniform) or not job:
        return job if isinstance(job, Uniform) else ()
    longest = padded_length(max(len(r.token_ids) for r in job))
    most = max(r.max_tokens for r in job)
    return _rows(job).bit_length(), longest, most.bit_length()


def _rows(job: Sequence[Request]) -> int:
    return sum(r.params.n for r in job)


def _some(requests: Sequence[Request]) -> Sequence[Request]:
    """So few that making blocks of them is quick; of all lengths, the longest with them."""
    if len(requests) <= _MOST_REQUESTS:
        return requests
    order = sorted(requests, key=lambda r: -len(r.token_ids))
    return order[:: math.ceil(len(order) / _MOST_REQUESTS)]


def _spread(length: int, most: int) -> list[float]:
    """At most so many places in ``range(length)``, the first and the last with them."""
    if length <= most:
        return [float(i) for i in range(length)]
    return [i * (length - 1) / (most - 1) for i in range(most)]


def limits_of_this_machine(
    memory: MemoryLimits, scratch: Path, stored_nbytes: int, runtime_memory: float
) -> Limits:
    """What a run may take here.

    Args:
        memory: What is allowed; where nothing is, a share of what there is. On the CPU backend
            device and host are the one memory, and the host's part is used as a tier only where
            there is a limit for it.
        scratch: On the disk tier's disk.
        stored_nbytes: Of weights, which are on the disk already.
        runtime_memory: Bytes that the process takes beside what is placed.
    """
    shared = jax.local_devices()[0].platform == "cpu"
    device, host = memory.device, memory.host
    allowed = memory.of_process(shared=shared)
    if shared and device is None:
        device = host
    # What is allowed is kept to, so what is planned leaves room for what a plan may be off by.
    aside = 0.0 if allowed is None else runtime_memory + PLAN_ERROR * allowed
    if device is None:
        device = int(MEMORY_SHARE * device_memory())
    if host is None:
        host = 0 if shared else int(MEMORY_SHARE * available_memory())
    if not shared:
        host = min(host, pinned_limit())
    where = next(p for p in (scratch, *scratch.absolute().parents) if p.exists())
    free = DISK_SHARE * shutil.disk_usage(where).free
    disk = free + stored_nbytes
    return Limits(device=device, host=host, disk=disk, shared=shared, aside=aside)


def part_of_this_machine(parts: int) -> dict[str, int]:
    """``device_memory`` or ``host_memory`` of an ``LLM``: that which ``parts`` of them share."""
    part = int(MEMORY_SHARE * available_memory()) // parts
    shared = jax.local_devices()[0].platform == "cpu"
    return {"device_memory" if shared else "host_memory": part}


@dataclasses.dataclass(frozen=True)
class Auto:
    """``policy="auto"``: what it has to keep, and what it may use.

    Attributes:
        allow: Of ``CHOICES``: methods that results may depend on slightly. Of ``EXACT`` ones, which
            are used where they help, nothing need be said.
        forbid: Of ``EXACT``: not to be used all the same.

    Raises:
        ValueError: an unknown field or method, or a value out of range.
    """

    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    allow: tuple[str, ...] = ()
    forbid: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        fields = [f.name for f in dataclasses.fields(Policy)]
        unknown = sorted(set(self.fixed) - set(fields))
        if unknown:
            raise ValueError(f"no policy field {', '.join(unknown)}; known: {', '.join(fields)}")
        wrong = sorted(set(self.allow) - set(CHOICES))
        if wrong:
            raise ValueError(f"nothing to allow by {', '.join(wrong)}; known: {', '.join(CHOICES)}")
        wrong = sorted(set(self.forbid) - set(EXACT))
        if wrong:
            raise ValueError(
                f"nothing to forbid by {', '.join(wrong)}; known: {', '.join(EXACT)}. "
                "Other methods are used only where they are allowed"
            )
        both = sorted(set(self.allow) & set(self.forbid))
        if both:
            raise ValueError(f"{', '.join(both)} is both allowed and forbidden: leave one out")
        _ = self.base

    @classmethod
    def asked(
        cls,
        policy: Policy | Literal["auto"],
        fixed: Mapping[str, Any] | None,
        allow: Iterable[str],
        forbid: Iterable[str] = (),
    ) -> tuple[Policy, Auto | None]:
        """The arguments of a call: the policy they give, or what ``"auto"`` begins with and is.

        Raises:
            ValueError: neither, or arguments that go with ``"auto"`` only.
        """
        if policy == "auto":
            auto = cls(dict(fixed or {}), tuple(allow), tuple(forbid))
            return auto.base, auto
        expect("policy", policy, Policy, "'auto' or a Policy")
        if fixed or tuple(allow) or tuple(forbid):
            raise ValueError(
                "fixed, allow and forbid are for policy='auto'; change the policy instead"
            )
        return policy, None

    @property
    def base(self) -> Policy:
        """The default with what is fixed."""
        return Policy(**self.fixed)

    def methods(self, limits: Limits) -> tuple[str, ...]:
        """Those that may be used: where host and device are one memory, what is computed on the
        one or the other is the same."""
        exact = () if limits.shared else tuple(n for n in EXACT if n not in self.forbid)
        return (*exact, *(name for name in self.allow if name not in EXACT))

    def choose(
        self,
        model: Model,
        job: Demand,
        hardware: Hardware,
        limits: Limits,
        *,
        schedule: Schedule,
        placed: Policy | None = None,
        lengths: Lengths | None = None,
        uphill: bool = True,
        blocks: Blocks | None = None,
    ) -> Found:
        """The best policy for a job.

        Args:
            uphill: As ``search`` takes it.
            lengths: Of its requests; None: all run to their limits.
            placed: Whose weights are where they are; None: they can go anywhere.
            blocks: Of the job, where something is known of them already; None: they are made.

        Raises:
            NothingFitsError: no policy within the limits.
        """
        # An empty job is planned as one short request.
        job = job if isinstance(job, Uniform) or job else Uniform(1, 1).requests(1)
        fixed = dict(self.fixed)
        if model.stored is not None and model.stored.coded:
            fixed["weight_bits"] = model.stored.bits  # codes cannot be undone
        if placed is not None:
            fixed |= {"weights": placed.weights, "weight_bits": placed.weight_bits}
            fixed |= {"experts": placed.experts}
        return search(
            blocks or model.blocks_of(job, lengths),
            hardware,
            limits,
            schedule=schedule,
            requests=10**9 if isinstance(job, Uniform) else _rows(job),
            fixed=fixed,
            allow=self.methods(limits),
            uphill=uphill,
        )
