"""What operations cost beside their work: what is run, and what is made of its timeline."""

import pytest

from flexgen_jax.machine import operation_costs as costs
from scheduling.policy import Split
from scheduling.timeline import Span, Timeline


def span(layer, step, seconds):
    return Span(
        op="Compute",
        step=step,
        layer=layer,
        batch=0,
        stream="compute",
        stage=0,
        start=0.0,
        end=seconds,
    )


def test_the_engine_runs_it_from_both_places(tmp_path, monkeypatch):
    seen = []
    kept = costs._run

    def run(runner, planner, steps):
        found = kept(runner, planner, steps)
        seen.append((planner.policy.weights, found))
        return found

    monkeypatch.setattr(costs, "_run", run)
    found = costs.operation_costs(tmp_path, "float32", 1e-4, steps=4, repeats=1)
    assert all(value >= 0 for value in found)
    assert [weights for weights, _ in seen] == [Split()] * 2 + [Split(device=0, disk=100)] * 2
    for weights, timeline in seen:
        layers = {s.layer for s in timeline.spans if s.op == "Compute"}
        assert layers == set(range(costs._LAYERS + 2))
        assert any(s.op == "LoadWeights" for s in timeline.spans) == (weights.disk == 100)
        assert max(s.step for s in timeline.spans if s.op == "Compute") == 3
    assert list(tmp_path.iterdir()) == []


def test_steps_that_fill_the_queues_are_left_out():
    early = [span(layer, step, 9.0) for layer in range(4) for step in range(costs._LEFT_OUT)]
    late = [span(layer, 5, seconds) for layer, seconds in enumerate((7.0, 1.0, 2.0, 4.0))]
    late += [span(1, 6, 3.0)]
    found = costs._spans(Timeline(spans=tuple(early + late), label="measured"))
    assert found == (2.0, 11.0)  # of layers 1 and 2 on average, and of the first and the last unit


@pytest.mark.parametrize(
    ("here", "disk", "expected"),
    [
        ((3e-4, 2e-3), (5e-4, 2e-3), (2e-4, 2e-4, 1.4e-3)),
        # What others take meanwhile may turn it round: a cost is never less than nothing.
        ((5e-5, 1e-4), (4e-5, 1e-4), (0.0, 0.0, 0.0)),
    ],
)
def test_each_cost_is_what_comes_on_top(tmp_path, monkeypatch, here, disk, expected):
    both = {0: costs._Spans(*here), 100: costs._Spans(*disk)}
    monkeypatch.setattr(costs, "_measured", lambda _, __, split, *more: both[split.disk])
    found = costs.operation_costs(tmp_path, "float32", 1e-4, steps=4, repeats=1)
    assert found == pytest.approx(expected)
