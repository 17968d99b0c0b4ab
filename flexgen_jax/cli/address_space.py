"""Whether a limit on addresses leaves JAX room: where it does not, libraries end the process by
themselves, each in its own way, and no error can be caught."""

from __future__ import annotations

import os
import resource

# Measured: starting, compiling and running a model of a megabyte took 1.6 GB on two cores. What
# each core more takes is reckoned: a thread's stack, and its part of the heap.
_NBYTES = 2 << 30
_NBYTES_A_CORE = 64 << 20


def limit() -> int | None:
    """Bytes that this process may address, as ``ulimit -v`` sets it; None: any number."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft


def _usable_cores() -> int:
    """As XLA counts them for its threads: a container may have few of many."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check() -> None:
    """Refuses a limit that JAX cannot start under.

    Raises:
        MemoryError: says how much it takes.
    """
    most, cores = limit(), _usable_cores()
    needed = _NBYTES + cores * _NBYTES_A_CORE
    if most is not None and most < needed:
        raise MemoryError(
            f"this process may address {most / 1e9:.1f} GB (ulimit -v), and JAX on {cores} cores "
            f"takes about {needed / 1e9:.1f} GB of addresses before any model, most of it never "
            "used: run 'ulimit -v unlimited', and limit memory by --host-memory or a container"
        )
