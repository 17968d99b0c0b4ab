"""Attention against sums written out in float64: groups, windows, caps, sinks, rings, blocks."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexgen_jax.models import attention
from flexgen_jax.models.attention import (
    attend_cached,
    attend_prompt,
    attend_selected,
    prompt_workspace_nbytes,
    select_cached,
    sum_values,
)
from flexgen_jax.models.kv_cache import LayerCache, in_ring


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def reference(query, key, value, padding, window=None, soft_cap=None, sinks=None):
    """Of every query its own sum, in float64; queries of padding are left zero."""
    batch, heads, seq, _ = query.shape
    group = heads // key.shape[1]
    out = np.zeros(query.shape)
    for b, h in itertools.product(range(batch), range(heads)):
        k, v = key[b, h // group].astype(np.float64), value[b, h // group].astype(np.float64)
        for q in range(padding[b], seq):
            first = padding[b] if window is None else max(padding[b], q - window + 1)
            scores = k[first : q + 1] @ query[b, h, q].astype(np.float64)
            if soft_cap is not None:
                scores = soft_cap * np.tanh(scores / soft_cap)
            top = max(scores.max(), -np.inf if sinks is None else sinks[h])
            weights = np.exp(scores - top)
            total = weights.sum() + (0 if sinks is None else np.exp(sinks[h] - top))
            out[b, h, q] = weights @ v[first : q + 1] / total
    return out


def close(found, expected, padding):
    for b, pad in enumerate(padding):
        np.testing.assert_allclose(found[b, :, pad:], expected[b, :, pad:], rtol=2e-5, atol=2e-5)
    assert np.isfinite(found).all()


OPTIONS = [
    {},
    {"window": 7},
    {"soft_cap": 1.5},
    {"window": 40, "soft_cap": 2.0},
    {"sinks": True},
    {"window": 9, "sinks": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("blocks", [False, True])
def test_prompts(options, heads, blocks, monkeypatch):
    """Whole, and in blocks that end with neither the prompt nor one another."""
    if blocks:
        monkeypatch.setattr(attention, "WHOLE_POSITIONS", 8)
        monkeypatch.setattr(attention, "QUERY_BLOCK", 8)
        monkeypatch.setattr(attention, "KEY_BLOCK", 12)
        monkeypatch.setattr(attention, "STEP_NBYTES", {"cpu": 2000, "gpu": 2000})
    many, few = heads
    batch, seq, dim = 2, 37, 4
    query, key, value = (normal(i, batch, n, seq, dim) for i, n in enumerate((many, few, few)))
    padding = np.asarray([0, 21], np.int32)
    options = dict(options)
    if options.pop("sinks", False):
        options["sinks"] = jnp.asarray(normal(5, many))
    found = jax.jit(lambda *a: attend_prompt(*a, **options))(query, key, value, padding)
    close(np.asarray(found), reference(query, key, value, padding, **options), padding)


def test_long_prompts_are_computed_in_blocks_as_short_ones_whole():
    batch, seq, dim = 1, 700, 16
    query, key, value = (normal(i, batch, n, seq, dim) for i, n in enumerate((4, 2, 2)))
    padding = np.asarray([3], np.int32)
    found = jax.jit(attend_prompt)(query, key, value, padding)
    visible = attention.causal_visibility(jnp.asarray(padding), seq)
    whole = attention.attend(jnp.asarray(query), jnp.asarray(key), jnp.asarray(value), visible)
    np.testing.assert_allclose(found[:, :, 3:], whole[:, :, 3:], rtol=2e-5, atol=2e-5)


def test_blocks_have_the_derivative_of_the_whole(monkeypatch):
    query, key, value = (jnp.asarray(normal(i, 1, 2, 24, 4)) for i in range(3))
    padding = jnp.zeros(1, jnp.int32)

    def loss(q, k, v):
        return jnp.square(attend_prompt(q, k, v, padding)).sum()

    whole = jax.grad(loss, argnums=(0, 1, 2))(query, key, value)
    monkeypatch.setattr(attention, "WHOLE_POSITIONS", 8)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)
    monkeypatch.setattr(attention, "KEY_BLOCK", 8)
    for found, expected in zip(
        jax.grad(loss, argnums=(0, 1, 2))(query, key, value), whole, strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_heads_that_cannot_be_shared_evenly_are_refused():
    query, key = jnp.zeros((1, 5, 3, 8)), jnp.zeros((1, 2, 3, 8))
    with pytest.raises(ValueError, match="5 query heads cannot share 2 key heads evenly"):
        attend_prompt(query, key, key, jnp.zeros(1, jnp.int32))


def test_flash_attention_is_not_asked_for_what_it_does_not_know(monkeypatch):
    query, key = jnp.ones((1, 4, 3, 8), jnp.bfloat16), jnp.ones((1, 2, 3, 8), jnp.bfloat16)
    padding, asked = jnp.zeros(1, jnp.int32), []
    for unknown in ({"soft_cap": 2.0}, {"sinks": jnp.zeros(4)}):
        with pytest.raises(ValueError, match="knows neither soft caps nor sinks"):
            attend_prompt(query, key, key, padding, flash="xla", **unknown)

    def cudnn(query, *_, implementation, **__):
        asked.append((query.shape, implementation))
        return query

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    attend_prompt(query, key, key, padding, soft_cap=2.0)
    attend_prompt(query, key, key, padding, sinks=jnp.zeros(4))
    wide = jnp.ones((1, 2, 3, 256), jnp.bfloat16)
    attend_prompt(wide, wide, wide, padding)
    assert not asked
    attend_prompt(query, key, key, padding, window=2)
    assert asked == [((1, 3, 4, 8), "cudnn")]


def test_flash_attention_knows_groups_and_windows():
    query, key, value = (normal(i, 2, n, 9, 8) for i, n in enumerate((4, 2, 2)))
    padding = np.array([0, 3], np.int32)
    arguments = map(jnp.asarray, (query, key, value, padding))
    found = attend_prompt(*arguments, window=4, flash="xla")
    close(found, reference(query, key, value, padding, window=4), padding)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        *((options, 48) for options in OPTIONS),  # room for all
        *((options, 16) for options in OPTIONS if options.get("window", 99) <= 16),  # a ring
    ],
    ids=str,
)
def test_a_new_token_attends_as_the_last_of_a_prompt(options, size):
    many, few, seq, dim = 4, 2, 37, 8
    query, key, value = (normal(i, 2, n, seq, dim) for i, n in enumerate((many, few, few)))
    padding = np.asarray([0, 30], np.int32)
    options = dict(options)
    if options.pop("sinks", False):
        options["sinks"] = jnp.asarray(normal(5, many))
    prompt = (jnp.asarray(x) for x in (query, key, value, padding))
    whole = attend_prompt(*prompt, **options)[:, :, -1:]
    kept = LayerCache(*(jnp.asarray(x[:, :, :-1]) for x in (key, value)))
    if size < seq:
        cache = in_ring(kept, size, seq - 1)
    else:
        room = ((0, 0), (0, 0), (0, size - seq + 1), (0, 0))
        cache = LayerCache(*(jnp.pad(x, room, constant_values=7.0) for x in kept))
    new = LayerCache(jnp.asarray(key[:, :, -1:]), jnp.asarray(value[:, :, -1:]))
    found = attend_cached(
        jnp.asarray(query[:, :, -1:]),
        cache,
        new,
        jnp.int32(seq - 1),
        jnp.asarray(padding),
        **options,
    )
    np.testing.assert_allclose(found, whole, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_a_selection_of_everything_is_all(heads, soft_cap):
    many, few = heads
    seq, dim = 20, 8
    query, key, value = (normal(i, 2, n, seq, dim) for i, n in enumerate((many, few, few)))
    padding = np.asarray([0, 11], np.int32)
    cache = LayerCache(jnp.asarray(key[:, :, :-1]), jnp.asarray(value[:, :, :-1]))
    new = LayerCache(jnp.asarray(key[:, :, -1:]), jnp.asarray(value[:, :, -1:]))
    where = jnp.asarray(query[:, :, -1:]), jnp.int32(seq - 1), jnp.asarray(padding)
    whole = attend_cached(where[0], cache, new, *where[1:], soft_cap=soft_cap)
    chosen = select_cached(where[0], cache.key, new, *where[1:], 0.999, soft_cap=soft_cap)
    taken = jnp.take_along_axis(cache.value, chosen.positions[..., None], axis=2)
    found = attend_selected(chosen, taken, new, sum_values(cache.value, jnp.asarray(padding)))
    np.testing.assert_allclose(found, whole, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("rows", "seq", "heads", "kv_heads"),
    [(1, 2048, 32, 8), (1, 4096, 8, 8), (4, 512, 12, 12), (8, 128, 16, 4)],
)
def test_the_workspace_that_is_counted_is_what_is_taken(rows, seq, heads, kv_heads):
    dim = 64
    shapes = [
        jax.ShapeDtypeStruct((rows, n, seq, dim), jnp.bfloat16) for n in (heads, kv_heads, kv_heads)
    ]
    padding = jax.ShapeDtypeStruct((rows,), jnp.int32)
    taken = jax.jit(attend_prompt).lower(*shapes, padding).compile().memory_analysis()
    counted = prompt_workspace_nbytes(rows, seq, heads, kv_heads, dim)
    result = rows * heads * seq * dim * 4  # which is computed in 32 bits
    assert taken.temp_size_in_bytes <= counted * 1.3 + result + 4 * rows * seq * seq + 2**20
    assert counted < 64 * 2**20  # never a square of all heads


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_ways_of_multiplying_few_queries_agree(group, dtype, monkeypatch):
    """Which one is taken depends on the version of JAX."""
    draws = [
        jax.random.normal(jax.random.key(number), (2, 2, size, 8), dtype)
        for number, size in enumerate((6, 6, 1, 1))
    ]
    query = jax.random.normal(jax.random.key(9), (2, 2 * group, 1, 8), dtype)
    cache, new = LayerCache(*draws[:2]), LayerCache(*draws[2:])
    found = []
    for shares in (False, True):
        monkeypatch.setattr(attention, "_SHARES_ROWS", shares)
        made = attention.attend_cached(query, cache, new, jnp.int32(4), jnp.array([0, 2]))
        found.append(np.asarray(made, np.float32))
    np.testing.assert_allclose(found[0], found[1], atol=1e-5 if dtype == "float32" else 1e-2)
