"""One compiled function per kind of layer and phase, called for every layer with other weights.

Each returns, beside its results, a *marker*: a scalar of the same computation, which tells when it
has run without keeping activations alive. The KV cache is only read here; keys and values of new
tokens are results, which whoever keeps the cache adds to it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flexgen_jax.engine import sampling
from flexgen_jax.models import attention, decoding
from flexgen_jax.models.family import Config, Kind, Routed
from flexgen_jax.models.kv_cache import CacheFormat, KeptCache, LayerCache, in_ring
from flexgen_jax.models.packed import Packed
from flexgen_jax.models.pieces import rows_per_call
from flexgen_jax.models.quantization import Quantized
from flexgen_jax.models.registry import family_of

Sinks = Float[Array, "heads"] | None


class Projected(NamedTuple):
    """What attention takes of a new token per row.

    Attributes:
        new: Its key and value as they are attended to. ``kept``: as the cache has them.
        sinks: The layer's.
    """

    query: Float[Array, "batch heads 1 head_dim"]
    new: LayerCache
    kept: KeptCache
    sinks: Sinks


def _marker(made: Array | Routed) -> Array:
    return (made.hidden if isinstance(made, Routed) else made).reshape(-1)[0]


@partial(jax.jit, static_argnames="config")
def embed(
    params: Any,
    rows: Float[Array, "batch seq embed"],
    first_position: Int[Array, ""],
    padding: Int[Array, "batch"],
    *,
    config: Config,
) -> tuple[Float[Array, "batch seq hidden"], Float[Array, ""]]:
    """Token and position embeddings, of a prompt or of one new token; ``rows`` of the table."""
    hidden = decoding.embed_rows(params, rows, first_position, padding, config)
    return hidden, _marker(hidden)


@partial(jax.jit, static_argnames=("config", "kind", "form", "keep", "ring"))
def prefill_layer(
    params: Any,
    hidden: Float[Array, "batch seq hidden"],
    padding: Int[Array, "batch"],
    *,
    config: Config,
    kind: Kind,
    form: CacheFormat,
    keep: int | None = None,
    ring: tuple[int, int] | None = None,
) -> tuple[Float[Array, "batch seq hidden"] | Routed, KeptCache, Float[Array, ""]]:
    """A decoder layer over whole prompts, a few rows at a time; their keys and values as well.

    Args:
        keep: At most so many positions of these, the last ones; None: all.
        ring: As a ring of so many positions, of sequences that have so many; see
            :func:`~flexgen_jax.models.kv_cache.in_ring`.
    """
    batch, seq, _ = hidden.shape
    rows = rows_per_call(batch, seq)

    def some_rows(part: tuple[Array, Array]) -> tuple[Array | Routed, KeptCache]:
        out, (k, v) = decoding.prefill_layer(params, *part, config, kind)
        cache = LayerCache(k, v)
        if ring is not None:
            cache = in_ring(cache, *ring)
        elif keep is not None:
            cache = LayerCache(k[:, :, -keep:], v[:, :, -keep:])
        return out, form.pack(cache)

    if rows == batch:
        out, cache = some_rows((hidden, padding))
    else:
        parts = (hidden.reshape(-1, rows, *hidden.shape[1:]), padding.reshape(-1, rows))
        out, cache = jax.tree.map(
            lambda x: x.reshape(batch, *x.shape[2:]), jax.lax.map(some_rows, parts)
        )
    return out, cache, _marker(out)


@partial(jax.jit, static_argnames=("config", "kind", "form"))
def decode_layer(
    params: Any,
    hidden: Float[Array, "batch 1 hidden"],
    cache: LayerCache,
    position: Int[Array, ""],
    padding: Int[Array, "batch"],
    *,
    config: Config,
    kind: Kind,
    form: CacheFormat,
) -> tuple[Float[Array, "batch 1 hidden"] | Routed, KeptCache, Float[Array, ""]]:
    """A decoder layer for one new token per row, and the token's key and value."""
    made, new = decoding.decode_layer(params, hidden, cache, position, padding, config, kind)
    return made, form.pack(new), _marker(made)


