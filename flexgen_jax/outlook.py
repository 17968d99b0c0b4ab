"""What a machine may be expected to do with a model: does it fit, where, and how fast."""

from __future__ import annotations

import dataclasses
import resource
from typing import Any, Literal

from flexgen_jax.planning import Plan, config_of, plan
from flexgen_jax.weight_format import WeightFormat
from scheduling.hardware import Hardware
from scheduling.policy import Policy, Tier
from scheduling.schedules import zigzag

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
    entries = WeightFormat(dtype).entries(config)
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

    def of(policy: Policy | Literal["auto"]) -> tuple[Plan, list[str]]:
        found = plan(
            config,
            policy,
            hardware,
            prompt_len=prompt_len,
            gen_len=gen_len,
            schedule=("zigzag", zigzag),
            dtype=dtype,
        )
        return found, _misfits(found)

    def result(
        policy: Literal["auto", "all on disk"], found: Plan, obstacles: list[str]
    ) -> Outlook:
        return Outlook(
            model=model,
            weights_nbytes=nbytes,
            obstacles=tuple(obstacles),
            policy=policy,
            plan=found,
        )

    found, misfits = of("auto")
    if not misfits:
        return result("auto", found, stopped)
    other, rest = of(Policy.from_percent(0, 0, 0, 0, 0, 0))
    if not rest:
        return result("all on disk", other, stopped)
    both = [f"policy auto: {'; '.join(misfits)}", f"all on disk: {'; '.join(rest)}"]
    return result("auto", found, stopped + both)


def _misfits(found: Plan) -> list[str]:
    """As the plan has them, but for a machine whose device and host are one memory."""
    machine, peak = found.hardware, found.peak_bytes
    if machine.host_to_device is not None:
        return found.misfits
    need = peak[Tier.DEVICE] + peak[Tier.HOST]
    room = machine.device_memory + machine.host_memory
    memory = [f"memory: {need / 1e9:.1f} GB of {room / 1e9:.1f} GB"] if need > room else []
    return memory + [line for line in found.misfits if line.startswith(Tier.DISK.value)]
