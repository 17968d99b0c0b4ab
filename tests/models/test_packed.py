"""Published types: what is computed with is what JAX's own conversion gives."""

import jax
import jax.numpy as jnp
import numpy as np

from flexgen_jax.models.packed import Published


def test_every_float16_becomes_the_bfloat16_that_jax_makes_of_it():
    x = jnp.asarray(np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(256, 256))
    for made in (Published(x), Published(x.T, swapped=True)):
        found = np.asarray(jax.jit(lambda x: x.dense(jnp.bfloat16))(made))
        expected = np.asarray(x.astype(jnp.bfloat16))
        np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
        known = ~np.isnan(expected)
        np.testing.assert_array_equal(found[known], expected[known])
        np.testing.assert_array_equal(np.signbit(found[known]), np.signbit(expected[known]))