@partial(jax.jit, static_argnames=("config", "kind", "form"))
def decode_qkv(
    params: Any,
    hidden: Float[Array, "batch 1 hidden"],
    position: Int[Array, ""],
    padding: Int[Array, "batch"],
    *,
    config: Config,
    kind: Kind,
    form: CacheFormat,
) -> tuple[Projected, Float[Array, ""]]:
    """The first part of a decoder layer taken apart: what attention takes."""
    query, new = decoding.decode_qkv(params, hidden, position, padding, config, kind)
    made = Projected(query, new, form.pack(new), family_of(config).sinks(params))
    return made, _marker(query)


@partial(jax.jit, static_argnames="kind")
def attend_cached(
    query: Float[Array, "batch heads 1 head_dim"],
    cache: LayerCache,
    new: LayerCache,
    position: Int[Array, ""],
    padding: Int[Array, "batch"],
    sinks: Sinks = None,
    *,
    kind: Kind,
) -> Float[Array, "batch heads 1 head_dim"]:
    """The second part, next to the cache: it runs where its arguments lie."""
    return attention.attend_cached(
        query,
        cache,
        new,
        position,
        padding,
        window=kind.window,
        soft_cap=kind.soft_cap,
        sinks=sinks,
    )


@partial(jax.jit, static_argnames=("kind", "sparsity"))
def select_cached(
    query: Float[Array, "batch heads 1 head_dim"],
    key: Float[Array, "batch kv_heads seq head_dim"],
    new: LayerCache,
    position: Int[Array, ""],
    padding: Int[Array, "batch"],
    sinks: Sinks = None,
    *,
    kind: Kind,
    sparsity: float,
) -> attention.Selection:
    """Of sparse attention, the part before the values: it runs where the keys lie."""
    return attention.select_cached(
        query, key, new, position, padding, sparsity, soft_cap=kind.soft_cap, sinks=sinks
    )


@jax.jit
def attend_selected(
    selection: attention.Selection,
    value: Float[Array, "batch kv_heads selected head_dim"] | Quantized,
    new: LayerCache,
    kept: KeptCache,
    value_sum: Float[Array, "batch kv_heads head_dim"],
) -> tuple[Float[Array, "batch heads 1 head_dim"], Float[Array, "batch kv_heads head_dim"]]:
    """Of sparse attention, the part that takes the selected values; and the next ``value_sum``.

    ``new`` is the token's key and value as they are attended to, ``kept`` as the cache has them.
    """
    attended = attention.attend_selected(selection, value, new, value_sum)
    return attended, value_sum + attention.sum_values(
        kept.value, jnp.zeros(kept.value.shape[0], jnp.int32)
    )


@jax.jit
def sum_values(
    value: Float[Array, "batch kv_heads seq head_dim"] | Quantized,
    padding: Int[Array, "batch"],
    length: Int[Array, ""] | None = None,
) -> Float[Array, "batch kv_heads head_dim"]:
    """Of a prompt; ``length``: it lies in a ring, of sequences that have so many positions."""
    return attention.sum_values(value, padding, length)


@partial(jax.jit, static_argnames=("config", "kind"))
def decode_rest(
    params: Any,
    hidden: Float[Array, "batch 1 hidden"],
    attended: Float[Array, "batch heads 1 head_dim"],
    *,
    config: Config,
    kind: Kind,
) -> tuple[Float[Array, "batch 1 hidden"] | Routed, Float[Array, ""]]:
    """The last part."""
    made = decoding.decode_rest(params, hidden, attended, config, kind)
    return made, _marker(made)


@partial(jax.jit, static_argnames="config")
def head(
    params: Any,
    token_table: Float[Array, "vocab embed"] | Packed,
    hidden: Float[Array, "batch seq hidden"],
    *,
    config: Config,
) -> Float[Array, "batch vocab"]:
    """Logits (float32) of the last position."""
    return decoding.head(params, token_table, hidden[:, -1], config)


@partial(jax.jit, donate_argnums=0)
def put_rows(
    whole: Float[Array, "batch *dims"], some: Float[Array, "count *dims"], rows: Int[Array, "count"]
) -> Float[Array, "batch *dims"]:
    """``whole`` with ``some`` in its ``rows``; -1: nowhere."""
    places = jnp.where(rows >= 0, rows, whole.shape[0])
    return whole.at[places].set(some.astype(whole.dtype), mode="drop")


