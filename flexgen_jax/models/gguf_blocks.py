"""Arrays in the blocks of GGUF files, unpacked as the package ``gguf`` does, bit for bit.

A row is a whole number of blocks; a block holds the codes of 32 or 256 neighbours, and their scales
(ggml's ``block_q4_0`` and so on). All products are of so few bits that float32 holds them exactly,
so whether they are fused with a sum makes no difference. Knows no file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from flexgen_jax.models.packed import Packed

# Kind -> elements and bytes of a block.
BLOCK_SIZES = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "MXFP4": (32, 17),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}


@flax.struct.dataclass
class Blocks(Packed):
    """A matrix of which each row is in blocks.

    Attributes:
        data: The rows' bytes.
        kind: A key of :data:`BLOCK_SIZES`.
        heads: The rows of each of so many heads lie as pairs that rotary positions turn together,
            and are wanted half a head apart; 0: they lie as they are wanted.
        swapped: The array is the transpose.
    """

    data: UInt8[Array, "*dims nbytes"]
    kind: str = flax.struct.field(pytree_node=False)
    heads: int = flax.struct.field(pytree_node=False, default=0)
    swapped: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        elements, nbytes = BLOCK_SIZES[self.kind]
        shape = (*self.data.shape[:-1], self.data.shape[-1] // nbytes * elements)
        return shape[::-1] if self.swapped else shape

    def __getitem__(self, rows: Any) -> Blocks:
        if self.swapped or self.heads:
            raise TypeError("rows of a matrix that lies another way round")
        return Blocks(self.data[rows], self.kind)

    def dense(self, dtype: Any) -> Array:
        _, nbytes = BLOCK_SIZES[self.kind]
        blocks = self.data.reshape(-1, nbytes)
        values = _UNPACK[self.kind](blocks).reshape(*self.data.shape[:-1], -1)
        return arranged(values, self.heads, swapped=self.swapped).astype(dtype)


@flax.struct.dataclass
class Rotated(Packed):
    """A float array whose rows lie as :class:`Blocks` has it with ``heads``."""

    values: Array
    heads: int = flax.struct.field(pytree_node=False)
    swapped: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape[::-1] if self.swapped else self.values.shape

    def dense(self, dtype: Any) -> Array:
        return arranged(self.values, self.heads, swapped=self.swapped).astype(dtype)


def arranged(rows: Array, heads: int, *, swapped: bool) -> Array:
    """``rows`` from pairs to halves of each of ``heads`` (0: as they are), or its transpose."""
    if heads:
        pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
        rows = pairs.swapaxes(1, 2).reshape(rows.shape)
    return rows.T if swapped else rows


def _half(pairs: UInt8[Array, "blocks 2"]) -> Float[Array, "blocks 1"]:
    """The float16 in two bytes."""
    halves = jax.lax.bitcast_convert_type(pairs, jnp.float16)
    return halves[..., None].astype(jnp.float32)


def _signed(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.int8).astype(jnp.float32)


def _nibbles(codes: UInt8[Array, "blocks nbytes"], width: int) -> UInt8[Array, "blocks elements"]:
    """Of each ``width`` bytes the lower halves, then the upper ones."""
    groups = codes.reshape(codes.shape[0], -1, 1, width)
    both = jnp.concatenate([groups & 15, groups >> 4], axis=2)
    return both.reshape(codes.shape[0], -1)


def _fifth_bits(bits: UInt8[Array, "blocks 4"]) -> UInt8[Array, "blocks 32"]:
    """The 32 bits of four bytes, each in the place of a code's fifth."""
    places = jnp.arange(8, dtype=jnp.uint8)
    return (((bits[..., None] >> places) & 1) << 4).reshape(bits.shape[0], 32)


def _q4_0(b: Array) -> Array:
    return _half(b[:, :2]) * (_nibbles(b[:, 2:], 16).astype(jnp.float32) - 8)


def _q4_1(b: Array) -> Array:
    return _half(b[:, :2]) * _nibbles(b[:, 4:], 16).astype(jnp.float32) + _half(b[:, 2:4])


def _q5_0(b: Array) -> Array:
    codes = _nibbles(b[:, 6:], 16) | _fifth_bits(b[:, 2:6])
    return _half(b[:, :2]) * (codes.astype(jnp.float32) - 16)


def _q5_1(b: Array) -> Array:
    codes = _nibbles(b[:, 8:], 16) | _fifth_bits(b[:, 4:8])
    return _half(b[:, :2]) * codes.astype(jnp.float32) + _half(b[:, 2:4])


def _q8_0(b: Array) -> Array:
    return _signed(b[:, 2:]) * _half(b[:, :2])


def _mxfp4(b: Array) -> Array:
    exponents = b[:, :1].astype(jnp.uint32)
    # 2^(exponent - 128): half the scale, as the values below are twice theirs. Of 0 and 1 it would
    # be no normal number, which devices may take for 0.
    bits = jnp.maximum(exponents, 2) - 1 << 23
    scale = jax.lax.bitcast_convert_type(bits, jnp.float32)
    scale = scale * jnp.where(exponents < 2, 0.0, 1.0)
    values = jnp.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], jnp.float32)
    return scale * values[_nibbles(b[:, 1:], 16)]


def _k_scales(packed: UInt8[Array, "blocks 12"]) -> tuple[Array, Array]:
    """Scales and minima of the eight parts of a block, of 6 bits each."""
    d, m, both = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = jnp.concatenate([d & 0x3F, (both & 0x0F) | ((d >> 2) & 0x30)], axis=-1)
    minima = jnp.concatenate([m & 0x3F, (both >> 4) | ((m >> 2) & 0x30)], axis=-1)
    return scales.astype(jnp.float32), minima.astype(jnp.float32)


def _k(b: Array, codes: Array) -> Array:
    scales, minima = _k_scales(b[:, 4:16])
    scale = (_half(b[:, :2]) * scales)[..., None]
    minimum = (_half(b[:, 2:4]) * minima)[..., None]
    parts = codes.reshape(b.shape[0], 8, 32).astype(jnp.float32)
    return (scale * parts - minimum).reshape(b.shape[0], -1)


def _q4_k(b: Array) -> Array:
    return _k(b, _nibbles(b[:, 16:], 32))


def _q5_k(b: Array) -> Array:
    places = jnp.arange(8, dtype=jnp.uint8)[:, None]
    fifth = ((b[:, None, 16:48] >> places) & 1) << 4  # (blocks, 8, 32)
    return _k(b, _nibbles(b[:, 48:], 32) | fifth.reshape(b.shape[0], -1))


def _q6_k(b: Array) -> Array:
    low = _nibbles(b[:, :128], 64)
    high = b[:, 128:192].reshape(b.shape[0], 2, 1, 32)
    places = jnp.array([0, 2, 4, 6], jnp.uint8)[:, None]
    codes = low | (((high >> places) & 3) << 4).reshape(b.shape[0], -1)
    scale = (_half(b[:, 208:]) * _signed(b[:, 192:208]))[..., None]
    parts = codes.reshape(b.shape[0], 16, 16).astype(jnp.float32) - 32
    return (scale * parts).reshape(b.shape[0], -1)


_UNPACK: dict[str, Callable[[Array], Array]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "MXFP4": _mxfp4,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
