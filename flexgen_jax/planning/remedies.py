"""What would make a model fit a machine that it does not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from flexgen_jax.planning.auto import Auto, Model, Uniform
from scheduling.hardware import Hardware
from scheduling.limits import Limits
from scheduling.schedules import Schedule
from scheduling.search import NothingFitsError
from scheduling.shapes import EXACT

# The room that is missing is found within a sixteenth of itself, if it is not absurd.
_HALVINGS, _DOUBLINGS = 4, 8
_CODES: tuple[tuple[str, dict[str, int]], ...] = (
    ("4-bit weights", {"weight_bits": 4}),
    ("4-bit weights and a 4-bit cache", {"weight_bits": 4, "cache_bits": 4}),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remedy:
    """One change with which the smallest block fits.

    Attributes:
        name: In words.
        fixed: Fields of the policy that it takes.
        tier: Of which there is to be more, ``memory`` where device and host are one; and how many
            bytes more.
    """

    name: str
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tier: str | None = None
    more_bytes: float | None = None

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {**dataclasses.asdict(self), "fixed": dict(self.fixed)}


class DoesNotFitError(NothingFitsError):
    """There is no policy within the limits.

    Attributes:
        reason: What was missing, in words.
        remedies: What would make it fit, each by itself.
    """

    def __init__(self, reason: str, remedies: tuple[Remedy, ...]) -> None:
        names = "; ".join(remedy.name for remedy in remedies)
        super().__init__(
            f"{reason}\nIt would fit with any one of these: {names}" if remedies else reason
        )
        self.reason, self.remedies = reason, remedies

    def to_json(self) -> dict[str, Any]:
        """As ``plan --json`` prints it."""
        remedies = [remedy.to_json() for remedy in self.remedies]
        return {"fits": False, "reason": self.reason, "would_fit": remedies}


@dataclasses.dataclass(frozen=True)
class _Trial:
    model: Model
    job: Uniform
    hardware: Hardware
    auto: Auto
    schedule: Schedule

    def fits(self, limits: Limits, fixed: Mapping[str, Any]) -> bool:
        """Whether any policy does: with the smallest block, which takes least."""
        smallest = {"device_batch_size": 1, "num_device_batches": self.auto.base.num_stages}
        auto = Auto({**self.auto.fixed, **fixed, **smallest}, forbid=EXACT)
        try:
            auto.choose(
                self.model, self.job, self.hardware, limits, schedule=self.schedule, uphill=False
            )
        except NothingFitsError:
            return False
        return True


def remedies(
    model: Model,
    job: Uniform,
    hardware: Hardware,
    limits: Limits,
    auto: Auto,
    schedule: Schedule,
) -> tuple[Remedy, ...]:
    """Changes with each of which alone a policy fits; the first ones cost nothing.

    Args:
        auto: What has to be kept.
    """
    trial = _Trial(model, job, hardware, auto, schedule)
    return (*_smaller(trial, limits), *_codes(trial, limits), *_room(trial, limits))


def _smaller(trial: _Trial, limits: Limits) -> Iterator[Remedy]:
    if {"device_batch_size", "num_device_batches"} & set(trial.auto.fixed) and trial.fits(
        limits, {}
    ):
        yield Remedy(name="a smaller block")


def _codes(trial: _Trial, limits: Limits) -> Iterator[Remedy]:
    given = set(trial.auto.fixed)
    coded = trial.model.stored is not None and trial.model.stored.coded
    for name, fixed in _CODES:
        if (coded and "weight_bits" in fixed) or given & set(fixed):
            continue
        if trial.fits(limits, fixed):
            yield Remedy(name=name, fixed=fixed)
            return


def _room(trial: _Trial, limits: Limits) -> Iterator[Remedy]:
    form = trial.model.form(trial.auto.base)
    weights = sum(entry.nbytes for entry in form.entries(trial.model.config).values())
    names = {"device": "device memory", "host": "host memory", "disk": "disk space"}
    if limits.shared:
        names = {"device": "memory", "disk": "disk space"}
    for tier, name in names.items():
        more = _missing(trial, limits, tier, weights / 16)
        if more is not None:
            called = "memory" if limits.shared and tier == "device" else tier
            yield Remedy(name=f"about {_size(more)} more {name}", tier=called, more_bytes=more)


def _missing(trial: _Trial, limits: Limits, tier: str, begin: float) -> float | None:
    """Bytes of ``tier`` that are missing; None: more of it does not do."""

    def fits(more: float) -> bool:
        room = dataclasses.replace(limits, **{tier: getattr(limits, tier) + more})
        return trial.fits(room, {})

    if not fits(begin * 2**_DOUBLINGS):
        return None
    low, high = 0.0, begin
    while not fits(high):
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _size(nbytes: float) -> str:
    unit, size = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6)) if nbytes >= s), ("kB", 1e3))
    return f"{nbytes / size:.3g} {unit}"
