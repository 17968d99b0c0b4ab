"""The constants of a machine, fitted again to what runs took.

Each kind of op gives one equation: the median time it took is the sum of its terms, each times the
factor by which its constant was off. There are more constants than a run can tell apart, so factors
stay near 1 where nothing speaks against it (ridge regression).
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from scheduling.cost_model import CostModel
from scheduling.hardware import Hardware
from scheduling.in_order import InOrder
from scheduling.ops import Op
from scheduling.simulate import simulate
from scheduling.timeline import Span, Timeline
from scheduling.workload import Workload

# What keeps a factor near 1, beside equations whose errors are relative.
_RIDGE = 0.01
_LOWEST, _HIGHEST = 0.05, 50.0
# Shorter ones are all overhead, and the clock's.
_SHORTEST = 1e-4

_Key = tuple[str, str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observation:
    """What ops of one kind took.

    Attributes:
        op: The kind, such as ``Compute``; ``phase``: ``prefill`` or ``decode``; ``layer``:
            ``first``, ``last``, or ``inner``.
        measured_seconds: The median of one.
        predicted_seconds: Likewise, simulated: others that use the same resource included.
        terms: Constant -> seconds of one, on average; they sum to ``predicted_seconds``.
    """

    op: str
    phase: str
    layer: str
    measured_seconds: float
    predicted_seconds: float
    terms: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Observation:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: not what that makes.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"no observation: {error}") from error


def observations(
    ops: Sequence[Op], workload: Workload, hardware: Hardware, measured: Timeline
) -> list[Observation]:
    """Predicted beside measured, for each kind of op that both timelines have.

    Args:
        ops: Of the block that ``measured`` is of.
    """
    costs = InOrder(CostModel(workload, hardware))
    last = workload.num_layers - 1
    seconds: dict[_Key, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for op in ops:
        for term in costs.terms(op):
            step, layer = getattr(op, "step", 0), getattr(op, "layer", 0)
            seconds[_key(type(op).__name__, step, layer, last)][term.constant] += term.seconds
    predicted = _grouped(simulate(ops, workload, hardware).spans, last)
    found = _grouped(measured.spans, last)
    rows = []
    for key, terms in seconds.items():
        if key not in predicted or key not in found:
            continue
        median, expected = statistics.median(found[key]), statistics.median(predicted[key])
        if median < _SHORTEST or expected <= 0:
            continue
        scale = expected / sum(terms.values())
        op_name, phase, where = key
        rows.append(
            Observation(
                op=op_name,
                phase=phase,
                layer=where,
                measured_seconds=median,
                predicted_seconds=expected,
                terms={name: value * scale for name, value in terms.items()},
            )
        )
    return rows


def _key(op: str, step: int | None, layer: int | None, last: int) -> _Key:
    where = "first" if layer == 0 else "last" if layer == last else "inner"
    return op, "decode" if step else "prefill", where


def _grouped(spans: Iterable[Span], last: int) -> dict[_Key, list[float]]:
    found: dict[_Key, list[float]] = defaultdict(list)
    for s in spans:
        if s.op != "Barrier":
            found[_key(s.op, s.step, s.layer, last)].append(s.seconds)
    return found


def factors(rows: Sequence[Observation]) -> dict[str, float]:
    """Constant -> how many times as long what it prices takes as was predicted."""
    from scipy.optimize import lsq_linear  # slow to import

    names = sorted({name for row in rows for name in row.terms})
    if not names:
        return {}
    matrix = np.zeros((len(rows), len(names)))
    for i, row in enumerate(rows):
        for name, value in row.terms.items():
            matrix[i, names.index(name)] = value / row.measured_seconds
    ridge = _RIDGE**0.5 * np.eye(len(names))
    solution = lsq_linear(
        np.vstack([matrix, ridge]),
        np.concatenate([np.ones(len(rows)), _RIDGE**0.5 * np.ones(len(names))]),
        bounds=(_LOWEST, _HIGHEST),
    )
    return dict(zip(names, map(float, solution.x), strict=True))


def calibrated(hardware: Hardware, rows: Sequence[Observation]) -> Hardware:
    """``hardware`` as the runs behind ``rows`` found it.

    Raises:
        ValueError: there is nothing to learn from.
    """
    if not rows:
        raise ValueError("no observations: the report has none of ops that took time")
    name = hardware.name.removesuffix(", calibrated") + ", calibrated"
    return dataclasses.replace(hardware.scaled(factors(rows)), name=name)
