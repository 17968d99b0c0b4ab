"""The command line's part in a pipeline over several processes."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import click

from flexgen_jax.cli.failures import Failure, plain_errors

if TYPE_CHECKING:
    from flexgen_jax.cli.llm_options import Chosen

_OPTIONS = [
    click.option(
        "--coordinator",
        metavar="HOST:PORT",
        help="Run the stages in several processes, on one machine or several: the address at which "
        "process 0 listens. All are given the same options. [default: one process]",
    ),
    click.option(
        "--num-processes",
        type=click.IntRange(min=1),
        help="How many processes there are. [default: the cluster's, with --distributed]",
    ),
    click.option(
        "--process-id",
        type=click.IntRange(min=0),
        help="Which of the processes this is, from 0. [default: the cluster's, with --distributed]",
    ),
    click.option(
        "--distributed",
        is_flag=True,
        help="Take --coordinator, --num-processes and --process-id from Slurm, Open MPI or "
        "Kubernetes.",
    ),
    click.option(
        "--process-timeout",
        type=click.FloatRange(min=1),
        metavar="SECONDS",
        help="A process that does not join within so many seconds, or shows no sign of life for so "
        "long, is considered lost; the others exit. [default: 60]",
    ),
]


def process_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options; :func:`joined` takes their values."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@contextlib.contextmanager
def joined(options: dict[str, Any], chosen: Chosen) -> Iterator[bool]:
    """Joins the other processes, if there are to be any; yields whether this one leads.

    What fails inside ends this process at once: without the others, JAX's runtime would wait for
    them at the exit.

    Args:
        options: By name, as click gives them; those that are of processes are taken out.

    Raises:
        ValueError: options that do not belong together.
    """
    given = {n: options.pop(n) for n in ("coordinator", "num_processes", "process_id")}
    distributed, timeout = options.pop("distributed"), options.pop("process_timeout")
    named = [name for name, value in given.items() if value is not None]
    if not named and not distributed:
        if timeout is not None:
            raise ValueError("--process-timeout: for several processes; give --coordinator, too")
        yield True
        return
    if options["checkpoint_minutes"] is not None:
        raise ValueError("--checkpoint-minutes: for one process only; leave it out")
    if named and len(named) < len(given) and not distributed:
        raise ValueError(
            "--coordinator, --num-processes and --process-id belong together; or give "
            "--distributed to take them from the cluster"
        )
    from flexgen_jax.distributed import processes
    from storage.pinned_memory import allow_pinned_memory

    allow_pinned_memory()
    if given["num_processes"] is not None:
        chosen.allow_cpu_devices(given["num_processes"])
    # Gloo writes to the standard output, which may be for results.
    output, real = sys.stdout, os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(real, "w", encoding="utf-8", closefd=False) as sys.stdout:
            processes.initialize(
                given["coordinator"],
                given["num_processes"],
                given["process_id"],
                timeout=processes.TIMEOUT if timeout is None else timeout,
            )
            yield processes.leads()
    except BaseException as error:
        if processes.process_count() == 1:
            raise  # it has not come to that
        _end(error)
    finally:
        sys.stdout = output
        os.dup2(real, 1)
        os.close(real)


def _end(error: BaseException) -> NoReturn:
    """Shows it and ends this process."""
    code = 1
    try:
        with plain_errors():
            raise error
    except Failure as failure:
        failure.show()
        code = failure.exit_code
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)
