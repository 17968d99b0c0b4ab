"""How the commands speak to a person: one line for what went wrong, and an exit code."""

from __future__ import annotations

import contextlib
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
        from flexgen_jax.cli.signals import exit_code

        raise Failure("interrupted", code=exit_code(error)) from None


def say(message: str) -> None:
    """On the standard error, in the form of the log."""
    if logs.in_json():
        logs.LOGGER.info("%s", message)
    else:
        click.echo(message, err=True)


def silent(message: str) -> None:
    """Takes the place of ``say`` where nothing is to be said."""
