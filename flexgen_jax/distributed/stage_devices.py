"""A device for each pipeline stage."""

from __future__ import annotations

from typing import Any

import jax

from flexgen_jax.distributed.backends import local_devices
from flexgen_jax.distributed.processes import process_count
from scheduling.stages import hosts_of


def stage_devices(num_stages: int) -> list[Any]:
    """A device for each stage: of all processes, where JAX's runtime joins several.

    Raises:
        ValueError: there are too few; the message says how to have more.
    """
    local = local_devices()
    count = process_count() if num_stages > 1 else 1
    if num_stages < count:
        raise ValueError(
            f"num_stages {num_stages} over {count} processes: each of them needs a stage at least"
        )
    if count == 1:
        return _first(local, num_stages)
    hosts = hosts_of(num_stages, count)
    return [
        device
        for index in range(count)
        for device in _first(
            [d for d in jax.devices() if d.process_index == index], hosts.count(index)
        )
    ]


def _first(devices: list[Any], count: int) -> list[Any]:
    if len(devices) < count:
        cure = (
            f"to try stages on a CPU, set JAX_NUM_CPU_DEVICES={count} before JAX starts"
            if devices[0].platform == "cpu"
            else "use fewer stages, or more machines"
        )
        raise ValueError(
            f"num_stages {count} needs {count} devices, and JAX finds {len(devices)} "
            f"({devices[0].device_kind}); {cure}"
        )
    return devices[:count]
