"""A run as it is planned: the order of its blocks, what they move, how long they should take.

Knows the model, the policy, the schedule and the machine, but no weights and no device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from flexgen_jax.planning.auto import Model
from flexgen_jax.planning.blocks import Block, make_blocks
from flexgen_jax.planning.cell_layout import place_cache, place_hidden
from flexgen_jax.planning.stage_layout import place_stages, together
from flexgen_jax.requests.request import Request
from scheduling.calibrate import Observation, observations
from scheduling.cost_model import CostModel, bound
from scheduling.hardware import Hardware
from scheduling.placement import Placement
from scheduling.policy import Policy
from scheduling.schedules import SCHEDULES, Schedule
from scheduling.simulate import simulate
from scheduling.sizes import Link
from scheduling.timeline import Timeline
from scheduling.transforms import serialized
from scheduling.validate import validate
from scheduling.workload import Workload

# Fields of the policy that placing the weights fixes.
_IN_PLACE = ("weights", "weight_bits", "num_stages")


@dataclasses.dataclass(frozen=True)
class Planner:
    """A model, a policy, a schedule and a machine: what there is to know before a block runs.

    Attributes:
        schedule_name: Of ``schedule``.
        schedule: The order of a block, as if its operations overlap; see :attr:`order`.
        why: Of the policy, where it was searched for.
    """

    model: Model
    policy: Policy
    schedule_name: str
    schedule: Schedule = dataclasses.field(repr=False)
    hardware: Hardware
    why: str | None = None

    @property
    def order(self) -> Schedule:
        """The schedule as the policy has it: with or without overlap."""
        return self.schedule if self.policy.overlap else serialized(self.schedule)

    def blocks(self, requests: Sequence[Request]) -> list[Block]:
        """How ``requests`` are grouped."""
        return list(
            make_blocks(
                requests,
                device_batch_size=self.policy.device_batch_size,
                num_device_batches=self.policy.num_device_batches,
            )
        )

    def workload(self, block: Block) -> Workload:
        """What the schedule has to order, with its sizes."""
        return self.model.workload(block, self.policy)

    @functools.cached_property
    def _checked(self) -> set[Workload]:
        return set()

    def check(self, blocks: Sequence[Block]) -> None:
        """Refuses a wrong schedule before anything runs; most blocks of a job are alike.

        Raises:
            ScheduleError: what is wrong with it.
        """
        for workload in {self.workload(block) for block in blocks} - self._checked:
            validate(self.schedule(workload), workload)
            self._checked.add(workload)

    @functools.cached_property
    def weights(self) -> Placement:
        """Where every weight tensor lies."""
        model = self.model
        return together(place_stages(model.config, model.form(self.policy), self.policy))

    def placement(self, blocks: Sequence[Block]) -> dict[str, Placement]:
        """Where weights, cache and hidden states lie: of the block with the largest cache."""
        config, dtype = self.model.config, self.model.dtype
        cache = [place_cache(b, config, dtype, self.policy) for b in blocks]
        hidden = [place_hidden(b, config, dtype, self.policy.hidden) for b in blocks]
        largest = max(range(len(blocks)), key=lambda i: cache[i].nbytes(), default=None)
        empty = Placement(())
        return {
            "weights": self.weights,
            "cache": empty if largest is None else cache[largest],
            "hidden": empty if largest is None else hidden[largest],
        }

    def traffic(self, blocks: Sequence[Block]) -> dict[Link, int]:
        """Bytes that the schedule moves over each link, if every request runs to its end."""
        total = dict.fromkeys(Link, 0)
        for block in blocks:
            workload = self.workload(block)
            assert workload.sizes is not None
            for link, nbytes in workload.sizes.total(self.schedule(workload)).items():
                total[link] += nbytes
        return total

    def predict(self, block: Block) -> Timeline:
        """What the simulator expects of ``block``."""
        workload = self.workload(block)
        return simulate(self.order(workload), workload, self.hardware)

    def observe(self, block: Block, timeline: Timeline) -> list[Observation]:
        """What each kind of op took in a measured ``timeline``, beside the prediction."""
        workload = self.workload(block)
        return observations(list(self.order(workload)), workload, self.hardware, timeline)

    def lower_bound(self, block: Block) -> float:
        """Seconds that any schedule of ``block`` takes."""
        return bound(CostModel(self.workload(block), self.hardware).lower_bound())[1]


def in_place(policy: Policy) -> dict[str, Any]:
    """What of a policy cannot change once the weights are in place, by name."""
    return {f"the policy's {name}": getattr(policy, name) for name in _IN_PLACE}


def named_schedule(schedule: str | Schedule) -> tuple[str, Schedule]:
    """The name of a schedule, and the function.

    Raises:
        ValueError: no such name.
    """
    if callable(schedule):
        return getattr(schedule, "__name__", "schedule"), schedule
    if schedule not in SCHEDULES:
        raise ValueError(f"no schedule {schedule!r}; known: {', '.join(sorted(SCHEDULES))}")
    return schedule, SCHEDULES[schedule]


def checked_slots(slots: Mapping[str, Any]) -> dict[str, int]:
    """``slots`` of a :class:`Workload`, by name.

    Raises:
        ValueError: an unknown name, or a number that cannot be.
    """
    names = [f.name for f in dataclasses.fields(Workload) if f.name.endswith("_slots")]
    for name in slots:
        if name not in names:
            raise ValueError(f"no slots {name!r}; known: {', '.join(names)}")
    Workload(num_steps=1, num_layers=1, num_batches=1, **slots)  # checks the numbers
    return dict(slots)
