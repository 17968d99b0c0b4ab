"""The cells of a block: how large they are, and which tier each one is dealt to.

A cell is what moves at once: the cache of one layer and batch, the hidden states of one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from flexgen_jax.models.family import Config, Kind
from flexgen_jax.models.kv_cache import CacheFormat
from flexgen_jax.models.params import unit_kinds
from flexgen_jax.planning.blocks import CACHE_MULTIPLE, Batch, Block
from scheduling.placement import Placement, place
from scheduling.policy import Policy, Split, Tier


def cache_name(config: Config, layer: int, batch: int) -> str:
    """What the cache of a layer (unit number) and batch is called in stores and errors."""
    return f"cache.{config.units[layer]}.batch_{batch}"


def hidden_name(batch: int) -> str:
    """Likewise, of the hidden states."""
    return f"hidden.batch_{batch}"


def cache_format(policy: Policy) -> CacheFormat:
    """How the policy wants keys and values kept."""
    return CacheFormat(policy.cache_bits, policy.group_size)


class CellRoom(NamedTuple):
    """The positions of a cell of the cache.

    Attributes:
        capacity: That it keeps.
        windowed: Attention sees fewer positions than the batch has.
        ring: The batch has more than it keeps: the newest take the place of the oldest.
    """

    capacity: int
    windowed: bool
    ring: bool


def cell_room(batch: Batch, kind: Kind) -> CellRoom:
    """Of a layer's kind: one with a window keeps no more than the window.

    The rows of a rolling block come and go, so its positions have no end.
    """
    rolling = batch.room is not None
    needed = batch.cache_len if rolling else batch.prompt_len + batch.num_steps - 1
    if kind.window is None or kind.window >= needed:
        return CellRoom(batch.cache_len, False, rolling)
    capacity = min(batch.cache_len, -(-kind.window // CACHE_MULTIPLE) * CACHE_MULTIPLE)
    return CellRoom(capacity, True, rolling or capacity < needed)


def cache_sizes(
    batch: Batch, config: Config, dtype: Any, form: CacheFormat, kind: Kind
) -> list[int]:
    """Bytes of the arrays that one layer and ``batch`` keep: of its keys, then of its values."""
    heads = batch.rows * cell_room(batch, kind).capacity * config.num_key_value_heads
    return [heads * n for n in form.position_nbytes(config.head_dim, dtype)] * 2


def hidden_nbytes(batch: Batch, config: Config, dtype: Any) -> int:
    """Bytes of the hidden states of ``batch`` in prefill, when they are largest."""
    positions = batch.rows * batch.longest_prompt
    return positions * config.hidden_size * jnp.dtype(dtype).itemsize


def cache_places(block: Block, config: Config) -> Iterator[tuple[int, int]]:
    """(layer, batch) of the cells of the cache, in the order in which they are dealt."""
    # One new token needs no cache.
    batches = [number for number, batch in enumerate(block.batches) if batch.num_steps > 1]
    for layer, kind in enumerate(unit_kinds(config)):
        if kind.role == "decoder":
            for number in batches:
                yield layer, number


def cache_tiers(
    block: Block, config: Config, dtype: Any, policy: Policy
) -> dict[tuple[int, int], tuple[int, Tier]]:
    """(layer, batch) -> bytes of a cell of the cache, and where it is dealt to."""
    form = cache_format(policy)
    kinds = unit_kinds(config)
    sizes = {
        (kind, number): sum(cache_sizes(batch, config, dtype, form, kind))
        for kind in set(kinds)
        for number, batch in enumerate(block.batches)
    }
    places = list(cache_places(block, config))
    nbytes = [sizes[kinds[layer], number] for layer, number in places]
    tiers = place(nbytes, policy.cache)
    return dict(zip(places, zip(nbytes, tiers, strict=True), strict=True))


def place_cache(block: Block, config: Config, dtype: Any, policy: Policy) -> Placement:
    """Deals the cells of the cache to tiers, layer after layer."""
    dealt = cache_tiers(block, config, dtype, policy)
    return Placement.of((cache_name(config, *where), *cell) for where, cell in dealt.items())


def place_hidden(block: Block, config: Config, dtype: Any, split: Split) -> Placement:
    """Deals the batches' hidden states to tiers."""
    cells = [
        (hidden_name(number), hidden_nbytes(batch, config, dtype))
        for number, batch in enumerate(block.batches)
    ]
    return _dealt(cells, split)


def _dealt(cells: Sequence[tuple[str, int]], split: Split) -> Placement:
    sizes = [nbytes for _, nbytes in cells]
    return Placement.of(
        (*cell, tier) for cell, tier in zip(cells, place(sizes, split), strict=True)
    )