@jax.jit
def put_last(
    whole: Float[Array, "batch 1 hidden"],
    prompts: Float[Array, "count seq hidden"],
    rows: Int[Array, "count"],
) -> Float[Array, "batch 1 hidden"]:
    """``whole`` with the last positions of ``prompts`` in its ``rows``; -1: nowhere."""
    places = jnp.where(rows >= 0, rows, whole.shape[0])
    return whole.at[places].set(prompts[:, -1:], mode="drop")


@partial(jax.jit, donate_argnums=(0, 1))
def into_pool(
    total: Float[Array, "capacity hidden"],
    inputs: Float[Array, "capacity hidden"],
    hidden: Float[Array, "batch seq hidden"],
    more: Float[Array, "batch seq hidden"],
    start: Int[Array, ""],
) -> tuple[Float[Array, "capacity hidden"], Float[Array, "capacity hidden"]]:
    """Puts tokens into a pool, from row ``start`` on: what experts add to, and are given."""
    width = hidden.shape[-1]

    def put(pool: Array, tokens: Array) -> Array:
        rows = tokens.reshape(-1, width).astype(pool.dtype)
        return jax.lax.dynamic_update_slice(pool, rows, (start, jnp.zeros_like(start)))

    return put(total, hidden), put(inputs, more)


@partial(jax.jit, static_argnames="config", donate_argnums=0)
def add_experts(
    total: Float[Array, "capacity hidden"],
    inputs: Float[Array, "capacity hidden"],
    rows: Int[Array, "tiles tile"],
    gates: Float[Array, "tiles tile"],
    bounds: Int[Array, "bounds"],
    params: tuple[Any, ...],
    *,
    config: Config,
) -> tuple[Float[Array, "capacity hidden"], Float[Array, ""]]:
    """``total`` with what some experts make of ``inputs``, tile by tile, times the gates.

    Args:
        rows: Of the pool; beyond it: nobody.
        bounds: The first tile of each of the experts, and the one behind the last one's.
        params: Of each of the experts.
    """
    family = family_of(config)
    for number, expert in enumerate(params):

        def tile(index: Array, total: Array, expert: Any = expert) -> Array:
            at = rows[index]
            given = inputs.at[at].get(mode="fill", fill_value=0)
            made = family.expert(expert, given, config).astype(jnp.float32)
            return total.at[at].add(gates[index][:, None] * made, mode="drop")

        total = jax.lax.fori_loop(bounds[number], bounds[number + 1], tile, total)
    return total, total.reshape(-1)[0]


@partial(jax.jit, static_argnames=("shape", "dtype"))
def out_of_pool(
    total: Float[Array, "capacity hidden"],
    start: Int[Array, ""],
    *,
    shape: tuple[int, ...],
    dtype: str,
) -> Float[Array, "batch seq hidden"]:
    """The tokens from row ``start`` on, as hidden states of ``shape``."""
    count = shape[0] * shape[1]
    rows = jax.lax.dynamic_slice(total, (start, jnp.zeros_like(start)), (count, shape[2]))
    return rows.reshape(shape).astype(dtype)


@partial(jax.jit, static_argnames=("config", "k"))
def score(
    params: Any,
    token_table: Float[Array, "vocab embed"] | Packed,
    hidden: Float[Array, "batch seq hidden"],
    wanted: Int[Array, "three scored"],
    *,
    config: Config,
    k: int,
) -> sampling.Sampled:
    """Log-probabilities at some positions: ``wanted`` is their rows, positions, and next tokens."""
    row, position, token = wanted
    logits = decoding.head(params, token_table, hidden[row, position], config)
    return sampling.scores(logits, token, k)


def compilations() -> int:
    """How many programs these functions have compiled so far in this process."""
    functions: tuple[Any, ...] = (
        embed,
        prefill_layer,
        decode_layer,
        decode_qkv,
        attend_cached,
        select_cached,
        attend_selected,
        sum_values,
        decode_rest,
        head,
        put_last,
        put_rows,
        into_pool,
        add_experts,
        out_of_pool,
        score,
    )
    return sum(f._cache_size() for f in functions)
