"""Codes of 4 bits that leave less error than min-max, whatever they are made of."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file

import flexgen_jax as fg
from flexgen_jax.models.fitting import quantize_fitted
from flexgen_jax.models.quantization import dequantize, quantize

fitted = jax.jit(quantize_fitted, static_argnames="group")
plain = jax.jit(quantize, static_argnames=("bits", "group"))


def left(q, x, group):
    """Squared error of each group, in float64."""
    errors = (np.asarray(dequantize(q), np.float64) - x) ** 2
    return errors.reshape(*x.shape[:-1], -1, group).sum(axis=-1)


@given(
    x=hnp.arrays(np.float32, (3, 24), elements=st.floats(-(2.0**40), 2.0**40, width=32)),
    group=st.sampled_from([6, 24]),
)
def test_no_group_is_worse(x, group):
    found, usual = fitted(x, group=group), plain(x, bits=4, group=group)
    assert found.codes.shape == usual.codes.shape
    rounding = 1e-5 * (np.abs(x) ** 2).reshape(3, -1, group).sum(axis=-1)
    assert (left(found, x, group) <= left(usual, x, group) * (1 + 1e-3) + rounding).all()


def test_what_is_extraordinary_is_as_with_min_max():
    x = np.zeros((1, 12), np.float32)
    x[0, :4] = [np.inf, 1, -np.inf, 0]
    x[0, 5] = np.nan
    x[0, 8:] = 3.0
    back = np.asarray(dequantize(fitted(x, group=4)))
    assert np.isfinite(back[0, :4]).all()
    assert back[0, 0] > 1e37
    assert np.isnan(back[0, 4:8]).all()
    np.testing.assert_allclose(back[0, 8:], 3.0, rtol=1e-6)


@pytest.mark.parametrize("size", [64, 100, 1])
def test_sizes_that_are_no_whole_groups(size):
    x = np.random.default_rng(0).standard_normal((2, size)).astype(np.float32)
    back = np.asarray(dequantize(fitted(x)))
    assert back.shape == x.shape
    assert np.abs(back - x).max() < 0.5


def test_a_trained_model_loses_a_seventh_less():
    """Of the squared error of its matrices."""
    state = load_file(Path(fg.__file__).parent / "demo_model" / "model.safetensors")
    usual = ours = 0.0
    for key, x in state.items():
        if x.ndim == 2 and "positions" not in key:
            x = x[:192, :192].astype(np.float32)  # of one shape, so that two programs do
            usual += float(jnp.sum((dequantize(plain(x, bits=4)) - x) ** 2))
            ours += float(jnp.sum((dequantize(fitted(x)) - x) ** 2))
    assert ours < 0.86 * usual
