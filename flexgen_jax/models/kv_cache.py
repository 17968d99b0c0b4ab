"""The KV cache of one layer and batch: what it is kept as, and the two ways to write it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flexgen_jax.models.quantization import GROUP, Quantized, quantize, quantized_shapes


class LayerCache(NamedTuple):
    """Keys and values, ``(batch, kv_heads, seq, head_dim)``: what decodes fastest on a CPU."""

    key: Float[Array, "batch kv_heads seq head_dim"]
    value: Float[Array, "batch kv_heads seq head_dim"]


class KeptCache(NamedTuple):
    """Keys and values as a :class:`CacheFormat` keeps them."""

    key: Float[Array, "batch kv_heads seq head_dim"] | Quantized
    value: Float[Array, "batch kv_heads seq head_dim"] | Quantized


@dataclasses.dataclass(frozen=True)
class CacheFormat:
    """How keys and values are kept: as they are, or in codes of ``bits`` along ``head_dim``."""

    bits: int | None = None
    group: int = GROUP

    def pack(self, new: LayerCache) -> KeptCache:
        """``new`` as it is kept."""
        if self.bits is None:
            return KeptCache(*new)
        return KeptCache(*(quantize(x, bits=self.bits, group=self.group) for x in new))

    def unflatten(self, arrays: Sequence[Array], head_dim: int) -> tuple[Array | Quantized, ...]:
        """The inverse of ``jax.tree.leaves`` of keys, of values, or of both."""
        if self.bits is None:
            return tuple(arrays)
        pairs = zip(arrays[::2], arrays[1::2], strict=True)
        return tuple(Quantized(codes, affine, self.bits, head_dim) for codes, affine in pairs)

    def position_nbytes(self, head_dim: int, dtype: Any) -> list[int]:
        """Bytes that keys, or values, take per position and head: of each stored array."""
        if self.bits is None:
            return [head_dim * jnp.dtype(dtype).itemsize]
        shapes = quantized_shapes((head_dim,), self.bits, self.group).values()
        return [shape[0] * jnp.dtype(kind).itemsize for shape, kind in shapes]


def write_prompt(
    key: Float[Array, "batch kv_heads seq head_dim"],
    value: Float[Array, "batch kv_heads seq head_dim"],
    cache_len: int,
) -> LayerCache:
    """A cache of ``cache_len`` positions whose first ``seq`` are the prompt's."""
    room = cache_len - key.shape[2]
    if room < 0:
        raise ValueError(f"cache_len {cache_len} is shorter than the prompt, {key.shape[2]}")
    widths = ((0, 0), (0, 0), (0, room), (0, 0))
    return LayerCache(jnp.pad(key, widths), jnp.pad(value, widths))


def in_ring(cache: LayerCache, capacity: int, length: int) -> LayerCache:
    """What a ring of ``capacity`` positions keeps of sequences of ``length``, p at p % capacity.

    ``cache`` has the last of them; what it lacks of the others is zeros.
    """
    have = min(length, capacity)
    shift = (length - have) % capacity

    def kept(x: Array) -> Array:
        x = x[:, :, max(0, x.shape[2] - have) :]
        x = jnp.pad(x, ((0, 0), (0, 0), (have - x.shape[2], 0), (0, 0)))
        return jnp.roll(x, shift, axis=2) if shift else x

    return LayerCache(kept(cache.key), kept(cache.value))


def write_token(
    cache: LayerCache,
    key: Float[Array, "batch kv_heads 1 head_dim"],
    value: Float[Array, "batch kv_heads 1 head_dim"],
    position: Int[Array, ""],
) -> LayerCache:
    """The cache with one more position filled; in place where the cache is donated."""
    return LayerCache(
        jax.lax.dynamic_update_slice_in_dim(cache.key, key, position, axis=2),
        jax.lax.dynamic_update_slice_in_dim(cache.value, value, position, axis=2),
    )
