"""What would help: the same search again, from the same shape on, with one thing changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from scheduling.hardware import Hardware
from scheduling.limits import Limits
from scheduling.policy import Policy
from scheduling.remembered import Blocks, Remembered
from scheduling.schedules import Schedule
from scheduling.search import NothingFitsError, search
from scheduling.shapes import CHOICES

# Less than this is within what an estimate may be off by.
WORTH_SAYING = 1.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """Something else than there is; None: as it is."""

    hardware: Hardware | None = None
    limits: Limits | None = None
    choices: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def changes(
    hardware: Hardware, limits: Limits, policy: Policy, left_out: Collection[str] = ()
) -> dict[str, Change]:
    """What could be otherwise, in words; but methods that are ``left_out``."""
    found = {
        "twice the device memory": Change(
            limits=dataclasses.replace(limits, device=2 * limits.device)
        ),
        "twice the host memory": Change(limits=dataclasses.replace(limits, host=2 * limits.host)),
        "a disk that reads and writes twice as fast": Change(
            hardware=hardware.scaled(
                dict.fromkeys(("disk_to_host", "host_to_disk_cache", "host_to_disk_hidden"), 0.5)
            )
        ),
        "twice the bandwidth between host and device": Change(
            hardware=hardware.scaled(
                dict.fromkeys(
                    ("host_to_device", "device_to_host_cache", "device_to_host_hidden"), 0.5
                )
            )
        ),
    }
    if hardware.host_to_device is None:
        del found["twice the bandwidth between host and device"]
        del found["twice the host memory"]  # is the device's
    if policy.weight_bits != 4 and "weight_bits" not in left_out:
        found["4-bit weights"] = Change(choices={"weight_bits": 4})
    if policy.cache_bits != 4 and "cache_bits" not in left_out:
        found["a 4-bit cache"] = Change(choices={"cache_bits": 4})
    hosted = policy.host_attention or "host_attention" in left_out
    if not hosted and hardware.host_to_device is not None:
        found["attention on the host"] = Change(choices={"host_attention": True})
    return found


def advice(
    blocks: Blocks,
    hardware: Hardware,
    limits: Limits,
    policy: Policy,
    *,
    schedule: Schedule,
    allow: Iterable[str] = (),
    settled: Iterable[str] = (),
) -> dict[str, float]:
    """What would help, and how many times the throughput it would give; the best first.

    By what a search finds with each change, beginning near ``policy``'s shape: blocks and places
    may be others then. Compared with the best that it finds so as things are.

    Args:
        allow: Methods that the search may use, as ``policy``'s did.
        settled: Methods that cannot be others, as the weights' bits if they are in codes.
    """
    free, blocks = tuple(allow), Remembered.of(blocks, schedule)
    left_out = {*free, *settled}
    names = (*CHOICES, "overlap", "group_size", "num_stages", "refill")
    kept = {name: getattr(policy, name) for name in names if name not in free}

    def seconds(change: Change) -> float | None:
        try:
            found = search(
                blocks,
                change.hardware or hardware,
                change.limits or limits,
                schedule=schedule,
                requests=10**9,
                fixed={**kept, **change.choices},
                allow=free,
                near=policy,
            )
        except NothingFitsError:
            return None
        return found.best.seconds

    now = seconds(Change())
    if now is None:
        return {}
    gains = {}
    for name, change in changes(hardware, limits, policy, left_out).items():
        then = seconds(change)
        if then is not None and now / then >= WORTH_SAYING:
            gains[name] = now / then
    return dict(sorted(gains.items(), key=lambda item: -item[1]))
