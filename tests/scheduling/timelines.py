"""Timelines to look at: every op takes a fixed time, and starts as early as it may."""

from scheduling import Span, Timeline, bind

SECONDS = {"LoadWeights": 0.5, "Compute": 0.25, "Barrier": 0.0, "FreeWeights": 0.0}


def timed(schedule, workload, *, label="predicted", slower=1.0):
    ends, free, spans = [], {}, []
    for issue in bind(schedule(workload), workload):
        seconds = slower * SECONDS.get(type(issue.op).__name__, 0.125)
        start = max([free.get(issue.lane, 0.0), *(ends[need] for need in issue.needs)])
        ends.append(start + seconds)
        free[issue.lane] = start + seconds
        spans.append(Span.of(issue, start, start + seconds))
    return Timeline(tuple(sorted(spans, key=lambda span: span.start)), label)
