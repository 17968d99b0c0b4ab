"""What happens in which order, how long it takes, and what it needs.

Knows no array, no file and no device: the standard library, NumPy and SciPy only.
"""

from scheduling.cost_model import CostModel
from scheduling.dependencies import (
    Issue,
    Need,
    ScheduleError,
    Stream,
    Weights,
    bind,
    needs,
    stream_of,
)
from scheduling.hardware import Hardware
from scheduling.limits import Limits
from scheduling.ops import (
    Attend,
    Barrier,
    Compute,
    ComputeExperts,
    FreeWeights,
    LoadCache,
    LoadChosen,
    LoadHidden,
    LoadWeights,
    Op,
    Project,
    StoreCache,
    StoreHidden,
    format_schedule,
    parse_op,
    parse_schedule,
)
from scheduling.peak import peak_nbytes
from scheduling.pipelined import cgopipe, neo
from scheduling.placement import Cell, Placement, place
from scheduling.policy import Policy, Split, Tier
from scheduling.registered import SCHEDULES, register
from scheduling.schedules import diagonal, lock_step, passes, row_by_row, zigzag
from scheduling.simulate import simulate
from scheduling.sizes import Link, Sizes
from scheduling.timeline import Span, Timeline, compare, to_perfetto, write_trace
from scheduling.transforms import Cut, first_n, remaining, serialize, serialized
from scheduling.validate import validate
from scheduling.workload import Experts, Workload

__all__ = [
    "SCHEDULES",
    "Attend",
    "Barrier",
    "Cell",
    "Compute",
    "ComputeExperts",
    "CostModel",
    "Cut",
    "Experts",
    "FreeWeights",
    "Hardware",
    "Issue",
    "Limits",
    "Link",
    "LoadCache",
    "LoadChosen",
    "LoadHidden",
    "LoadWeights",
    "Need",
    "Op",
    "Placement",
    "Policy",
    "Project",
    "ScheduleError",
    "Sizes",
    "Span",
    "Split",
    "StoreCache",
    "StoreHidden",
    "Stream",
    "Tier",
    "Timeline",
    "Weights",
    "Workload",
    "bind",
    "cgopipe",
    "compare",
    "diagonal",
    "first_n",
    "format_schedule",
    "lock_step",
    "needs",
    "neo",
    "parse_op",
    "parse_schedule",
    "passes",
    "peak_nbytes",
    "place",
    "register",
    "remaining",
    "row_by_row",
    "serialize",
    "serialized",
    "simulate",
    "stream_of",
    "to_perfetto",
    "validate",
    "write_trace",
    "zigzag",
]
