"""The command line's options for an ``LLM``, shared by the commands that run one."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flexgen_jax.cli.failures import plain_errors
from flexgen_jax.cli.policy_options import NAMES as POLICY_NAMES
from flexgen_jax.cli.policy_options import allowed, named, policy_options, read_policy
from flexgen_jax.cli.slot_options import SLOTS, slot_options, slots_of

if TYPE_CHECKING:
    from flexgen_jax.llm import LLM
    from scheduling.policy import Policy


class _Dtype(click.Choice):
    """With a reason why another one is not."""

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        with plain_errors():  # it may be the first that imports much
            from flexgen_jax.weights.dtypes import checked_dtype

        try:
            return checked_dtype(value) or "auto"
        except ValueError as error:
            self.fail(str(error), param, ctx)


DTYPES = _Dtype(["auto", "float32", "bfloat16"])

schedule_option = click.option(
    "--schedule",
    metavar="NAME|FILE.py:NAME",
    default="zigzag",
    show_default=True,
    help="The order of the operations: zigzag, diagonal, lock_step, row_by_row, cgopipe or neo, "
    "the name of a schedule that an installed package offers, or FILE.py:NAME, a function of a "
    "file of yours.",
)

_BEFORE = [
    click.option(
        "--model",
        required=True,
        help="A weight store, a Hugging Face directory, a GGUF file, or a hub name.",
    ),
]
_AFTER: list[Callable[..., Any]] = [
    schedule_option,
    click.option(
        "--dtype",
        type=DTYPES,
        default="auto",
        show_default=True,
        help="Dtype of the computation. auto: bfloat16 for weights of 16 bits, float32 for others.",
    ),
    click.option(
        "--device-memory",
        metavar="SIZE",
        help="Device memory that may be taken, such as 12GiB; on a CPU all memory. A run that "
        "would take more is not begun, and one that does ends. [default: what is free]",
    ),
    click.option(
        "--host-memory",
        metavar="SIZE",
        help="Host memory that the process may take, with what Python and its libraries take. "
        "[default: what is free]",
    ),
    click.option(
        "--path",
        type=click.Path(),
        metavar="DIR|_DUMMY_",
        help="Where converted models are kept; _DUMMY_ takes --model as the name of a preset, with "
        "random weights. [default: --offload-dir]",
    ),
    click.option(
        "--offload-dir",
        type=click.Path(),
        help="Where the KV cache and hidden states on disk lie during the run, and converted "
        "models without --path. [default: the cache directory]",
    ),
    slot_options,
    click.option(
        "--hardware",
        metavar="FILE",
        help="A file with this machine's figures, as 'profile' measured them. "
        "[default: what 'profile' saved, or what the first run measures]",
    ),
    click.option(
        "--no-profile",
        is_flag=True,
        help="Do not measure a machine of which no profile is saved: predict as for the nearest "
        "preset.",
    ),
    click.option(
        "--disk-mode",
        type=click.Choice(["auto", "mapped", "direct", "tensorstore"]),
        default="auto",
        show_default=True,
        help="How the disk is read: mapped goes through the page cache, direct goes past it, "
        "tensorstore "
        "leaves it to TensorStore; auto chooses for each tensor.",
    ),
    click.option(
        "--verify/--no-verify",
        default=True,
        show_default=True,
        help="Check each tensor against its checksum when it is first read.",
    ),
]
NAMES = (
    *POLICY_NAMES,
    "model",
    "schedule",
    "dtype",
    "device_memory",
    "host_memory",
    "path",
    "offload_dir",
    *SLOTS,
    "hardware",
    "no_profile",
    "disk_mode",
    "verify",
)


def llm_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options; :class:`Chosen` makes an ``LLM`` of their values."""
    for option in reversed(_AFTER):
        command = option(command)
    command = policy_options(command)
    for option in reversed(_BEFORE):
        command = option(command)
    return command


lengths_option = click.option(
    "--lengths",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A file that says how many new tokens requests really have: a number a line, or the "
    "output "
    "of a job. [default: every request runs to its limit]",
)


