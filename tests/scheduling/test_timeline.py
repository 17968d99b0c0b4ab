"""Spans, their sums, and the trace that Perfetto opens."""

import json

import pytest

from scheduling import (
    Compute,
    Issue,
    LoadWeights,
    Span,
    Stream,
    Timeline,
    Workload,
    compare,
    lock_step,
    to_perfetto,
    write_trace,
    zigzag,
)

from .timelines import timed

W = Workload(num_steps=2, num_layers=3, num_batches=2)
HAND = Timeline(
    (
        Span.of(Issue(0, LoadWeights(0, 1), Stream.LOAD_WEIGHTS, ()), 0.0, 2.0),
        Span.of(Issue(1, Compute(0, 1, 0), Stream.COMPUTE, ()), 2.0, 3.0, "weights", 2.0),
        Span("Barrier", "compute", 3.0, 4.0),
    ),
    "by hand",
)


def test_sums():
    assert HAND.seconds == 4
    assert HAND.streams == ("load weights", "compute")
    assert HAND.busy("load weights") == 2
    assert HAND.busy("compute") == 1  # a barrier is no work
    assert HAND.summary() == {
        "load weights": {"busy_seconds": 2, "share": 0.5, "waited_seconds": {}},
        "compute": {"busy_seconds": 1, "share": 0.25, "waited_seconds": {"weights": 2.0}},
    }
    assert [len(spans) for spans in HAND.by_stream().values()] == [1, 2]
    assert HAND.spans[1].wait == "weights"
    assert HAND.spans[1].seconds == 1
    assert Timeline(()).seconds == 0
    assert Timeline(()).summary() == {}


def test_streams_of_others_come_last():
    odd = Timeline((Span("x", "network", 0, 1), Span("Compute", "compute", 0, 1)))
    assert odd.streams == ("compute", "network")


def test_a_timeline_survives_json():
    for timeline in (HAND, timed(zigzag, W), Timeline((), "empty")):
        assert Timeline.from_json(json.loads(json.dumps(timeline.to_json()))) == timeline


def test_overlap_shows_in_the_makespan():
    assert timed(zigzag, W).seconds < timed(lock_step, W).seconds


def test_compare():
    predicted = timed(zigzag, W)
    measured = timed(zigzag, W, label="measured", slower=2.0)
    rows = compare(predicted, measured)
    assert set(rows) == {*predicted.streams, "makespan"}
    assert all(row["ratio"] == pytest.approx(2.0) for row in rows.values())
    assert rows["makespan"]["measured_seconds"] == measured.seconds
    assert compare(Timeline(()), HAND)["compute"] == {
        "predicted_seconds": 0,
        "measured_seconds": 1.0,
        "ratio": None,
    }


def test_concatenate_moves_and_orders():
    joined = Timeline.concatenate([(10.0, HAND), (0.0, HAND)], label="two")
    assert [span.start for span in joined.spans] == [0, 2, 3, 10, 12, 13]
    assert joined.seconds == 14
    assert joined.label == "two"


def test_perfetto_has_a_process_a_timeline_and_a_thread_a_stream(tmp_path):
    predicted, measured = timed(zigzag, W), timed(lock_step, W, label="measured")
    path = tmp_path / "trace.json"
    write_trace(path, predicted, measured)
    trace = json.loads(path.read_text(encoding="utf-8"))
    assert trace == to_perfetto(predicted, measured)
    events = trace["traceEvents"]
    about = [e for e in events if e["ph"] == "M"]
    processes = {e["pid"]: e["args"]["name"] for e in about if e["name"] == "process_name"}
    assert list(processes.values()) == ["predicted", "measured"]
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in about if e["name"] == "thread_name"}
    spans = [e for e in events if e["ph"] == "X"]
    assert len(spans) == len(predicted.spans) + len(measured.spans)
    for process, timeline in zip(processes, (predicted, measured), strict=True):
        named = [name for (pid, _), name in threads.items() if pid == process]
        assert named == list(timeline.streams)
        for stream, expected in timeline.by_stream().items():
            (thread,) = (t for (p, t), name in threads.items() if (p, name) == (process, stream))
            shown = [e for e in spans if (e["pid"], e["tid"]) == (process, thread)]
            assert [e["ts"] for e in shown] == [s.start * 1e6 for s in expected]
            assert [e["dur"] for e in shown] == [s.seconds * 1e6 for s in expected]
            assert {e["cat"] for e in shown} == {stream}


def test_perfetto_shows_place_and_reason():
    (span,) = (e for e in to_perfetto(HAND)["traceEvents"] if e["name"].startswith("Compute"))
    assert span["args"] == {"step": 0, "layer": 1, "batch": 0, "wait": "weights", "waited": 2.0}
