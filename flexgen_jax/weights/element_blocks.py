"""The elements of a tensor a few megabytes at a time, as they lie or transposed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from flexgen_jax.models.family import Config
from flexgen_jax.weights.tensor_file import SourceError
from flexgen_jax.weights.weight_format import WeightFormat
from storage.array_file import ArrayFile
from storage.checksums import is_finite, tensor_checksum

_BLOCK_NBYTES = 8 << 20
# A transposing block takes at least so many columns of the source: less than a page of each row
# would read the same pages again for the next block.
_MIN_COLUMNS = 512
# Rows transposed at once: numpy's copy of a transposed array is bound by cache misses, and strips
# of this height are 2-4 times faster than the whole.
_STRIP = 16


def blocks_of(source: np.ndarray, dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
    """``source`` in C order and ``dtype``."""
    rows = max(1, _BLOCK_NBYTES // max(1, math.prod(source.shape[1:]) * dtype.itemsize))
    for start in range(0, len(source), rows):
        with np.errstate(over="ignore"):  # is found by who looks for what is not finite
            block = np.ascontiguousarray(source[start : start + rows], dtype)
        yield block


def transposed_blocks(source: np.ndarray, dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
    """The transpose of the matrix ``source`` in C order and ``dtype``."""
    n_out, n_in = source.shape
    columns = max(_MIN_COLUMNS, _BLOCK_NBYTES // (n_out * dtype.itemsize))
    for start in range(0, n_in, columns):
        stop = min(n_in, start + columns)
        block = np.empty((stop - start, n_out), dtype)
        for row in range(0, n_out, _STRIP):
            with np.errstate(over="ignore"):
                strip = source[row : row + _STRIP, start:stop].astype(dtype, copy=False)
            block[:, row : row + _STRIP] = strip.T
        yield block


def finite(blocks: Iterator[np.ndarray], what: str) -> Iterator[np.ndarray]:
    """``blocks``, float32 or bfloat16, looked over on their way.

    Args:
        what: Whose they are, and where they lie.

    Raises:
        SourceError: one of them has a value that is no number.
    """
    for block in blocks:
        if not is_finite(block):
            raise SourceError(
                f"{what} has values that are not numbers in {block.dtype.name} (NaN or infinity): "
                "nothing that is computed with them would mean anything; download or save the "
                "model again"
            )
        yield block


def read_array(file: ArrayFile) -> np.ndarray:
    """All of a stored array.

    Raises:
        SourceError: it is not one uncompressed chunk, no longer whole, or not what was written.
    """
    found = read_elements(file, 0, math.prod(file.shape))
    if file.checksum is not None:
        check_content(file, tensor_checksum(found.view(np.uint8)))
    return found.reshape(file.shape)


def check_content(file: ArrayFile, checksum: str) -> None:
    """Whether ``checksum`` is that of ``file``, if it has one.

    Raises:
        SourceError: it is not.
    """
    if file.checksum not in (None, checksum):
        raise SourceError(
            f"{file.chunk} is damaged: its bytes are not those that were written (checksum "
            f"{checksum}, expected {file.checksum}); convert the model again"
        )


def read_elements(file: ArrayFile, first: int, count: int) -> np.ndarray:
    """Some elements of a stored array, in C order.

    Raises:
        SourceError: as :func:`read_array`.
    """
    if not file.raw:
        raise SourceError(f"{file.directory} is not one uncompressed chunk: convert anew")
    offset = (file.offset or 0) + first * file.dtype.itemsize
    found = np.fromfile(file.chunk, file.dtype, count, offset=offset)
    if found.size != count:
        raise SourceError(
            f"{file.chunk} is truncated: {found.size} elements from {first} on, expected {count}"
        )
    return found


def dense_array(
    form: WeightFormat, config: Config, arrays: Mapping[str, ArrayFile], name: str
) -> np.ndarray:
    """A parameter the way round that it is stored; codes as what they stand for.

    Args:
        arrays: Of the store, by their stored names.

    Raises:
        SourceError: an array is not one uncompressed chunk.
    """
    flat = {n: read_array(arrays[n]) for n in form.stored_names(config, name)}
    found = form.assemble(config, flat)[form.array_name(config, name)]
    if isinstance(found, np.ndarray):
        return found
    import jax
    import jax.numpy as jnp

    from flexgen_jax.models.packed import dense_jit

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return np.asarray(dense_jit(jax.tree.map(jnp.asarray, found), form.dtype))
