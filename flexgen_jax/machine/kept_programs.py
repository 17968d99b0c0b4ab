"""Compiled programs, kept from one process to the next: JAX's persistent compilation cache.

A command spends seconds on compiling what the same command compiled yesterday. Programs for a CPU
hold instructions that another model of CPU may not have, so each has a directory of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import tempfile
import time
import warnings
from pathlib import Path

import jax

from flexgen_jax.weights.checkpoint import cache_directory

VARIABLE = "FLEXGEN_JAX_PROGRAMS"
_BEING_WRITTEN = 60.0  # seconds: a younger one may be on its way
MOST_NBYTES = 1 << 30  # of a directory; what was not used for longest goes first
# JAX looks at all that are kept whenever it adds one: half a second with 6,400, measured.
MOST = 1000


def keep_programs() -> Path | None:
    """Has JAX keep compiled programs in the cache directory, and take them from there.

    ``$FLEXGEN_JAX_PROGRAMS`` names another directory, or is ``off``. Whoever has set a cache in
    JAX's own way keeps it. A directory that cannot be written is left alone: nothing fails by it.

    Returns:
        Where they are kept; None: nowhere, or where JAX was told.
    """
    chosen = os.environ.get(VARIABLE, "")
    if chosen.lower() in ("off", "0", "false", "no") or _in_use():
        return None
    base = Path(chosen).expanduser() if chosen else cache_directory() / "programs"
    directory = base / this_cpu()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"x")
        _drop_halves(directory)
        _drop_oldest(directory)
    except OSError:
        return None
    # A disk that fills later, or a program that cannot be read, is compiled again without a word.
    warnings.filterwarnings("ignore", message=".*persistent compilation cache")
    jax.config.update("jax_compilation_cache_max_size", MOST_NBYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    return directory


def _drop_halves(directory: Path) -> None:
    """Removes programs that were not written to their end: a full disk, a kill.

    JAX keeps when each was used in a file beside it, and without that adds no more programs.
    """
    for program in directory.glob("*-cache"):
        if program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
            continue
        with contextlib.suppress(OSError):  # another process removes it, too
            if time.time() - program.stat().st_mtime > _BEING_WRITTEN:
                program.unlink()


def _drop_oldest(directory: Path) -> None:
    """Leaves the three quarters of :data:`MOST` that were used last, once there are more than it.

    Another process may remove the same ones, or compile again what it finds gone.
    """
    used = list(directory.glob("*-atime"))
    if len(used) <= MOST:
        return
    when: dict[Path, int] = {}
    for path in used:
        with contextlib.suppress(OSError):
            when[path] = int.from_bytes(path.read_bytes(), "little")
    for path in sorted(when, key=lambda path: when[path])[: len(used) - MOST * 3 // 4]:
        program = path.with_name(path.name.removesuffix("-atime") + "-cache")
        for each in (program, path):  # a program alone is a half, and goes one day
            each.unlink(missing_ok=True)


def _in_use() -> bool:
    """Whether somebody has told JAX where to keep programs."""
    return bool(getattr(jax.config, "jax_compilation_cache_dir", None))


def this_cpu() -> str:
    """The name of a directory for programs of CPUs like this one."""
    facts = set()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = platform.processor()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "flags", "Features", "CPU part", "cpu family", "model"):
            facts.add(f"{key.strip()} {' '.join(sorted(value.split()))}")
    digest = hashlib.sha256("\n".join(sorted(facts)).encode()).hexdigest()
    return f"{platform.machine()}-{digest[:16]}"
