"""The KV cache and the hidden states of a block over the three tiers.

A cell is what moves at once: the cache of one layer and batch, the hidden states of one batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from flexgen_jax.blocks import Batch, Block
from flexgen_jax.config import OPTConfig
from flexgen_jax.kv_cache import CacheFormat
from flexgen_jax.stages import layers_of
from scheduling.placement import Placement, place
from scheduling.policy import Policy, Split, Tier
from storage.device import DeviceSequences
from storage.disk import DiskContext
from storage.disk_sequences import DiskSequences
from storage.host import HostSequences, host_sequences
from storage.scratch import Scratch
from storage.store import SequenceStore

WrapStore = Callable[[Tier, Any], Any]


def cache_name(config: OPTConfig, layer: int, batch: int) -> str:
    """What the cache of a layer (unit number) and batch is called in stores and errors."""
    return f"cache.{config.units[layer]}.batch_{batch}"


def hidden_name(batch: int) -> str:
    """Likewise, of the hidden states."""
    return f"hidden.batch_{batch}"


def cache_format(policy: Policy) -> CacheFormat:
    """How the policy wants keys and values kept."""
    return CacheFormat(policy.cache_bits, policy.group_size)


def cache_sizes(batch: Batch, config: OPTConfig, dtype: Any, form: CacheFormat) -> list[int]:
    """Bytes of the arrays that one layer and ``batch`` keep: of its keys, then of its values."""
    heads = batch.rows * batch.cache_len * config.num_attention_heads
    return [heads * n for n in form.position_nbytes(config.head_dim, dtype)] * 2


def hidden_nbytes(batch: Batch, config: OPTConfig, dtype: Any) -> int:
    """Bytes of the hidden states of ``batch`` in prefill, when they are largest."""
    return batch.rows * batch.prompt_len * config.hidden_size * jnp.dtype(dtype).itemsize


def cache_places(block: Block, config: OPTConfig) -> Iterator[tuple[int, int]]:
    """(layer, batch) of the cells of the cache, in the order in which they are dealt."""
    for layer in range(1, len(config.units) - 1):
        for number, batch in enumerate(block.batches):
            if batch.num_steps > 1:  # one new token needs no cache
                yield layer, number


def place_cache(block: Block, config: OPTConfig, dtype: Any, policy: Policy) -> Placement:
    """Deals the cells of the cache to tiers (DESIGN §4), layer after layer."""
    form = cache_format(policy)
    sizes = [sum(cache_sizes(batch, config, dtype, form)) for batch in block.batches]
    cells = [
        (cache_name(config, layer, number), sizes[number])
        for layer, number in cache_places(block, config)
    ]
    return _dealt(cells, policy.cache)


def place_hidden(block: Block, config: OPTConfig, dtype: Any, split: Split) -> Placement:
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


Stores = dict[Tier, SequenceStore]


class Cells:
    """Where the cells of a run's blocks lie. A context manager; nothing outlives it.

    Args:
        blocks: All of the run: room on disk is checked for the largest before it begins.
        devices: Of the stages that are here, by number.
        scratch: Parent of the directory for what lies on disk.

    Attributes:
        cache_of, hidden_of: The placement of each block.
        cache, hidden: The stores of each stage that is here.

    Raises:
        StorageError: too little space on the disk.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        config: OPTConfig,
        dtype: Any,
        policy: Policy,
        devices: Mapping[int, Any],
        *,
        scratch: Path,
        context: DiskContext | None = None,
        wrap: WrapStore | None = None,
    ) -> None:
        self.policy = policy
        self.cache_of = [place_cache(b, config, dtype, policy) for b in blocks]
        self.hidden_of = [place_hidden(b, config, dtype, policy.hidden) for b in blocks]
        self._stack = contextlib.ExitStack()
        self._disks: list[DiskSequences] = []
        layers = layers_of(config, policy.num_stages)
        here = {layer for stage in devices for layer in layers[stage]}
        cached = [
            sum(
                cell.nbytes
                for cell, (layer, _) in zip(placed.cells, cache_places(block, config), strict=True)
                if cell.tier is Tier.DISK and layer in here
            )
            for placed, block in zip(self.cache_of, blocks, strict=True)
        ]
        needs = {
            "cache": max(cached, default=0),
            "hidden": max((p.nbytes(Tier.DISK) for p in self.hidden_of), default=0),
        }
        self.cache: dict[int, Stores] = {}
        self.hidden: dict[int, Stores] = {}
        with contextlib.ExitStack() as stack:
            root = None
            if sum(needs.values()):
                made = stack.enter_context(Scratch(scratch))
                made.require(sum(needs.values()), "the cache and hidden states of a block")
                root = made.path
            for stage, device in devices.items():
                for kind, stores in (("cache", self.cache), ("hidden", self.hidden)):
                    directory = None if root is None else root / f"{kind}-{stage}"
                    stores[stage] = self._stores(
                        stack, device, directory, kind, needs, context, wrap
                    )
            self._stack = stack.pop_all()

    def _stores(
        self,
        stack: contextlib.ExitStack,
        device: Any,
        directory: Path | None,
        kind: str,
        needs: dict[str, int],
        context: DiskContext | None,
        wrap: WrapStore | None,
    ) -> Stores:
        hosted = kind == "cache" and self.policy.host_attention
        device = jax.local_devices(backend="cpu")[0] if hosted else device
        sparse = kind == "cache" and self.policy.attention_sparsity < 1
        stores: dict[Tier, Any] = {
            Tier.DEVICE: DeviceSequences(device),
            # Pinned memory cannot be indexed where it lies.
            Tier.HOST: HostSequences(device) if hosted or sparse else host_sequences(device),
        }
        if needs[kind]:
            assert directory is not None
            directory.mkdir()
            disk = DiskSequences(directory, context, device, nbytes=sum(needs.values()))
            self._disks.append(disk)
            stores[Tier.DISK] = disk
        if wrap is not None:
            stores = {tier: wrap(tier, store) for tier, store in stores.items()}
        for store in stores.values():
            stack.callback(store.close)
        return stores

    @property
    def buffered_nbytes(self) -> int:
        """Host memory in which cells on disk collect what is not written yet."""
        return sum(disk.buffered_nbytes for disk in self._disks)

    @property
    def disk_bytes_read(self) -> int:
        return sum(disk.bytes_read for disk in self._disks)

    @property
    def disk_bytes_written(self) -> int:
        return sum(disk.bytes_written for disk in self._disks)

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Cells:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
