"""The devices that JAX finds, or in plain words why it finds none."""

from __future__ import annotations

import contextlib
import os
from typing import Any


class BackendError(ValueError):
    """JAX cannot start the backend it was told to use."""


def local_devices() -> list[Any]:
    """``jax.local_devices()``.

    Raises:
        BackendError: there are none, or none of the host beside an accelerator; the message says
            what asked for them and what to do.
    """
    import jax

    try:
        found = list(jax.local_devices())
    # What comes depends on version and plugin, up to an assertion without a word.
    except Exception as error:
        asked = _asked()
        if asked:
            raise BackendError(
                f"JAX cannot start the platform that JAX_PLATFORMS={asked} asks for"
                f"{_reason(error)}. Set JAX_PLATFORMS=cpu to run on the CPU, unset it to let JAX "
                "choose, or install the JAX for your accelerator, such as jax[cuda12]"
            ) from error
        raise BackendError(
            f"JAX finds no device{_reason(error)}. Set JAX_PLATFORMS=cpu to run on the CPU"
        ) from error
    try:
        jax.local_devices(backend="cpu")
    except RuntimeError as error:
        asked = _asked() or found[0].platform
        raise BackendError(
            f"JAX_PLATFORMS={asked} leaves out the CPU, on which weights are prepared and "
            "attention on the host is computed: "
            f"set JAX_PLATFORMS={asked},cpu, or unset it"
        ) from error
    return found


def allow_cpu_devices(count: int) -> None:
    """Has JAX make so many devices of a CPU, unless the environment says how many.

    Without effect once a backend has started; accelerators are what they are.
    """
    import jax

    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)


def _asked() -> str | None:
    import jax

    return os.environ.get("JAX_PLATFORMS") or getattr(jax.config, "jax_platforms", None)


def _reason(error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), "").rstrip(".")
    return f": {first}" if first else " (it gives no reason: most likely it is not installed)"
