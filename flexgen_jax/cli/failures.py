"""How the commands speak to a person: one line for what went wrong, and an exit code."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import IO, Any

import click

from flexgen_jax import logs
from flexgen_jax.cli import address_space


class Failure(click.ClickException):
    """One line for a person, and an exit code: 2 for what the user can mend, 1 for the rest."""

    exit_code = 2

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = code  # type: ignore[misc] # click declares it for the class

    def show(self, file: IO[Any] | None = None) -> None:
        """On the standard error, in the form of the log."""
        if logs.in_json():
            logs.LOGGER.error("%s", self.format_message())
        else:
            super().show(file)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turns expected errors into one line; anything else keeps its traceback."""
    try:
        address_space.check()
    except MemoryError as error:
        raise Failure(str(error)) from error
    from flexgen_jax.distributed.processes import ProcessError
    from flexgen_jax.engine.executor import ExecutionError
    from storage.store import StorageError

    try:
        yield
    except (ExecutionError, ProcessError) as error:
        raise Failure(str(error), code=1) from error
    except (ValueError, ImportError, OSError, StorageError) as error:
        raise Failure(str(error)) from error
    except MemoryError as error:
        limited = " under the limit of 'ulimit -v'" if address_space.limit() else ""
        raise Failure(
            f"out of memory{limited}{': ' * bool(str(error))}{error}; smaller blocks take less",
            code=1,
        ) from error
    except KeyboardInterrupt as error:
        raise interrupted(error) from None


def interrupted(error: KeyboardInterrupt, kept: str = "") -> Failure:
    """What to raise after an interrupt. Ends the process at once if something does not come back.

    Whatever would be closed on the way out may be what hangs; what is finished is on the disk.

    Args:
        kept: What is.
    """
    from flexgen_jax.cli.signals import exit_code

    stuck = getattr(error, "__notes__", [])
    text = "; ".join(part for part in (*stuck, kept) if part)
    failure = Failure(f"interrupted{': ' * bool(text)}{text}", code=exit_code(error))
    if stuck:
        failure.show()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(failure.exit_code)
    return failure


def say(message: str) -> None:
    """On the standard error, in the form of the log."""
    if logs.in_json():
        logs.LOGGER.info("%s", message)
    else:
        click.echo(message, err=True)


def silent(message: str) -> None:
    """Takes the place of ``say`` where nothing is to be said."""
