"""The commands that predict: ``plan`` and ``simulate``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flexgen_jax.cli_errors import Failure, plain_errors, say
from flexgen_jax.llm_options import DTYPES
from flexgen_jax.pictures import check_pictures, write_pictures
from flexgen_jax.policy_options import NAMES, policy_options, read_policy

if TYPE_CHECKING:
    from flexgen_jax.planning import Plan

_BEFORE = [
    click.option(
        "--model", required=True, help="A preset, or a config.json or directory that has one."
    ),
    click.option("--prompt-len", type=int, required=True, help="Tokens of each prompt."),
    click.option("--gen-len", "--max-tokens", type=int, default=32, show_default=True),
    click.option(
        "--hardware",
        required=True,
        metavar="NAME|FILE",
        help="A preset (t4, laptop, h200), or a JSON file.",
    ),
]
_AFTER = [
    click.option("--schedule", default="zigzag", show_default=True),
    click.option("--dtype", type=DTYPES, default="bfloat16", show_default=True),
    click.option("--trace", type=click.Path(path_type=Path), help="Write a Perfetto trace here."),
    click.option("--plot", type=click.Path(path_type=Path), help="Draw the timeline (PNG, SVG)."),
    click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON on stdout."),
]


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_AFTER):
        command = option(command)
    command = policy_options(command)
    for option in reversed(_BEFORE):
        command = option(command)
    return command


@click.command()
@_options
def plan(**options: Any) -> None:
    """Predict a block: placement, time and memory, without weights or an accelerator."""
    with plain_errors():
        found = _plan(options)
        if options["as_json"]:
            click.echo(json.dumps(found.to_json(), indent=2))
        else:
            click.echo(_described(found))


@click.command()
@_options
def simulate(**options: Any) -> None:
    """Run a schedule on paper: how long each stream works in a block, and a picture of it."""
    with plain_errors():
        found = _plan(options)
        summary = found.timeline.summary()
        if options["as_json"]:
            click.echo(json.dumps({"seconds": found.timeline.seconds, "streams": summary}))
            return
        click.echo(f"{found.schedule}: {found.timeline.seconds:.2f} s")
        for stream, figures in summary.items():
            share = figures["busy_seconds"] / found.timeline.seconds
            click.echo(f"  {stream:13s} {figures['busy_seconds']:10.2f} s  {share:6.1%}")


@click.command()
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The JSON to write."
)
@click.option(
    "--offload-dir",
    type=click.Path(path_type=Path),
    default=Path(),
    help="On the disk to measure. [default: the current directory]",
)
@click.option("--dtype", type=DTYPES, default="bfloat16", show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON on stdout too.")
def profile(output: Path, offload_dir: Path, dtype: str, repeats: int, as_json: bool) -> None:
    """Measure this machine: disk, links, arithmetic, memory. Takes about a minute."""
    with plain_errors():
        from flexgen_jax.profile import profile as measure

        if output.is_dir() or not output.absolute().parent.is_dir():
            raise Failure(f"cannot write {output}: it is a directory, or its directory is missing")
        hardware = measure(offload_dir, dtype=dtype, repeats=repeats, say=say)
        text = json.dumps(hardware.to_json(), indent=2)
        output.write_text(text + "\n", encoding="utf-8")
        say(f"{hardware.name}: {output}")
        if as_json:
            click.echo(text)


def _plan(options: dict[str, Any]) -> Plan:
    import dataclasses

    from flexgen_jax.planning import plan
    from scheduling.hardware import Hardware
    from scheduling.schedules import SCHEDULES

    policy, changes = read_policy({name: options[name] for name in NAMES})
    if policy != "auto":
        policy = dataclasses.replace(policy, **changes)
    elif changes:
        raise Failure("give --percent or --policy FILE beside what changes a policy")
    name = options["schedule"]
    if name not in SCHEDULES:
        raise Failure(f"no schedule {name!r}; known: {', '.join(sorted(SCHEDULES))}")
    check_pictures(options["trace"], options["plot"])
    found = plan(
        options["model"],
        policy,
        Hardware.load(options["hardware"]),
        prompt_len=options["prompt_len"],
        gen_len=options["gen_len"],
        schedule=(name, SCHEDULES[name]),
        dtype=options["dtype"],
    )
    write_pictures([found.timeline], options["trace"], options["plot"], say)
    return found


def _described(found: Plan) -> str:
    from scheduling.cost_model import bound

    policy = found.policy
    name, least = bound(found.lower_bound)
    seconds = found.timeline.seconds
    peak = ", ".join(f"{t.value} {n / 1e9:.1f} GB" for t, n in found.peak_bytes.items())
    rate, prefill = found.tokens_per_second, found.prefill_seconds
    shape = f"{policy.device_batch_size} x {policy.num_device_batches}"
    times = (
        f"{seconds:.1f} s, of which prefill {prefill:.1f} s and decode {seconds - prefill:.1f} s"
    )
    floor = f"no schedule of this block takes less than {least:.1f} s ({name})"
    lines = [
        f"on {found.hardware.name}",
        f"block of {shape}, schedule {found.schedule}",
        *(placed.describe(kind) for kind, placed in found.placement.items() if placed.cells),
        f"predicted: {rate:.2f} tokens/s; {times}",
        f"{floor}: {least / seconds:.0%} of the prediction",
        f"peak: {peak}",
    ]
    if found.misfits:
        lines.append("does not fit: " + "; ".join(found.misfits))
    return "\n".join(lines)
