"""The commands that predict: ``plan`` and ``simulate``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from flexgen_jax.cli.failures import Failure, plain_errors, say
from flexgen_jax.cli.llm_options import lengths_option
from flexgen_jax.cli.pictures import write_pictures
from flexgen_jax.cli.plan_options import arguments, plan_options, planned

if TYPE_CHECKING:
    from flexgen_jax.planning.plans import Plan
    from scheduling.timeline import Timeline


def _lengths(context: click.Context, option: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise click.BadParameter(f"expected positive numbers such as 32,128,512, got {text!r}")
    return tuple(dict.fromkeys(found))


@click.command()
@plan_options(required=False)
@lengths_option
@click.option(
    "--requests",
    type=click.IntRange(min=1),
    help="How many prompts the job has: its time is told, and blocks are no larger than it. "
    "[default: a long job, and the time of 1,000 prompts]",
)
@click.option(
    "--compare-hardware",
    "comparing",
    is_flag=True,
    help="Compare the machines that are listed after it, presets or files as --hardware takes "
    "them: a row for each.",
)
@click.option(
    "--sweep",
    is_flag=True,
    help="Plan for several lengths of prompts and outputs: a row for each pair that the model has "
    "positions for.",
)
@click.option(
    "--sweep-prompt-lens",
    callback=_lengths,
    default="32,128,512,2048",
    show_default=True,
    metavar="N,N,...",
    help="Lengths of prompts for --sweep.",
)
@click.option(
    "--sweep-gen-lens",
    callback=_lengths,
    default="32,128,512",
    show_default=True,
    metavar="N,N,...",
    help="Numbers of new tokens for --sweep.",
)
@click.argument("machines", nargs=-1, metavar="[MACHINE]...")
@click.pass_context
def plan(context: click.Context, /, **options: Any) -> None:
    """Predict a block: does it fit, how fast is it, what limits it, what would help.

    Needs neither weights nor an accelerator. The first lines answer, the others have the details.

    \b
    flexgen-jax plan --model facebook/opt-30b --hardware t4 --prompt-len 512
    flexgen-jax plan --model facebook/opt-30b --prompt-len 512 --compare-hardware t4 h200 mine.json
    flexgen-jax plan --model facebook/opt-30b --hardware t4 --sweep
    """
    with plain_errors():
        given = {
            name
            for name in options
            if context.get_parameter_source(name) not in (None, ParameterSource.DEFAULT)
        }
        _check(options, given)
        if options["comparing"]:
            _compare(options)
        elif options["sweep"]:
            _sweep(options)
        else:
            _one(options)


def _check(options: dict[str, Any], given: set[str]) -> None:
    """Refuses options that do not go together, and says what to give.

    Args:
        given: The names of those that were.
    """
    comparing, sweep, machines = options["comparing"], options["sweep"], options["machines"]
    if machines and not comparing:
        raise Failure(
            f"{machines[0]!r} is not an option: machines are listed after --compare-hardware, and "
            "one alone is given as --hardware NAME"
        )
    if comparing and not machines:
        raise Failure("--compare-hardware: list machines after it, such as t4 h200 mine.json")
    if comparing and sweep:
        raise Failure(
            "--compare-hardware and --sweep exclude each other: compare machines at one "
            "--prompt-len, or sweep lengths on one --hardware"
        )
    if comparing and "hardware" in given:
        raise Failure("--hardware: with --compare-hardware list all machines after that")
    if not comparing and "hardware" not in given:
        raise Failure("give --hardware NAME|FILE, or --compare-hardware and several of them")
    if sweep and (names := {"prompt_len", "gen_len"} & given):
        option = "--" + sorted(names)[0].replace("_", "-")
        raise Failure(f"{option}: with --sweep give --sweep-prompt-lens and --sweep-gen-lens")
    if not sweep and "prompt_len" not in given:
        raise Failure("give --prompt-len N, or --sweep for several")
    if not sweep and (names := {"sweep_prompt_lens", "sweep_gen_lens"} & given):
        option = "--" + sorted(names)[0].replace("_", "-")
        raise Failure(f"{option} goes with --sweep: add that, or leave it out")
    if sweep and "lengths" in given:
        raise Failure("--lengths are of one --gen-len: leave them or --sweep out")
    if (comparing or sweep) and (options["trace"] or options["plot"]):
        which = "--sweep" if sweep else "--compare-hardware"
        raise Failure(f"--trace and --plot show one plan: leave them or {which} out")


def _one(options: dict[str, Any]) -> None:
    from flexgen_jax.cli.plan_words import described
    from flexgen_jax.planning.remedies import DoesNotFitError

    try:
        found = planned(options, help_wanted=True, requests=options["requests"])
    except DoesNotFitError as error:
        if options["as_json"]:
            click.echo(json.dumps(error.to_json(), indent=2, allow_nan=False))
        raise
    if options["trace"] or options["plot"]:
        write_pictures([found.timeline], options["trace"], options["plot"], say)
    if options["as_json"]:
        click.echo(json.dumps(found.to_json(), indent=2, allow_nan=False))
    else:
        click.echo(described(found))


def _compare(options: dict[str, Any]) -> None:
    from flexgen_jax import progress
    from flexgen_jax.cli.plan_words import compared
    from flexgen_jax.planning.plan_tables import plan_machines, ratios_to_first
    from scheduling.hardware import Hardware

    names = options["machines"]
    machines = [Hardware.load(name) for name in names]
    asked = arguments(options)
    with progress.count(len(names), "planning", "machines", quiet=options["as_json"]) as bar:
        rows = plan_machines(
            hardware=machines,
            prompt_len=options["prompt_len"],
            gen_len=options["gen_len"],
            requests=options["requests"],
            on_plan=bar,
            **asked,
        )
    found = list(zip(names, rows, strict=True))
    if not options["as_json"]:
        click.echo(compared(found))
        return
    ratios = ratios_to_first(rows)
    table = [
        {"machine": name, **row.to_json(), "ratio": ratio}
        for (name, row), ratio in zip(found, ratios, strict=True)
    ]
    click.echo(json.dumps({"machines": table}, indent=2, allow_nan=False))


def _sweep(options: dict[str, Any]) -> None:
    from flexgen_jax import progress
    from flexgen_jax.cli.plan_words import swept
    from flexgen_jax.planning.plan_tables import pairs_within, plan_sweep
    from scheduling.hardware import Hardware

    prompts, news = options["sweep_prompt_lens"], options["sweep_gen_lens"]
    pairs = pairs_within(options["model"], prompts, news)
    left_out = [[p, n] for p in prompts for n in news if (p, n) not in pairs]
    hardware, asked = Hardware.load(options["hardware"]), arguments(options)
    del asked["lengths"]
    with progress.count(len(pairs), "planning", "plans", quiet=options["as_json"]) as bar:
        rows = plan_sweep(
            hardware=hardware,
            prompt_lens=prompts,
            gen_lens=news,
            requests=options["requests"],
            on_plan=bar,
            **asked,
        )
    if options["as_json"]:
        table = {"sweep": [row.to_json() for row in rows], "left_out": left_out}
        click.echo(json.dumps(table, indent=2, allow_nan=False))
        return
    click.echo(swept(rows))
    if left_out:
        pairs_left = ", ".join(f"{p} + {n}" for p, n in left_out)
        click.echo(f"left out, beyond the model's positions: {pairs_left}")


@click.command()
@plan_options(required=True)
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
            plans.append(planned({**options, "schedule": name}, policy=policy))
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
