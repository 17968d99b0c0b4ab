"""The weights of a model over the three tiers, and how a layer is brought together."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from flexgen_jax.engine.unpacking import Dense
from flexgen_jax.models.family import Config
from flexgen_jax.models.packed import Packed
from flexgen_jax.models.params import (
    TOKEN_TABLE,
    head_table,
    loaded_names,
    nest,
    unit_kinds,
)
from scheduling.placement import Placement
from scheduling.policy import Tier
from storage.device import DeviceStore
from storage.disk import DiskContext, DiskStore
from storage.host import HostStore
from storage.memory import PAGE, aligned_bytes, round_up
from storage.slots import Slot
from storage.store import Store

if TYPE_CHECKING:
    from flexgen_jax.weights.checkpoint import StoredModel


class LayerWeights(NamedTuple):
    """What one layer computes with; ``token_table`` is the head's (vocab, embed), else None."""

    params: dict[str, Any]
    token_table: jax.Array | Packed | None


@partial(jax.jit, static_argnums=1)
def _dense(rows: Packed, dtype: str) -> jax.Array:
    return rows.dense(dtype)


class LayerLoader:
    """Loads layers from where ``placement`` put their tensors. A context manager.

    Args:
        layers: Those that are loaded here; of no other is anything opened.
        device: Where they are computed.
        wrap: Applied to each tier's store (tier, store) -> store: throttles, faults and logs for
            research and tests come in here.
    """

    def __init__(
        self,
        model: StoredModel,
        placement: Placement,
        layers: Iterable[int],
        device: Any,
        *,
        context: DiskContext | None = None,
        wrap: Any = None,
    ) -> None:
        self.config: Config = model.config
        self.dtype = model.dtype
        self.format = model.format
        self.placement = placement
        tier_of = {cell.name: cell.tier for cell in placement.cells}
        disk = DiskStore(
            {n: f for n, f in model.arrays.items() if tier_of.get(n) is Tier.DISK}, context, device
        )
        self._settled = {n for n in model.arrays if tier_of.get(n) in (Tier.DEVICE, Tier.HOST)}
        here, host = DeviceStore(device), HostStore(device)
        self._fill(model, tier_of, here, host, context)
        stores: dict[Tier, Store] = {Tier.DEVICE: here, Tier.HOST: host, Tier.DISK: disk}
        if wrap is not None:
            stores = {tier: wrap(tier, store) for tier, store in stores.items()}
        self._stores = stores
        self._disk = disk
        # Per layer and tier, which tensors: fixed for the whole run.
        self._parts: dict[int, list[tuple[Store, tuple[str, ...]]]] = {}
        self._expert_of: dict[str, int] = {}
        for layer in layers:
            unit = self.config.units[layer]
            names = self.format.order(self.config, loaded_names(self.config, unit))
            by_tier = {t: tuple(n for n in names if tier_of[n] is t) for t in Tier}
            self._parts[layer] = [(stores[t], group) for t, group in by_tier.items() if group]
            self._expert_of |= self._experts_of(layer, names)
        no_slot = Slot(0)  # what is resident takes no transient room
        self._resident = {
            layer: self._assemble(
                layer, here.load([name for _, names in parts for name in names], no_slot)
            )
            for layer, parts in self._parts.items()
            if {id(store) for store, _ in parts} <= {id(stores[Tier.DEVICE])}
        }
        table = self.format.stored_names(self.config, TOKEN_TABLE) if 0 in self._parts else ()
        self._table = [(stores[tier_of[name]], name) for name in table]
        self._dense = Dense(self.dtype)

    @staticmethod
    def _fill(
        model: StoredModel,
        tier_of: dict[str, Tier],
        device: DeviceStore,
        host: HostStore,
        context: DiskContext | None,
    ) -> None:
        files = {n: f for n, f in model.arrays.items() if tier_of.get(n, Tier.DISK) != Tier.DISK}
        source = DiskStore(files, context)
        try:
            for name, file in files.items():
                block = aligned_bytes(round_up(file.nbytes) + PAGE)
                array = source.read_into(name, block)
                array = model.format.settled(model.config, name, array)
                (device if tier_of[name] is Tier.DEVICE else host).put(name, array)
        finally:
            source.close()

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the dense copies that are there now."""
        return self._dense.nbytes

    @property
    def disk_bytes(self) -> int:
        """Bytes read from the disk tier so far."""
        return self._disk.bytes_read

    def resident(self, layer: int) -> LayerWeights | None:
        """The layer's weights if all of them lie on the device, where loading is no work."""
        return self._resident.get(layer)

    def dense(self, weights: LayerWeights) -> LayerWeights:
        """``weights`` as computing takes them: what is in codes is dequantised, once per load.

        The batches that compute with the same layer one after another share the result.
        """
        return self._dense.of(weights) if self.format.unpacks else weights

    def token_rows(self, tokens: np.ndarray) -> jax.Array:
        """Rows of the token table, (batch, seq, embed), of ``tokens`` (batch, seq), on the device.

        Looked up where the table lies: it is as large as several layers.
        """
        fields = [store.take(name, tokens) for store, name in self._table]
        flat = dict(zip((name for _, name in self._table), fields, strict=True))
        (rows,) = self.format.assemble(self.config, flat, self._settled).values()
        return _dense(rows, self.dtype) if isinstance(rows, Packed) else rows

    def slot_nbytes(self, layer: int) -> int:
        """Bytes of slot memory that loading ``layer`` may take."""
        return sum(store.slot_nbytes(names) for store, names in self._parts[layer])

    def load(self, layer: int, slot: Slot, experts: Container[int] | None = None) -> LayerWeights:
        """The tensors of ``layer`` on the device, ready.

        Args:
            experts: Of a unit of experts: which of them; None: all tensors.
        """
        flat: dict[str, jax.Array] = {}
        for store, names in self._parts[layer]:
            if experts is not None:
                names = tuple(name for name in names if self._expert_of[name] in experts)
            flat.update(store.load(names, slot))
        return self._assemble(layer, flat)

    def _experts_of(self, layer: int, names: Sequence[str]) -> dict[str, int]:
        """Stored name -> expert, of a unit of experts."""
        if unit_kinds(self.config)[layer].role != "experts":
            return {}
        modules = {name: name.split(".")[1] for name in names}
        return {name: int(module.removeprefix("expert_")) for name, module in modules.items()}

    def _assemble(self, layer: int, arrays: dict[str, jax.Array]) -> LayerWeights:
        unit = self.config.units[layer]
        flat = self.format.assemble(self.config, arrays, self._settled)
        table = None
        if unit_kinds(self.config)[layer].role == "head":
            table = flat[head_table(self.config)]
        own = {name: array for name, array in flat.items() if name.startswith(unit + ".")}
        return LayerWeights(nest(own).get(unit, {}), table)

    def close(self) -> None:
        self._resident.clear()
        self._dense.clear()
        for store in self._stores.values():
            store.close()

    def __enter__(self) -> LayerLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
