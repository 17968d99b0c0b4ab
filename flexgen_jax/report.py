"""What a run did: placement, throughput, padding, and its measured timeline."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Self

from flexgen_jax.engine.runner import Finished
from flexgen_jax.planning.blocks import Block
from flexgen_jax.planning.planner import Planner
from scheduling.calibrate import Observation
from scheduling.placement import Placement
from scheduling.policy import Policy, Tier
from scheduling.sizes import Link
from scheduling.timeline import Timeline, compare

# Of a long job's timeline so much is kept: about 20 MB, and simulated in seconds.
MAX_SPANS = 100_000
SHORTEST = 1.0  # seconds of work that can be held against a prediction
_NOT_PLAIN = (
    "policy",
    "placement",
    "moved",
    "peak_bytes",
    "timeline",
    "predict",
    "observe",
    "lower_bound",
)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Report:
    """Figures of one ``generate`` call, or of a job with all its windows and resumptions.

    Attributes:
        placement: Where every cell of ``weights``, ``cache`` and ``hidden`` really lay; the latter
            two of the block with the largest cache; of a model with ``experts`` also where these
            lay, which are among the weights. Of a resumed job, the last process's.
        seconds: Wall time of the blocks, compilation included. Of a job, of its finished blocks
            with the reading and writing between them.
        prompt_tokens: Tokens of the prompts, as given.
        failed: Of the requests, those that have an error for an answer.
        seed: What requests without one of their own were sampled by; None: nothing says.
        padded_tokens: Positions that prefill computed, padding and empty rows included.
        generated_tokens: New tokens of all requests. ``limit_tokens``: those that their
            ``max_tokens`` allow.
        rows_computed: Rows of all steps of all batches. ``rows_used``: of these, those that gave a
            token; see :attr:`occupancy`.
        passes: Over the weights. ``ideal_passes``: those that it takes if every row of the block is
            somebody's until nobody waits, first come, first served.
        blocks: How many blocks the requests made; ``batches``: how many device batches.
        compilations: Programs compiled for layers and heads during this run.
        disk_bytes: Bytes read from the disk tier: weights, cache and hidden states.
        disk_bytes_written: Bytes of cache and hidden states written there.
        peak_bytes: The most that weights, cells, slots and dense copies took in each tier at the
            borders of steps.
        process_bytes: The most resident memory that the process had, there and then: with Python,
            its libraries and compiled programs, but without the pages of mapped files, which the
            system takes back when it needs them. 0: nothing tells.
        moved: Bytes that the schedule moves over each link, by the sizes of its cells; a batch
            whose requests stop early moves less.
        timeline: Measured spans of the blocks, one after another; of a long job, of its first; of
            a resumed one, of the last process's first.
        hardware: What the prediction is made for, by name.
        why: Of the policy, where it was searched for.
        predict: Simulates what ``timeline`` has; see :attr:`predicted`.
        observe: Gives :attr:`observations`. ``lower_bound``: :attr:`lower_bound_seconds`.
        compile_seconds: Of ``seconds``, spent on compiling programs, by all threads together.
        timeline_compile_seconds: Likewise, of the time that ``timeline`` covers, by whichever
            process.
    """

    policy: Policy
    placement: Mapping[str, Placement]
    schedule: str
    requests: int
    blocks: int
    batches: int
    prompt_tokens: int
    padded_tokens: int
    generated_tokens: int
    limit_tokens: int
    rows_computed: int
    rows_used: int
    passes: int
    ideal_passes: int
    seconds: float
    compilations: int
    disk_bytes: int
    disk_bytes_written: int
    peak_bytes: Mapping[Tier, int]
    moved: Mapping[Link, int]
    timeline: Timeline
    hardware: str
    predict: Callable[[], Timeline] = dataclasses.field(repr=False)
    observe: Callable[[], list[Observation]] = dataclasses.field(repr=False)
    lower_bound: Callable[[], float] = dataclasses.field(repr=False)
    why: str | None = None
    compile_seconds: float = 0.0
    timeline_compile_seconds: float = 0.0
    failed: int = 0
    seed: int | None = None
    process_bytes: int = 0

    @functools.cached_property
    def lower_bound_seconds(self) -> float:
        """No schedule of these blocks takes less on ``hardware``."""
        return self.lower_bound()

    @functools.cached_property
    def observations(self) -> list[Observation]:
        """Of the first block: what each kind of op took, beside the prediction."""
        return self.observe()

    @functools.cached_property
    def predicted(self) -> Timeline:
        """The same timeline, as the simulator expects it; computed when first asked for."""
        return self.predict()

    @classmethod
    def empty(cls, planner: Planner) -> Report:
        """Of nothing yet."""
        zeros: dict[str, Any] = dict.fromkeys(_SUMMED, 0)
        return cls(
            **zeros,
            policy=planner.policy,
            placement=planner.placement([]),
            schedule=planner.schedule_name,
            peak_bytes={tier: planner.weights.nbytes(tier) for tier in Tier},
            moved=dict.fromkeys(Link, 0),
            timeline=Timeline((), label="measured"),
            hardware=planner.hardware.name,
            predict=lambda: Timeline((), label="predicted"),
            observe=list,
            lower_bound=float,
            why=planner.why,
        )

    @classmethod
    def of_block(cls, planner: Planner, block: Block, finished: Finished) -> Report:
        """Of one block, or a part of it; without a timeline there is nothing to predict either."""
        report = dataclasses.replace(
            cls.empty(planner),
            requests=len(finished.requests),
            prompt_tokens=sum(len(r.token_ids) for r in finished.requests),
            generated_tokens=finished.generated_tokens,
            limit_tokens=sum(r.max_tokens for r in finished.requests),
            peak_bytes=finished.peak_bytes,
            process_bytes=finished.process_bytes,
            **finished.counts,
        )
        if finished.ended:
            report = dataclasses.replace(
                report,
                placement=planner.placement([block]),
                blocks=1,
                batches=len(block.batches),
                moved=planner.traffic(block, finished.lives, finished.counts["passes"]),
            )
        timeline = finished.timeline
        if timeline is None:
            return report
        return dataclasses.replace(
            report,
            timeline=timeline,
            timeline_compile_seconds=finished.timeline_compile_seconds,
            predict=functools.partial(planner.predict, block, finished.lives, finished.passes),
            observe=functools.partial(planner.observe, block, timeline, finished.lives),
            lower_bound=functools.partial(
                planner.lower_bound, block, finished.lives, finished.passes
            ),
        )

    def __repr__(self) -> str:
        """Short: spans and cells run to megabytes."""
        return (
            f"<Report: {self.generated_tokens} tokens of {self.requests} requests in "
            f"{self.seconds:.2f} s, {self.tokens_per_second:.2f} tokens/s>"
        )

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over wall time: FlexGen's throughput."""
        return self.generated_tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def occupancy(self) -> float:
        """The share of the computed rows that were of use, in [0, 1]."""
        return self.rows_used / self.rows_computed if self.rows_computed else 0.0

    @property
    def passes_over_ideal(self) -> float:
        """How many times the passes that ideal refill takes: 1 at best."""
        return self.passes / self.ideal_passes if self.ideal_passes else 1.0

    @property
    def padding(self) -> float:
        """The share of prefill positions that held no token of a prompt, in [0, 1)."""
        return 1 - self.prompt_tokens / self.padded_tokens if self.padded_tokens else 0.0

    def beside_prediction(self) -> str:
        """One line: predicted and measured, and how near the bound of any schedule it came."""
        predicted, measured = self.predicted.seconds, self.timeline.seconds
        compiling = measured - self.working_seconds
        text = f"predicted {predicted:.1f} s, measured {measured:.1f} s"
        if compiling > 0.01 * measured:
            text += f", {compiling:.1f} s of it compiling"
        ratio = self.measured_over_predicted
        if ratio is None:
            return f"{text}: too short to compare ({self.hardware})"
        return (
            f"{text}: ratio {_brief(ratio)}; no schedule takes less than "
            f"{self.lower_bound_seconds:.1f} s ({self.hardware})"
        )

    @property
    def working_seconds(self) -> float:
        """Of the timeline, without compiling, which several threads may do at once."""
        return max(self.timeline.seconds - self.timeline_compile_seconds, 0.0)

    @property
    def measured_over_predicted(self) -> float | None:
        """Compiling aside; None: so short, or so much of it compiling, that it says nothing."""
        work, predicted = self.working_seconds, self.predicted.seconds
        enough = work >= max(SHORTEST, 0.1 * self.timeline.seconds) and predicted >= 0.1 * SHORTEST
        return work / predicted if enough else None

    def to_json(self) -> dict[str, Any]:
        """All figures but the spans, which ``Timeline.to_json`` and a trace give."""
        values = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in _NOT_PLAIN
        }
        return {
            "policy": self.policy.to_json(),
            "placement": {kind: placed.to_json() for kind, placed in self.placement.items()},
            **values,
            "peak_bytes": {tier.value: nbytes for tier, nbytes in self.peak_bytes.items()},
            "moved_bytes": {link.value: nbytes for link, nbytes in self.moved.items()},
            "tokens_per_second": self.tokens_per_second,
            "padding": self.padding,
            "occupancy": self.occupancy,
            "passes_over_ideal": self.passes_over_ideal,
            "streams": self.timeline.summary(),
            "stages": self.timeline.stage_table(),
            "predicted": self._compared(),
            "lower_bound_seconds": self.lower_bound_seconds,
            "working_seconds": self.working_seconds,
            "measured_over_predicted": self.measured_over_predicted,
            "achieved_over_bound": self.working_seconds / self.lower_bound_seconds
            if self.lower_bound_seconds and self.measured_over_predicted is not None
            else None,
            "observations": [row.to_json() for row in self.observations],
        }

    def _compared(self) -> dict[str, dict[str, float | None]]:
        """Stream by stream; the whole's ratio is that of the text.

        Compiling is in the spans of computations, too: they have no ratio, if that is much.
        """
        rows = compare(self.predicted, self.timeline)
        if self.timeline_compile_seconds > 0.01 * self.timeline.seconds:
            for name, row in rows.items():
                row["ratio"] = None if name.endswith("compute") else row["ratio"]
        rows["makespan"]["compile_seconds"] = self.timeline_compile_seconds
        rows["makespan"]["ratio"] = self.measured_over_predicted
        return rows

    def sums(self) -> dict[str, Any]:
        """What adds up, as plain JSON: :meth:`Sum.add_sums` takes it."""
        return {
            **{name: getattr(self, name) for name in _SUMMED},
            "moved": {link.value: nbytes for link, nbytes in self.moved.items()},
            "peak_bytes": {tier.value: nbytes for tier, nbytes in self.peak_bytes.items()},
            "process_bytes": self.process_bytes,
        }


