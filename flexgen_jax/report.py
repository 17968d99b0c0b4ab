"""What a run did: placement, throughput, padding, and its measured timeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from scheduling.placement import Placement
from scheduling.policy import Policy, Tier
from scheduling.sizes import Link
from scheduling.timeline import Timeline, compare


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Report:
    """Figures of one ``generate`` call, or of a job with all its windows and resumptions.

    Attributes:
        placement: Where every cell of ``weights``, ``cache`` and ``hidden`` really lay; the latter
            two of the block with the largest cache. Of a resumed job, the last process's.
        seconds: Wall time of the blocks, compilation included. Of a job, of its finished blocks
            with the reading and writing between them.
        prompt_tokens: Tokens of the prompts, as given.
        padded_tokens: Positions that prefill computed, padding and empty rows included.
        generated_tokens: New tokens of all requests.
        blocks: How many blocks the requests made; ``batches``: how many device batches.
        compilations: Programs compiled for layers and heads during this run.
        disk_bytes: Bytes read from the disk tier: weights, cache and hidden states.
        disk_bytes_written: Bytes of cache and hidden states written there.
        peak_bytes: The most that weights, cells, slots and dense copies took in each tier at the
            borders of steps.
        moved: Bytes that the schedule moves over each link, by the sizes of its cells; a batch
            whose requests stop early moves less.
        timeline: Measured spans of the blocks, one after another; of a long job, of its first; of
            a resumed one, of the last process's first.
        predicted: The same, as the simulator expected it; None if the hardware is not known.
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
    seconds: float
    compilations: int
    disk_bytes: int
    disk_bytes_written: int
    peak_bytes: Mapping[Tier, int]
    moved: Mapping[Link, int]
    timeline: Timeline
    predicted: Timeline | None = None

    @classmethod
    def empty(cls, policy: Policy, placement: Mapping[str, Placement], schedule: str) -> Report:
        """Of nothing yet."""
        zeros: dict[str, Any] = dict.fromkeys(_SUMMED, 0)
        return cls(
            **zeros,
            policy=policy,
            placement=placement,
            schedule=schedule,
            peak_bytes={tier: placement["weights"].nbytes(tier) for tier in Tier},
            moved=dict.fromkeys(Link, 0),
            timeline=Timeline((), label="measured"),
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
    def padding(self) -> float:
        """The share of prefill positions that held no token of a prompt, in [0, 1)."""
        return 1 - self.prompt_tokens / self.padded_tokens if self.padded_tokens else 0.0

    def to_json(self) -> dict[str, Any]:
        """All figures but the spans, which ``Timeline.to_json`` and a trace give."""
        values = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("policy", "placement", "moved", "peak_bytes", "timeline", "predicted")
        }
        return {
            "policy": self.policy.to_json(),
            "placement": {kind: placed.to_json() for kind, placed in self.placement.items()},
            **values,
            "peak_bytes": {tier.value: nbytes for tier, nbytes in self.peak_bytes.items()},
            "moved_bytes": {link.value: nbytes for link, nbytes in self.moved.items()},
            "tokens_per_second": self.tokens_per_second,
            "padding": self.padding,
            "streams": self.timeline.summary(),
            "predicted": compare(self.predicted, self.timeline) if self.predicted else None,
        }

    def sums(self) -> dict[str, Any]:
        """What adds up, as plain JSON: :meth:`Sum.add_sums` takes it."""
        return {
            **{name: getattr(self, name) for name in _SUMMED},
            "moved": {link.value: nbytes for link, nbytes in self.moved.items()},
            "peak_bytes": {tier.value: nbytes for tier, nbytes in self.peak_bytes.items()},
        }


_SUMMED = (
    "requests",
    "blocks",
    "batches",
    "prompt_tokens",
    "padded_tokens",
    "generated_tokens",
    "seconds",
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
        self._peak = dict(empty.peak_bytes)
        self._measured: list[tuple[float, Timeline]] = []
        self._predicted: list[tuple[float, Timeline]] = []
        self._offset, self._expected = 0.0, 0.0
        self._spans, self._max_spans = 0, max_spans

    @property
    def has_room(self) -> bool:
        """Whether the next timeline would be kept."""
        return self._spans <= self._max_spans

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
        return self

    def sums(self) -> dict[str, Any]:
        """As :meth:`Report.sums`."""
        return {
            **self._sums,
            "moved": {link.value: nbytes for link, nbytes in self._moved.items()},
            "peak_bytes": {tier.value: nbytes for tier, nbytes in self._peak.items()},
        }

    def _keep_timeline(self, report: Report) -> None:
        if not self.has_room:
            return
        self._spans += len(report.timeline.spans)
        self._measured.append((self._offset, report.timeline))
        self._offset += report.seconds
        if report.predicted is not None:
            self._predicted.append((self._expected, report.predicted))
            self._expected += report.predicted.seconds

    def total(self) -> Report:
        """All in one."""
        predicted = Timeline.concatenate(self._predicted, label="predicted")
        return dataclasses.replace(
            self._last,
            **self._sums,
            placement=self._largest,
            moved=dict(self._moved),
            peak_bytes=dict(self._peak),
            timeline=Timeline.concatenate(self._measured, label="measured"),
            predicted=predicted if self._predicted else None,
        )
