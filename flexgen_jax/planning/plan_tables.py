"""Plans side by side: of several machines, or of several lengths of prompts and outputs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from flexgen_jax.arguments import expect, expect_callable
from flexgen_jax.models.family import Config
from flexgen_jax.planning.plans import Plan, config_of, plan
from scheduling.hardware import Hardware
from scheduling.policy import Policy, Tier
from scheduling.search import NothingFitsError

PROMPT_LENS, GEN_LENS = (32, 128, 512, 2048), (32, 128, 512)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One plan of several.

    Attributes:
        hardware, prompt_len, gen_len: That it is for.
        plan: None: no policy fits.
        reason: Why not, in words; None: it fits.
    """

    hardware: Hardware
    prompt_len: int
    gen_len: int
    plan: Plan | None
    reason: str | None = None

    @property
    def fits(self) -> bool:
        """Whether the machine has room for it."""
        return self.reason is None

    @property
    def tokens_per_second(self) -> float | None:
        """Predicted; None: it does not fit."""
        return self.plan.answer.tokens_per_second if self.plan is not None and self.fits else None

    def to_json(self) -> dict[str, Any]:
        """Plain values; the plan's figures in short."""
        found: dict[str, Any] = {
            "hardware": self.hardware.name,
            "prompt_len": self.prompt_len,
            "gen_len": self.gen_len,
            "fits": self.fits,
            "reason": self.reason,
            "tokens_per_second": self.tokens_per_second,
        }
        if self.plan is None or not self.fits:
            return {**found, "job": None, "limit": None, "policy": None}
        answer = self.plan.answer.to_json()
        policy = self.plan.policy.to_json()
        return {**found, "job": answer["job"], "limit": answer["limit"], "policy": policy}


def in_short(found: Plan) -> str:
    """A plan's policy in one phrase: the block, percents on device, host and disk, and methods."""
    policy = found.policy
    parts = [f"{policy.device_batch_size} x {policy.num_device_batches}"]
    for kind in ("weights", "cache"):
        shares = "/".join(f"{found.placement[kind].percent(tier):.0f}" for tier in Tier)
        parts.append(f"{kind} {shares}")
    methods = {
        "attention on the host": policy.host_attention,
        f"{policy.weight_bits}-bit weights": policy.weight_bits,
        f"{policy.cache_bits}-bit cache": policy.cache_bits,
        f"attention to {policy.attention_sparsity:.0%}": policy.attention_sparsity < 1,
        "no overlap": not policy.overlap,
        f"{policy.num_stages} stages": policy.num_stages > 1,
    }
    return ", ".join([*parts, *(name for name, used in methods.items() if used)])


def ratios_to_first(rows: Sequence[PlanRow]) -> list[float | None]:
    """How many times as fast each is as the first that fits; None: it does not fit."""
    first = next((row.tokens_per_second for row in rows if row.fits), None) or 1.0
    rates = [row.tokens_per_second for row in rows]
    return [None if rate is None else rate / first for rate in rates]


def plan_machines(
    model: str | os.PathLike[str] | Config,
    policy: Policy | Literal["auto"] = "auto",
    hardware: Sequence[Hardware | str] = (),
    *,
    prompt_len: int,
    gen_len: int,
    on_plan: Callable[[int], None] | None = None,
    **options: Any,
) -> list[PlanRow]:
    """The same plan on several machines: to choose one.

    Args:
        model: As :func:`plan` takes it.
        policy: As :func:`plan` takes it.
        hardware: The machines, as ``plan`` takes one.
        prompt_len: As :func:`plan` takes it.
        gen_len: As :func:`plan` takes it.
        on_plan: Called with 1 after each.
        **options: What else :func:`plan` takes.

    Returns:
        A row for each machine, in this order. Where nothing fits, the row says so.

    Raises:
        ValueError: no machines, or what ``plan`` raises, but for what does not fit.
    """
    expect("hardware", hardware, (list, tuple), "a list of machines")
    if not hardware:
        raise ValueError("hardware must be a list of at least one machine, got none")
    expect_callable("on_plan", on_plan)
    machines = [Hardware.preset(h) if isinstance(h, str) else h for h in hardware]
    asked = [(machine, prompt_len, gen_len) for machine in machines]
    return _rows(model, policy, asked, on_plan, options)


def plan_sweep(
    model: str | os.PathLike[str] | Config,
    policy: Policy | Literal["auto"] = "auto",
    hardware: Hardware | str = "t4",
    *,
    prompt_lens: Iterable[int] = PROMPT_LENS,
    gen_lens: Iterable[int] = GEN_LENS,
    on_plan: Callable[[int], None] | None = None,
    **options: Any,
) -> list[PlanRow]:
    """Plans for each of some lengths of prompts with each of some numbers of new tokens.

    Args:
        model: As :func:`plan` takes it.
        policy: As :func:`plan` takes it.
        hardware: As :func:`plan` takes it.
        prompt_lens: In tokens. Pairs beyond the model's positions are left out.
        gen_lens: In tokens, as the prompts are.
        on_plan: Called with 1 after each.
        **options: What else :func:`plan` takes.

    Returns:
        A row for each pair, prompts first. Where nothing fits, the row says so.

    Raises:
        ValueError: no pair is within the model's positions, or what ``plan`` raises, but for what
            does not fit.
    """
    expect_callable("on_plan", on_plan)
    machine = Hardware.preset(hardware) if isinstance(hardware, str) else hardware
    pairs = pairs_within(model, prompt_lens, gen_lens)
    return _rows(model, policy, [(machine, *pair) for pair in pairs], on_plan, options)


def pairs_within(
    model: str | os.PathLike[str] | Config, prompt_lens: Iterable[int], gen_lens: Iterable[int]
) -> list[tuple[int, int]]:
    """The pairs of lengths that the model has positions for.

    Raises:
        ValueError: none is.
    """
    config = model if isinstance(model, Config) else config_of(model)
    room, news = config.max_position_embeddings, list(gen_lens)
    prompts = list(prompt_lens)
    pairs = [(p, n) for p in prompts for n in news if p + n <= room]
    if not pairs:
        raise ValueError(
            f"prompts of {prompts} tokens with {news} new ones: none of them is within the model's "
            f"{room} positions; give shorter ones"
        )
    return pairs


def _rows(
    model: str | os.PathLike[str] | Config,
    policy: Policy | Literal["auto"],
    asked: Sequence[tuple[Hardware, int, int]],
    on_plan: Callable[[int], None] | None,
    options: dict[str, Any],
) -> list[PlanRow]:
    rows = []
    for machine, prompt_len, gen_len in asked:
        found, reason = None, None
        try:
            found = plan(model, policy, machine, prompt_len=prompt_len, gen_len=gen_len, **options)
            reason = "; ".join(found.misfits) or None
        except NothingFitsError as error:
            reason = str(error)
        rows.append(
            PlanRow(
                hardware=machine,
                prompt_len=prompt_len,
                gen_len=gen_len,
                plan=found,
                reason=reason,
            )
        )
        if on_plan is not None:
            on_plan(1)
    return rows
