"""Group-wise quantisation: asymmetric min-max codes of 4 or 8 bits (paper, section 5).

Groups lie along the last axis: each has a scale and a zero, in bfloat16, and an element is
``zero + code * scale``. A :class:`Quantized` array is a pytree leaf type: it may stand wherever an
array may that is only multiplied with, looked up in, or attended to. Knows no tier and no file.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, UInt8

from flexgen_jax.models.packed import Packed

BITS = (4, 8)
GROUP = 64
# What is larger saturates, infinities too: a group's range then is a finite float32.
_LARGEST = float(2.0**126)
_SMALLEST = float(np.finfo(np.float32).tiny)


@flax.struct.dataclass
class Quantized(Packed):
    """An array in codes.

    Attributes:
        codes: The last axis, filled up to whole groups; of 4 bits, a byte holds one of the first
            half of its group, below, and the one as far into the second half. So unpacking is two
            plain runs over the bytes, which XLA makes vector code of.
        affine: The groups' scales, then their zeros, along the last axis.
        bits: 4 or 8.
        size: Of the last axis.
    """

    codes: UInt8[Array, "*dims packed"]
    affine: BFloat16[Array, "*dims two_groups"]
    bits: int = flax.struct.field(pytree_node=False)
    size: int = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], self.size)

    def __getitem__(self, rows: Any) -> Quantized:
        """Indexing of the leading axes."""
        return Quantized(self.codes[rows], self.affine[rows], self.bits, self.size)

    def dense(self, dtype: Any) -> Array:
        return dequantize(self, dtype)

    @classmethod
    def packed(
        cls,
        codes: UInt8[Array, "*dims groups width"],
        scale: BFloat16[Array, "*dims groups"],
        zero: BFloat16[Array, "*dims groups"],
        bits: int,
        size: int,
    ) -> Quantized:
        """Of codes in groups, one a byte."""
        if bits == 4:
            low, high = jnp.split(codes, 2, axis=-1)
            codes = low | (high << 4)
        codes = codes.reshape(*codes.shape[:-2], -1)
        return cls(codes, jnp.concatenate([scale, zero], axis=-1), bits, size)


def grouping(size: int, group: int = GROUP) -> tuple[int, int]:
    """How many groups an axis of ``size`` has, and their size: equal, even, at most ``group``.

    80 elements in groups of at most 64 are two groups of 40, not 64 and 16.
    """
    count = -(-size // group)
    return count, -(-size // (2 * count)) * 2


def quantized_shapes(
    shape: tuple[int, ...], bits: int, group: int = GROUP
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Field -> (shape, dtype) of the two arrays that an array of ``shape`` becomes."""
    count, size = grouping(shape[-1], group)
    return {
        "codes": ((*shape[:-1], count * size * bits // 8), "uint8"),
        "affine": ((*shape[:-1], 2 * count), "bfloat16"),
    }


def _truncated(x: Array) -> tuple[Array, Array]:
    """The float32 ``x`` cut to bfloat16's bits, and whether that lost any."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return bits & jnp.uint32(0xFFFF0000), (bits & jnp.uint32(0xFFFF)) != 0


def _outward(bits: Array, step: Array) -> BFloat16[Array, "*dims"]:
    """The truncated ``bits``, one step away from zero where ``step``."""
    bits = jnp.where(step, bits + jnp.uint32(0x10000), bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)


def _floor(x: Array) -> BFloat16[Array, "*dims"]:
    bits, lost = _truncated(x)
    return _outward(bits, lost & (x < 0))


def _ceil(x: Array) -> BFloat16[Array, "*dims"]:
    bits, lost = _truncated(x)
    return _outward(bits, lost & (x > 0))


def quantize(x: Float[Array, "*dims size"], *, bits: int = 4, group: int = GROUP) -> Quantized:
    """``x`` in codes: each element is off by at most half its group's scale.

    Zeros are rounded down and scales up to bfloat16, so that the codes reach every element of the
    group. A constant group has codes 0. Infinities, and what is beyond 2^126, saturate; a NaN
    makes its group NaN.

    Args:
        bits: 4 or 8.
        group: The most elements of a group, along the last axis.
    """
    if bits not in BITS:
        raise ValueError(f"bits must be 4 or 8, got {bits!r}")
    groups = in_groups(x, group)
    zero = _floor(groups.min(axis=-1))
    low = zero.astype(jnp.float32)
    levels = (1 << bits) - 1
    scale = _ceil(jnp.maximum((groups.max(axis=-1) - low) / levels, _SMALLEST))
    steps = (groups - low[..., None]) / scale.astype(jnp.float32)[..., None]
    codes = jnp.clip(jnp.round(steps), 0, levels).astype(jnp.uint8)
    return Quantized.packed(codes, scale, zero, bits, x.shape[-1])


def in_groups(x: Float[Array, "*dims size"], group: int) -> Float[Array, "*dims groups width"]:
    """``x`` in float32, finite but for NaN, cut into groups; the last is filled up with its end."""
    count, width = grouping(x.shape[-1], group)
    x32 = jnp.clip(x.astype(jnp.float32), -_LARGEST, _LARGEST)
    widths = [(0, 0)] * (x.ndim - 1) + [(0, count * width - x.shape[-1])]
    return jnp.pad(x32, widths, mode="edge").reshape(*x.shape[:-1], count, width)


def dequantize(q: Quantized, dtype: Any = jnp.float32) -> Float[Array, "*dims size"]:
    """The inverse of :func:`quantize`, computed in float32 and returned as ``dtype``."""
    scale, zero = jnp.split(q.affine, 2, axis=-1)
    codes = q.codes.reshape(*scale.shape, -1)
    if q.bits == 4:
        codes = jnp.concatenate([codes & 15, codes >> 4], axis=-1)
    # Widened behind the broadcast: before it, XLA:CPU finds no vector code for the result.
    scale, zero = (jnp.broadcast_to(x[..., None], codes.shape) for x in (scale, zero))
    x = zero.astype(jnp.float32) + codes.astype(jnp.float32) * scale.astype(jnp.float32)
    return x.reshape(*q.codes.shape[:-1], -1)[..., : q.size].astype(dtype)
