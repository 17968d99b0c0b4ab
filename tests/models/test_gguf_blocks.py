"""GGUF's blocks against the package ``gguf``, bit for bit."""

import jax
import numpy as np
import pytest

from flexgen_jax.models.gguf_blocks import BLOCK_SIZES, Blocks

gguf = pytest.importorskip("gguf")


def random_blocks(kind, rows=5, blocks=3, seed=0):
    """Any bytes are blocks, as long as their scales are numbers."""
    rng = np.random.default_rng(seed)
    _, nbytes = BLOCK_SIZES[kind]
    data = rng.integers(0, 256, (rows, blocks, nbytes), dtype=np.uint8)
    places = {"Q6_K": (208,), "MXFP4": (), "Q8_0": (0,), "Q4_0": (0,), "Q5_0": (0,)}
    for place in places.get(kind, (0, 2)):
        halves = rng.standard_normal((rows, blocks)).astype(np.float16)
        halves[0, 0] = np.float16(6e-8)  # subnormal
        data[..., place : place + 2] = halves[..., None].view(np.uint8)
    if kind == "MXFP4":
        data[..., 0] = rng.integers(2, 250, (rows, blocks))
    return data.reshape(rows, -1)


@pytest.mark.parametrize("kind", BLOCK_SIZES)
def test_as_the_package_unpacks_them(kind):
    data = random_blocks(kind)
    expected = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
    found = jax.jit(lambda x: x.dense(np.float32))(Blocks(data, kind))
    assert Blocks(data, kind).shape == expected.shape
    np.testing.assert_array_equal(np.asarray(found), expected)


def test_heads_swaps_and_rows():
    data = random_blocks("Q4_K", rows=8, blocks=1)
    plain = np.asarray(Blocks(data, "Q4_K").dense(np.float32))
    halves = Blocks(data, "Q4_K", heads=2)
    order = [0, 2, 1, 3, 4, 6, 5, 7]
    np.testing.assert_array_equal(np.asarray(halves.dense(np.float32)), plain[order])
    swapped = Blocks(data, "Q4_K", swapped=True)
    assert swapped.shape == (256, 8)
    np.testing.assert_array_equal(np.asarray(swapped.dense(np.float32)), plain.T)
    rows = Blocks(data, "Q4_K")[np.array([[3, 1]])]
    np.testing.assert_array_equal(np.asarray(rows.dense(np.float32)), plain[[[3, 1]]])


def test_sizes_are_the_format_s():
    for kind, sizes in BLOCK_SIZES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == sizes
