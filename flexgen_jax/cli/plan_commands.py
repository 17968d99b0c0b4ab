"""The commands that predict: ``plan`` and ``simulate``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flexgen_jax.cli.failures import Failure, plain_errors, say
from flexgen_jax.cli.llm_options import DTYPES, lengths_option, schedule_option
from flexgen_jax.cli.pictures import check_pictures, check_replaceable, force_option, write_pictures
from flexgen_jax.cli.policy_options import NAMES, allowed, policy_options, read_policy

if TYPE_CHECKING:
    from flexgen_jax.planning.forecast import Forecast
    from flexgen_jax.planning.plans import Plan
    from scheduling.hardware import Hardware
    from scheduling.policy import Policy
    from scheduling.timeline import Timeline

_BEFORE = [
    click.option(
        "--model", required=True, help="A preset, or a config.json or directory that has one."
    ),
    click.option("--prompt-len", type=int, required=True, help="Tokens of each prompt."),
    click.option(
        "--gen-len",
        "--max-tokens",
        type=int,
        default=32,
        show_default=True,
        help="How many new tokens each prompt gets.",
    ),
    click.option(
        "--hardware",
        required=True,
        metavar="NAME|FILE",
        help="The machine: a preset (t4, laptop, h200), or a JSON file of 'profile'.",
    ),
    click.option(
        "--hosts",
        "num_hosts",
        type=int,
        default=1,
        show_default=True,
        help="How many machines like --hardware the stages are spread over.",
    ),
]
_AFTER = [
    schedule_option,
    click.option(
        "--dtype",
        type=DTYPES,
        default="auto",
        show_default=True,
        help="Dtype of the computation. auto: the model's; bfloat16 for a preset.",
    ),
    click.option(
        "--trace",
        type=click.Path(path_type=Path),
        help="Write a Perfetto trace to this file. [default: none]",
    ),
    click.option(
        "--plot",
        type=click.Path(path_type=Path),
        help="Draw the timeline to this file (.png, .svg). [default: none]",
    ),
    force_option,
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
@lengths_option
def plan(**options: Any) -> None:
    """Predict a block: placement, time and memory, without weights or an accelerator."""
    with plain_errors():
        found = _plan(options, help_wanted=True)
        if options["trace"] or options["plot"]:
            write_pictures([found.timeline], options["trace"], options["plot"], say)
        if options["as_json"]:
            click.echo(json.dumps(found.to_json(), indent=2, allow_nan=False))
        else:
            click.echo(_described(found))


@click.command()
@_options
@lengths_option
@click.option(
    "--requests",
    type=click.IntRange(min=1),
    help="With --lengths: of the job that is simulated. [default: four blocks' worth]",
)
@click.option(
    "--compare",
    "others",
    multiple=True,
    metavar="SCHEDULE",
    help="Simulate this schedule as well, named as --schedule names it, and draw them under each "
    "other; repeatable. [default: none]",
)
def simulate(others: tuple[str, ...], requests: int | None, **options: Any) -> None:
    """Run a schedule on paper: how long each stream works in a block, and a picture of it.

    With --lengths a whole job is simulated: rows are refilled as their requests end.
    """
    with plain_errors():
        if requests is not None and options["lengths"] is None:
            raise Failure("--requests goes with --lengths: without them, one block is simulated")
        names = dict.fromkeys((options["schedule"], *others))
        plans: list[Plan] = []
        for name in names:
            # The others run with the policy of the first, also where that was searched for.
            policy = plans[0].policy if plans else None
            plans.append(_plan({**options, "schedule": name}, policy=policy))
        lengths = options["lengths"]
        runs = [_simulated(found, lengths, requests) for found in plans]
        timelines = [run.timeline for run in runs]
        if options["trace"] or options["plot"]:
            write_pictures(timelines, options["trace"], options["plot"], say)
        if options["as_json"]:
            click.echo(json.dumps([run.to_json() for run in runs], indent=2, allow_nan=False))
            return
        for run in runs:
            click.echo("\n".join(run.lines()))


@dataclasses.dataclass(frozen=True)
class _Simulated:
    """What a schedule takes: of a block, or of a job whose rows are refilled."""

    schedule: str
    timeline: Timeline
    tokens: int
    peak_bytes: dict[str, int]
    job: dict[str, Any]

    @property
    def rate(self) -> float:
        return self.tokens / self.timeline.seconds

    def to_json(self) -> dict[str, Any]:
        return {
            "schedule": self.schedule,
            "seconds": self.timeline.seconds,
            "tokens_per_second": self.rate,
            **self.job,
            "peak_bytes": self.peak_bytes,
            "streams": self.timeline.summary(),
        }

    def lines(self) -> list[str]:
        peak = ", ".join(
            f"{tier} {nbytes / 1e9:.1f} GB" for tier, nbytes in self.peak_bytes.items()
        )
        took = f"{self.timeline.seconds:.2f} s, {self.rate:.2f} tokens/s"
        lines = [f"{self.schedule}: {took}; peak: {peak}"]
        if self.job:
            lines.append(
                f"  {self.job['requests']} requests with {self.tokens} new tokens; "
                f"{self.job['occupancy']:.0%} of the computed rows are of use, and the "
                f"{self.job['passes']} passes over the weights are "
                f"{self.job['passes_over_ideal']:.2f} times those of ideal refill"
            )
        return lines + _streams(self.timeline)


def _simulated(found: Plan, lengths: Path | None, requests: int | None) -> _Simulated:
    peak = {tier.value: nbytes for tier, nbytes in found.peak_bytes.items()}
    if lengths is None:
        return _Simulated(found.schedule, found.timeline, found.generated_tokens, peak, {})
    job = found.simulate_job(lengths, requests)
    return _Simulated(found.schedule, job.timeline, job.tokens, peak, job.to_json())


def _streams(timeline: Timeline) -> list[str]:
    lines = []
    for stream, figures in timeline.summary().items():
        waits = [
            f"{reason} {seconds:.2f} s"
            for reason, seconds in figures["waited_seconds"].items()
            if seconds > 0.01 * timeline.seconds
        ]
        waited = f"; waited for {', '.join(waits)}" if waits else ""
        lines.append(
            f"  {stream:13s} {figures['busy_seconds']:10.2f} s  {figures['share']:6.1%}{waited}"
        )
    return lines


@click.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="The JSON file to write. [default: where 'auto' looks for this machine's]",
)
@click.option(
    "--calibrate",
    "reports",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="REPORT",
    help="Do not measure, but fit the figures to a run: a file with what 'generate --json' "
    "printed. "
    "Repeatable. [default: none]",
)
@click.option(
    "--hardware",
    "start",
    metavar="NAME|FILE",
    help="The machine whose figures are fitted. [default: this machine]",
)
@click.option(
    "--offload-dir",
    type=click.Path(path_type=Path),
    default=Path(),
    help="A directory on the disk to measure. [default: the current directory]",
)
@click.option(
    "--dtype",
    type=DTYPES,
    default="auto",
    show_default=True,
    help="Dtype of the computation. auto: bfloat16.",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="How many times each figure is measured.",
)
@force_option
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON on stdout too.")
def profile(
    output: Path | None,
    reports: tuple[Path, ...],
    start: str | None,
    offload_dir: Path,
    dtype: str,
    repeats: int,
    force: bool,
    as_json: bool,
) -> None:
    """Measure this machine: disk, links, arithmetic, memory. Takes about a minute.

    Runs on this machine use what it keeps, for --policy auto and for predictions.
    """
    with plain_errors():
        from flexgen_jax.machine.kept_programs import keep_programs
        from flexgen_jax.machine.profile import profile as measure
        from flexgen_jax.machine.this_machine import profile_path, save, this_machine
        from flexgen_jax.weights.checkpoint import dtype_of_model
        from scheduling.hardware import Hardware

        keep_programs()
        dtype = dtype_of_model("", dtype)
        path = output or profile_path(dtype)
        if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
            raise Failure(f"cannot write {output}: it is a directory, or its directory is missing")
        if output is not None:
            check_replaceable(output, _is_profile, force=force)
        if reports:
            known = Hardware.load(start) if start else this_machine(dtype)
            hardware = _calibrated(known, reports)
        elif start:
            raise Failure("--hardware goes with --calibrate: measuring starts from nothing")
        else:
            hardware = measure(offload_dir, dtype=dtype, repeats=repeats, say=say)
        save(hardware, path)
        say(f"{hardware.name}: {path}")
        if as_json:
            click.echo(json.dumps(hardware.to_json(), indent=2, allow_nan=False))


def _is_profile(path: Path) -> bool:
    from scheduling.hardware import Hardware

    try:
        Hardware.load(str(path))
    except (ValueError, OSError):
        return False
    return True


def _calibrated(hardware: Hardware, reports: tuple[Path, ...]) -> Hardware:
    from scheduling.calibrate import Observation, calibrated, factors
    from storage.json_text import read_json

    rows = []
    for path in reports:
        try:
            values = read_json(path)
            rows += [Observation.from_json(row) for row in values["observations"]]
            predicted_for = values["hardware"]
        except OSError as error:
            raise Failure(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise Failure(
                f"{path} is not a report: expected what 'generate --json' prints ({error})"
            ) from error
        if predicted_for != hardware.name:
            raise Failure(
                f"{path} was predicted for {predicted_for!r}, not for {hardware.name!r}: "
                "give that with --hardware"
            )
    for name, factor in factors(rows).items():
        say(f"{name}: {factor:.2f} times as long as predicted")
    return calibrated(hardware, rows)


def _plan(
    options: dict[str, Any], *, policy: Policy | None = None, help_wanted: bool = False
) -> Plan:
    """What the options ask for.

    Args:
        policy: Instead of theirs.
    """
    from flexgen_jax.planning.plans import plan
    from scheduling.hardware import Hardware

    chosen, changes = read_policy({name: options[name] for name in NAMES})
    allow = allowed(options["allow"])
    if policy is not None:
        chosen, changes, allow = policy, {}, ()
    elif chosen != "auto":
        if allow:
            raise Failure("--allow is for --policy auto: it searches; --percent says it all")
        chosen, changes = dataclasses.replace(chosen, **changes), {}
    check_pictures(options["trace"], options["plot"], force=options["force"])
    return plan(
        options["model"],
        chosen,
        Hardware.load(options["hardware"]),
        prompt_len=options["prompt_len"],
        gen_len=options["gen_len"],
        schedule=options["schedule"],
        dtype=options["dtype"],
        fixed=changes,
        allow=allow,
        help_wanted=help_wanted,
        num_hosts=options["num_hosts"],
        lengths=options.get("lengths"),
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


def _described(found: Plan) -> str:
    from flexgen_jax.planning.planner import described
    from scheduling.cost_model import bound

    policy = found.policy
    name, least = bound(found.lower_bound)
    seconds = found.seconds
    peak = ", ".join(f"{t.value} {n / 1e9:.1f} GB" for t, n in found.peak_bytes.items())
    peak += f"; computing takes {found.workspace_bytes / 1e9:.2f} GB of the device on top"
    rate, prefill = found.tokens_per_second, found.prefill_seconds
    shape = f"{policy.device_batch_size} x {policy.num_device_batches}"
    times = (
        f"{seconds:.1f} s, of which prefill {prefill:.1f} s and decode {seconds - prefill:.1f} s"
    )
    floor = f"no schedule of this block takes less than {least:.1f} s ({name})"
    lines = [
        f"on {found.hardware.name}",
        f"block of {shape}, schedule {found.schedule}",
        *described(found.placement),
        f"predicted: {rate:.2f} tokens/s; {times}",
        f"{floor}: {least / seconds:.0%} of the prediction",
        f"peak: {peak}",
    ]
    if found.expected:
        lines.insert(-2, _expected(found.expected))
    if policy.num_stages > 1:
        lines.insert(2, _stages(found))
    if found.why:
        lines.insert(2, f"chosen: {found.why}")
    helps = [f"{name} ({gain:.2f} x)" for name, gain in found.would_help.items()]
    if helps:
        lines.append("what would help: " + ", ".join(helps[:4]))
    if found.misfits:
        lines.append("does not fit: " + "; ".join(found.misfits))
    return "\n".join(lines)
