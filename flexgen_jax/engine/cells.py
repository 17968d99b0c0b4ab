"""The stores in which the KV cache and the hidden states of a run lie, on all three tiers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from flexgen_jax.models.family import Config
from flexgen_jax.planning.blocks import Block
from flexgen_jax.planning.cell_layout import cache_places, place_cache, place_hidden
from flexgen_jax.planning.stage_layout import layers_of
from scheduling.placement import Placement
from scheduling.policy import Policy, Tier
from storage.device import DeviceSequences
from storage.disk import DiskContext
from storage.disk_sequences import DiskSequences
from storage.host import HostSequences, host_sequences
from storage.scratch import Scratch
from storage.store import SequenceStore

WrapStore = Callable[[Tier, Any], Any]


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
        config: Config,
        dtype: Any,
        policy: Policy,
        devices: Mapping[int, Any],
        *,
        scratch: Path,
        context: DiskContext | None = None,
        wrap: WrapStore | None = None,
    ) -> None:
        self.config, self.dtype, self.policy = config, dtype, policy
        self.cache_of: list[Placement] = []
        self.hidden_of: list[Placement] = []
        for block in blocks:
            self.add(block)
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
        # What a rolling block becomes later may be dealt otherwise.
        rolling = any(block.room is not None for block in blocks)
        self._on_disk = {
            "cache": needs["cache"] > 0 or (rolling and policy.cache.disk > 0),
            "hidden": needs["hidden"] > 0 or (rolling and policy.hidden.disk > 0),
        }
        self.cache: dict[int, Stores] = {}
        self.hidden: dict[int, Stores] = {}
        with contextlib.ExitStack() as stack:
            root = None
            if any(self._on_disk.values()):
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

    def add(self, block: Block) -> int:
        """Places the cells of one more block; returns its number."""
        policy = self.policy
        self.cache_of.append(place_cache(block, self.config, self.dtype, policy))
        self.hidden_of.append(place_hidden(block, self.config, self.dtype, policy.hidden))
        return len(self.cache_of) - 1

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
        # Attention to what lies on the device is computed there all the same.
        home = jax.local_devices(backend="cpu")[0] if hosted else device
        sparse = kind == "cache" and self.policy.attention_sparsity < 1
        stores: dict[Tier, Any] = {
            Tier.DEVICE: DeviceSequences(device),
            # Pinned memory cannot be indexed where it lies.
            Tier.HOST: HostSequences(home) if hosted or sparse else host_sequences(home),
        }
        if self._on_disk[kind]:
            assert directory is not None
            directory.mkdir()
            disk = DiskSequences(directory, context, home, nbytes=sum(needs.values()))
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
