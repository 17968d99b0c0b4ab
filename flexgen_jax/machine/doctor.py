"""Looks a machine over: what would stop a run, what would slow it down, what to expect."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flexgen_jax._version import __version__
from flexgen_jax.distributed.backends import BackendError, local_devices
from flexgen_jax.machine.file_system import FileSystem, existing, file_system
from flexgen_jax.weights.checkpoint import cache_directory
from storage.memory import PAGE, available_memory, memory_limit, total_memory

if TYPE_CHECKING:
    from flexgen_jax.machine.outlook import Outlook
    from scheduling.hardware import Hardware

PRESETS = ("opt-1.3b", "opt-6.7b", "opt-30b")
PROMPT_LEN, GEN_LEN = 256, 32

_LIBRARIES = ("jax", "jaxlib", "tensorstore", "numpy")
_FILE_NBYTES = 256 << 20
_LITTLE_MEMORY = 2 << 30
_SLOW_DISK = 200e6
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: ``"error"``: it would stop a run; ``"warning"``: it costs time or memory.
        message: What is there; of an error or a warning also what to do.
    """

    check: str
    level: Literal["ok", "warning", "error"]
    message: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All that was found.

    Attributes:
        offload_dir: The directory that was meant; ``file_system`` is None if it cannot be written.
        devices: Their names; empty if JAX cannot start.
        memory: Bytes: ``total``, ``available``, and the cgroup's ``limit`` or None.
        disk_speed: Bytes per second, ``read`` and ``write``, past the page cache.
        hardware: What the outlook is for; None: it could not be measured.
    """

    versions: dict[str, str | None]
    offload_dir: Path
    devices: tuple[str, ...]
    memory: dict[str, int | None]
    file_system: FileSystem | None
    disk_speed: dict[str, float] | None
    hardware: Hardware | None
    outlook: tuple[Outlook, ...]
    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Nothing would stop a run."""
        return all(finding.level != "error" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        files = self.file_system
        return {
            "healthy": self.healthy,
            "versions": self.versions,
            "devices": list(self.devices),
            "memory_bytes": self.memory,
            "offload_dir": str(self.offload_dir),
            "file_system": None if files is None else dataclasses.asdict(files),
            "disk_bytes_per_second": self.disk_speed,
            "hardware": None if self.hardware is None else self.hardware.to_json(),
            "outlook": [model.to_json() for model in self.outlook],
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
        }


def diagnose(
    offload_dir: Path | None = None,
    *,
    hardware: Hardware | None = None,
    models: Sequence[str] = (),
    dtype: str = "bfloat16",
    file_nbytes: int = _FILE_NBYTES,
) -> Diagnosis:
    """Looks over this machine, in about ten seconds.

    Args:
        offload_dir: Where runs keep what is on disk; None: the cache directory.
        hardware: What the outlook is for; None: this machine, measured roughly.
        models: That are to be run, as :func:`flexgen_jax.plan` takes them: one that does not fit is
            an error. None given: ``PRESETS``, for information.
        dtype: Of the models and the arithmetic.
        file_nbytes: Of the file that is written and read to time the disk.

    Raises:
        ValueError: a model that is not known.
    """
    from flexgen_jax.machine.profile import disk_speed

    offload_dir = cache_directory() if offload_dir is None else offload_dir
    findings: list[Finding] = []

    def found(check: str, level: Literal["ok", "warning", "error"], message: str) -> None:
        findings.append(Finding(check=check, level=level, message=message))

    versions = {
        "flexgen-jax": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in _LIBRARIES},
    }
    for name, problem in _broken_libraries():
        found(name, "error", f"{problem}: install flexgen-jax anew")
    devices: list[Any] = []
    try:
        devices = local_devices()
    except (BackendError, ImportError) as error:
        found("backend", "error", str(error))
    else:
        shared = devices[0].platform == "cpu"
        count = "1 device" if len(devices) == 1 else f"{len(devices)} devices, one is used"
        text = f"{devices[0].platform}: {count}; {_cores()}"
        text += "; device and host are one memory" if shared else ""
        found("backend", "ok", text)
    memory = _look_at_memory(found)
    where, files, speed, measured = existing(offload_dir), None, None, None
    try:
        files = file_system(where)
        if _look_at_directory(found, where, files, file_nbytes):
            if hardware is None and devices:
                hardware = _measured(found, where, dtype, file_nbytes)
                measured = hardware
            if measured is not None:
                speed = measured.disk_to_host, measured.host_to_disk_cache
            else:
                speed = disk_speed(where, 1, file_nbytes)[:2]
            _look_at_speed(found, *speed)
    except OSError as error:
        found(
            "disk",
            "error",
            f"cannot write in {where}: {error.strerror or error}; choose another --offload-dir",
        )
    return Diagnosis(
        versions=versions,
        offload_dir=offload_dir,
        devices=tuple(map(str, devices)),
        memory=memory,
        file_system=files,
        disk_speed=None if speed is None else {"read": speed[0], "write": speed[1]},
        hardware=hardware,
        outlook=_look_ahead(found, hardware, models, dtype) if devices and hardware else (),
        findings=tuple(findings),
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _broken_libraries() -> Iterator[tuple[str, str]]:
    for name in _LIBRARIES:
        try:
            importlib.import_module(name)
        except Exception as error:  # a library that does not fit another raises what it likes
            yield name, f"cannot be imported ({type(error).__name__}: {error})"


def _cores() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{usable} of {os.cpu_count()} cores usable"


def _look_at_memory(found: Any) -> dict[str, int | None]:
    total, available, limit = total_memory(), available_memory(), memory_limit()
    text = f"{available / 1e9:.1f} GB available of {total / 1e9:.1f} GB"
    if limit is not None and limit < total:
        text += f", of which this process may take {limit / 1e9:.1f} GB (a limit of its cgroup)"
    if available < _LITTLE_MEMORY:
        found("memory", "warning", f"{text}: little beside programs and buffers; end other work")
    else:
        found("memory", "ok", text)
    try:
        setting = _HUGE_PAGES.read_text()
    except OSError:
        setting = ""
    if "[never]" in setting:
        found(
            "huge pages",
            "warning",
            f"off, pages are of {PAGE // 1024} KiB: fresh memory takes several times as long; "
            f"set {_HUGE_PAGES} to madvise",
        )
    elif setting:
        found("huge pages", "ok", f"on; pages are of {PAGE // 1024} KiB")
    return {"total": total, "available": available, "limit": limit}


def _look_at_directory(found: Any, where: Path, files: FileSystem, file_nbytes: int) -> bool:
    """Whether there is room to time the disk."""
    place = f"{where} ({files.kind or 'unknown'}), {files.free / 1e9:.1f} GB free"
    if files.free < 2 * file_nbytes:
        found("disk", "error", f"{place}: free some, or choose another --offload-dir")
        return False
    found("disk", "ok", place)
    if not files.locks:
        found(
            "locks",
            "error",
            f"files in {where} cannot be locked, which conversions and runs need: mount it with "
            "locks, or choose another --offload-dir",
        )
    if files.in_memory:
        found(
            "file system",
            "warning",
            f"{files.kind} lies in memory, so what is put on disk takes memory, too: "
            "choose an --offload-dir on a disk",
        )
    elif files.network:
        found(
            "file system",
            "warning",
            f"{files.kind} is a network file system: runs are as fast as the network, and no other "
            "machine may use the same directory; a local disk is better for --offload-dir",
        )
    if not files.direct_io:
        found(
            "direct I/O",
            "warning",
            "not possible here: all reading goes through the page cache, which takes time from "
            "computing; a local ext4 or xfs file system allows it",
        )
    return True


def _measured(found: Any, where: Path, dtype: str, file_nbytes: int) -> Hardware | None:
    from flexgen_jax.machine.profile import profile

    try:
        return profile(where, dtype=dtype, repeats=1, file_nbytes=file_nbytes)
    except RuntimeError as error:  # as JAX says that memory is out, or a driver gone
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        found(
            "compute",
            "error",
            f"the device computes nothing: {reason}; see that no other process takes its memory",
        )
        return None


def _look_at_speed(found: Any, read: float, write: float) -> None:
    text = (
        f"reads {read / 1e9:.2f} GB/s, writes {write / 1e9:.2f} GB/s (a short look: "
        "'flexgen-jax profile' measures)"
    )
    if min(read, write) < _SLOW_DISK:
        found("disk speed", "warning", f"{text}: this will be what runs wait for; use a faster one")
    else:
        found("disk speed", "ok", text)


def _look_ahead(
    found: Any, hardware: Hardware, models: Sequence[str], dtype: str
) -> tuple[Outlook, ...]:
    from flexgen_jax.machine.outlook import outlook

    expected = tuple(
        outlook(model, hardware, prompt_len=PROMPT_LEN, gen_len=GEN_LEN, dtype=dtype)
        for model in models or PRESETS
    )
    for model in expected:
        if models and model.obstacles:
            found(model.model, "error", "; ".join(model.obstacles))
    return expected
