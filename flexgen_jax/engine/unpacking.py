"""Dense copies of what is kept packed, in memory that is used again and again.

Fresh memory costs more in page faults than unpacking does, so the copy made last is donated to the
next of its kind.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from flexgen_jax.models.packed import Packed, is_packed


class Dense:
    """The dense copy of the latest leaf of each kind: its place in a tree, its shapes and device.

    A copy is valid until the next tree with a leaf of its kind is asked for: computations that were
    dispatched with it before are waited for by JAX. By the leaf and not by the tree, since what
    lies on another tier may need no copy.

    Args:
        dtype: Of the copies.
    """

    def __init__(self, dtype: Any) -> None:
        self._dtype = str(dtype)
        self._copies: dict[Any, tuple[Packed, jax.Array]] = {}

    def of(self, tree: Any) -> Any:
        """``tree`` as arrays; itself if it is. The same leaves again cost nothing."""
        leaves, structure = jax.tree.flatten(tree, is_leaf=is_packed)
        if not any(isinstance(leaf, Packed) for leaf in leaves):
            return tree
        found = [
            self._copy(place, leaf) if isinstance(leaf, Packed) else leaf
            for place, leaf in enumerate(leaves)
        ]
        return jax.tree.unflatten(structure, found)

    def _copy(self, place: int, leaf: Packed) -> jax.Array:
        arrays, structure = jax.tree.flatten(leaf)
        kind = place, structure, tuple((x.shape, x.dtype, x.sharding) for x in arrays)
        source, copy = self._copies.pop(kind, (None, None))
        if source is not leaf or copy is None:
            if copy is None:
                shape = jax.eval_shape(partial(_dense, dtype=self._dtype), leaf)
                copy = jax.device_put(jnp.zeros(shape.shape, shape.dtype), arrays[0].sharding)
            copy = _dense_into(copy, leaf, self._dtype)
        self._copies[kind] = leaf, copy
        return copy

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(copy.nbytes for _, copy in self._copies.values())

    def clear(self) -> None:
        """Gives the copies' memory back."""
        self._copies.clear()


def _dense(leaf: Packed, dtype: str) -> jax.Array:
    return leaf.dense(dtype)


@partial(jax.jit, static_argnums=2, donate_argnums=0, keep_unused=True)
def _dense_into(old: jax.Array, leaf: Packed, dtype: str) -> jax.Array:
    """``leaf`` as an array, in the memory of ``old``."""
    del old
    return _dense(leaf, dtype)
