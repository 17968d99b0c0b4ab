"""Attention: of whole prompts, of new tokens to a cache, and to a selection of a cache.

Shapes: ``batch heads seq head_dim``. Sequences are padded on the left, and ``padding[b]`` says by
how many positions. Softmax is computed in float32. Knows no family: queries come scaled, and what
layers differ in comes as arguments.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from flexgen_jax.models.kv_cache import LayerCache
from flexgen_jax.models.quantization import Quantized, dense

# Finite, so that the rows of padding, which see no key at all, stay free of NaN.
MASKED = float(np.finfo(np.float32).min)


def attend(
    query: Float[Array, "batch heads queries head_dim"],
    key: Float[Array, "batch kv_heads keys head_dim"],
    value: Float[Array, "batch kv_heads keys head_dim"],
    visible: Bool[Array, "batch #queries keys"],
    *,
    soft_cap: float | None = None,
) -> Float[Array, "batch heads queries head_dim"]:
    """Softmax attention. ``query`` comes scaled; ``visible`` says which key each query may see.

    A key and value head serves as many query heads as there are more of them, side by side.

    Args:
        soft_cap: Scores ``s`` become ``cap * tanh(s / cap)``.
    """
    batch, heads, queries, head_dim = query.shape
    group = heads // key.shape[1]
    # The queries of a group lie one after another: keys are not repeated.
    query = query.reshape(batch, key.shape[1], group * queries, head_dim)
    alone = group * queries == 1
    # One bfloat16 query row is 12 times slower than two on XLA's CPU backend.
    if alone and query.dtype == jnp.bfloat16:
        query = jnp.concatenate([query, query], axis=2)
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
    scores = _capped(scores, soft_cap)
    if group > 1:
        visible = jnp.broadcast_to(visible, (batch, queries, visible.shape[-1]))
        visible = jnp.tile(visible, (1, group, 1))
    scores = jnp.where(visible[:, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = jnp.einsum("bhqk,bhkd->bhqd", weights, value, preferred_element_type=jnp.float32)
    out = out[:, :, : group * queries].astype(value.dtype)
    return out.reshape(batch, heads, queries, head_dim)


def _capped(scores: Array, cap: float | None) -> Array:
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def attend_prompt(
    query: Float[Array, "batch heads seq head_dim"],
    key: Float[Array, "batch kv_heads seq head_dim"],
    value: Float[Array, "batch kv_heads seq head_dim"],
    padding: Int[Array, "batch"],
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    flash: Literal["cudnn", "xla"] | None = None,
) -> Float[Array, "batch heads seq head_dim"]:
    """Causal attention of whole prompts.

    Args:
        window: A query sees so many keys, its own the last of them; None: all before it.
        soft_cap: As :func:`attend` has it.
        flash: How ``jax.nn.dot_product_attention`` is to compute it; None: ``cudnn``'s flash
            attention on a GPU, in 16 bits, which is all it knows; elsewhere :func:`attend`.
    """
    visible = causal_visibility(padding, query.shape[2], window)
    if (
        flash is None
        and soft_cap is None
        and jax.default_backend() == "gpu"
        and query.dtype != jnp.float32
    ):
        flash = "cudnn"
    if flash is None:
        return attend(query, key, value, visible, soft_cap=soft_cap)
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    out = jax.nn.dot_product_attention(
        query, key, value, mask=visible[:, None], scale=1.0, is_causal=True, implementation=flash
    )
    return out.swapaxes(1, 2)


def attend_cached(
    query: Float[Array, "batch heads 1 head_dim"],
    cache: LayerCache,
    new: LayerCache,
    position: Int[Array, ""],
    padding: Int[Array, "batch"],
    *,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "batch heads 1 head_dim"]:
    """Attention of one new token per row to the cache before ``position``, and to itself.

    The cache is only read, wherever it lies; ``new`` holds the token's own key and value. Attending
    everything under a mask beats slicing the filled prefix, which would copy it. The cache may be
    a ring: position ``p`` lies at index ``p % size``.
    """
    query = _grouped(query, cache.key.shape[1])
    weights, own = _cached_weights(
        query, cache.key, new.key, position, padding, window=window, soft_cap=soft_cap
    )
    value = cache.value
    weights = weights.astype(value.dtype)
    group = query.shape[2]
    if query.dtype == jnp.bfloat16 and group == 1:
        weights = jnp.concatenate([weights, weights], axis=2)
    out = jnp.einsum("bhqk,bhkd->bhqd", weights, value, preferred_element_type=jnp.float32)
    out = out[:, :, :group] + own * new.value.astype(jnp.float32)
    return out.astype(query.dtype).reshape(query.shape[0], -1, 1, query.shape[-1])


def _grouped(query: Array, kv_heads: int) -> Float[Array, "batch kv_heads group head_dim"]:
    batch, heads, _, head_dim = query.shape
    return query.reshape(batch, kv_heads, heads // kv_heads, head_dim)


def _cached_weights(
    query: Array,
    key: Array,
    own_key: Array,
    position: Array,
    padding: Array,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
) -> tuple[Float[Array, "batch kv_heads group seq"], Float[Array, "batch kv_heads group 1"]]:
    """The softmax of :func:`attend_cached`: over the cached keys, and of the token's own.

    Args:
        query: By :func:`_grouped`.
    """
    size, group = key.shape[2], query.shape[2]
    index = jnp.arange(size)
    # The newest position before this one that lies at each index; negative: none yet.
    held = position - 1 - (position - 1 - index) % size
    visible = held[None, :] >= jnp.maximum(padding, 0)[:, None]
    if window is not None:
        visible &= held[None, :] > position - window
    several = query
    if query.dtype == jnp.bfloat16 and group == 1:  # as in attend
        several = jnp.concatenate([query, query], axis=2)
    scores = jnp.einsum("bhqd,bhkd->bhqk", several, key, preferred_element_type=jnp.float32)
    scores = _capped(scores[:, :, :group], soft_cap)
    scores = jnp.where(visible[:, None, None], scores, MASKED)
    own = jnp.sum(query.astype(jnp.float32) * own_key.astype(jnp.float32), -1, keepdims=True)
    own = _capped(own, soft_cap)
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), own)
    weights, own = jnp.exp(scores - top), jnp.exp(own - top)
    total = weights.sum(axis=-1, keepdims=True) + own
    return weights / total, own / total


class Selection(NamedTuple):
    """The cached positions that a new token attends to, per head of keys and values.

    ``kept`` says which of ``positions`` count: the share is of the visible positions, whose number
    differs from row to row. ``weights`` are the positions' attention weights, and ``own`` the new
    token's, which is always kept; ``rest`` is how many visible positions are left out.
    """

    positions: Int[Array, "batch kv_heads selected"]
    kept: Bool[Array, "batch kv_heads selected"]
    weights: Float[Array, "batch kv_heads group selected"]
    own: Float[Array, "batch kv_heads group 1"]
    rest: Float[Array, "batch"]


def select_cached(
    query: Float[Array, "batch heads 1 head_dim"],
    key: Float[Array, "batch kv_heads seq head_dim"],
    new: LayerCache,
    position: Int[Array, ""],
    padding: Int[Array, "batch"],
    sparsity: float,
    *,
    soft_cap: float | None = None,
) -> Selection:
    """The share ``sparsity`` of the visible positions with the largest weights (paper, section 5).

    The weights are those of the softmax over all positions; of several query heads that share keys,
    their sum decides.
    """
    query = _grouped(query, key.shape[1])
    weights, own = _cached_weights(query, key, new.key, position, padding, soft_cap=soft_cap)
    count = math.ceil(sparsity * weights.shape[-1])
    if query.shape[2] == 1:
        top, index = jax.lax.top_k(weights[:, :, 0], count)
        top = top[:, :, None]
    else:
        _, index = jax.lax.top_k(weights.sum(axis=2), count)
        top = jnp.take_along_axis(weights, index[:, :, None], axis=-1)
    visible = (position - padding).astype(jnp.float32)
    wanted = jnp.ceil(sparsity * visible)
    kept = jnp.arange(count, dtype=jnp.float32) < wanted[:, None, None]
    kept = jnp.broadcast_to(kept, index.shape)
    # What is not kept is read as well, since shapes are fixed: let it be what is there.
    return Selection(
        jnp.where(kept, index, index[..., :1]),
        kept,
        jnp.where(kept[:, :, None], top, 0),
        own,
        visible - wanted,
    )


def attend_selected(
    selection: Selection,
    value: Float[Array, "batch kv_heads selected head_dim"] | Quantized,
    new: LayerCache,
    value_sum: Float[Array, "batch kv_heads head_dim"],
) -> Float[Array, "batch heads 1 head_dim"]:
    """Attention to the selected positions, whose values are ``value``, and to the token itself.

    The weight of what is left out falls on the mean of its values (SparQ attention, Ribar et al.,
    2023), for which ``value_sum``, over all visible positions, is enough. FlexGen drops it.
    """
    x = jnp.where(selection.kept[..., None], dense(value, jnp.float32).astype(jnp.float32), 0)
    weights = selection.weights
    out = jnp.sum(weights[..., None] * x[:, :, None], axis=3)
    rest = jnp.maximum(selection.rest, 1)[:, None, None]
    mean = (value_sum - x.sum(axis=2)) / rest
    dropped = 1 - weights.sum(axis=-1)[..., None] - selection.own
    dropped = jnp.where(selection.rest[:, None, None, None] > 0, dropped, 0)
    out = out + dropped * mean[:, :, None] + selection.own * new.value.astype(jnp.float32)
    out = out.astype(new.value.dtype)
    return out.reshape(out.shape[0], -1, 1, out.shape[-1])


def sum_values(
    value: Float[Array, "batch kv_heads seq head_dim"] | Quantized, padding: Int[Array, "batch"]
) -> Float[Array, "batch kv_heads head_dim"]:
    """Over the positions that are not padding, in float32: what :func:`attend_selected` needs."""
    x = dense(value, jnp.float32).astype(jnp.float32)
    visible = jnp.arange(x.shape[2])[None, :] >= padding[:, None]
    return jnp.sum(jnp.where(visible[:, None, :, None], x, 0), axis=2)


def causal_visibility(
    padding: Int[Array, "batch"], seq: int, window: int | None = None
) -> Bool[Array, "batch seq seq"]:
    """``[b, q, k]``: query ``q`` may see key ``k``: not after it, not padding, in its window."""
    index = jnp.arange(seq)
    causal = index[None, :] <= index[:, None]
    if window is not None:
        causal &= index[None, :] > index[:, None] - window
    return causal[None] & (index[None, None, :] >= padding[:, None, None])
