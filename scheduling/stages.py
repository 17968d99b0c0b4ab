"""Layers over the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def balanced(costs: Sequence[float], num_stages: int) -> tuple[int, ...]:
    """The first layer of each stage, so that the costliest stage costs as little as can be.

    Stages are of neighbouring layers, at least one each; of several such ways the one in which the
    others are most alike (least sum of squares).

    Args:
        costs: Of each layer, in any one unit.

    Raises:
        ValueError: more stages than layers.
    """
    layers = len(costs)
    if not 1 <= num_stages <= layers:
        raise ValueError(
            f"num_stages must lie in 1..{layers}, one layer a stage at least; got {num_stages}"
        )
    total = [0.0, *accumulate(costs)]
    # best[end]: of the first ``end`` layers in as many stages as the round, (costliest, squares,
    # where its last stage begins).
    best: list[list[tuple[float, float, int]]] = [[(0.0, 0.0, 0)]]
    best[0] += [(float("inf"), 0.0, 0)] * layers
    for _ in range(num_stages):
        before = best[-1]
        row = [(float("inf"), 0.0, 0)]
        for end in range(1, layers + 1):
            row.append(
                min(
                    (
                        max(before[start][0], total[end] - total[start]),
                        before[start][1] + (total[end] - total[start]) ** 2,
                        start,
                    )
                    for start in range(end)
                )
            )
        best.append(row)
    starts, end = [], layers
    for row in reversed(best[1:]):
        end = row[end][2]
        starts.append(end)
    return tuple(reversed(starts))


def hosts_of(num_stages: int, num_hosts: int) -> tuple[int, ...]:
    """The host of each stage: neighbours together, as many on each as can be."""
    return tuple(stage * num_hosts // num_stages for stage in range(num_stages))
