"""A whole model from its family's functions: prefill and decode, layer by layer or at once.

Knows no tier, no schedule and no file. :func:`forward` is the unscheduled reference;
:func:`prefill` and :func:`decode` are the two entry points of generation, built of the same layer
functions that the executor calls one at a time.

Shapes: ``batch seq hidden`` for activations, ``batch heads seq head_dim`` for the KV cache.
Sequences are padded on the left, and ``padding[b]`` says by how many positions, so no token id is
special: a prompt may contain the pad token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flexgen_jax.models.attention import attend_cached, attend_prompt
from flexgen_jax.models.family import Config, Kind, Params, Routed
from flexgen_jax.models.kv_cache import LayerCache, write_prompt, write_token
from flexgen_jax.models.packed import Packed, dense
from flexgen_jax.models.params import head_table, nest, param_records
from flexgen_jax.models.pieces import positions_per_call
from flexgen_jax.models.positions import positions
from flexgen_jax.models.registry import family_of


def init_params(key: Array, config: Config, dtype: Any = jnp.float32) -> Params:
    """Random parameters as their records say: matrices and tables normal, the others constant.

    Returns:
        Nested dict ``params[unit][module][leaf]``; see :mod:`flexgen_jax.models.params`.
    """
    records = param_records(config)
    flat = {}
    for subkey, (name, record) in zip(
        jax.random.split(key, len(records)), records.items(), strict=True
    ):
        if record.role in ("norm", "bias"):
            flat[name] = jnp.full(record.shape, record.init, dtype)
        else:
            drawn = jax.random.normal(subkey, record.shape, jnp.float32)
            flat[name] = (record.init * drawn).astype(dtype)
    return nest(flat)


def embed_rows(
    params: Params,
    rows: Float[Array, "batch seq embed"],
    first_position: Int[Array, ""] | int,
    padding: Int[Array, "batch"],
    config: Config,
) -> Float[Array, "batch seq hidden"]:
    """Hidden states of tokens whose rows of the table are looked up already.

    Args:
        first_position: The column of ``rows[:, 0]`` in the padded sequence.
    """
    at = positions(first_position, rows.shape[1], padding)
    return family_of(config).embed(params, rows, at, config)


def embed(
    params: Params,
    tokens: Int[Array, "batch seq"],
    first_position: Int[Array, ""] | int,
    padding: Int[Array, "batch"],
    config: Config,
    dtype: Any = None,
) -> Float[Array, "batch seq hidden"]:
    """Hidden states of ``tokens``.

    Args:
        first_position: The column of ``tokens[:, 0]`` in the padded sequence.
        dtype: That rows of a table in codes become; None: that of the other parameters.
    """
    rows = dense(params["tokens"][tokens], _dtype_of(params) if dtype is None else dtype)
    return embed_rows(params, rows, first_position, padding, config)


def _dtype_of(params: Params) -> Any:
    """What is computed with: of the first parameter that is not in codes."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Packed))
    plain = (leaf.dtype for leaf in leaves if not isinstance(leaf, Packed))
    return next(plain, jnp.float32)