class Chosen:
    """What the options say, checked as far as that goes without a model.

    Args:
        options: By name, as click gives them; those that are an ``LLM``'s are taken out.
        seed: Of the ``LLM``.

    Raises:
        ValueError: options that exclude each other, or ask for what is not there.
    """

    def __init__(self, options: dict[str, Any], *, seed: int = 0) -> None:
        from flexgen_jax.planning.lengths import Lengths
        from flexgen_jax.planning.schedule_names import named_schedule

        self._values = {name: options.pop(name) for name in NAMES}
        self._values["lengths"] = options.pop("lengths", None)
        named_schedule(self._values["schedule"])  # better known before a model is opened
        policy, changes = read_policy(self._values)
        stages_given = "num_stages" in changes
        self._allow = allowed(self._values["allow"])
        self._forbid = named(self._values["forbid"])
        if policy != "auto":
            searching = ("allow", "forbid", "lengths")
            given = [name for name in searching if self._values[name]]
            if given:
                names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
                raise ValueError(
                    f"{names}: for policy auto, which chooses by it; --percent and --policy "
                    "FILE say themselves where everything lies. Leave one or the other out"
                )
            policy, changes = dataclasses.replace(policy, **changes), {}
        # None: of one process one, of several one for each device that they have.
        self._num_stages: int | None = changes.get("num_stages")
        if policy != "auto" and (policy.num_stages > 1 or stages_given):
            self._num_stages = policy.num_stages
        self._policy, self._changes, self._seed = policy, changes, seed
        path = self._values["lengths"]
        self._lengths = None if path is None else Lengths.read(path)

    @property
    def model(self) -> str:
        """As it was given."""
        return str(self._values["model"])

    @property
    def compression(self) -> dict[str, Any]:
        """``weight_bits``, ``cache_bits`` and ``attention_sparsity`` as they are asked for."""
        names = ("weight_bits", "cache_bits", "attention_sparsity")
        if self._policy == "auto":
            return {name: self._changes.get(name) for name in names}
        return {name: getattr(self._policy, name) for name in names}

    def identity(self) -> dict[str, Any]:
        """Of what a job is compared by, what the options alone tell."""
        from flexgen_jax.jobs.job import policy_identity
        from flexgen_jax.weights.checkpoint import fingerprint_of
        from flexgen_jax.weights.dtypes import checked_dtype

        policy = policy_identity(None if self._policy == "auto" else self._policy, self._changes)
        if self._policy != "auto":
            del policy["num_stages"]  # several processes have more than is said
        dtype = checked_dtype(self._values["dtype"])
        weights = {"source": fingerprint_of(self.model), "dtype": dtype}
        parts = {"policy": policy, "weights": weights}
        return {
            part: {name: value for name, value in values.items() if value is not None}
            for part, values in parts.items()
        }

    def allow_cpu_devices(self, num_processes: int) -> None:
        """Has JAX make as many devices of a CPU as one of the processes needs for its stages."""
        from flexgen_jax.distributed.backends import allow_cpu_devices

        if self._num_stages is not None:
            allow_cpu_devices(math.ceil(self._num_stages / num_processes))

    @contextlib.contextmanager
    def llm(
        self,
        say: Callable[[str], None],
        *,
        quiet: bool,
        recorded: Policy | None = None,
        **changes: Any,
    ) -> Iterator[LLM]:
        """The ``LLM``, its model converted if need be.

        Args:
            say: Told what takes long.
            recorded: What ``auto`` came to when the job was begun: it is not to come to another.
            changes: Of the policy, beyond the options.
        """
        from flexgen_jax import progress
        from flexgen_jax.llm import LLM

        arguments = self.arguments(say, quiet=quiet, recorded=recorded, **changes)
        with progress.doing("loading the model", quiet=quiet):
            llm = LLM(**arguments)
        with llm:
            yield llm

    def arguments(
        self,
        say: Callable[[str], None],
        *,
        quiet: bool,
        recorded: Policy | None = None,
        **changes: Any,
    ) -> dict[str, Any]:
        """Of the ``LLM``, as :meth:`llm` makes it; the model is converted."""
        import jax

        from flexgen_jax import progress
        from flexgen_jax.distributed.backends import local_devices
        from flexgen_jax.distributed.processes import process_count
        from flexgen_jax.jobs import measured
        from flexgen_jax.machine.kept_programs import keep_programs
        from flexgen_jax.weights.checkpoint import GROUP_SIZE
        from flexgen_jax.weights.dtypes import checked_dtype
        from scheduling.hardware import Hardware
        from storage.disk import DiskContext
        from storage.pinned_memory import allow_pinned_memory

        allow_pinned_memory()
        keep_programs()
        if process_count() > 1:
            stages = self._num_stages or jax.device_count()
            if stages < process_count():
                raise ValueError(
                    f"--stages {stages}: each of the {process_count()} processes needs a stage"
                )
            changes = {"num_stages": stages, **changes}
        else:
            self.allow_cpu_devices(1)
        local_devices()  # a backend that cannot start is better known before a conversion
        v = self._values
        dtype = checked_dtype(v["dtype"])
        policy: Policy | Any = self._policy
        wanted = {**self._changes, **changes}
        if policy != "auto":
            policy, wanted = dataclasses.replace(policy, **changes), {}
        bits = changes.get("weight_bits", self.compression["weight_bits"])
        group = GROUP_SIZE if policy == "auto" else policy.group_size
        group = wanted.get("group_size", group)
        with progress.transfer("converting", quiet=quiet) as update:
            store = measured.store(
                self.model,
                v["path"],
                dtype=dtype,
                weight_bits=bits,
                group_size=group,
                offload_dir=v["offload_dir"],
                say=say,
                progress=update,
            )
        limits = {name: v[name] for name in ("device_memory", "host_memory")}
        searching: dict[str, Any] = {"fixed": wanted, "allow": self._allow}
        searching |= {"forbid": self._forbid, "lengths": self._lengths}
        if policy == "auto" and recorded is not None:
            # What is given differently now is for the job to notice.
            policy, searching = dataclasses.replace(recorded, **wanted), {}
        return {
            "model": str(store),
            "policy": policy,
            "schedule": v["schedule"],
            "offload_dir": v["offload_dir"],
            "dtype": v["dtype"],
            "seed": self._seed,
            "generation_config": "vllm",  # a job says itself what its requests get
            "hardware": Hardware.load(v["hardware"]) if v["hardware"] else None,
            "profile": not v["no_profile"],
            "disk": DiskContext(mode=v["disk_mode"], verify=v["verify"]),
            "slots": slots_of(v),
            **limits,
            **searching,
        }
