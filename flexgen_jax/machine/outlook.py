"""What a machine may be expected to do with a model: does it fit, where, and how fast."""

from __future__ import annotations

import dataclasses
import resource
from typing import Any, Literal

from flexgen_jax.models.family import Config
from flexgen_jax.planning.plans import Plan, config_of, plan
from flexgen_jax.weights.weight_format import WeightFormat
from scheduling.hardware import Hardware
from scheduling.policy import Policy
from scheduling.schedules import zigzag
from scheduling.search import NothingFitsError

# Files that a run holds open beside those of the weights.
_OTHER_FILES = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outlook:
    """Of one model on one machine.

    Attributes:
        weights_nbytes: Of its weight store.
        obstacles: What would stop a run, in words; empty: it fits.
        plan: Of the policy below.
        policy: ``"auto"``, or where that does not fit, everything on disk.
    """

    model: str
    weights_nbytes: int
    obstacles: tuple[str, ...]
    policy: Literal["auto", "all on disk"]
    plan: Plan

    def to_json(self) -> dict[str, Any]:
        """Plain values, the plan's figures among them."""
        return {
            "model": self.model,
            "weights_bytes": self.weights_nbytes,
            "fits": not self.obstacles,
            "obstacles": list(self.obstacles),
            "policy": self.policy,
            "plan": self.plan.to_json(),
        }


def outlook(
    model: str, hardware: Hardware, *, prompt_len: int, gen_len: int, dtype: str
) -> Outlook:
    """Plans a block of ``model``; the arguments are as :func:`flexgen_jax.plan` has them.

    Raises:
        ValueError: a model or lengths that cannot be.
    """
    config = config_of(model)
    entries = WeightFormat.usual(dtype).entries(config)
    nbytes = sum(entry.nbytes for entry in entries.values())
    stopped = []
    if nbytes > hardware.disk:
        stopped.append(
            f"its weight store takes {nbytes / 1e9:.1f} GB of disk, {hardware.disk / 1e9:.1f} GB "
            "are free"
        )
    files = len(entries) + _OTHER_FILES
    most, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files > most:
        how = "'ulimit -n'" if hard == resource.RLIM_INFINITY or hard >= files else "limits.conf"
        stopped.append(
            f"it may hold {files} files open, {most} are allowed: raise the limit by {how}"
        )

    chosen: Literal["auto", "all on disk"] = "auto"
    try:
        found = _planned(config, "auto", hardware, prompt_len, gen_len, dtype)
    except NothingFitsError:
        chosen = "all on disk"
        everything = Policy.from_percent(*(0,) * 6, device_batch_size=1, num_device_batches=1)
        found = _planned(config, everything, hardware, prompt_len, gen_len, dtype)
        stopped += [f"one request with everything on disk: {line}" for line in found.misfits]
    return Outlook(
        model=model,
        weights_nbytes=nbytes,
        obstacles=tuple(stopped),
        policy=chosen,
        plan=found,
    )


def _planned(
    config: Config,
    policy: Policy | Literal["auto"],
    hardware: Hardware,
    prompt_len: int,
    gen_len: int,
    dtype: str,
) -> Plan:
    return plan(
        config,
        policy,
        hardware,
        prompt_len=prompt_len,
        gen_len=gen_len,
        schedule=("zigzag", zigzag),
        dtype=dtype,
    )
