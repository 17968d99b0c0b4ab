"""The KV cache of one layer and batch, and the two ways to write it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class LayerCache(NamedTuple):
    """Keys and values, ``(batch, heads, seq, head_dim)``: what decodes fastest on a CPU."""

    key: Float[Array, "batch heads seq head_dim"]
    value: Float[Array, "batch heads seq head_dim"]


def write_prompt(
    key: Float[Array, "batch heads seq head_dim"],
    value: Float[Array, "batch heads seq head_dim"],
    cache_len: int,
) -> LayerCache:
    """A cache of ``cache_len`` positions whose first ``seq`` are the prompt's."""
    room = cache_len - key.shape[2]
    if room < 0:
        raise ValueError(f"cache_len {cache_len} is shorter than the prompt, {key.shape[2]}")
    widths = ((0, 0), (0, 0), (0, room), (0, 0))
    return LayerCache(jnp.pad(key, widths), jnp.pad(value, widths))


def write_token(
    cache: LayerCache,
    key: Float[Array, "batch heads 1 head_dim"],
    value: Float[Array, "batch heads 1 head_dim"],
    position: Int[Array, ""],
) -> LayerCache:
    """The cache with one more position filled; in place where the cache is donated."""
    return LayerCache(
        jax.lax.dynamic_update_slice_in_dim(cache.key, key, position, axis=2),
        jax.lax.dynamic_update_slice_in_dim(cache.value, value, position, axis=2),
    )
