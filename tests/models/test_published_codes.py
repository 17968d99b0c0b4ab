"""Leaves in published codes against decoders written from the formats' descriptions, in NumPy."""

import ml_dtypes
import numpy as np
import pytest

from flexgen_jax.models.packed import dense_jit
from flexgen_jax.models.published_codes import (
    Mxfp4,
    PackedIntegers,
    ScaledValues,
    TableCodes,
)

N_IN, N_OUT, GROUP = 48, 32, 16


def words_of(codes, bits, axis, order=None):
    """One code after another into each word, by Python's integers."""
    codes = np.moveaxis(codes, axis, -1)
    count = 32 // bits
    order = order or range(count)
    found = np.zeros((*codes.shape[:-1], codes.shape[-1] // count), np.int64)
    for place in np.ndindex(found.shape):
        of_word = [int(codes[(*place[:-1], place[-1] * count + i)]) for i in order]
        found[place] = sum(code << bits * i for i, code in enumerate(of_word))
    return np.moveaxis(found, -1, axis).astype(np.uint32).view(np.int32)


def drawn(bits, seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, (N_IN, N_OUT))
    zeros = rng.integers(0, 1 << bits, (N_IN // GROUP, N_OUT))
    scales = rng.uniform(0.01, 1, zeros.shape).astype(np.float16)
    index = rng.permutation(np.arange(N_IN) // GROUP).astype(np.int32)
    return codes, zeros, scales, index


def decoded(codes, zeros, scales, index):
    return (codes - zeros[index]).astype(np.float32) * scales.astype(np.float32)[index]


@pytest.mark.parametrize("less_one", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq(bits, less_one):
    codes, zeros, scales, index = drawn(bits)
    stored = words_of(zeros, bits, 1)
    if less_one:
        ones = sum(1 << bits * i for i in range(32 // bits))
        stored = (stored.view(np.uint32) - np.uint32(ones)).view(np.int32)
    leaf = PackedIntegers(
        n_in=N_IN,
        n_out=N_OUT,
        rows=(8, 24),
        swapped=True,
        words=words_of(codes, bits, 0),
        scales=scales,
        zeros=stored,
        groups=index,
        kind="gptq",
        bits=bits,
        zeros_less_one=less_one,
    )
    found = np.asarray(dense_jit(leaf, "float32"))
    assert found.shape == leaf.shape == (16, N_IN)
    np.testing.assert_array_equal(found, decoded(codes, zeros, scales, index)[:, 8:24].T)


def test_awq():
    codes, zeros, scales, _ = drawn(4)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    leaf = PackedIntegers(
        n_in=N_IN,
        n_out=N_OUT,
        rows=(0, N_OUT),
        swapped=False,
        words=words_of(codes, 4, 1, order),
        scales=scales,
        zeros=words_of(zeros, 4, 1, order),
        groups=None,
        kind="awq",
        bits=4,
    )
    found = np.asarray(dense_jit(leaf, "float32"))
    plain = np.arange(N_IN) // GROUP
    np.testing.assert_array_equal(found, decoded(codes, zeros, scales, plain))


@pytest.mark.parametrize("zeros_as", ["none", "words", "int8"])
@pytest.mark.parametrize("ordered", [True, False])
def test_compressed_tensors(zeros_as, ordered):
    codes, zeros, scales, index = drawn(4)
    if zeros_as == "none":
        zeros = np.full_like(zeros, 8)
    stored = {
        "none": None,
        "words": words_of(zeros.T, 4, 0),
        "int8": (zeros.T - 8).astype(np.int8),
    }[zeros_as]
    leaf = PackedIntegers(
        n_in=N_IN,
        n_out=N_OUT,
        rows=(0, N_OUT),
        swapped=False,
        words=words_of(codes.T, 4, 1),
        scales=scales.T,
        zeros=stored,
        groups=index if ordered else None,
        kind="compressed-tensors",
        bits=4,
    )
    index = index if ordered else np.arange(N_IN) // GROUP
    found = np.asarray(dense_jit(leaf, "float32"))
    np.testing.assert_array_equal(found, decoded(codes, zeros, scales, index).T)


@pytest.mark.parametrize("block", [(16, 16), (20, 36), (1, N_IN), (N_OUT, N_IN)])
def test_scaled_float8(block):
    rng = np.random.default_rng(1)
    values = rng.integers(0, 0x7F, (N_OUT, N_IN), dtype=np.uint8)  # all but what is no number
    values |= rng.integers(0, 2, values.shape, dtype=np.uint8) << 7
    shape = tuple(-(-n // b) for n, b in zip(values.shape, block, strict=True))
    scales = rng.uniform(0.01, 1, shape).astype(np.float32)
    # Of eight bits: sign, four of an exponent less 7, three of a mantissa.
    sign, exponent, mantissa = values >> 7, (values >> 3) & 15, values & 7
    small = mantissa / 8 * 2.0**-6
    normal = (1 + mantissa / 8) * 2.0 ** (exponent.astype(int) - 7)
    plain = np.where(exponent == 0, small, normal) * np.where(sign == 1, -1, 1)
    of_each = scales.repeat(block[0], 0)[:N_OUT].repeat(block[1], 1)[:, :N_IN]
    leaf = ScaledValues(
        n_in=N_IN,
        n_out=N_OUT,
        rows=(0, N_OUT),
        swapped=False,
        values=values.view(ml_dtypes.float8_e4m3fn),
        scales=scales,
        zeros=None,
        block=block,
    )
    found = np.asarray(dense_jit(leaf, "float32"))
    np.testing.assert_array_equal(found, plain.astype(np.float32) * of_each)


def test_scaled_integers_with_zeros():
    rng = np.random.default_rng(2)
    values = rng.integers(-128, 128, (N_OUT, N_IN), dtype=np.int8)
    zeros = rng.integers(-128, 128, (N_OUT, 1), dtype=np.int8)
    scales = rng.uniform(0.01, 1, (N_OUT, 1)).astype(np.float32)
    leaf = ScaledValues(
        n_in=N_IN,
        n_out=N_OUT,
        rows=(4, 9),
        swapped=True,
        values=values,
        scales=scales,
        zeros=zeros,
        block=(1, N_IN),
    )
    expected = (values.astype(np.float32) - zeros) * scales
    np.testing.assert_array_equal(np.asarray(dense_jit(leaf, "float32")), expected[4:9].T)


def test_codes_of_a_table():
    """An odd number of elements; blocks that cross rows."""
    rng = np.random.default_rng(3)
    table = np.sort(rng.uniform(-1, 1, 16)).astype(np.float32)
    codes, absmax = rng.integers(0, 16, 45), rng.uniform(0.1, 2, 3).astype(np.float32)
    pairs = np.append(codes, 0).reshape(-1, 2).astype(np.uint8)
    leaf = TableCodes(
        n_in=9,
        n_out=5,
        rows=(0, 5),
        swapped=False,
        codes=(pairs[:, :1] << 4) | pairs[:, 1:],
        table=table,
        absmax=absmax,
        nested=None,
        block=16,
    )
    expected = table[codes] * absmax.repeat(16)[:45]
    np.testing.assert_array_equal(np.asarray(dense_jit(leaf, "float32")), expected.reshape(5, 9))


def test_mxfp4_as_gpt_oss_stores_it():
    rng = np.random.default_rng(4)
    blocks = rng.integers(0, 256, (3, 5, 2, 16), dtype=np.uint8)
    scales = rng.integers(100, 140, (3, 5, 2), dtype=np.uint8)
    scales[0, 0] = 4, 251
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(3, 5, 2, 32)
    sign, exponent, mantissa = codes >> 3, (codes >> 1) & 3, codes & 1
    normal = (1 + mantissa / 2) * 2.0 ** (exponent.astype(int) - 1)
    plain = np.where(exponent == 0, mantissa / 2, normal) * np.where(sign == 1, -1, 1)
    expected = (plain * 2.0 ** (scales[..., None].astype(float) - 127)).reshape(3, 5, 64)
    leaf = Mxfp4(blocks, scales)
    assert leaf.shape == (3, 5, 64)
    found = np.asarray(dense_jit(leaf, "float32"))
    np.testing.assert_array_equal(found, expected.astype(np.float32))
    some = np.asarray(leaf[np.array([2, 1])].dense(np.float32))
    np.testing.assert_array_equal(some, found[[2, 1]])
