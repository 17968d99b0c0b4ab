"""How the parameters of a checkpoint lie that is used in place: each in the bytes as published.

What is computed with is what a weight store of the same dtype has: the same names, the same way
round, the same bits. Where a parameter lies otherwise, it is a
:class:`~flexgen_jax.models.packed.Packed`, which travels as it lies.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import numpy as np

from flexgen_jax.models.family import Config
from flexgen_jax.weights.manifest import TensorEntry
from flexgen_jax.weights.weight_format import WeightFormat
from storage.memory import aligned_bytes

_FLOATS = ("float16", "bfloat16", "float32", "float64")
Make = Callable[[list[Any], str], Any]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """How one parameter lies.

    Attributes:
        arrays: What it consists of: name -> entry. Parameters that are parts of a fused matrix in
            codes have the same arrays.
        make: Arrays in this order, dtype -> what stands for the parameter, or the array itself.
        packed: Whether it takes a dense copy to compute with.
        settles: Whether its dense copy takes no more bytes: then it is made when the weights are
            put on the device or the host, and not at each load.
    """

    arrays: Mapping[str, TensorEntry]
    make: Make
    packed: bool
    settles: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class PublishedFormat(WeightFormat):
    """Of one checkpoint.

    Attributes:
        leaves: Parameter -> how it lies.
        described: For people: what the weights are, such as ``Q4_K``.
    """

    leaves: Mapping[str, Leaf] = dataclasses.field(default_factory=dict)
    described: str = ""

    # As long as the checkpoint is open, and no other is the same.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @classmethod
    def of(
        cls, dtype: str, leaves: Mapping[str, Leaf], described: str, layout: str | None = None
    ) -> PublishedFormat:
        """Computed with as a store of ``dtype`` is, matrices with ``layout`` if there is one."""
        layout = layout or WeightFormat.usual(dtype).layout
        return cls(dtype, layout=layout, leaves=leaves, described=described)

    def __str__(self) -> str:
        return f"{self.dtype} of {self.described}"

    @property
    def coded(self) -> bool:
        return any(
            e.dtype not in _FLOATS for leaf in self.leaves.values() for e in leaf.arrays.values()
        )

    @property
    def unpacks(self) -> bool:
        return any(leaf.packed for leaf in self.leaves.values())

    def unpacked(self, config: Config, name: str) -> bool:
        return self.leaves[name].packed

    @functools.cached_property
    def _owners(self) -> dict[str, list[str]]:
        """Array -> parameters."""
        found: dict[str, list[str]] = {}
        for name, leaf in self.leaves.items():
            for array in leaf.arrays:
                found.setdefault(array, []).append(name)
        return found

    def entries(self, config: Config) -> dict[str, TensorEntry]:
        return {array: e for leaf in self.leaves.values() for array, e in leaf.arrays.items()}

    def stored_names(self, config: Config, name: str) -> tuple[str, ...]:
        return tuple(self.leaves[name].arrays)

    def order(self, config: Config, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(array for name in names for array in self.leaves[name].arrays))

    def settles(self, config: Config, stored: str) -> bool:
        return self.leaves[self._owners[stored][0]].settles

    def settled(self, config: Config, stored: str, array: np.ndarray) -> np.ndarray:
        leaf = self.leaves[self._owners[stored][0]]
        if not leaf.settles:
            return array
        import jax

        from flexgen_jax.models.packed import dense_jit

        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            found = dense_jit(leaf.make([jax.numpy.asarray(array)], self.dtype), self.dtype)
            # Memory of its own: what is seen of a JAX array keeps it alive longer than is needed.
            kept = aligned_bytes(found.nbytes).view(found.dtype).reshape(found.shape)
            np.copyto(kept, np.asarray(found))
            found.delete()
        return kept

    def assemble(
        self, config: Config, flat: Mapping[str, Any], settled: Container[str] = ()
    ) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in dict.fromkeys(name for array in flat for name in self._owners[array]):
            leaf, plain = self.leaves[name], self.array_name(config, name)
            arrays = [flat[array] for array in leaf.arrays]
            done = leaf.settles and all(array in settled for array in leaf.arrays)
            found[plain] = arrays[0] if done else leaf.make(arrays, self.dtype)
        return found


def float_leaf(name: str, entry: TensorEntry, dtype: str, *, swapped: bool) -> Leaf:
    """Of a parameter in floats.

    Args:
        name: Of its one array. ``entry``: as it lies.
        dtype: That is computed with.
        swapped: What is computed with is the transpose.
    """
    packed = swapped or entry.dtype != dtype

    def make(arrays: list[Any], dtype: str) -> Any:
        from flexgen_jax.models.packed import Published

        return Published(arrays[0], swapped) if packed else arrays[0]

    size = TensorEntry.of(entry.shape, dtype).nbytes
    return Leaf({name: entry}, make, packed, settles=packed and size <= entry.nbytes)
