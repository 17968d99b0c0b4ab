"""The cells of a block: how large they are, and which tier each one is dealt to.

A cell is what moves at once: the cache of one layer and batch, the hidden states of one batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np

from flexgen_jax.models.family import Config, Kind
from flexgen_jax.models.kv_cache import CacheFormat
from flexgen_jax.models.params import unit_kinds
from flexgen_jax.planning.blocks import CACHE_MULTIPLE, Batch, Block
from scheduling.placement import Placement, place, place_numbers
from scheduling.policy import Policy, Split, Tier

T = TypeVar("T")


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


class CacheTiers(NamedTuple):
    """Where the cells of a block's cache lie.

    Attributes:
        kinds: Of layers.
        batches: Each for those that are like it.
        nbytes: (kinds, batches) Of a cell.
        codes: (layers, batches of the block) What a cell is: its kind, its batch and its tier, as
            one number of (kinds, batches, tiers); -1: there is none.
    """

    kinds: tuple[Kind, ...]
    batches: tuple[Batch, ...]
    nbytes: np.ndarray
    codes: np.ndarray


def cache_tiers(block: Block, config: Config, dtype: Any, policy: Policy) -> CacheTiers:
    """Deals the cells of the cache to tiers, layer after layer."""
    kind_of, kinds = _kinds(config)
    batch_of, batches = _numbered(block.batches, _cells_of)
    form = cache_format(policy)
    sizes = [[sum(cache_sizes(b, config, dtype, form, kind)) for b in batches] for kind in kinds]
    nbytes = np.array(sizes, np.int64)
    decoder = np.array([kind.role == "decoder" for kind in kinds])[kind_of]
    # One new token needs no cache.
    several = np.array([batch.num_steps > 1 for batch in batches])[batch_of]
    there = decoder[:, None] & several
    cells = kind_of[:, None] * len(batches) + batch_of
    codes = np.full(cells.shape, -1, np.int16)
    dealt = place_numbers(nbytes.reshape(-1)[cells[there]].tolist(), policy.cache)
    codes[there] = cells[there] * len(Tier) + dealt
    return CacheTiers(kinds, batches, nbytes, codes)


@functools.lru_cache(maxsize=16)
def _kinds(config: Config) -> tuple[np.ndarray, tuple[Kind, ...]]:
    """Which kind each unit is of, and the kinds."""
    return _numbered(unit_kinds(config), lambda kind: kind)


def _cells_of(batch: Batch) -> object:
    """Equal for batches whose cells are alike."""
    return batch.rows, batch.prompt_len, batch.num_steps, batch.cache_len, batch.room


def _numbered(items: Sequence[T], key: Callable[[T], object]) -> tuple[np.ndarray, tuple[T, ...]]:
    """Which one each of ``items`` is like, and these, of each key the first."""
    numbers: dict[object, int] = {}
    firsts: list[T] = []
    found = []
    for item in items:
        number = numbers.setdefault(key(item), len(firsts))
        if number == len(firsts):
            firsts.append(item)
        found.append(number)
    return np.array(found, np.int32), tuple(firsts)


def place_cache(block: Block, config: Config, dtype: Any, policy: Policy) -> Placement:
    """Deals the cells of the cache to tiers, layer after layer."""
    dealt, tiers = cache_tiers(block, config, dtype, policy), tuple(Tier)
    nbytes = dealt.nbytes.reshape(-1).tolist()
    codes = dealt.codes.tolist()
    return Placement.of(
        (
            cache_name(config, layer, number),
            nbytes[codes[layer][number] // len(tiers)],
            tiers[codes[layer][number] % len(tiers)],
        )
        for layer, number in cache_places(block, config)
    )


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
