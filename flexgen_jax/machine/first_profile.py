"""A profile that makes itself: where there is none, the first run measures a short one.

Nothing of it stops a run. Of several processes that begin at once one measures, and the others
wait for what it finds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from flexgen_jax.machine.this_machine import nearest_preset, profile_path, save, saved_profile
from scheduling.hardware import Hardware

VARIABLE = "FLEXGEN_JAX_PROFILE"
# What another process takes to measure is less; one that hangs is not waited for.
_PATIENCE, _POLL = 120.0, 0.2

Say = Callable[[str], None]


def switched_on() -> bool:
    """Whether ``$FLEXGEN_JAX_PROFILE`` allows to measure: unless it is ``off``."""
    return os.environ.get(VARIABLE, "").lower() not in ("off", "0", "false", "no")


def known_machine(dtype: str, directory: Path, *, measure: bool, say: Say) -> Hardware:
    """The profile that is saved for this machine; where there is none, a short one is measured.

    Args:
        dtype: Of the arithmetic.
        directory: On the disk to measure.
        measure: Whether to: else, and where it cannot be done, the nearest preset is taken.
        say: Told in a line what was measured, or why not.

    Raises:
        ValueError: a saved profile that cannot be read; the message names it.
    """
    found = saved_profile(dtype)
    if found is not None:
        return found
    # Of processes that are one pipeline the first one predicts and chooses.
    if not (measure and switched_on()) or jax.process_index() != 0:
        return nearest_preset()
    path = profile_path(dtype)
    try:
        with _only_one(path.with_name(f"{path.name}.lock")) as alone:
            found = saved_profile(dtype)  # of a process that was at it
            if found is not None:
                return found
            if alone:
                return _measured(dtype, directory, path, say)
        reason = "another process is measuring"
    except (OSError, RuntimeError) as error:  # JAX says by a RuntimeError that memory is out
        reason = next(iter(str(error).splitlines()), type(error).__name__)
    preset = nearest_preset()
    say(f"this machine could not be measured ({reason}): predictions are of {preset.name}")
    return preset


@contextlib.contextmanager
def _only_one(lock: Path) -> Iterator[bool]:
    """Whether this process has the lock, once no other one has it or for want of patience.

    Raises:
        OSError: the directory cannot be written, or its files cannot be locked.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    yield False
                    return
                time.sleep(_POLL)
            else:
                # The file stays: whoever removed it might remove what another process waits at.
                yield True
                return


def _measured(dtype: str, directory: Path, path: Path, say: Say) -> Hardware:
    from flexgen_jax.machine.profile import SHORT_FILE_NBYTES, SHORT_REPEATS, profile

    # Measured for nothing if it cannot be kept: a full disk is better known before.
    with path.with_name(f"{path.name}.probe-{os.getpid()}").open("wb") as probe:
        try:
            probe.write(bytes(1 << 16))
            probe.flush()
        finally:
            os.unlink(probe.name)
    begun = time.perf_counter()
    found = profile(
        directory, dtype=dtype, repeats=SHORT_REPEATS, file_nbytes=SHORT_FILE_NBYTES, short=True
    )
    save(found, path)
    say(
        f"no profile of this machine yet: measured a short one in "
        f"{time.perf_counter() - begun:.0f} s ({path}); 'flexgen-jax profile' makes a full one"
    )
    return found
