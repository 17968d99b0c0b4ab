"""The command ``verify``."""

from __future__ import annotations

import dataclasses
import json
import sys

import click

from flexgen_jax.cli.failures import plain_errors


@click.command()
@click.argument("model")
@click.option(
    "--record",
    is_flag=True,
    help="Take checksums of what is there now and keep them: for a model that has none, or whose "
    "tokenizer was changed on purpose.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
@click.option("--quiet", is_flag=True, help="Show no progress bar.")
def verify(model: str, record: bool, as_json: bool, quiet: bool) -> None:
    """Read all of MODEL once, and name every file that is not as it was written.

    The checksums of a weight store are taken when it is made. The exit code is 1 if anything is
    wrong.
    """
    with plain_errors():
        from flexgen_jax import progress
        from flexgen_jax.weights.verifying import verify as verified

        with progress.transfer("verifying", quiet=quiet) as update:
            found = verified(model, record=record, progress=update)
        if as_json:
            values = {**dataclasses.asdict(found), "path": str(found.path), "sound": found.sound}
            click.echo(json.dumps(values, indent=2, allow_nan=False))
        else:
            for problem in found.problems:
                click.echo(problem)
            click.echo(found.summary())
    if not found.sound:
        sys.exit(1)
