"""Matrices in the codes that checkpoints are published in: GPTQ, AWQ, compressed-tensors, FP8, NF4.

Each kind is made dense in float32 from its codes and scales. What is computed exactly (an integer
times a scale of 16 bits) is the same whether a compiler fuses it or not. Knows no file.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from flexgen_jax.models.packed import Packed

Layout = Literal["in_out", "out_in"]

# In which nibble of a word AWQ has the code of each of eight neighbours.
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


@flax.struct.dataclass
class PublishedCodes(Packed):
    """The base: what a matrix is beside its arrays.

    Attributes:
        n_in, n_out: Of the whole matrix in the checkpoint.
        rows: The first and the last but one of the outputs that are wanted.
        swapped: The array is the transpose of what lies there.
    """

    n_in: int = flax.struct.field(pytree_node=False)
    n_out: int = flax.struct.field(pytree_node=False)
    rows: tuple[int, int] = flax.struct.field(pytree_node=False)
    swapped: bool = flax.struct.field(pytree_node=False)

    @property
    def layout(self) -> Layout:
        """Which way the codes lie."""
        return "out_in"

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.n_in, self.rows[1] - self.rows[0]
        return shape if (self.layout == "in_out") != self.swapped else shape[::-1]

    def dense(self, dtype: Any) -> Array:
        x, (first, last) = self.whole(), self.rows
        x = x[:, first:last] if self.layout == "in_out" else x[first:last]
        return (x.T if self.swapped else x).astype(dtype)

    def whole(self) -> Float[Array, "rows columns"]:
        """All of the matrix as it lies, in float32."""
        raise NotImplementedError


@flax.struct.dataclass
class PackedIntegers(PublishedCodes):
    """Integers of 2, 4 or 8 bits in words of 32: an element is ``(code - zero) * scale``.

    ====================  ======================  =========================  ======================
    kind                  words                   scales                     zeros
    ====================  ======================  =========================  ======================
    GPTQ                  (n_in packed, n_out)    (groups, n_out)            (groups, n_out packed)
    AWQ                   (n_in, n_out packed)    (groups, n_out)            (groups, n_out packed)
    compressed-tensors    (n_out, n_in packed)    (n_out, groups)            (n_out packed, groups)
    ====================  ======================  =========================  ======================

    Attributes:
        zeros: None: all are half of the range.
        groups: Of each input; None: equally many neighbours share one.
        kind: ``gptq``, ``awq`` or ``compressed-tensors``.
        zeros_less_one: They are stored so: as words of which each code's one was subtracted.
    """

    words: Int[Array, "rows columns"]
    scales: Float[Array, "rows columns"]
    zeros: Int[Array, "rows columns"] | None
    groups: Int[Array, " n_in"] | None
    kind: str = flax.struct.field(pytree_node=False)
    bits: int = flax.struct.field(pytree_node=False)
    zeros_less_one: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def layout(self) -> Layout:
        return "out_in" if self.kind == "compressed-tensors" else "in_out"

    def whole(self) -> Float[Array, "rows columns"]:
        places = AWQ_PLACES if self.kind == "awq" else tuple(range(32 // self.bits))
        if self.layout == "out_in":
            shape, in_axis, code_axis, zero_axis = (self.n_out, self.n_in), 1, 1, 0
        else:
            shape, in_axis, zero_axis = (self.n_in, self.n_out), 0, 1
            code_axis = 0 if self.kind == "gptq" else 1
        codes = _unpacked(self.words, self.bits, places, code_axis)[: shape[0], : shape[1]]
        scales = self.scales.astype(jnp.float32)
        if self.zeros is None:
            zeros = jnp.full(scales.shape, 1 << (self.bits - 1), jnp.int32)
        elif self.zeros.dtype == jnp.int32:
            ones = sum(1 << place * self.bits for place in places) if self.zeros_less_one else 0
            zeros = _unpacked(self.zeros + jnp.int32(ones), self.bits, places, zero_axis)
            zeros = zeros[: scales.shape[0], : scales.shape[1]]
        else:  # signed numbers, one by one
            zeros = self.zeros.astype(jnp.int32) + (1 << (self.bits - 1))
        zeros, scales = (self._of_each_input(x, in_axis) for x in (zeros, scales))
        return (codes - zeros).astype(jnp.float32) * scales

    def _of_each_input(self, x: Array, axis: int) -> Array:
        """From groups to inputs."""
        if self.groups is not None:
            return jnp.take(x, self.groups, axis=axis, mode="clip")
        return repeated(x, axis, -(-self.n_in // x.shape[axis]), self.n_in)


@flax.struct.dataclass
class ScaledValues(PublishedCodes):
    """Small floats or integers (n_out, n_in), each times the scale of its block.

    Attributes:
        values: float8_e4m3fn or int8.
        scales: (rows of blocks, columns of blocks); or of all there is one.
        zeros: As ``scales``, subtracted from the values first; None: 0.
        block: Rows and columns of a block; the last of a row or column may be less.
        divisor: Of the scales.
    """

    values: Array
    scales: Float[Array, "..."]
    zeros: Int[Array, "..."] | None
    block: tuple[int, int] = flax.struct.field(pytree_node=False)
    divisor: float = flax.struct.field(pytree_node=False, default=1.0)

    def whole(self) -> Float[Array, "rows columns"]:
        values = self.values.astype(jnp.float32)
        if self.zeros is not None:
            values = values - self._of_each(self.zeros.astype(jnp.float32))
        scales = self.scales.astype(jnp.float32)
        if self.divisor != 1:
            scales = scales / self.divisor
        return values * self._of_each(scales)

    def _of_each(self, x: Array) -> Array:
        if x.size == 1:
            return x.reshape(1, 1)
        rows, columns = (
            -(-n // b) for n, b in zip((self.n_out, self.n_in), self.block, strict=True)
        )
        x = x.reshape(rows, columns)
        x = repeated(x, 0, self.block[0], self.n_out)
        return repeated(x, 1, self.block[1], self.n_in) if columns > 1 else x


@flax.struct.dataclass
class TableCodes(PublishedCodes):
    """Two codes of 4 bits a byte, the first one above: an element is ``table[code] * absmax``.

    What bitsandbytes calls NF4 and FP4. Blocks are neighbours in the order of (n_out, n_in).

    Attributes:
        codes: All of the matrix. ``table``: 16 values.
        absmax: Of each block; in codes of 8 bits, where ``nested`` is there.
        nested: Absmax of the absmax's blocks, and its table of 256 values.
        block: Elements. ``nested_block``: Blocks.
        offset: Added to an absmax in codes.
    """

    codes: UInt8[Array, "..."]
    table: Float[Array, " 16"]
    absmax: Array
    nested: tuple[Float[Array, " blocks"], Float[Array, " 256"]] | None
    block: int = flax.struct.field(pytree_node=False)
    nested_block: int = flax.struct.field(pytree_node=False, default=0)
    offset: float = flax.struct.field(pytree_node=False, default=0.0)

    def whole(self) -> Float[Array, "rows columns"]:
        absmax = self.absmax
        if self.nested is not None:
            maxima, table = self.nested
            found = table[absmax] * repeated(maxima, 0, self.nested_block, absmax.shape[0])
            absmax = found + jnp.float32(self.offset)
        both = self.codes.reshape(-1)
        codes = jnp.stack([both >> 4, both & 15], axis=-1).reshape(-1)[: self.n_in * self.n_out]
        scales = repeated(absmax.astype(jnp.float32), 0, self.block, codes.shape[0])
        values = self.table.astype(jnp.float32)[codes] * scales
        return values.reshape(self.n_out, self.n_in)


@flax.struct.dataclass
class Mxfp4(Packed):
    """FP4 (E2M1) with a power of two for each 32 neighbours, as gpt-oss stores its experts.

    Attributes:
        blocks: Two elements a byte, the first one below.
        scales: Exponents, of base 2, 127 more than they are.
    """

    blocks: UInt8[Array, "*dims groups 16"]
    scales: UInt8[Array, "*dims groups"]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.scales.shape[:-1], self.scales.shape[-1] * 32)

    def __getitem__(self, rows: Any) -> Mxfp4:
        """Indexing of the leading axes: some experts."""
        return Mxfp4(self.blocks[rows], self.scales[rows])

    def dense(self, dtype: Any) -> Array:
        values = jnp.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], jnp.float32)
        values = jnp.concatenate([values, -values])
        pairs = jnp.stack([values[self.blocks & 15], values[self.blocks >> 4]], axis=-1)
        groups = pairs.reshape(*self.scales.shape, 32)
        exponents = self.scales.astype(jnp.int32)[..., None] - 127
        return jnp.ldexp(groups, exponents).reshape(self.shape).astype(dtype)


def repeated(x: Array, axis: int, times: int, size: int) -> Array:
    """Each element ``times`` times along ``axis``, cut to ``size``; nothing is gathered."""
    x = jnp.expand_dims(x, axis + 1)
    x = jnp.broadcast_to(x, (*x.shape[: axis + 1], times, *x.shape[axis + 2 :]))
    x = x.reshape(*x.shape[:axis], math.prod(x.shape[axis : axis + 2]), *x.shape[axis + 2 :])
    return x[(slice(None),) * axis + (slice(size),)]


def _unpacked(words: Array, bits: int, places: tuple[int, ...], axis: int) -> Array:
    """The codes in ``words``, int32, of which each word has several neighbours along ``axis``."""
    shifts = bits * jnp.array(places, jnp.int32)
    shifts = shifts[:, None] if axis == 0 else shifts
    codes = (jnp.expand_dims(words, axis + 1) >> shifts) & ((1 << bits) - 1)
    shape = list(words.shape)
    shape[axis] *= len(places)
    return codes.reshape(shape)
