"""Codes and back: the error bound, the corner cases, and a model computed with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flexgen_jax.models import opt
from flexgen_jax.models.packed import dense_tree
from flexgen_jax.models.quantization import (
    Quantized,
    dequantize,
    grouping,
    quantize,
    quantized_shapes,
)

FLOAT32 = st.floats(-(2.0**100), 2.0**100, width=32)


def round_trip(x, bits, group=64):
    """What comes back, and each element's scale (numpy)."""
    q = quantize(jnp.asarray(x), bits=bits, group=group)
    count, width = grouping(x.shape[-1], group)
    scale = np.asarray(q.affine[..., :count].astype(jnp.float32))
    return np.asarray(dequantize(q)), np.repeat(scale, width, axis=-1)[..., : x.shape[-1]]


@given(
    # Few shapes and groups: each pair is a program.
    x=hnp.arrays(np.float32, st.sampled_from([(1,), (9,), (2, 7), (3, 1, 8)]), elements=FLOAT32),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([2, 3, 7]),
)
def test_the_error_is_at_most_half_a_step(x, bits, group):
    back, scale = round_trip(x, bits, group)
    assert back.shape == x.shape
    rounding = 4 * np.finfo(np.float32).eps * np.abs(x) + np.finfo(np.float32).tiny
    assert (np.abs(back - x) <= scale / 2 * (1 + 1e-5) + rounding).all()


@given(bits=st.sampled_from([4, 8]), seed=st.integers(0, 99))
def test_a_step_is_the_range_over_the_levels(bits, seed):
    """Rounding scale and zero to bfloat16 costs a few percent of a step, no more."""
    x = np.random.default_rng(seed).normal(size=(5, 64)).astype(np.float32)
    _, scale = round_trip(x, bits)
    ideal = (x.max(axis=-1) - x.min(axis=-1)) / (2**bits - 1)
    assert (scale[:, 0] >= ideal * (1 - 1e-6)).all()
    assert (scale[:, 0] <= ideal * 1.02).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1e30, 1e-42, 3.0e38])
def test_constant_groups(bits, value):
    back, _ = round_trip(np.full((3, 10), value, np.float32), bits)
    assert np.isfinite(back).all()
    np.testing.assert_allclose(back, min(value, 2.0**126), rtol=3e-4, atol=1e-38)


@pytest.mark.parametrize("bits", [4, 8])
def test_infinities_saturate_and_nan_stays_in_its_group(bits):
    x = np.zeros((1, 8), np.float32)
    x[0, :4] = [np.inf, 1, -np.inf, 0]
    x[0, 5] = np.nan
    back, _ = round_trip(x, bits, group=4)
    assert np.isfinite(back[0, :4]).all()
    assert back[0, 0] > 1e37
    assert back[0, 2] < -1e37
    assert np.isnan(back[0, 4:]).all()


@given(size=st.integers(1, 500), group=st.integers(2, 130))
def test_groups_are_equal_even_and_waste_little(size, group):
    count, width = grouping(size, group)
    assert width % 2 == 0
    assert width <= group + 1
    assert count * width >= size
    assert count * width - size < 2 * count
    assert grouping(80) == (2, 40)
    assert grouping(128) == (2, 64)


def test_bytes():
    """Half a byte an element, and two bfloat16 for 64: 0.28 of bfloat16's bytes."""
    shapes = quantized_shapes((10, 2048), 4)
    assert shapes == {"codes": ((10, 1024), "uint8"), "affine": ((10, 64), "bfloat16")}
    q = quantize(jnp.ones((10, 2048)))
    assert {n: getattr(q, n).shape for n in shapes} == {n: s for n, (s, _) in shapes.items()}
    assert (q.codes.nbytes + q.affine.nbytes) / (10 * 2048 * 2) == pytest.approx(0.28125)


def test_a_byte_holds_an_element_of_each_half_of_its_group():
    x = np.arange(16, dtype=np.float32)[None]
    q = quantize(x, bits=4, group=16)
    assert q.codes.tolist() == [[i | (i + 8) << 4 for i in range(8)]]
    np.testing.assert_array_equal(dequantize(q), x)


def test_a_leaf_of_a_tree_under_jit_and_vmap():
    x = jax.random.normal(jax.random.key(0), (4, 6, 40))
    q = jax.jit(quantize, static_argnames=("bits", "group"))(x, bits=4, group=8)
    assert q.shape == x.shape
    assert len(jax.tree.leaves(q)) == 2
    each = jax.vmap(dequantize)(q)
    np.testing.assert_array_equal(each, dequantize(q))
    np.testing.assert_array_equal(dequantize(q[2]), each[2])
    assert dequantize(q, jnp.bfloat16).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="4 or 8, got 3"):
        quantize(x, bits=3)


def test_a_model_computes_with_quantised_parameters(golden):
    """The reference takes them wherever it takes arrays, and means the same."""
    forward = jax.jit(opt.forward, static_argnames="config")

    def packed(path, x):
        matrix = path[-1].key in ("kernel", "tokens")
        return quantize(x, bits=8) if matrix else x

    params = jax.tree_util.tree_map_with_path(packed, golden.params)
    assert any(
        isinstance(leaf, Quantized)
        for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Quantized))
    )
    tokens = jnp.asarray([golden.prompts[0]])
    with_codes = forward(params, tokens, config=golden.config)
    plain = forward(dense_tree(params, jnp.float32), tokens, config=golden.config)
    np.testing.assert_allclose(with_codes, plain, rtol=1e-5, atol=1e-5)
    full = forward(golden.params, tokens, config=golden.config)
    assert 0 < np.abs(plain - full).mean() < 0.05 * np.abs(full).mean()
