"""What a person asks of a plan: does it fit, how fast is it, what limits it, what would help."""

from __future__ import annotations

import dataclasses
from typing import Any

# Methods that results, or where they are computed, depend on: what ``allow`` calls them.
ALLOWED_BY = {
    "4-bit weights": "weight_bits",
    "a 4-bit cache": "cache_bits",
    "attention on the host": "host_attention",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """Of a plan.

    Attributes:
        fits: Whether the machine has room for it.
        short_bytes: What is missing, by the name of a tier.
        where: ``weights``, ``cache`` and ``hidden`` -> percent of the bytes in each tier that has
            some.
        tokens_per_second: New tokens of the block over its time; where lengths are known, of a job.
        requests, seconds: A job of so many requests like those planned for, and how long it takes.
        limit: The link, processor or stream that has most to do; ``share``: of the time.
        to_buy, to_allow: The change of the machine, and the method to allow, that would help most,
            and how many times as fast it makes the job; None: none helps, or none was looked for.
    """

    fits: bool
    short_bytes: dict[str, float]
    where: dict[str, dict[str, float]]
    tokens_per_second: float
    requests: int
    seconds: float
    limit: str
    share: float
    to_buy: tuple[str, float] | None = None
    to_allow: tuple[str, float] | None = None

    @property
    def best_help(self) -> tuple[str, float] | None:
        """The better of ``to_buy`` and ``to_allow``."""
        there = [found for found in (self.to_buy, self.to_allow) if found is not None]
        return max(there, key=lambda item: item[1], default=None)

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        return {
            "fits": self.fits,
            "short_bytes": self.short_bytes,
            "where": self.where,
            "tokens_per_second": self.tokens_per_second,
            "job": {"requests": self.requests, "seconds": self.seconds},
            "limit": {"name": self.limit, "share": self.share},
            "best_help": _named(self.best_help),
            "to_buy": _named(self.to_buy),
            "to_allow": _named(self.to_allow),
        }


def _named(found: tuple[str, float] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    name, times = found
    allow = {"allow": ALLOWED_BY[name]} if name in ALLOWED_BY else {}
    return {"name": name, "times": times, **allow}


def best_helps(
    would_help: dict[str, float],
) -> tuple[tuple[str, float] | None, tuple[str, float] | None]:
    """The best change of the machine, and the best method to allow, of what a plan found."""

    def best(allowed: bool) -> tuple[str, float] | None:
        found = [item for item in would_help.items() if (item[0] in ALLOWED_BY) is allowed]
        return max(found, key=lambda item: item[1], default=None)

    return best(False), best(True)
