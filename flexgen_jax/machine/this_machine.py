"""What is known of this machine: the profile that was saved for it, or the nearest preset."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax

from flexgen_jax.planning.byte_sizes import device_memory
from flexgen_jax.weights.checkpoint import cache_directory
from scheduling.hardware import Hardware
from storage.memory import available_memory


def profile_path(dtype: str) -> Path:
    """Where ``flexgen-jax profile`` keeps its figures of this machine."""
    return cache_directory() / f"hardware-{dtype}.json"


def this_machine(dtype: str) -> Hardware:
    """The saved profile, or else a preset of the same kind, with this machine's memory.

    Raises:
        ValueError: a saved profile that cannot be read; the message names it.
    """
    saved = profile_path(dtype)
    if saved.is_file():
        return Hardware.load(str(saved))
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


def save(hardware: Hardware, path: Path) -> None:
    """Writes ``hardware`` as JSON.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(hardware.to_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8"
    )
