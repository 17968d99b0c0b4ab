"""Pinned host memory beside an accelerator: what goes there, and what leaves through it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from storage.memory import memory_limit, total_memory
from storage.store import StorageError

LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
_PREALLOCATE = "XLA_PJRT_GPU_HOST_MEMORY_PREALLOCATE"


def pinned_limit() -> int:
    """Bytes that a backend which starts now pins at most, for all devices of the process.

    XLA's own rule: 64 GiB, or 16 where it is to take them at once, unless the environment says
    another number.
    """
    at_once = os.environ.get(_PREALLOCATE, "").lower() in ("1", "true")
    try:
        gibibytes = int(os.environ.get(LIMIT, ""))
    except ValueError:
        gibibytes = 16 if at_once else 64
    return gibibytes << 30


def allow_pinned_memory() -> None:
    """Lets a backend that starts later pin all there is, unless the environment says how much.

    It takes no more than it is asked to hold.
    """
    total = total_memory()
    os.environ.setdefault(LIMIT, str(max(1, min(total, memory_limit() or total) >> 30)))


def pin(arrays: Any, pinned: Any) -> Any:
    """``arrays``, a tree of them, in pinned memory, ready.

    Args:
        pinned: The sharding of pinned memory.

    Raises:
        StorageError: there is no room; the message says what to set.
    """
    try:
        return jax.block_until_ready(jax.device_put(arrays, pinned))
    except RuntimeError as error:  # XLA's, which names the memory that is out
        if "host memory" not in str(error) and "host_bfc" not in str(error):
            raise
        nbytes = sum(array.nbytes for array in jax.tree.leaves(arrays))
        raise StorageError(
            f"no room in pinned host memory for {nbytes} more bytes: unless told otherwise, JAX "
            f"pins at most 64 GB for all devices of a process. Set {LIMIT} to the "
            "gigabytes that may be pinned, before JAX starts, or leave less in host memory "
            "(--percent, --host-memory)"
        ) from error


def through_pinned(arrays: Sequence[jax.Array], pinned: Any) -> list[np.ndarray]:
    """The values of ``arrays``, which may be views of pinned memory, not to be written to."""
    return [np.asarray(array) for array in pin(tuple(arrays), pinned)]


def on_host(arrays: Sequence[jax.Array | np.ndarray]) -> list[np.ndarray]:
    """The values of ``arrays``, which may be views of where they lie, not to be written to.

    What leaves an accelerator goes through pinned memory: at once it is several times as slow.
    """
    there = [array for array in arrays if isinstance(array, jax.Array)]
    devices = {device for array in there for device in array.devices()}
    if all(device.platform == "cpu" for device in devices):
        return [np.asarray(array) for array in arrays]
    (device,) = devices
    pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    return through_pinned(there, pinned)
