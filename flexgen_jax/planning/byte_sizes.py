"""How much memory there is, and how people write it."""

from __future__ import annotations

import re

import jax

from storage.memory import available_memory

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(value: int | str | None) -> int | None:
    """``"12GiB"``, ``"500MB"`` or a number of bytes; None stays None.

    Raises:
        ValueError: anything else.
    """
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    text = value.lower() if isinstance(value, str) else ""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text)
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


def device_is_host() -> bool:
    """Whether the first local device's memory is the host's."""
    return jax.local_devices()[0].platform == "cpu"
