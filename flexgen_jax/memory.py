"""How much memory there is, and the simplest policy that respects it."""

from __future__ import annotations

import re

import jax

from scheduling.policy import Policy, Split
from storage.memory import available_memory

# Of the memory that weights may take; the rest is for the cache, activations and programs.
WEIGHTS_SHARE = 0.6

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(value: int | str | None) -> int | None:
    """``"12GiB"``, ``"500MB"`` or a number of bytes; None stays None.

    Raises:
        ValueError: anything else.
    """
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", str(value).lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"expected a size such as '12GiB', '500MB' or a number, got {value!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def device_memory() -> int:
    """Bytes of the first local device's memory; on the CPU backend what the host has available."""
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return available_memory()


def automatic_policy(
    sizes: dict[str, int], device_limit: int | None, host_limit: int | None
) -> Policy:
    """Fills the device with weights, then host memory, then the disk.

    On the CPU backend device and host are one memory, so the host tier is used only where
    ``host_limit`` asks for it.

    Args:
        sizes: Bytes of every weight tensor, by name.
        device_limit: Bytes; None: what the device has.
        host_limit: Bytes; None: what the host has available.
    """
    total = sum(sizes.values())
    shared = jax.local_devices()[0].platform == "cpu"
    device_room = WEIGHTS_SHARE * (device_memory() if device_limit is None else device_limit)
    if host_limit is None:
        host_limit = 0 if shared else available_memory()
    device = min(100.0, 100 * device_room / total)
    host = min(100.0 - device, 100 * WEIGHTS_SHARE * host_limit / total)
    return Policy(weights=Split(device=device, host=host, disk=100.0 - device - host))