def _brief(ratio: float) -> str:
    """Never 0.00."""
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.1g}"


_SUMMED = (
    "requests",
    "failed",
    "blocks",
    "batches",
    "prompt_tokens",
    "padded_tokens",
    "generated_tokens",
    "limit_tokens",
    "rows_computed",
    "rows_used",
    "passes",
    "ideal_passes",
    "seconds",
    "compile_seconds",
    "compilations",
    "disk_bytes",
    "disk_bytes_written",
)


class Sum:
    """Adds up reports, block by block, in memory that does not grow with their number.

    Args:
        empty: A report of nothing, which gives policy, schedule and the placement of the weights.
        max_spans: Once there are more, blocks leave their timelines out.
    """

    def __init__(self, empty: Report, max_spans: int) -> None:
        self._last = empty
        self._largest = empty.placement
        self._sums: dict[str, Any] = dict.fromkeys(_SUMMED, 0)
        self._moved = dict.fromkeys(Link, 0)
        self._peak, self._process = dict(empty.peak_bytes), 0
        self._kept: list[tuple[float, Report]] = []  # with the time that each began
        self._offset = self._begun = 0.0  # of all, and of those before the block on its way
        self._spans, self._max_spans = 0, max_spans
        self._compiling = 0.0  # in the time of what is kept

    @classmethod
    def of(cls, planner: Planner) -> Self:
        """Of nothing yet."""
        return cls(Report.empty(planner), MAX_SPANS)

    def add(self, report: Report) -> Self:
        """Adds what comes after what was added before."""
        if report.placement["cache"].nbytes() >= self._largest["cache"].nbytes():
            self._largest = report.placement
        self._keep_timeline(report)
        return self.add_sums(report.sums())

    def add_sums(self, sums: Mapping[str, Any]) -> Self:
        """Adds figures whose report is gone: of an earlier process."""
        for name in _SUMMED:
            self._sums[name] += sums[name]
        for link in Link:
            self._moved[link] += sums["moved"].get(link.value, 0)
        for tier in Tier:
            self._peak[tier] = max(self._peak[tier], sums["peak_bytes"].get(tier.value, 0))
        self._process = max(self._process, sums.get("process_bytes", 0))
        return self

    def sums(self) -> dict[str, Any]:
        """As :meth:`Report.sums`."""
        return {
            **self._sums,
            "moved": {link.value: nbytes for link, nbytes in self._moved.items()},
            "peak_bytes": {tier.value: nbytes for tier, nbytes in self._peak.items()},
            "process_bytes": self._process,
        }

    def _keep_timeline(self, report: Report) -> None:
        """A block's timeline comes with its last part, and begins with its first."""
        if self._spans > self._max_spans:
            return
        self._offset += report.seconds
        if report.timeline.spans:
            self._spans += len(report.timeline.spans)
            self._kept.append((self._begun, report))
            self._compiling += report.timeline_compile_seconds
        if report.blocks:
            self._begun = self._offset

    def total(self) -> Report:
        """All in one."""
        kept = list(self._kept)
        return dataclasses.replace(
            self._last,
            **self._sums,
            placement=self._largest,
            moved=dict(self._moved),
            peak_bytes=dict(self._peak),
            process_bytes=self._process,
            timeline_compile_seconds=self._compiling,
            timeline=Timeline.concatenate(
                ((begun, report.timeline) for begun, report in kept), label="measured"
            ),
            predict=functools.partial(_predicted, kept),
            observe=lambda: kept[0][1].observations if kept else [],
            lower_bound=lambda: sum(report.lower_bound_seconds for _, report in kept),
        )


def _predicted(kept: list[tuple[float, Report]]) -> Timeline:
    parts, begun = [], 0.0
    for _, report in kept:
        parts.append((begun, report.predicted))
        begun += report.predicted.seconds
    return Timeline.concatenate(parts, label="predicted")
