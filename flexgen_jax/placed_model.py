"""A model and the policy in force: the one that was given, or the best for the job at hand.

Opens the weight store that the policy wants and has the runner place the weights, once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from flexgen_jax.engine.runner import Runner
from flexgen_jax.logs import event
from flexgen_jax.machine.first_profile import known_machine
from flexgen_jax.models.family import Config
from flexgen_jax.planning.auto import Auto, Demand, Model, Uniform, kind_of, limits_of_this_machine
from flexgen_jax.planning.blocks import Block
from flexgen_jax.planning.byte_sizes import device_is_host
from flexgen_jax.planning.lengths import Lengths
from flexgen_jax.planning.memory_need import MemoryLimits, MemoryNeed, memory_need
from flexgen_jax.planning.planner import Planner, in_place
from flexgen_jax.planning.stage_layout import (
    check_experts,
    layers_of,
    place_stages,
    stored_names,
    together,
)
from flexgen_jax.requests.tokenization import Tokenizer, load_tokenizer
from flexgen_jax.weights.checkpoint import open_model, resolve
from flexgen_jax.weights.weight_format import WeightFormat
from scheduling.hardware import Hardware
from scheduling.limits import Limits
from scheduling.policy import Policy, Tier
from scheduling.reported import naming
from scheduling.schedules import Schedule
from scheduling.workload import Workload


@dataclasses.dataclass(frozen=True)
class Asked:
    """What an ``LLM`` was asked for, beside model and policy; checked.

    Attributes:
        dtype: None: the model's own.
        memory: What the device and the process may take; without, ``"auto"`` goes by what there
            is.
        scratch: Parent of the directories for what lies on disk while blocks run.
        schedule: Its name, and the function.
        chunk_positions: Of the cache on disk.
        lengths: Of requests, which ``"auto"`` chooses for; None: nothing is known.
        profile: Whether a machine without a profile is measured.
    """

    dtype: str | None
    offload_dir: str | None
    scratch: Path
    memory: MemoryLimits
    schedule: tuple[str, Schedule]
    slots: Mapping[str, int]
    chunk_positions: int
    hardware: Hardware | None
    say: Callable[[str], None]
    lengths: Lengths | None = None
    profile: bool = True


class PlacedModel:
    """A model whose weights lie in ``runner``, from when a policy is known.

    Args:
        model: As ``LLM`` takes it.
        policy: What to open it for. ``auto``: what chooses another one; None: it is in force.

    Attributes:
        store: Where the weights lie, converted if need be.
        tokenizer: None: there are no files of one.
        hardware: What predictions are made for.

    Raises:
        ValueError: a model or store that cannot be used, or not under ``policy``.
    """

    def __init__(
        self, runner: Runner, model: str, policy: Policy, auto: Auto | None, asked: Asked
    ) -> None:
        self._runner, self._auto, self._asked = runner, auto, asked
        self._dtype = asked.dtype
        self.store: Path
        self.tokenizer: Tokenizer | None
        self._open(model, policy)
        if asked.hardware is not None:
            self.hardware = asked.hardware
        elif runner.machine is not None:
            self.hardware = runner.machine.hardware
        else:
            self.hardware = known_machine(
                runner.model.dtype, asked.scratch, measure=asked.profile, say=asked.say
            )
        self._planner: Planner | None = None
        self._allowed: set[Workload] = set()
        self._chosen_for: object = None
        if auto is None:
            self._place(policy, None)

    def _open(self, model: str, policy: Policy) -> None:
        """Opens the weight store that ``policy`` wants, made if need be."""
        store = resolve(
            model,
            dtype=self._dtype,
            weight_bits=policy.weight_bits,
            group_size=policy.group_size,
            offload_dir=self._asked.offload_dir,
            say=self._asked.say,
        )

        def needed(config: Config, form: WeightFormat) -> set[str]:
            layers = layers_of(config, policy.num_stages)
            here = (layer for stage in self._runner.stages for layer in layers[stage])
            return stored_names(config, form, here)

        opened = open_model(store, dtype=self._dtype, needed=needed)
        check_experts(opened.config, policy)
        self._dtype = opened.dtype
        self.store, self.tokenizer = store, load_tokenizer(opened.path)
        self._runner.open(opened, self.tokenizer)

    def _place(self, policy: Policy, why: str | None) -> Planner:
        """Puts the weights where ``policy`` wants them."""
        policy = dataclasses.replace(policy, weight_bits=self._runner.model.format.bits)
        self._check_weights(policy)
        self._runner.place(policy)
        event("model opened", store=str(self.store), policy=policy.to_json())
        self._planner = Planner(self._known(), policy, *self._asked.schedule, self.hardware, why)
        return self._planner

    def _check_weights(self, policy: Policy) -> None:
        """Refuses weights that alone take more than was allowed, before any is read.

        Raises:
            MemoryLimitError: they do.
        """
        if not self._asked.memory.any or self._runner.machine is not None:
            return
        of_stages = place_stages(self._runner.model.config, self._runner.model.format, policy)
        placed = together([of_stages[stage] for stage in self._runner.stages])
        weights = {tier: placed.nbytes(tier) for tier in Tier}
        self._asked.memory.check(
            MemoryNeed(
                peak={"prefill": weights, "decode": weights},
                workspace_bytes=0,
                runtime_bytes=round(self.hardware.runtime_memory),
                shared=device_is_host(),
            )
        )

    def take(self, policy: Policy, why: str | None = None) -> Planner:
        """Works by ``policy``; the weights, if they are in place, are where it has them."""
        if self._planner is not None:
            self._planner = dataclasses.replace(self._planner, policy=policy, why=why)
            return self._planner
        if policy.weight_bits != self._runner.model.format.bits:
            self._open(str(self.store), policy)
        return self._place(policy, why)

    def change(self, policy: Policy) -> None:
        """Works by ``policy`` from now on, whatever the job.

        Raises:
            ValueError: it would move the weights.
        """
        planner = self.planner
        if in_place(policy) != in_place(planner.policy):
            raise ValueError("the weights are in place already; make another LLM to move them")
        self.take(policy, planner.why)
        self._auto = None

    @property
    def planner(self) -> Planner:
        """Of the policy in force; where there is none, of the best for a job as usual."""
        if self._planner is None:
            self.choose(Uniform())
        assert self._planner is not None
        return self._planner

    @property
    def why(self) -> str | None:
        """Why the policy in force was chosen; None: it was not, or not yet."""
        return None if self._planner is None else self._planner.why

    def choose(self, job: Demand) -> Policy:
        """See :meth:`LLM.choose_policy`."""
        if self._auto is None:
            return self.planner.policy
        if isinstance(job, Uniform):
            job = job.within(self._runner.model.config)
        alike = kind_of(job)
        if alike != self._chosen_for:
            name, schedule = self._asked.schedule
            with naming(name):
                found = self._auto.choose(
                    self._known(),
                    job,
                    self.hardware,
                    self.limits,
                    schedule=schedule,
                    placed=None if self._planner is None else self._planner.policy,
                    lengths=self._asked.lengths,
                )
            self._chosen_for = alike
            policy, why = found.best.policy, found.why()
            event("policy chosen", policy=policy.to_json(), why=why)
            self.take(policy, why)
        return self.planner.policy

    @property
    def limits(self) -> Limits:
        """What ``auto`` may take of the memory and of the disk."""
        if self._runner.machine is not None:
            return self._runner.machine.limits
        stored = self._known().stored_nbytes
        return limits_of_this_machine(
            self._asked.memory, self._asked.scratch, stored, self.hardware.runtime_memory
        )

    def check_memory(self, blocks: Sequence[Block]) -> None:
        """Refuses blocks that would take more memory than was allowed by name.

        Raises:
            MemoryLimitError: it says how much.
        """
        if not self._asked.memory.any or self._runner.machine is not None:
            return
        planner = self.planner
        for workload in {planner.workload(block) for block in blocks} - self._allowed:
            self._asked.memory.check(
                memory_need(
                    planner.order,
                    workload,
                    shared=device_is_host(),
                    runtime_bytes=self.hardware.runtime_memory,
                )
            )
            self._allowed.add(workload)

    def _known(self) -> Model:
        opened = self._runner.model
        return Model(
            opened.config,
            opened.dtype,
            opened.format,
            self._asked.slots,
            self._asked.chunk_positions,
            self._runner.hosts,
        )
