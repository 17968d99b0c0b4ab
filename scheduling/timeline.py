"""When each op ran, predicted or measured; and how to look at it."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from scheduling.dependencies import Issue, Stream

# In every picture that is written: what tells it from other files.
GENERATOR = "flexgen-jax"


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """One op on its stream; seconds from the run's start.

    Attributes:
        op: The name of its kind, such as ``Compute``.
        wait: What it started late for: ``weights``, ``cache``, ``hidden``, ``compute``, ``slot``
            (nothing was free to load into), ``stores`` (too many results wait), ``barrier``,
            ``attention`` (of the host, beside it), ``router``,
            ``bubble`` (another pipeline stage); None: it started as soon as its stream came to it.
        waited: Seconds that its stream stood still for that.
        stage: Whose stream it is.
    """

    op: str
    stream: str
    start: float
    end: float
    step: int | None = None
    layer: int | None = None
    batch: int | None = None
    wait: str | None = None
    waited: float = 0.0
    stage: int = 0

    @classmethod
    def of(
        cls, issue: Issue, start: float, end: float, wait: str | None = None, waited: float = 0.0
    ) -> Span:
        """The span of ``issue``."""
        op = issue.op
        return cls(
            type(op).__name__,
            issue.stream.value,
            start,
            end,
            getattr(op, "step", None),
            getattr(op, "layer", None),
            getattr(op, "batch", None),
            wait,
            waited,
            issue.stage,
        )

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclasses.dataclass(frozen=True)
class Timeline:
    """When each op of a run worked, predicted or measured.

    Attributes:
        spans: Ordered by their start, in seconds from the run's.
        label: Tells predicted from measured.
    """

    spans: tuple[Span, ...] = dataclasses.field(repr=False)
    label: str = "timeline"

    @property
    def seconds(self) -> float:
        """From the run's start to the last end."""
        return max((s.end for s in self.spans), default=0.0)

    @functools.cached_property
    def num_stages(self) -> int:
        """Pipeline stages with spans; at least 1."""
        return 1 + max((s.stage for s in self.spans), default=0)

    def lane(self, span: Span) -> str:
        """The name of the stream of ``span``, with its stage where there are several."""
        return f"stage {span.stage}: {span.stream}" if self.num_stages > 1 else span.stream

    @property
    def streams(self) -> tuple[str, ...]:
        """Streams with spans, by stage and then in the order of ``Stream``."""
        known = {stream.value: place for place, stream in enumerate(Stream)}
        present = {(s.stage, known.get(s.stream, len(known)), self.lane(s)) for s in self.spans}
        return tuple(name for _, _, name in sorted(present))

    def by_stream(self) -> dict[str, tuple[Span, ...]]:
        """The spans of each stream, in order."""
        found: dict[str, list[Span]] = {name: [] for name in self.streams}
        for span in self.spans:
            found[self.lane(span)].append(span)
        return {name: tuple(spans) for name, spans in found.items()}

    def busy(self, stream: str, stage: int | None = None) -> float:
        """Seconds that ``stream`` worked. A Barrier waits for others, which is no work.

        Args:
            stream: As in :attr:`streams`; or a stream's plain name, with its ``stage``.
        """
        return sum(s.seconds for s in self._of(stream, stage) if s.op != "Barrier")

    def waits(self, stream: str, stage: int | None = None) -> dict[str, float]:
        """Seconds that ``stream`` stood still, by what for; the longest first."""
        found: dict[str, float] = {}
        for s in self._of(stream, stage):
            if s.wait is not None:
                found[s.wait] = found.get(s.wait, 0.0) + s.waited
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def _of(self, stream: str, stage: int | None) -> Iterator[Span]:
        for s in self.spans:
            if (s.stream, s.stage) == (stream, stage) or (stage is None and self.lane(s) == stream):
                yield s

    def stage_table(self) -> list[dict[str, float]]:
        """Per pipeline stage, the shares of the whole in which it computes (``busy``) and in which
        it waits for other stages (``bubble``), after its last computation included."""
        total, name, rows = self.seconds, Stream.COMPUTE.value, []
        for stage in range(self.num_stages) if total else ():
            last = max((s.end for s in self._of(name, stage)), default=0.0)
            idle = self.waits(name, stage).get("bubble", 0.0) + total - last
            rows.append({"busy": self.busy(name, stage) / total, "bubble": idle / total})
        return rows

    def summary(self) -> dict[str, dict[str, Any]]:
        """Per stream: busy seconds, their share of the whole, and what it waited for."""
        total = self.seconds
        return {
            name: {
                "busy_seconds": self.busy(name),
                "share": self.busy(name) / total if total else 0.0,
                "waited_seconds": self.waits(name),
            }
            for name in self.streams
        }

    @classmethod
    def concatenate(
        cls, parts: Iterable[tuple[float, Timeline]], *, label: str = "timeline"
    ) -> Timeline:
        """One timeline of several, each moved by its offset in seconds."""
        spans = [
            dataclasses.replace(s, start=s.start + offset, end=s.end + offset)
            for offset, part in parts
            for s in part.spans
        ]
        return cls(tuple(sorted(spans, key=lambda s: s.start)), label)

    def later(self, steps: int) -> Timeline:
        """The same, of steps that come after so many others."""
        if not steps:
            return self
        moved = (
            s if s.step is None else dataclasses.replace(s, step=s.step + steps) for s in self.spans
        )
        return Timeline(tuple(moved), self.label)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return {"label": self.label, "spans": [dataclasses.asdict(s) for s in self.spans]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Timeline:
        """The inverse of :meth:`to_json`."""
        return cls(tuple(Span(**s) for s in values["spans"]), values["label"])


def compare(predicted: Timeline, measured: Timeline) -> dict[str, dict[str, float | None]]:
    """Per stream, and for the whole as ``makespan``: seconds in both, and measured / predicted.

    The ratio is None where nothing was predicted.
    """

    def row(expected: float, actual: float) -> dict[str, float | None]:
        return {
            "predicted_seconds": expected,
            "measured_seconds": actual,
            "ratio": actual / expected if expected else None,
        }

    streams = dict.fromkeys((*predicted.streams, *measured.streams))
    rows = {name: row(predicted.busy(name), measured.busy(name)) for name in streams}
    return rows | {"makespan": row(predicted.seconds, measured.seconds)}


def to_perfetto(*timelines: Timeline) -> dict[str, Any]:
    """Chrome's trace format, which Perfetto opens: a process a timeline, a thread a stream."""
    events: list[dict[str, Any]] = []
    for process, timeline in enumerate(timelines, 1):
        events.append(_about("process_name", {"name": timeline.label}, process))
        events.append(_about("process_sort_index", {"sort_index": process}, process))
        for thread, (stream, spans) in enumerate(timeline.by_stream().items(), 1):
            events.append(_about("thread_name", {"name": stream}, process, thread))
            events.append(_about("thread_sort_index", {"sort_index": thread}, process, thread))
            events.extend(
                {
                    "ph": "X",
                    "name": s.op if s.layer is None else f"{s.op} {s.layer}",
                    "cat": stream,
                    "pid": process,
                    "tid": thread,
                    "ts": s.start * 1e6,
                    "dur": s.seconds * 1e6,
                    "args": {
                        name: value
                        for name in ("step", "layer", "batch", "wait", "waited")
                        if (value := getattr(s, name)) is not None and (name != "waited" or value)
                    },
                }
                for s in spans
            )
    # First, so that whoever opens the file knows whose it is.
    about = {"otherData": {"generator": GENERATOR}}
    return {**about, "traceEvents": events, "displayTimeUnit": "ms"}


def _about(kind: str, args: dict[str, Any], process: int, thread: int = 0) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": args}


def write_trace(path: str | Path, *timelines: Timeline) -> None:
    """Writes a trace for Perfetto or ``chrome://tracing``: JSON, a process per timeline.

    Raises:
        OSError: ``path`` cannot be written.
    """
    Path(path).write_text(json.dumps(to_perfetto(*timelines), allow_nan=False), encoding="utf-8")
