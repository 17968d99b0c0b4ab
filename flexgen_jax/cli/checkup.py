"""The command ``doctor``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flexgen_jax.cli.failures import plain_errors
from flexgen_jax.cli.llm_options import DTYPES

if TYPE_CHECKING:
    from flexgen_jax.machine.doctor import Diagnosis
    from flexgen_jax.machine.outlook import Outlook


@click.command()
@click.option(
    "--offload-dir",
    type=click.Path(path_type=Path),
    help="Where runs keep what is on disk. [default: the cache directory]",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="PRESET",
    help="A model that you want to run: if it does not fit, that is an error. Repeatable. "
    "[default: a few models, to inform]",
)
@click.option(
    "--hardware",
    metavar="NAME|FILE",
    help="The machine that estimates are for: a file of 'profile', or a preset. [default: this "
    "machine, measured roughly]",
)
@click.option(
    "--dtype",
    type=DTYPES,
    default="auto",
    show_default=True,
    help="Dtype of the computation. auto: bfloat16.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON on stdout.")
def doctor(
    offload_dir: Path | None,
    models: tuple[str, ...],
    hardware: str | None,
    dtype: str,
    as_json: bool,
) -> None:
    """Check this machine: what would stop a run, and how fast one would be.

    Versions, devices, memory, the disk and its file system; takes about 15 seconds. The exit code
    is 1 if something would stop a run.
    """
    with plain_errors():
        from flexgen_jax.machine.doctor import diagnose
        from flexgen_jax.machine.kept_programs import keep_programs
        from flexgen_jax.weights.checkpoint import dtype_of_model
        from scheduling.hardware import Hardware

        keep_programs()
        machine = Hardware.load(hardware) if hardware else None
        found = diagnose(
            offload_dir, hardware=machine, models=models, dtype=dtype_of_model("", dtype)
        )
        click.echo(
            json.dumps(found.to_json(), indent=2, allow_nan=False) if as_json else _described(found)
        )
    if not found.healthy:
        sys.exit(1)


def _described(found: Diagnosis) -> str:
    from flexgen_jax.machine.doctor import GEN_LEN, PROMPT_LEN

    lines = [", ".join(f"{name} {version or '-'}" for name, version in found.versions.items())]
    lines += [f"{f.level:8s} {f.check:12s} {f.message}" for f in found.findings]
    if found.outlook:
        assert found.hardware is not None
        what = f"{PROMPT_LEN} prompt tokens and {GEN_LEN} new ones"
        lines += ["", f"estimated for {what}, on {found.hardware.name}:", *_table(found.outlook)]
    else:
        lines += ["", "fix the errors above to get an estimate"]
    return "\n".join(lines)


def _table(models: tuple[Outlook, ...]) -> Iterator[str]:
    for model in models:
        size = f"{model.weights_nbytes / 1e9:.1f} GB"
        if model.obstacles:
            yield f"  {model.model:12s} {size:>9s}  does not fit: {'; '.join(model.obstacles)}"
            continue
        policy = model.plan.policy
        shares = policy.weights.shares().items()
        where = ", ".join(f"{tier.value} {share:.0f}%" for tier, share in shares if share)
        yield (
            f"  {model.model:12s} {size:>9s}  about {model.plan.tokens_per_second:.2g} tokens/s in "
            f"blocks of {policy.device_batch_size} x {policy.num_device_batches}; "
            f"{'policy auto' if model.policy == 'auto' else 'with --percent 0 0 0 0 0 0'}, "
            f"weights: {where}"
        )
