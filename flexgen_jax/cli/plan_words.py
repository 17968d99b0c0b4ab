"""A plan in words: first what a person asks, in full phrases, then the details."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexgen_jax.planning.answer import Answer
    from flexgen_jax.planning.forecast import Forecast
    from flexgen_jax.planning.plan_tables import PlanRow
    from flexgen_jax.planning.plans import Plan

_PLACES = {"device": "on the device", "host": "in host memory", "disk": "on disk"}
_KINDS = {"weights": "weights", "cache": "KV cache", "hidden": "hidden states"}
_DOES = {
    "disk to host": "reading from disk",
    "host to disk": "writing to disk",
    "host to device": "the link from host memory to the device",
    "device to host": "the link from the device to host memory",
    "stage to stage": "the link from stage to stage",
    "device compute": "the arithmetic of the device",
    "host compute": "the arithmetic of the host",
    "load weights": "loading weights",
    "load cache": "loading the KV cache",
    "store cache": "storing the KV cache",
    "load hidden": "loading hidden states",
    "store hidden": "storing hidden states",
    "hand over": "handing over between stages",
    "compute": "computing, by turns on the device and on the host",
}
_OPTIONS = {
    "weight_bits": "--weight-bits 4",
    "cache_bits": "--cache-bits 4",
    "host_attention": "--host-attention",
}


def answered(found: Plan) -> list[str]:
    """Does it fit and where, how fast is it, what limits it, what would help: a line each."""
    from flexgen_jax.planning.answer import ALLOWED_BY

    answer, job = found.answer, found.job
    lines = [_fits(answer)]
    outputs = f"{job.gen_len} new ones"
    if found.expected:
        expected = found.expected[0]
        outputs = f"{expected.tokens / expected.requests:.1f} new ones on average"
    lines.append(
        f"Speed: {_rate(answer.tokens_per_second)} tokens/s; {answer.requests:,} prompts of "
        f"{job.prompt_len} tokens with {outputs} take {duration(answer.seconds)}."
    )
    lines.append(
        f"Limited by: {_does(answer.limit)} ({answer.limit}), busy {answer.share:.0%} of the time."
    )
    helps = []
    if answer.to_allow is not None:
        name, times = answer.to_allow
        # Which also goes with a policy that is given, where --allow has nothing to do.
        option = _OPTIONS[ALLOWED_BY[name]]
        helps.append(f"to allow, {name} ({option}): {times:.2f} times as fast")
    if answer.to_buy is not None:
        name, times = answer.to_buy
        helps.append(f"to buy, {name}: {times:.2f} times as fast")
    lines.append(f"What would help most: {'; '.join(helps) or 'nothing that was tried'}.")
    return lines


def _fits(answer: Answer) -> str:
    if not answer.fits:
        short = " and ".join(
            f"{nbytes / 1e9:.1f} GB of {tier if tier in ('memory', 'disk') else f'{tier} memory'}"
            for tier, nbytes in answer.short_bytes.items()
        )
        return (
            f"It does not fit: {short} are missing. Give smaller blocks or another split, or "
            "--policy auto, which looks for one that fits."
        )
    return (
        "It fits: "
        + "; ".join(
            f"{_KINDS[kind]} {_where(shares)}"
            for kind, shares in answer.where.items()
            if kind in _KINDS
        )
        + "."
    )


def _where(shares: dict[str, float]) -> str:
    if len(shares) == 1:
        return _PLACES[next(iter(shares))]
    parts = [f"{share:.0f}% {_PLACES[tier]}" for tier, share in shares.items()]
    return ", ".join(parts[:-1]) + " and " + parts[-1]


def _does(limit: str) -> str:
    kind, of, where = limit.partition(" of ")
    return f"{_DOES.get(kind, kind)}{of}{where}"


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def duration(seconds: float) -> str:
    """In the unit that a person would take."""
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds" if seconds >= 1 else f"{seconds:.2f} seconds"


def compared(found: list[tuple[str, PlanRow]]) -> str:
    """A table with a row for each machine, by the name that it was given."""
    from flexgen_jax.planning.plan_tables import in_short, ratios_to_first

    rows = []
    for (name, row), ratio in zip(found, ratios_to_first([r for _, r in found]), strict=True):
        if row.plan is None or ratio is None:
            rows.append([name, "no", "-", "-", "-", row.reason or ""])
            continue
        answer = row.plan.answer
        rows.append(
            [
                name,
                "yes",
                _rate(answer.tokens_per_second),
                f"{ratio:.3g}",
                f"{answer.limit}, {answer.share:.0%}",
                in_short(row.plan),
            ]
        )
    head = ["machine", "fits", "tokens/s", "ratio", "limited by", "policy (device/host/disk in %)"]
    return table(head, rows)


def swept(rows: list[PlanRow]) -> str:
    """A table with a row for each pair of lengths."""
    from flexgen_jax.planning.plan_tables import in_short

    lines = []
    for row in rows:
        lengths = [str(row.prompt_len), str(row.gen_len)]
        if row.plan is None or row.tokens_per_second is None:
            lines.append([*lengths, "-", "-", f"does not fit: {row.reason}"])
            continue
        answer = row.plan.answer
        rate, limit = _rate(answer.tokens_per_second), f"{answer.limit}, {answer.share:.0%}"
        lines.append([*lengths, rate, limit, in_short(row.plan)])
    head = ["prompt", "new", "tokens/s", "limited by", "block (device/host/disk in %)"]
    return table(head, lines)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as they need to be, the last one as it is."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _stages(found: Plan) -> str:
    parts = []
    for number, stage in enumerate(found.stages):
        shares = ""
        if "busy" in stage:
            shares = f", computing {stage['busy']:.0%}, bubbles {stage['bubble']:.0%}"
        first, count = stage["first_layer"], stage["num_layers"]
        parts.append(f"  stage {number}: layers {first} to {first + count - 1}{shares}")
    groups = len(found.workload.groups())
    head = f"{found.workload.num_stages} stages, the batches in {groups} groups:"
    return "\n".join([head, *parts])


def _expected(forecasts: tuple[Forecast, ...]) -> str:
    first = forecasts[0]
    mean = first.tokens / first.requests
    lines = [f"expected of {first.requests} requests with {mean:.1f} new tokens on average:"]
    for found in forecasts:
        lines.append(
            f"  with{'' if found.refill else 'out'} refill {found.tokens_per_second:.2f} tokens/s, "
            f"{found.seconds:.1f} s; {found.occupancy:.0%} of the computed rows are of use, and "
            f"the {found.passes} passes over the weights are {found.passes_over_ideal:.2f} times "
            "those of ideal refill"
        )
    return "\n".join(lines)


def described(found: Plan) -> str:
    """All of it, for a person."""
    from flexgen_jax.planning.planner import described as where
    from scheduling.cost_model import bound

    policy = found.policy
    name, least = bound(found.lower_bound)
    seconds = found.seconds
    peak = ", ".join(f"{t.value} {n / 1e9:.1f} GB" for t, n in found.peak_bytes.items())
    peak += f"; computing takes {found.workspace_bytes / 1e9:.2f} GB of the device on top"
    memory = found.memory
    whole = f"{memory.host_bytes / 1e9:.2f} GB, of them {memory.runtime_bytes / 1e9:.2f} GB for "
    whole += "Python, its libraries and compiled programs"
    if not memory.shared:
        whole += f"; the device holds {memory.device_bytes / 1e9:.2f} GB"
    rate, prefill = found.tokens_per_second, found.prefill_seconds
    shape = f"{policy.device_batch_size} x {policy.num_device_batches}"
    times = (
        f"{seconds:.1f} s, of which prefill {prefill:.1f} s and decode {seconds - prefill:.1f} s"
    )
    floor = f"no schedule of this block takes less than {least:.1f} s ({name})"
    answers = answered(found)
    first = len(answers) + 1
    lines = [
        *answers,
        "",
        f"on {found.hardware.name}",
        f"block of {shape}, schedule {found.schedule}",
        *where(found.placement),
        f"predicted: {rate:.2f} tokens/s; {times}",
        f"{floor}: {least / seconds:.0%} of the prediction",
        f"peak: {peak}",
        f"resident memory of the process: {whole}",
    ]
    if found.expected:
        lines.insert(-3, _expected(found.expected))
    if policy.num_stages > 1:
        lines.insert(first + 2, _stages(found))
    if found.why:
        lines.insert(first + 2, f"chosen: {found.why}")
    helps = [f"{name} ({gain:.2f} x)" for name, gain in found.would_help.items()]
    if helps:
        lines.append("what would help: " + ", ".join(helps[:4]))
    if found.misfits:
        lines.append("does not fit: " + "; ".join(found.misfits))
    return "\n".join(lines)
