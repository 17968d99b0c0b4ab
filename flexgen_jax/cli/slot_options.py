"""The options that say how much is held at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

SLOTS = ("weight_slots", "cache_slots", "hidden_slots")

_OPTIONS = [
    click.option(
        "--weight-slots",
        type=int,
        help="How many layers of weights are held at once; 2 loads one ahead. [default: 2]",
    ),
    click.option(
        "--cache-slots",
        type=int,
        help="How many cells of the KV cache are held at once; 2 loads one ahead. [default: 2]",
    ),
    click.option(
        "--hidden-slots",
        type=int,
        help="How many batches' hidden states are held at once; 2 loads one ahead. [default: 2]",
    ),
]


def slot_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def slots_of(values: Mapping[str, Any]) -> dict[str, int]:
    """Those that were given, as ``LLM`` and ``plan`` take them."""
    return {name: values[name] for name in SLOTS if values[name] is not None}
