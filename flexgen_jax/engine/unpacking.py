"""Dense copies of what is kept in codes, in memory that is used again and again.

Fresh memory costs more in page faults than dequantising does, so the copy made last is donated to
the next of its kind.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from flexgen_jax.models.quantization import Quantized, dense_tree


class Dense:
    """The dense copy of the latest tree of each kind (structure, shapes and place).

    A copy is valid until the next tree of its kind is asked for: computations that were dispatched
    with it before are waited for by JAX.

    Args:
        dtype: Of the copies.
    """

    def __init__(self, dtype: Any) -> None:
        self._dtype = str(dtype)
        self._latest: dict[Any, tuple[Any, Any]] = {}

    def of(self, tree: Any) -> Any:
        """``tree`` as arrays; itself if it is. The same object again costs nothing."""
        leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Quantized))
        if not any(isinstance(leaf, Quantized) for leaf in leaves):
            return tree
        arrays, structure = jax.tree.flatten(tree)
        kind = structure, tuple((x.shape, x.dtype, x.sharding) for x in arrays)
        source, dense = self._latest.pop(kind, (None, None))
        if source is not tree or dense is None:
            if dense is None:
                shapes = jax.eval_shape(partial(dense_tree, dtype=self._dtype), tree)
                dense = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
                dense = jax.device_put(dense, arrays[0].sharding)
            dense = _dequantize_into(dense, tree, self._dtype)
        self._latest[kind] = tree, dense
        return dense

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(x.nbytes for _, dense in self._latest.values() for x in jax.tree.leaves(dense))

    def clear(self) -> None:
        """Gives the copies' memory back."""
        self._latest.clear()


@partial(jax.jit, static_argnums=2, donate_argnums=0, keep_unused=True)
def _dequantize_into(old: Any, tree: Any, dtype: str) -> Any:
    """``tree`` as arrays, in the memory of ``old``."""
    del old
    return dense_tree(tree, dtype)
