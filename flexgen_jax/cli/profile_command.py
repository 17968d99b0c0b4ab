"""The command that measures: ``profile``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flexgen_jax.cli.failures import Failure, plain_errors, say
from flexgen_jax.cli.llm_options import DTYPES
from flexgen_jax.cli.pictures import check_replaceable, force_option

if TYPE_CHECKING:
    from scheduling.hardware import Hardware


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
