"""The options of a job that runs in the workers of a Ray cluster."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from flexgen_jax.cli.failures import Failure
from flexgen_jax.cli.signals import terminable

if TYPE_CHECKING:
    from flexgen_jax.cli.llm_options import Chosen
    from flexgen_jax.llm import LLM
    from scheduling.policy import Policy

_NEEDS = ("ray_workers", "ray_cpus", "ray_gpus")
_OPTIONS = [
    click.option(
        "--ray",
        is_flag=True,
        help="Run the blocks in the workers of a Ray cluster, each with a model of its own; the "
        "output is the same. Needs flexgen-jax[ray].",
    ),
    click.option(
        "--ray-workers",
        type=click.IntRange(min=1),
        metavar="N",
        help="How many workers there are. [default: one per GPU of the cluster, or one per "
        "machine]",
    ),
    click.option(
        "--ray-address",
        envvar="RAY_ADDRESS",
        metavar="auto|HOST:PORT",
        help="The Ray cluster to use. [default: $RAY_ADDRESS, or a cluster that is started on this "
        "machine and ended with the job]",
    ),
    click.option(
        "--ray-cpus",
        type=click.FloatRange(min=0),
        metavar="N",
        help="How many cores Ray reserves for a worker. [default: an equal share]",
    ),
    click.option(
        "--ray-gpus",
        type=click.FloatRange(min=0),
        metavar="N",
        help="How many GPUs Ray reserves for a worker. [default: 1, where there are any]",
    ),
]


def ray_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options; :class:`OverRay` takes their values."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


class OverRay:
    """What the options say about many replicas.

    Args:
        options: By name, as click gives them; those about Ray are taken out.
        excluded: What a job in many replicas cannot have -> whether it is asked for.

    Raises:
        Failure: options that do not go together.
    """

    def __init__(self, options: dict[str, Any], excluded: dict[str, bool]) -> None:
        self._wanted: bool = options.pop("ray")
        self._address: str | None = options.pop("ray_address")
        self._values = {name: options.pop(name) for name in _NEEDS}
        given = [name for name, value in self._values.items() if value is not None]
        if self._address != (os.environ.get("RAY_ADDRESS") or None):
            given.append("ray_address")
        if given and not self._wanted:
            names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            raise Failure(f"{names}: for jobs over Ray; give --ray, too")
        unfit = [name for name, asked in excluded.items() if asked]
        if self._wanted and unfit:
            raise Failure(f"{' and '.join(unfit)}: for one process only; leave it or --ray out")

    @contextlib.contextmanager
    def llm(
        self, chosen: Chosen, say: Callable[[str], None], *, quiet: bool, recorded: Policy | None
    ) -> Iterator[LLM]:
        """What runs the job: the model here, or replicas of it.

        Raises:
            ImportError: Ray is not installed.
            JobError: there is no such cluster.
        """
        if not self._wanted:
            with chosen.llm(say, quiet=quiet, recorded=recorded) as llm:
                yield llm
            return
        import jax

        from flexgen_jax.replicas.ray_cluster import LOCAL, Workers, connected, import_ray
        from flexgen_jax.replicas.ray_runner import replicated

        import_ray()
        # Accelerators are for the workers: this process computes nothing.
        jax.config.update("jax_platforms", "cpu")
        names = {"ray_workers": "count", "ray_cpus": "num_cpus", "ray_gpus": "num_gpus"}
        workers = Workers(**{names[name]: value for name, value in self._values.items()})
        arguments = chosen.arguments(say, quiet=quiet, recorded=recorded)
        # Ray has a SIGTERM handler of its own: ours comes back.
        with (
            contextlib.redirect_stdout(sys.stderr),  # what Ray says there of workers that die
            connected(self._address or LOCAL, quiet=quiet),
            terminable(),
            replicated(workers.settled(say), arguments) as llm,
        ):
            yield llm
