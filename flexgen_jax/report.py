"""What a run did: placement, throughput, padding, and its measured timeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from scheduling.placement import Placement
from scheduling.policy import Policy, Tier
from scheduling.sizes import Link
from scheduling.timeline import Timeline, compare


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Report:
    """Figures of one ``generate`` call.

    Attributes:
        placement: Where every cell of ``weights``, ``cache`` and ``hidden`` really lay; the latter
            two of the block with the largest cache.
        seconds: Wall time from the first op to the last, compilation included.
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
        timeline: Measured spans of the blocks, one after another; of a long job, of its first.
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
