"""What stands for an array: kept and moved as it lies in a checkpoint, made an array to compute.

A :class:`Packed` is a kind of pytree leaf. It may stand wherever an array may that is only
multiplied with, looked up in, or attended to; :func:`dense` makes the array. Knows no tier and no
file.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array


class Packed:
    """The base of all kinds; each is a ``flax.struct`` dataclass of arrays.

    ``shape`` is that of the array that it stands for.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def __getitem__(self, rows: Any) -> Packed:
        """Indexing of the leading axes."""
        raise NotImplementedError

    def dense(self, dtype: Any) -> Array:
        """The array, in ``dtype``; pure."""
        raise NotImplementedError


@flax.struct.dataclass
class Published(Packed):
    """An array in another float type than is computed with, or lying the other way round.

    Attributes:
        values: As they lie.
        swapped: The array is the transpose of ``values``, a matrix.
    """

    values: Array
    swapped: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape[::-1] if self.swapped else self.values.shape

    def __getitem__(self, rows: Any) -> Published:
        if self.swapped:
            raise TypeError("rows of a matrix that lies the other way round")
        return Published(self.values[rows])

    def dense(self, dtype: Any) -> Array:
        values = self.values.T if self.swapped else self.values
        narrow = values.dtype == jnp.float16 and jnp.dtype(dtype) == jnp.bfloat16
        return _to_bfloat16(values) if narrow else values.astype(dtype)


def _to_bfloat16(x: Array) -> Array:
    """``x.astype(bfloat16)`` of float16, bit for bit but for a NaN's payload.

    With integers, of which XLA:CPU makes vector code: several times as fast as its own conversion.
    """
    wide = x.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(wide, jnp.uint32)
    even = (bits >> 16) & 1
    rounded = ((bits + jnp.uint32(0x7FFF) + even) >> 16).astype(jnp.uint16)
    rounded = jnp.where(wide != wide, jnp.uint16(0x7FC0), rounded)
    return jax.lax.bitcast_convert_type(rounded, jnp.bfloat16)


def is_packed(x: Any) -> bool:
    """For ``jax.tree``'s ``is_leaf``."""
    return isinstance(x, Packed)


def dense(x: Any, dtype: Any) -> Array:
    """``x`` as an array, which it may be already."""
    return x.dense(dtype) if isinstance(x, Packed) else x


dense_jit = jax.jit(dense, static_argnums=1)


def dense_tree(tree: Any, dtype: Any) -> Any:
    """All of ``tree`` as arrays."""
    return jax.tree.map(lambda x: dense(x, dtype), tree, is_leaf=is_packed)
