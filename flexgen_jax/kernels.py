"""One compiled function per kind of layer and phase, called for every layer with other weights.

Each returns, beside its results, a *marker*: a scalar of the same computation, which tells when it
has run without keeping activations or a donated cache alive.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from flexgen_jax import opt
from flexgen_jax.config import OPTConfig
from flexgen_jax.kv_cache import LayerCache, write_prompt

# Calls of 512 to 2,048 tokens stay in a CPU's caches; larger ones lose a fifth of the speed.
PREFILL_TOKENS = 1024


def _marker(hidden: Array) -> Array:
    return hidden.reshape(-1)[0]


@partial(jax.jit, static_argnames="config")
def embed(
    params: Any,
    tokens: Int[Array, "batch seq"],
    first_position: Int[Array, ""],
    padding: Int[Array, "batch"],
    *,
    config: OPTConfig,
) -> tuple[Float[Array, "batch seq hidden"], Float[Array, ""]]:
    """Token and position embeddings, of a prompt or of one new token."""
    hidden = opt.embed(params, tokens, first_position, padding, config)
    return hidden, _marker(hidden)


def rows_per_call(batch: int, seq: int) -> int:
    """The largest divisor of ``batch`` whose rows hold at most ``PREFILL_TOKENS`` tokens, or 1."""
    most = max(1, PREFILL_TOKENS // seq)
    return max(d for d in range(1, batch + 1) if batch % d == 0 and d <= most)


@partial(jax.jit, static_argnames=("config", "cache_len"))
def prefill_layer(
    params: Any,
    hidden: Float[Array, "batch seq hidden"],
    padding: Int[Array, "batch"],
    *,
    config: OPTConfig,
    cache_len: int,
) -> tuple[Float[Array, "batch seq hidden"], LayerCache, Float[Array, ""]]:
    """A decoder layer over whole prompts, a few rows at a time; makes the cache."""
    batch, seq, _ = hidden.shape
    rows = rows_per_call(batch, seq)

    def some_rows(part: tuple[Array, Array]) -> tuple[Array, LayerCache]:
        out, (k, v) = opt.prefill_layer(params, *part, config)
        return out, write_prompt(k, v, cache_len)

    if rows == batch:
        out, cache = some_rows((hidden, padding))
    else:
        parts = (hidden.reshape(-1, rows, *hidden.shape[1:]), padding.reshape(-1, rows))
        out, cache = jax.tree.map(
            lambda x: x.reshape(batch, *x.shape[2:]), jax.lax.map(some_rows, parts)
        )
    return out, cache, _marker(out)


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def decode_layer(
    params: Any,
    hidden: Float[Array, "batch 1 hidden"],
    cache: LayerCache,
    position: Int[Array, ""],
    padding: Int[Array, "batch"],
    *,
    config: OPTConfig,
) -> tuple[Float[Array, "batch 1 hidden"], LayerCache, Float[Array, ""]]:
    """A decoder layer for one new token per row; updates the donated cache in place."""
    hidden, cache = opt.decode_layer(params, hidden, cache, position, padding, config)
    return hidden, cache, _marker(hidden)


@partial(jax.jit, static_argnames="config")
def head(
    params: Any,
    token_table: Float[Array, "vocab embed"],
    hidden: Float[Array, "batch seq hidden"],
    *,
    config: OPTConfig,
) -> Float[Array, "batch vocab"]:
    """Logits (float32) of the last position."""
    return opt.head(params, token_table, hidden[:, -1], config)


def compilations() -> int:
    """How many programs these functions have compiled so far in this process."""
    functions: tuple[Any, ...] = (embed, prefill_layer, decode_layer, head)
    return sum(f._cache_size() for f in functions)
