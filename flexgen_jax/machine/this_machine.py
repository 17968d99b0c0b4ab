"""What is known of this machine: the profile that was saved for it, or the nearest preset."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import jax

from flexgen_jax.machine.kept_programs import this_cpu
from flexgen_jax.planning.byte_sizes import device_memory
from flexgen_jax.weights.checkpoint import cache_directory
from scheduling.hardware import Hardware
from storage.memory import available_memory


def profile_path(dtype: str) -> Path:
    """Where ``flexgen-jax profile`` keeps its figures of this machine.

    Machines may share a home directory, and JAX's versions differ more than machines do: attention
    on a CPU is three times as fast with 0.12 as with 0.10.
    """
    device = jax.local_devices()[0]
    cores = f"{len(os.sched_getaffinity(0))}-cores"
    other = () if device.platform == "cpu" else (_slug(device.device_kind),)
    jax_version = ".".join(jax.__version__.split(".")[:2])
    parts = ("hardware", dtype, *other, cores, this_cpu(), f"jax-{jax_version}")
    return cache_directory() / f"{'-'.join(parts)}.json"


def _slug(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def saved_profile(dtype: str) -> Hardware | None:
    """The profile that was saved for this machine; None: there is none.

    Raises:
        ValueError: it cannot be read; the message names it.
    """
    saved = profile_path(dtype)
    return Hardware.load(str(saved)) if saved.is_file() else None


def nearest_preset() -> Hardware:
    """A preset of the same kind, with this machine's memory."""
    device = jax.local_devices()[0]
    shared = device.platform == "cpu"
    preset = Hardware.preset("laptop" if shared else "h200")
    memory = available_memory()
    return dataclasses.replace(
        preset,
        name=f"not profiled; using preset {preset.name}",
        device_memory=memory // 2 if shared else device_memory(),
        host_memory=memory // 2 if shared else memory,
    )


def this_machine(dtype: str) -> Hardware:
    """The saved profile, or else the nearest preset.

    Raises:
        ValueError: a saved profile that cannot be read; the message names it.
    """
    return saved_profile(dtype) or nearest_preset()


def save(hardware: Hardware, path: Path) -> None:
    """Writes ``hardware`` as JSON: all of it, or nothing.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(hardware.to_json(), indent=2, allow_nan=False) + "\n"
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
