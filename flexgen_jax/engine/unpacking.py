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
        packed = {n: leaf for n, leaf in enumerate(leaves) if isinstance(leaf, Packed)}
        if not packed:
            return tree
        kinds = {place: _kind(place, leaf) for place, leaf in packed.items()}
        stale = [p for p, leaf in packed.items() if self._source(kinds[p]) is not leaf]
        if stale:
            sources = tuple(packed[place] for place in stale)
            old = tuple(self._room(kinds[p], leaf) for p, leaf in zip(stale, sources, strict=True))
            # In one call: a model with experts has tens of thousands of leaves a pass.
            made = _dense_into(old, sources, self._dtype)
            for place, leaf, copy in zip(stale, sources, made, strict=True):
                self._copies[kinds[place]] = leaf, copy
        for place in packed:
            leaves[place] = self._copies[kinds[place]][1]
        return jax.tree.unflatten(structure, leaves)

    def _source(self, kind: Any) -> Packed | None:
        """What the latest copy of a kind is of."""
        return self._copies[kind][0] if kind in self._copies else None

    def _room(self, kind: Any, leaf: Packed) -> jax.Array:
        """The memory of a copy that nobody needs any more, or new memory."""
        if kind in self._copies:
            return self._copies.pop(kind)[1]
        shape = jax.eval_shape(partial(_dense, dtype=self._dtype), leaf)
        return jax.device_put(
            jnp.zeros(shape.shape, shape.dtype), jax.tree.leaves(leaf)[0].sharding
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(copy.nbytes for _, copy in self._copies.values())

    def clear(self) -> None:
        """Gives the copies' memory back."""
        self._copies.clear()


def _kind(place: int, leaf: Packed) -> Any:
    arrays, structure = jax.tree.flatten(leaf)
    return place, structure, tuple((x.shape, x.dtype, x.sharding) for x in arrays)


def _dense(leaf: Packed, dtype: str) -> jax.Array:
    return leaf.dense(dtype)


@partial(jax.jit, static_argnums=2, donate_argnums=0, keep_unused=True)
def _dense_into(
    old: tuple[jax.Array, ...], leaves: tuple[Packed, ...], dtype: str
) -> tuple[jax.Array, ...]:
    """``leaves`` as arrays, in the memory of ``old``."""
    del old
    return tuple(_dense(leaf, dtype) for leaf in leaves)
