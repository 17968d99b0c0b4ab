"""The options that ``plan`` and ``simulate`` share, and the plan that they ask for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flexgen_jax.cli.failures import Failure
from flexgen_jax.cli.llm_options import DTYPES, schedule_option
from flexgen_jax.cli.pictures import check_pictures, force_option
from flexgen_jax.cli.policy_options import NAMES, allowed, named, policy_options, read_policy
from flexgen_jax.cli.slot_options import slot_options, slots_of

if TYPE_CHECKING:
    from flexgen_jax.planning.plans import Plan
    from scheduling.policy import Policy


_UNLESS = " [default: none; required unless {} is given]"


def _before(required: bool) -> list[Callable[..., Any]]:
    """Options of the block.

    Args:
        required: Whether there is always one block on one machine.
    """
    return [
        click.option(
            "--model",
            required=True,
            help="A preset, in the codes that it is published in unless --weight-bits is given; "
            "or a config.json, or a directory that has one.",
        ),
        click.option(
            "--prompt-len",
            type=int,
            required=required,
            help="Tokens of each prompt." + ("" if required else _UNLESS.format("--sweep")),
        ),
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
            required=required,
            metavar="NAME|FILE",
            help="The machine: a preset (t4, a5000, h200, laptop), or a JSON file of 'profile'."
            + ("" if required else _UNLESS.format("--compare-hardware")),
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


_AFTER: list[Callable[..., Any]] = [
    schedule_option,
    slot_options,
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


def plan_options(*, required: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds the options; :func:`planned` makes a plan of their values.

    Args:
        required: Whether there is always one block on one machine.
    """

    def added(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(_AFTER):
            command = option(command)
        command = policy_options(command)
        for option in reversed(_before(required)):
            command = option(command)
        return command

    return added


def arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Of ``fg.plan``: all but the machine and the lengths of prompts and outputs.

    Raises:
        ValueError: options that exclude each other.
    """
    chosen, changes = read_policy({name: options[name] for name in NAMES})
    allow, forbid = allowed(options["allow"]), named(options["forbid"])
    if chosen != "auto":
        for name in [name for name in ("allow", "forbid") if options[name]]:
            raise Failure(f"--{name} is for --policy auto: it searches; --percent says it all")
        chosen, changes = dataclasses.replace(chosen, **changes), {}
    return {
        "model": options["model"],
        "policy": chosen,
        "schedule": options["schedule"],
        "slots": slots_of(options),
        "dtype": options["dtype"],
        "fixed": changes,
        "allow": allow,
        "forbid": forbid,
        "num_hosts": options["num_hosts"],
        "lengths": options.get("lengths"),
    }


def planned(
    options: dict[str, Any],
    *,
    policy: Policy | None = None,
    help_wanted: bool = False,
    requests: int | None = None,
) -> Plan:
    """The one plan that the options ask for.

    Args:
        policy: Instead of theirs.
        help_wanted: See ``fg.plan``; ``requests``, too.
    """
    from flexgen_jax.planning.plans import plan
    from scheduling.hardware import Hardware

    asked = arguments(options)
    if policy is not None:
        asked |= {"policy": policy, "fixed": {}, "allow": (), "forbid": ()}
    check_pictures(options["trace"], options["plot"], force=options["force"])
    return plan(
        hardware=Hardware.load(options["hardware"]),
        prompt_len=options["prompt_len"],
        gen_len=options["gen_len"],
        help_wanted=help_wanted,
        requests=requests,
        **asked,
    )
