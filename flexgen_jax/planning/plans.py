"""What a run would do and take, without weights, accelerator or a run."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from flexgen_jax.arguments import expect, expect_names
from flexgen_jax.models.family import Config
from flexgen_jax.models.registry import load_config, preset
from flexgen_jax.planning.answer import Answer, best_helps
from flexgen_jax.planning.auto import Auto, Demand, Model, Uniform
from flexgen_jax.planning.blocks import padded_length
from flexgen_jax.planning.forecast import (
    Forecast,
    SimulatedJob,
    forecast,
    job_size,
    simulate_job,
)
from flexgen_jax.planning.lengths import Lengths
from flexgen_jax.planning.memory_need import MemoryNeed, memory_need
from flexgen_jax.planning.planner import Planner
from flexgen_jax.planning.refilling import Life
from flexgen_jax.planning.remedies import DoesNotFitError, remedies
from flexgen_jax.planning.schedule_names import named_schedule
from flexgen_jax.weights.checkpoint import dtype_of_model
from flexgen_jax.weights.coded_leaves import planned_format, preset_format
from scheduling.advice import advice
from scheduling.busy import busy
from scheduling.collecting import no_collecting
from scheduling.cost_model import CostModel, bound
from scheduling.estimate import estimate
from scheduling.hardware import Hardware
from scheduling.limits import Limits
from scheduling.peak import highest
from scheduling.placement import Placement
from scheduling.policy import Policy, Tier
from scheduling.registered import is_ours
from scheduling.remembered import Remembered
from scheduling.reported import naming
from scheduling.schedules import Schedule
from scheduling.search import NothingFitsError
from scheduling.simulate import simulate
from scheduling.stages import hosts_of
from scheduling.timeline import Timeline
from scheduling.workload import Workload

# Computations of a block up to which each is simulated: some seconds' worth.
_SIMULATED = 30_000
REQUESTS = 1000  # of the job whose time is told, where none is given
_MOST_SEARCHED_FOR = 8192  # requests; no block has as many


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A block of a policy on a machine, predicted.

    Attributes:
        placement: Of ``weights``, ``cache`` and ``hidden``, as a run would place them; of the
            weights' ``experts`` also alone, if there are any.
        seconds, prefill_seconds: Of the block, predicted; of a very large one by simulating some
            of its decode steps.
        memory: What the process and the device take, and of what that is made up.
        lower_bound: Seconds that any schedule of this block needs, per resource.
        why: Of the policy, where it was searched for.
        would_help: What would, and how many times the throughput it gives, estimated.
        expected: Where lengths are known: what a job of many blocks takes, refilled and not.
        requests: Of the job that :attr:`answer` is about.
    """

    policy: Policy
    hardware: Hardware
    schedule: str
    workload: Workload
    placement: dict[str, Placement]
    planner: Planner = dataclasses.field(repr=False)
    job: Uniform
    seconds: float
    prefill_seconds: float
    memory: MemoryNeed
    lower_bound: dict[str, float]
    why: str | None = None
    would_help: dict[str, float] = dataclasses.field(default_factory=dict)
    expected: tuple[Forecast, ...] = ()
    requests: int = REQUESTS

    @property
    def generated_tokens(self) -> int:
        """Of the block."""
        return self.policy.block_size * self.workload.num_steps

    @functools.cached_property
    def timeline(self) -> Timeline:
        """Predicted, op by op, and labelled with the schedule's name.

        Takes some seconds for a model of hundreds of gigabytes.
        """
        found = simulate(self.planner.order(self.workload), self.workload, self.hardware)
        return dataclasses.replace(found, label=self.schedule)

    def simulate_job(
        self, lengths: Lengths | str | os.PathLike[str] | Iterable[int], requests: int | None = None
    ) -> SimulatedJob:
        """Predicted, op by op: a job whose requests turn out to be so long, refilled if the policy
        says so.

        Args:
            lengths: New tokens of requests like those to come, as :func:`plan` takes them.
            requests: Of the job; None: four blocks' worth.

        Raises:
            ValueError: lengths that cannot be, or no requests.
        """
        count = 4 * self.policy.block_size if requests is None else requests
        if count < 1:
            raise ValueError(f"requests must be 1 or more, got {count}")
        return simulate_job(self.planner, self.workload, _lives(self.job, lengths, count))

    @functools.cached_property
    def stages(self) -> list[dict[str, Any]]:
        """Of each pipeline stage its layers, and in a block not too large to simulate the shares of
        time in which it computes (``busy``) and waits for other stages (``bubble``)."""
        w = self.workload
        small = w.num_steps * w.num_layers * w.num_batches <= _SIMULATED
        shares = self.timeline.stage_table() if small else []
        return [
            {
                "host": w.host_of(stage),
                "first_layer": w.layers_of(stage).start,
                "num_layers": len(w.layers_of(stage)),
                **(shares[stage] if shares else {}),
            }
            for stage in range(w.num_stages)
        ]

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over the block's time: FlexGen's throughput."""
        return self.generated_tokens / self.seconds

    @property
    def peak_bytes(self) -> dict[Tier, int]:
        """What weights, cache, hidden states and buffers take in each tier, of both phases."""
        return highest(self.memory.peak)

    @property
    def workspace_bytes(self) -> int:
        """What the largest computation takes of the device on top."""
        return self.memory.workspace_bytes

    @functools.cached_property
    def short_bytes(self) -> dict[str, float]:
        """What is missing, by tier; ``memory`` where device and host are one. Empty: it fits."""
        needed = self.peak_bytes
        needed[Tier.DEVICE] += self.workspace_bytes
        limits = Limits.of(self.hardware)
        names = {tier: tier.value for tier in Tier}
        if limits.shared:
            names[Tier.DEVICE] = "memory"
        return {names[tier]: nbytes for tier, nbytes in limits.exceeded(needed).items()}

    @property
    def misfits(self) -> list[str]:
        """What does not fit the machine, in words."""
        return [f"{tier}: {n / 1e9:.1f} GB too much" for tier, n in self.short_bytes.items()]

    @functools.cached_property
    def answer(self) -> Answer:
        """What a person asks: does it fit, how fast is it, what limits it, what would help."""
        found = busy(self.planner.order, self.workload, self.hardware)
        limit, seconds = found.busiest()
        to_buy, to_allow = best_helps(self.would_help)
        return Answer(
            fits=not self.short_bytes,
            short_bytes=self.short_bytes,
            where={
                kind: {t.value: placed.percent(t) for t in Tier if placed.nbytes(t)}
                for kind, placed in self.placement.items()
                if placed.cells
            },
            tokens_per_second=self._rate,
            requests=self.requests,
            seconds=self._job_seconds,
            limit=limit,
            share=min(1.0, seconds / self.seconds),
            to_buy=to_buy,
            to_allow=to_allow,
        )

    @property
    def _as_run(self) -> Forecast | None:
        return next((f for f in self.expected if f.refill == self.policy.refill), None)

    @property
    def _rate(self) -> float:
        expected = self._as_run
        return self.tokens_per_second if expected is None else expected.tokens_per_second

    @property
    def _job_seconds(self) -> float:
        """Of :attr:`requests`: full blocks, and one of those who are left."""
        expected = self._as_run
        if expected is not None:
            return expected.seconds * self.requests / expected.requests
        blocks, rest = divmod(self.requests, self.policy.block_size)
        if not rest:
            return blocks * self.seconds
        (block,) = self.planner.blocks(self.job.requests(rest))
        last = _predicted(self.planner.order, self.planner.workload(block), self.hardware)
        # Fewer rows never take longer than the block's.
        return blocks * self.seconds + min(self.seconds, sum(last))

    def to_json(self) -> dict[str, Any]:
        """All figures but the spans."""
        name, seconds = bound(self.lower_bound)
        return {
            "answer": self.answer.to_json(),
            "policy": self.policy.to_json(),
            "hardware": self.hardware.name,
            "schedule": self.schedule,
            "placement": {kind: placed.to_json() for kind, placed in self.placement.items()},
            "predicted": {
                "tokens_per_second": self.tokens_per_second,
                "seconds": self.seconds,
                "prefill_seconds": self.prefill_seconds,
                "decode_seconds": self.seconds - self.prefill_seconds,
            },
            "peak_bytes": {tier.value: nbytes for tier, nbytes in self.peak_bytes.items()},
            "peak_bytes_by_phase": {
                phase: {tier.value: nbytes for tier, nbytes in peak.items()}
                for phase, peak in self.memory.peak.items()
            },
            "memory": self.memory.to_json(),
            "workspace_bytes": self.workspace_bytes,
            "fits": not self.misfits,
            "stages": self.stages,
            "why": self.why,
            "would_help": self.would_help,
            "bound": name,
            "lower_bound_seconds": seconds,
            **({"expected": [found.to_json() for found in self.expected]} if self.expected else {}),
        }


def plan(
    model: str | os.PathLike[str] | Config,
    policy: Policy | Literal["auto"] = "auto",
    hardware: Hardware | str | None = None,
    *,
    prompt_len: int,
    gen_len: int,
    schedule: str | Schedule | tuple[str, Schedule] = "zigzag",
    dtype: Any = "auto",
    slots: Mapping[str, int] | None = None,
    fixed: Mapping[str, Any] | None = None,
    allow: Iterable[str] = (),
    forbid: Iterable[str] = (),
    help_wanted: bool = False,
    num_hosts: int = 1,
    lengths: Lengths | str | os.PathLike[str] | Iterable[int] | None = None,
    requests: int | None = None,
) -> Plan:
    """Predicts one full block.

    Args:
        model: A preset (in the codes that it is published in, if ``weight_bits`` asks for no
            others), the path of a ``config.json`` (or of a directory that has one), or a config.
        policy: ``"auto"``: the best within the hardware's memory for a job of many such blocks.
        hardware: Or the name of a preset, such as ``"t4"``.
        prompt_len: Tokens of each prompt; padded as a run would.
        schedule: As ``LLM`` takes it. One that is not the library's is validated for the block.
        dtype: Of weights, cache and hidden states, quantisation aside; ``"auto"``: what the model
            is computed with, and bfloat16 for a preset.
        fixed: Fields that ``"auto"`` has to keep.
        allow: Methods that ``"auto"`` may use though results may change slightly: ``weight_bits``,
            ``cache_bits``, ``attention_sparsity``.
        forbid: ``host_attention``: not to be used, as otherwise it is where it helps.
        help_wanted: Find out what would help, which takes about as long again.
        num_hosts: Machines like ``hardware`` that the stages are spread over, as evenly as can be.
        lengths: New tokens of requests like those to come, as ``LLM`` takes them; none has more
            than ``gen_len``. None: all have as many.
        requests: Of the job: ``"auto"`` chooses blocks that are no larger than it, and
            ``Plan.answer`` has its time. None: a long job, and the time of 1,000.

    Raises:
        NothingFitsError: no policy fits the hardware; with ``help_wanted`` it says what would.
        ScheduleError: the schedule is wrong.
        ValueError: a model, lengths or a schedule that cannot be.
    """
    expect("model", model, (str, os.PathLike, Config), "a preset, a path or a config")
    expect("policy", policy, (str, Policy), "'auto' or a Policy; hardware comes after it")
    expect("hardware", hardware, (str, Hardware), "a Hardware, or a preset's name such as 't4'")
    for label, value in (("prompt_len", prompt_len), ("gen_len", gen_len)):
        expect(label, value, numbers.Integral, "an integer")
    expect_names("allow", allow)
    expect_names("forbid", forbid)
    expect("fixed", fixed, Mapping, "a dict of a policy's fields", optional=True)
    expect("requests", requests, numbers.Integral, "an integer", optional=True)
    if requests is not None and requests < 1:
        raise ValueError(f"requests must be 1 or more, got {requests}")
    if isinstance(hardware, str):
        hardware = Hardware.preset(hardware)
    assert isinstance(hardware, Hardware)
    policy, auto = Auto.asked(policy, fixed, allow, forbid)
    config = model if isinstance(model, Config) else config_of(model)
    room = config.max_position_embeddings
    if prompt_len < 1 or gen_len < 1 or prompt_len + gen_len > room:
        raise ValueError(
            f"prompt_len {prompt_len} and gen_len {gen_len} must be at least 1, and together at "
            f"most the model's {room} positions"
        )
    stages = policy.num_stages
    if not 1 <= num_hosts <= stages:
        raise ValueError(
            f"num_hosts must lie in 1..{stages}, the number of stages; got {num_hosts}"
        )
    hosts = hosts_of(stages, num_hosts) if num_hosts > 1 else ()
    named = None if isinstance(model, Config) else model
    dtype = dtype_of_model(named or "", dtype)
    stored = None
    if named is not None and os.path.exists(named):
        stored = planned_format(Path(named), config, dtype)
    elif named is not None and policy.weight_bits is None:
        stored = preset_format(config, dtype)
    known = Model(config, dtype, stored, slots=slots or {}, hosts=hosts)
    job = Uniform(prompt_len, gen_len)
    name, order = named_schedule(schedule)
    known_lengths = None if lengths is None else Lengths.of(lengths)
    with naming(name), no_collecting():
        return _planned(
            known, policy, auto, (name, order), hardware, job, known_lengths, help_wanted, requests
        )


def _planned(
    known: Model,
    policy: Policy,
    auto: Auto | None,
    schedule: tuple[str, Schedule],
    hardware: Hardware,
    job: Uniform,
    lengths: Lengths | None,
    help_wanted: bool,
    requests: int | None,
) -> Plan:
    limits, why = Limits.of(hardware), None
    name, order = schedule
    blocks = Remembered.of(known.blocks_of(job, lengths), order)
    if auto is not None:
        few = requests is not None and requests <= _MOST_SEARCHED_FOR
        demand: Demand = job.requests(requests) if few and requests else job
        try:
            found = auto.choose(
                known,
                demand,
                hardware,
                limits,
                schedule=order,
                lengths=lengths,
                blocks=blocks if demand is job else None,
            )
        except NothingFitsError as error:
            if not help_wanted:
                raise
            would = remedies(known, job, hardware, limits, auto, order)
            raise DoesNotFitError(str(error), would) from None
        policy, why = found.best.policy, found.why()
    planner = Planner(known, policy, name, order, hardware, why)
    (block,) = planner.blocks(job.requests(policy.block_size))
    if not is_ours(order):
        planner.check([block])
    workload = planner.workload(block)
    assert workload.sizes is not None
    ordered = planner.order
    helps = {}
    if help_wanted:
        methods = () if auto is None else auto.methods(limits)
        fixed = {} if auto is None else auto.fixed
        free = [name for name in methods if name not in fixed]
        coded = known.stored is not None and known.stored.coded  # codes cannot be undone
        settled = ("weight_bits",) if coded else ()
        helps = advice(
            blocks, hardware, limits, policy, schedule=order, allow=free, settled=settled
        )
    prefill, decode = _predicted(ordered, workload, hardware)
    return Plan(
        policy=policy,
        hardware=hardware,
        schedule=name,
        workload=workload,
        placement=planner.placement([block]),
        planner=planner,
        job=job,
        seconds=prefill + decode,
        prefill_seconds=prefill,
        memory=memory_need(
            order, workload, shared=limits.shared, runtime_bytes=hardware.runtime_memory
        ),
        lower_bound=CostModel(workload, hardware).lower_bound(),
        why=why,
        would_help=helps,
        expected=() if lengths is None else _expected(planner, job, lengths),
        requests=requests or REQUESTS,
    )


def _expected(planner: Planner, job: Uniform, lengths: Lengths) -> tuple[Forecast, ...]:
    """With refill, and without."""
    size = planner.policy.block_size
    lives = _lives(job, lengths, job_size(size))
    found = []
    for refill in (True, False):
        policy = dataclasses.replace(planner.policy, refill=refill)
        planned = dataclasses.replace(planner, policy=policy)
        (block,) = planned.blocks(job.requests(size))
        whole = planned.workload(block)
        seconds = sum(_predicted(planned.order, whole, planned.hardware))
        found.append(forecast(planned, whole, lives, seconds=seconds))
    return tuple(found)


def _lives(
    job: Uniform, lengths: Lengths | str | os.PathLike[str] | Iterable[int], count: int
) -> list[Life]:
    known = Lengths.of(lengths).of_each([job.gen_len] * count)
    return [Life(padded_length(job.prompt_len), num_tokens) for num_tokens in known]


def _predicted(order: Schedule, workload: Workload, hardware: Hardware) -> tuple[float, float]:
    w = workload
    large = w.num_steps * w.num_layers * w.num_batches > _SIMULATED
    return estimate(order, w, hardware, decode_steps=3 if large else w.num_steps)


def config_of(model: str | os.PathLike[str]) -> Config:
    """The config of a preset, a file or a directory.

    Raises:
        ConfigError: none of these.
    """
    return load_config(Path(model)) if os.path.exists(model) else preset(str(model))
