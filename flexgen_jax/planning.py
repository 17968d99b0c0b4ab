"""What a run would do and take, without weights, accelerator or a run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from flexgen_jax.block_sizes import block_sizes
from flexgen_jax.blocks import Request, make_blocks
from flexgen_jax.cells import place_cache, place_hidden
from flexgen_jax.config import OPTConfig
from flexgen_jax.llm import Schedule
from flexgen_jax.memory import automatic_policy
from flexgen_jax.sampling_params import SamplingParams
from flexgen_jax.weight_format import WeightFormat
from flexgen_jax.weights import place_weights
from scheduling.cost_model import CostModel, bound
from scheduling.hardware import Hardware
from scheduling.placement import Placement
from scheduling.policy import Policy, Tier
from scheduling.simulate import simulate
from scheduling.timeline import Timeline
from scheduling.transforms import serialized
from scheduling.workload import Workload
from storage.disk import DiskContext


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A block of a policy on a machine, predicted.

    Attributes:
        placement: Of ``weights``, ``cache`` and ``hidden``, as a run would place them.
        timeline: Predicted.
        peak_bytes: Per tier.
        lower_bound: Seconds that any schedule of this block needs, per resource.
    """

    policy: Policy
    hardware: Hardware
    schedule: str
    workload: Workload
    placement: dict[str, Placement]
    timeline: Timeline
    peak_bytes: dict[Tier, int]
    lower_bound: dict[str, float]

    @property
    def generated_tokens(self) -> int:
        """Of the block."""
        return self.policy.block_size * self.workload.num_steps

    @property
    def prefill_seconds(self) -> float:
        """Until the last batch has its first token."""
        return max(s.end for s in self.timeline.spans if s.op == "Compute" and s.step == 0)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over the block's time: FlexGen's throughput."""
        return self.generated_tokens / self.timeline.seconds

    @property
    def misfits(self) -> list[str]:
        """What does not fit the machine, in words."""
        h = self.hardware
        room = {Tier.DEVICE: h.device_memory, Tier.HOST: h.host_memory, Tier.DISK: h.disk}
        return [
            f"{tier.value}: {self.peak_bytes[tier] / 1e9:.1f} GB of {room[tier] / 1e9:.1f} GB"
            for tier in Tier
            if self.peak_bytes[tier] > room[tier]
        ]

    def to_json(self) -> dict[str, Any]:
        """All figures but the spans."""
        name, seconds = bound(self.lower_bound)
        return {
            "policy": self.policy.to_json(),
            "hardware": self.hardware.name,
            "schedule": self.schedule,
            "placement": {kind: placed.to_json() for kind, placed in self.placement.items()},
            "predicted": {
                "tokens_per_second": self.tokens_per_second,
                "seconds": self.timeline.seconds,
                "prefill_seconds": self.prefill_seconds,
                "decode_seconds": self.timeline.seconds - self.prefill_seconds,
                "streams": self.timeline.summary(),
            },
            "peak_bytes": {tier.value: nbytes for tier, nbytes in self.peak_bytes.items()},
            "fits": not self.misfits,
            "bound": name,
            "lower_bound_seconds": seconds,
        }


def plan(
    model: str | OPTConfig,
    policy: Policy | Literal["auto"],
    hardware: Hardware,
    *,
    prompt_len: int,
    gen_len: int,
    schedule: tuple[str, Schedule],
    dtype: str = "bfloat16",
    slots: dict[str, int] | None = None,
) -> Plan:
    """Predicts one full block.

    Args:
        model: A preset, the path of a ``config.json`` (or of a directory that has one), or a
            config.
        policy: ``"auto"``: weights on the device while they fit, then in host memory, then on disk,
            as ``LLM`` has it.
        prompt_len: Tokens of each prompt; padded as a run would.
        schedule: Its name, and the function.
        dtype: Of weights, cache and hidden states, quantisation aside.

    Raises:
        ValueError: a model, lengths or a schedule that cannot be.
    """
    if policy != "auto" and policy.num_stages != 1:
        raise ValueError("not supported yet: num_stages above 1; leave it at 1")
    config = model if isinstance(model, OPTConfig) else config_of(model)
    room = config.max_position_embeddings
    if prompt_len < 1 or gen_len < 1 or prompt_len + gen_len > room:
        raise ValueError(
            f"prompt_len {prompt_len} and gen_len {gen_len} must be at least 1, and together at "
            f"most the model's {room} positions"
        )
    if policy == "auto":
        stored = WeightFormat(dtype).entries(config)
        nbytes = {name: entry.nbytes for name, entry in stored.items()}
        policy = automatic_policy(nbytes, int(hardware.device_memory), int(hardware.host_memory))
    params = SamplingParams(temperature=0.0, max_tokens=gen_len, ignore_eos=True)
    prompt = (0,) * prompt_len
    requests = [Request(i, None, prompt, params) for i in range(policy.block_size)]
    (block,) = make_blocks(
        requests,
        device_batch_size=policy.device_batch_size,
        num_device_batches=policy.num_device_batches,
    )
    group = policy.group_size if policy.weight_bits else None
    form = WeightFormat(dtype, policy.weight_bits, group)
    entries = form.entries(config)
    weights = place_weights({n: e.nbytes for n, e in entries.items()}, policy.weights)
    sizes = block_sizes(
        block, config, form, policy, weights, chunk_positions=DiskContext().chunk_positions
    )
    workload = dataclasses.replace(block.workload(len(config.units), slots), sizes=sizes)
    name, order = schedule
    ops: Iterable[Any] = (order if policy.overlap else serialized(order))(workload)
    costs = CostModel(workload, hardware)
    return Plan(
        policy=policy,
        hardware=hardware,
        schedule=name,
        workload=workload,
        placement={
            "weights": weights,
            "cache": place_cache(block, config, dtype, policy),
            "hidden": place_hidden(block, config, dtype, policy.hidden),
        },
        timeline=simulate(ops, workload, hardware),
        peak_bytes=costs.peak_nbytes(),
        lower_bound=costs.lower_bound(),
    )


def config_of(model: str) -> OPTConfig:
    """The config of a preset, a file or a directory.

    Raises:
        ConfigError: none of these.
    """
    return OPTConfig.load(Path(model)) if os.path.exists(model) else OPTConfig.preset(model)
