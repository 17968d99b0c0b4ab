"""Ray, as jobs and datasets use it: connecting, room for workers, retries."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flexgen_jax.distributed.processes import ProcessError
from flexgen_jax.distributed.sentry import answers
from flexgen_jax.jobs.job_input import JobError

LOCAL = "local"
RETRIES = 3  # of a block whose run raised, and of a worker that dies before it is ready
_OBJECT_STORE = 2**28  # bytes: what passes are prompts and their completions


class WorkerError(ProcessError):
    """A worker of a Ray cluster failed, and so it did when it was tried again."""


def import_ray() -> Any:
    """The module ``ray``, with ``ray.data``.

    Raises:
        ImportError: it is not installed; the message says how to.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(
            f"many replicas need Ray Data ({error}): pip install 'flexgen-jax[ray]'"
        ) from error
    return ray


@dataclasses.dataclass(frozen=True)
class Workers:
    """How many processes run an ``LLM``, and what Ray keeps for each.

    Attributes:
        count: None: one per accelerator that Ray knows of, or else one per machine.
        num_cpus: None: an equal share of a machine's cores. ``num_gpus``: None: one, where there
            are any. ``resources``: of Ray's own naming, such as ``{"TPU": 4}``.
    """

    count: int | None = None
    num_cpus: float | None = None
    num_gpus: float | None = None
    resources: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("count", "num_cpus", "num_gpus"):
            value = getattr(self, name)
            least = 1 if name == "count" else 0
            if value is not None and not value >= least:
                raise ValueError(f"{name} of the workers must be at least {least}, got {value!r}")

    def settled(self, say: Callable[[str], None]) -> Settled:
        """In numbers, for the cluster that Ray is connected to.

        Args:
            say: Told if the cluster has no room for them now.
        """
        nodes = [node["Resources"] for node in import_ray().nodes() if node["Alive"]]
        gpus = sum(node.get("GPU", 0) for node in nodes)
        num_gpus = self.num_gpus if self.num_gpus is not None else min(1, gpus)
        fitting = [n for n in nodes if n.get("CPU", 0) and n.get("GPU", 0) >= num_gpus] or nodes
        count = self.count
        if count is None:
            count = max(1, int(gpus / num_gpus) if num_gpus else len(fitting))
        beside = -(-count // max(1, len(fitting)))
        cores = min((n.get("CPU", 0) for n in fitting), default=1)
        num_cpus = self.num_cpus if self.num_cpus is not None else max(1, cores // beside)
        wanted = {"CPU": num_cpus, "GPU": num_gpus, **self.resources}
        room = sum(
            min(int(node.get(name, 0) / need) for name, need in wanted.items() if need)
            if any(wanted.values())
            else count
            for node in nodes
        )
        if room < count:
            each = ", ".join(f"{need:g} {name}" for name, need in wanted.items() if need)
            say(
                f"the Ray cluster has room for {room} of {count} workers of {each} each; the "
                "others wait until it has more"
            )
        return Settled(count, num_cpus, num_gpus, dict(self.resources), beside)


@dataclasses.dataclass(frozen=True)
class Settled:
    """:class:`Workers` in numbers; ``beside``: how many share a machine, at most."""

    count: int
    num_cpus: float
    num_gpus: float
    resources: dict[str, float]
    beside: int

    def remote(self) -> dict[str, Any]:
        """As Ray takes it, for one worker."""
        return {
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus,
            "resources": self.resources,
        }


@contextlib.contextmanager
def connected(address: str, *, quiet: bool) -> Iterator[None]:
    """Ray at ``address``; what is connected already stays as it is.

    Args:
        address: ``"local"`` starts one on this machine, and ends it; or as ``ray.init`` takes it.

    Raises:
        JobError: there is none.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"logging_level": "error", "log_to_driver": not quiet}
    if address == LOCAL:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine
        options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE}
    try:
        host, _, port = address.rpartition(":")
        if "/" not in host and port.isdecimal() and not answers(address):
            raise ConnectionError("nothing answers there")  # Ray would ask for a minute
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise JobError(
            f"no Ray cluster at {address}: {reason}. Start one with 'ray start --head', or leave "
            "--ray-address out to start one on this machine"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def patient(context: Any) -> None:
    """Makes a dataset with this ``DataContext`` retry what fails, and lets it take its time.

    A worker that dies is begun anew, and its task run again, by Ray's own default.
    """
    context.retried_map_errors, context.max_map_retries = True, RETRIES
    context.max_consecutive_actor_init_deaths = RETRIES
    context.execution_no_progress_timeout_s = -1  # a block may take hours


def missing_model(path: str) -> ValueError:
    return ValueError(
        f"a worker on {socket.gethostname()} finds no weight store at {path}: every machine needs "
        "it at the same path. Put it (--model, or --offload-dir where models are converted) on a "
        "file system that all of them share, or a copy of it on each"
    )