def prefill_layer(
    params: Params,
    hidden: Float[Array, "batch seq hidden"],
    padding: Int[Array, "batch"],
    config: Config,
    kind: Kind,
) -> tuple[
    Float[Array, "batch seq hidden"] | Routed,
    tuple[Float[Array, "batch kv_heads seq head_dim"], Float[Array, "batch kv_heads seq head_dim"]],
]:
    """One decoder layer over whole prompts; returns all positions' keys and values as well.

    Of long prompts what comes before and after attention is computed some positions at a time.
    """
    family = family_of(config)
    seq = hidden.shape[1]
    count = seq // positions_per_call(seq)
    at = positions(0, seq, padding)

    def before(part: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        x, index = part
        return family.before_attention(
            params, x, dataclasses.replace(at, index=index), config, kind
        )

    def after(part: tuple[Array, Array]) -> Array | Routed:
        return family.after_attention(params, *part, config, kind)

    query, key, value = _in_pieces(before, (hidden, at.index), count, (1, 1), 2)
    attended = attend_prompt(
        query,
        key,
        value,
        padding,
        window=kind.window,
        soft_cap=kind.soft_cap,
        sinks=family.sinks(params),
    )
    return _in_pieces(after, (hidden, attended), count, (1, 2), 1), (key, value)


def _in_pieces(
    function: Callable[[Any], Any], inputs: Any, count: int, axes: tuple[int, ...], axis: int
) -> Any:
    """``function`` of ``inputs``, each cut into ``count`` pieces along its axis of ``axes``.

    Args:
        axis: Of the results, along which they are put together.
    """
    if count == 1:
        return function(inputs)

    def cut(x: Array, along: int) -> Array:
        shape = (*x.shape[:along], count, x.shape[along] // count, *x.shape[along + 1 :])
        return jnp.moveaxis(x.reshape(shape), along, 0)

    def joined(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, axis)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    parts = tuple(cut(x, along) for x, along in zip(inputs, axes, strict=True))
    return jax.tree.map(joined, jax.lax.map(function, parts))


def decode_qkv(
    params: Params,
    hidden: Float[Array, "batch 1 hidden"],
    position: Int[Array, ""],
    padding: Int[Array, "batch"],
    config: Config,
    kind: Kind,
) -> tuple[Float[Array, "batch heads 1 head_dim"], LayerCache]:
    """What attention needs of the new tokens: the scaled query, and their key and value."""
    at = positions(position, 1, padding)
    query, key, value = family_of(config).before_attention(params, hidden, at, config, kind)
    return query, LayerCache(key, value)


def decode_rest(
    params: Params,
    hidden: Float[Array, "batch 1 hidden"],
    attended: Float[Array, "batch heads 1 head_dim"],
    config: Config,
    kind: Kind,
) -> Float[Array, "batch 1 hidden"] | Routed:
    """What comes after attention in a decoder layer, but for its experts."""
    return family_of(config).after_attention(params, hidden, attended, config, kind)


def decode_layer(
    params: Params,
    hidden: Float[Array, "batch 1 hidden"],
    cache: LayerCache,
    position: Int[Array, ""],
    padding: Int[Array, "batch"],
    config: Config,
    kind: Kind,
) -> tuple[Float[Array, "batch 1 hidden"] | Routed, LayerCache]:
    """One decoder layer for one new token per sequence, whose index is ``position``.

    Returns:
        Hidden states, and the token's key and value ``(batch, kv_heads, 1, head_dim)``, which
        belong into the cache at ``position``; the cache itself is only read.
    """
    query, new = decode_qkv(params, hidden, position, padding, config, kind)
    attended = attend_cached(
        query,
        cache,
        new,
        position,
        padding,
        window=kind.window,
        soft_cap=kind.soft_cap,
        sinks=family_of(config).sinks(params),
    )
    return decode_rest(params, hidden, attended, config, kind), new


def head(
    params: Params,
    table: Float[Array, "vocab embed"] | Packed,
    hidden: Float[Array, "*dims hidden"],
    config: Config,
) -> Float[Array, "*dims vocab"]:
    """Final norm, projection and logits (float32). A tied model passes its embedding table."""
    return family_of(config).head(params, table, hidden, config)


def _head_of(params: Params, hidden: Array, config: Config) -> Array:
    unit, _, leaf = head_table(config).partition(".")
    return head(params.get("head", {}), params[unit][leaf], hidden, config)


class _Decoder(NamedTuple):
    """A decoder layer; ``experts``: its experts' parameters, in order."""

    params: Params
    kind: Kind
    experts: list[Params]


def _decoders(params: Params, config: Config) -> list[_Decoder]:
    found: list[_Decoder] = []
    for unit in family_of(config).units(config):
        if unit.kind.role == "decoder":
            found.append(_Decoder(params[unit.name], unit.kind, []))
        elif unit.kind.role == "experts":
            found[-1].experts.extend(params[unit.name][f"expert_{n}"] for n in unit.experts)
    return found


def _mixed(made: Array | Routed, experts: list[Params], config: Config) -> Array:
    """Hidden states with what every expert adds, which here sees all tokens.

    What is added is summed up in float32, in the order of the experts.
    """
    if not isinstance(made, Routed):
        return made
    family, inputs = family_of(config), made.inputs.reshape(-1, made.inputs.shape[-1])
    total = made.hidden.astype(jnp.float32)
    for number, params in enumerate(experts):
        gate = jnp.where(made.chosen == number, made.gates, 0.0).sum(axis=-1, keepdims=True)
        out = family.expert(params, inputs, config).astype(jnp.float32)
        total = total + gate * out.reshape(total.shape)
    return total.astype(made.hidden.dtype)


def _no_padding(tokens: Array) -> Array:
    return jnp.zeros(tokens.shape[0], jnp.int32)


def _arrays(params: Params) -> Params:
    """JAX's: NumPy's cannot be indexed by what is traced."""
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, params)


def _check(tokens: Any, padding: Any, config: Config) -> None:
    """Refuses tokens and padding that cannot be, as far as they are known."""
    if getattr(tokens, "ndim", None) != 2 or 0 in tokens.shape:
        shape = getattr(tokens, "shape", type(tokens).__name__)
        raise ValueError(f"tokens must be an array [batch, seq], not empty; got {shape}")
    batch, seq = tokens.shape
    room = family_of(config).room(config, seq)
    if seq > room:
        raise ValueError(f"{seq} tokens exceed the model's {room} positions")
    _check_range("tokens", tokens, config.vocab_size - 1)
    if padding is not None:
        if getattr(padding, "shape", None) != (batch,):
            raise ValueError(f"padding must be an array [batch], of {batch} numbers")
        _check_range("padding", padding, seq - 1)


def _check_range(name: str, values: Any, highest: int) -> None:
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got {values.dtype}")
    if isinstance(values, jax.core.Tracer):
        return
    known = np.asarray(values)  # what JAX computes amid a trace would be traced
    least, most = int(known.min()), int(known.max())
    if least < 0 or most > highest:
        raise ValueError(f"{name} must lie in 0..{highest}, found {least if least < 0 else most}")


def forward(
    params: Params,
    tokens: Int[Array, "batch seq"],
    config: Config,
    padding: Int[Array, "batch"] | None = None,
) -> Float[Array, "batch seq vocab"]:
    """Logits (float32) of every position: the unscheduled reference.

    Works under ``jax.jit`` (``config`` is hashable: a static argument), ``vmap`` and ``grad``.

    Args:
        padding: How many positions at the left of each row are padding; None: none.

    Raises:
        ValueError: tokens or padding that cannot be, as far as their values are known: under
            ``jit`` they are not, and are clamped.
    """
    _check(tokens, padding, config)
    params = _arrays(params)
    padding = _no_padding(tokens) if padding is None else padding
    hidden = embed(params["embed"], tokens, 0, padding, config, _dtype_of(params))
    for layer, kind, experts in _decoders(params, config):
        made, _ = prefill_layer(layer, hidden, padding, config, kind)
        hidden = _mixed(made, experts, config)
    return _head_of(params, hidden, config)


def prefill(
    params: Params,
    tokens: Int[Array, "batch seq"],
    config: Config,
    *,
    cache_len: int,
    padding: Int[Array, "batch"] | None = None,
) -> tuple[Float[Array, "batch vocab"], tuple[LayerCache, ...]]:
    """Logits (float32) of the last position, and a cache with room for ``cache_len`` positions.

    Raises:
        ValueError: as :func:`forward`; or there is no room for the tokens.
    """
    _check(tokens, padding, config)
    params = _arrays(params)
    if cache_len < tokens.shape[1]:
        raise ValueError(f"cache_len {cache_len} has no room for {tokens.shape[1]} tokens")
    padding = _no_padding(tokens) if padding is None else padding
    hidden = embed(params["embed"], tokens, 0, padding, config)
    caches = []
    for layer, kind, experts in _decoders(params, config):
        made, (k, v) = prefill_layer(layer, hidden, padding, config, kind)
        hidden = _mixed(made, experts, config)
        caches.append(write_prompt(k, v, cache_len))
    return _head_of(params, hidden[:, -1], config), tuple(caches)


def decode(
    params: Params,
    token: Int[Array, "batch"],
    caches: tuple[LayerCache, ...],
    position: Int[Array, ""] | int,
    config: Config,
    *,
    padding: Int[Array, "batch"] | None = None,
) -> tuple[Float[Array, "batch vocab"], tuple[LayerCache, ...]]:
    """Logits (float32) after ``token``, which takes index ``position`` of the padded sequence."""
    params = _arrays(params)
    padding = _no_padding(token) if padding is None else padding
    position = jnp.asarray(position, jnp.int32)
    hidden = embed(params["embed"], token[:, None], position, padding, config, _dtype_of(params))
    updated = []
    for (layer, kind, experts), cache in zip(_decoders(params, config), caches, strict=True):
        made, new = decode_layer(layer, hidden, cache, position, padding, config, kind)
        hidden = _mixed(made, experts, config)
        updated.append(write_token(cache, *new, position))
    return _head_of(params, hidden[:, -1], config), tuple(updated)
