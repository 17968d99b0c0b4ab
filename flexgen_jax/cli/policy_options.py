"""The command line's words for a policy: our names, and FlexGen's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from flexgen_jax.cli.failures import say
from storage.json_text import read_json

if TYPE_CHECKING:
    from scheduling.policy import Policy


def policy_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options; :func:`read_policy` makes a policy of their values."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


_OPTIONS = [
    click.option(
        "--policy",
        metavar="auto|FILE",
        help="Where everything lies and how large blocks are: auto searches for the fastest "
        "policy, "
        "FILE is a policy in JSON. [default: auto, without --percent]",
    ),
    click.option(
        "--allow",
        multiple=True,
        type=click.Choice(["host-attention", "weight-bits", "cache-bits", "attention-sparsity"]),
        help="A method that 'auto' may use if it helps, though results may change slightly; "
        "repeatable. Attention on the host, with which greedy tokens stay the same, need not be "
        "named. [default: none]",
    ),
    click.option(
        "--forbid",
        multiple=True,
        type=click.Choice(["host-attention"]),
        help="A method that 'auto' may not use, although greedy tokens stay the same with it. "
        "[default: none]",
    ),
    click.option(
        "--percent",
        type=float,
        nargs=6,
        metavar="WD WH CD CH HD HH",
        help="Percent of the weights on the device and on the host, then of the KV cache, then of "
        "the hidden states; the rest is on disk. [default: what 'auto' chooses]",
    ),
    click.option(
        "--experts-percent",
        type=float,
        nargs=2,
        metavar="DEVICE HOST",
        help="Percent of the experts on the device and on the host, the rest on disk, in a model "
        "that has experts. [default: what 'auto' chooses; with --percent, as the other weights]",
    ),
    click.option(
        "--device-batch-size",
        "--gpu-batch-size",
        type=int,
        help="How many requests are computed at once. [default: what 'auto' chooses, or 8]",
    ),
    click.option(
        "--num-device-batches",
        "--num-gpu-batches",
        type=int,
        help="How many batches a block has, which share each pass over the weights. [default: what "
        "'auto' chooses, or 4]",
    ),
    click.option(
        "--overlap",
        type=bool,
        is_flag=False,
        flag_value=True,
        metavar="[BOOL]",
        help="Whether to load and store while computing. [default: true]",
    ),
    click.option("--no-overlap", is_flag=True, help="The same as --overlap false."),
    click.option(
        "--no-refill",
        is_flag=True,
        help="Run blocks as in the paper: rows whose requests have finished stay empty.",
    ),
    click.option(
        "--host-attention",
        "--cpu-cache-compute",
        is_flag=True,
        help="Compute attention next to the cache on the host.",
    ),
    click.option(
        "--weight-bits",
        type=click.Choice(["4", "8"]),
        help="Quantise the weights, once, and keep the result like a converted model. "
        "[default: as the model has them]",
    ),
    click.option("--compress-weight", is_flag=True, help="The same as --weight-bits 4."),
    click.option(
        "--cache-bits", type=click.Choice(["4", "8"]), help="Quantise the KV cache. [default: no]"
    ),
    click.option("--compress-cache", is_flag=True, help="The same as --cache-bits 4."),
    click.option(
        "--group-size", type=int, help="The most elements that share a scale. [default: 64]"
    ),
    click.option(
        "--attention-sparsity",
        "--attn-sparsity",
        type=float,
        metavar="SHARE",
        help="Attend to this share of the positions, those with the largest weights. "
        "[default: 1, all of them]",
    ),
    click.option(
        "--stages",
        "--num-stages",
        "num_stages",
        type=int,
        help="How many devices the layers are pipelined over. [default: 1]",
    ),
    click.option(
        "--num-groups",
        type=int,
        help="How many groups of batches follow one another through the stages. "
        "[default: as many as stages]",
    ),
    click.option(
        "--sep-layer",
        type=bool,
        metavar="BOOL",
        help="FlexGen's option; only false is supported: attention and MLP are one layer. "
        "[default: false]",
    ),
    click.option(
        "--pin-weight",
        type=bool,
        metavar="BOOL",
        help="FlexGen's option; only true is supported: beside an accelerator, weights on the host "
        "are in pinned memory. [default: true]",
    ),
]
NAMES = (
    "policy",
    "allow",
    "forbid",
    "percent",
    "experts_percent",
    "device_batch_size",
    "num_device_batches",
    "overlap",
    "no_overlap",
    "no_refill",
    "host_attention",
    "weight_bits",
    "compress_weight",
    "cache_bits",
    "compress_cache",
    "group_size",
    "attention_sparsity",
    "num_stages",
    "num_groups",
    "sep_layer",
    "pin_weight",
)


def named(values: Iterable[str]) -> tuple[str, ...]:
    """What ``--allow`` or ``--forbid`` names, as a policy's fields."""
    return tuple(value.replace("-", "_") for value in values)


def allowed(values: Iterable[str]) -> tuple[str, ...]:
    """What ``--allow`` names; says so where it need not be."""
    if "host-attention" in values:
        say(
            "--allow host-attention is not needed any more: auto uses attention on the host where "
            "it helps, unless --forbid host-attention says otherwise"
        )
    return named(values)


def read_policy(values: Mapping[str, Any]) -> tuple[Policy | Literal["auto"], dict[str, Any]]:
    """The policy that the options name, and what they change of it.

    Args:
        values: By ``NAMES``, as click gives them.

    Raises:
        ValueError: options that exclude each other, or ask for what is not there.
        OSError: a policy file that cannot be read.
    """
    from scheduling.policy import Policy, Split  # brings NumPy, which --help can do without

    if values["sep_layer"]:
        raise ValueError("not supported yet: --sep-layer true; layers are whole decoder layers")
    if values["pin_weight"] is False:
        raise ValueError(
            "not supported: --pin-weight false; on an accelerator host memory is always pinned"
        )
    if values["overlap"] and values["no_overlap"]:
        raise ValueError("--overlap and --no-overlap exclude each other")
    experts = values["experts_percent"]
    given = {
        "experts": Split.from_percent("experts", *experts) if experts else None,
        "device_batch_size": values["device_batch_size"],
        "num_device_batches": values["num_device_batches"],
        "overlap": False if values["no_overlap"] else values["overlap"],
        "refill": False if values["no_refill"] else None,
        "host_attention": values["host_attention"] or None,
        "weight_bits": _bits(values, "weight_bits", "compress_weight"),
        "cache_bits": _bits(values, "cache_bits", "compress_cache"),
        "group_size": values["group_size"],
        "attention_sparsity": values["attention_sparsity"],
        "num_stages": values["num_stages"],
        "num_groups": values["num_groups"],
    }
    changes = {name: value for name, value in given.items() if value is not None}
    policy, percent = values["policy"], values["percent"]
    if percent and policy is not None:
        raise ValueError("--policy and --percent exclude each other")
    if percent:
        return Policy.from_percent(*percent), changes
    if policy is None or policy == "auto":
        return "auto", changes
    try:
        return Policy.from_json(read_json(Path(policy))), changes
    except OSError as error:
        raise OSError(f"cannot read the policy {policy}: {error.strerror}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{policy} is not a policy: {error}") from error


def _bits(values: Mapping[str, Any], name: str, short: str) -> int | None:
    bits, compress = values[name], values[short]
    if compress and bits == "8":
        raise ValueError(
            f"--{name.replace('_', '-')} 8 and --{short.replace('_', '-')} (4 bits) exclude each "
            "other"
        )
    return int(bits) if bits else 4 if compress else None
