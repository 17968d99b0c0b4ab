"""What a schedule keeps busy: each stream's work, and each link's and processor's."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable

from scheduling.cost_model import CostModel
from scheduling.dependencies import stream_of
from scheduling.estimate import shortened
from scheduling.hardware import Hardware
from scheduling.in_order import InOrder
from scheduling.ops import Barrier, FreeWeights, Op
from scheduling.workload import Workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class Busy:
    """Seconds of work, as if each were alone.

    Attributes:
        resources: Link or processor -> seconds.
        streams: Stream -> seconds; of several stages each has its own.
    """

    resources: dict[str, float]
    streams: dict[str, float]

    def busiest(self) -> tuple[str, float]:
        """The name and the seconds of what has most to do.

        A stream is named only where no link or processor has about as much: its work then lies on
        several of them, one after another.
        """
        nothing = ("nothing", 0.0)
        resource = max(self.resources.items(), key=lambda item: item[1], default=nothing)
        stream = max(self.streams.items(), key=lambda item: item[1], default=nothing)
        return stream if stream[1] > 1.02 * resource[1] else resource


def busy(
    schedule: Callable[[Workload], Iterable[Op]],
    workload: Workload,
    hardware: Hardware,
    *,
    decode_steps: int = 3,
) -> Busy:
    """The work of ``schedule``, of which a few decode steps stand for all.

    Raises:
        ValueError: the workload has no sizes.
    """
    short = shortened(workload, decode_steps)
    steps = short.num_steps - 1
    times = (workload.num_steps - 1) / steps if steps else 0.0
    costs = InOrder(CostModel(short, hardware))
    resources: defaultdict[str, float] = defaultdict(float)
    streams: defaultdict[str, float] = defaultdict(float)
    for op in schedule(short):
        if isinstance(op, (FreeWeights, Barrier)):
            continue
        name = stream_of(op, short).value
        if short.num_stages > 1:
            name = f"{name} of stage {short.stage_of(op.layer)}"
        for resource, seconds in costs.pieces(op):
            counted = seconds * (times if op.step else 1.0)
            resources[resource] += counted
            streams[name] += counted
    return Busy(resources=dict(resources), streams=dict(streams))
