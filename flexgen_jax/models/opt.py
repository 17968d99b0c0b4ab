"""OPT as pure functions: arrays in, arrays out.

Knows no tier, no schedule and no file. ``forward`` is the unscheduled reference; ``prefill`` and
``decode`` are the two entry points of generation, built of the same layer functions that the
executor calls one at a time.

Shapes: ``batch seq hidden`` for activations, ``batch heads seq head_dim`` for the KV cache.
Sequences are padded on the left, and ``padding[b]`` says by how many positions, so no token id is
special: a prompt may contain the pad token. Matrix products accumulate in float32; softmax and
layer norm are computed in float32; activations keep the dtype of the parameters.
Wherever a kernel or the token table is taken, it may be :class:`Quantized`.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from flexgen_jax.models.config import OPTConfig
from flexgen_jax.models.kv_cache import LayerCache, write_prompt, write_token
from flexgen_jax.models.params import POSITION_OFFSET, nest, param_shapes
from flexgen_jax.models.quantization import Quantized, dense

Params = dict[str, Any]

LAYER_NORM_EPSILON = 1e-5
# Finite, so that the rows of padding, which see no key at all, stay free of NaN.
MASKED = float(np.finfo(np.float32).min)


def init_params(key: Array, config: OPTConfig, dtype: Any = jnp.float32) -> Params:
    """Random parameters as OPT was initialised: normal(0, 0.02), norms one, biases zero.

    Returns:
        Nested dict ``params[unit][module][leaf]``; see :mod:`flexgen_jax.models.params`.
    """
    shapes = param_shapes(config)
    flat = {}
    for subkey, (name, shape) in zip(
        jax.random.split(key, len(shapes)), shapes.items(), strict=True
    ):
        if name.endswith(".scale"):
            flat[name] = jnp.ones(shape, dtype)
        elif name.endswith(".bias"):
            flat[name] = jnp.zeros(shape, dtype)
        else:
            flat[name] = (0.02 * jax.random.normal(subkey, shape, jnp.float32)).astype(dtype)
    return nest(flat)


def layer_norm(params: Params, x: Float[Array, "*dims hidden"]) -> Float[Array, "*dims hidden"]:
    """Layer norm over the last axis, in float32; ``params`` is empty where norms are not affine."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON)
    if params:
        y = y * params["scale"].astype(jnp.float32) + params["bias"].astype(jnp.float32)
    return y.astype(x.dtype)


def linear(params: Params, x: Float[Array, "*dims n_in"]) -> Float[Array, "*dims n_out"]:
    """``x @ kernel + bias``, accumulated in float32, returned in the dtype of ``x``."""
    y = _matmul(x, dense(params["kernel"], x.dtype))
    if "bias" in params:
        y = y + params["bias"].astype(jnp.float32)
    return y.astype(x.dtype)


def _matmul(x: Array, kernel: Array) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    # XLA's CPU backend has no fast bfloat16 kernel for one row (32 ms against 6 ms padded to two).
    lonely = rows.shape[0] == 1 and rows.dtype == jnp.bfloat16
    if lonely:
        rows = jnp.concatenate([rows, rows])
    y = jnp.matmul(rows, kernel, preferred_element_type=jnp.float32)
    return (y[:1] if lonely else y).reshape(*x.shape[:-1], kernel.shape[-1])


def _activation(name: str, x: Array) -> Array:
    if name == "relu":
        return jax.nn.relu(x)
    return jax.nn.gelu(x, approximate=name != "gelu")


def attend(
    query: Float[Array, "batch heads queries head_dim"],
    key: Float[Array, "batch heads keys head_dim"],
    value: Float[Array, "batch heads keys head_dim"],
    visible: Bool[Array, "batch #queries keys"],
) -> Float[Array, "batch heads queries head_dim"]:
    """Softmax attention. ``query`` comes scaled; ``visible`` says which key each query may see."""
    queries = query.shape[2]
    # One bfloat16 query row is 12 times slower than two on XLA's CPU backend.
    if queries == 1 and query.dtype == jnp.bfloat16:
        query = jnp.concatenate([query, query], axis=2)
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = jnp.einsum("bhqk,bhkd->bhqd", weights, value, preferred_element_type=jnp.float32)
    return out[:, :, :queries].astype(value.dtype)


def attend_prompt(
    query: Float[Array, "batch heads seq head_dim"],
    key: Float[Array, "batch heads seq head_dim"],
    value: Float[Array, "batch heads seq head_dim"],
    padding: Int[Array, "batch"],
    flash: Literal["cudnn", "xla"] | None = None,
) -> Float[Array, "batch heads seq head_dim"]:
    """Causal attention of whole prompts.

    Args:
        flash: How ``jax.nn.dot_product_attention`` is to compute it; None: ``cudnn``'s flash
            attention on a GPU, in 16 bits, which is all it knows; elsewhere :func:`attend`.
    """
    visible = causal_visibility(padding, query.shape[2])
    if flash is None and jax.default_backend() == "gpu" and query.dtype != jnp.float32:
        flash = "cudnn"
    if flash is None:
        return attend(query, key, value, visible)
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
) -> Float[Array, "batch heads 1 head_dim"]:
    """Attention of one new token per row to the cache before ``position``, and to itself.

    The cache is only read, wherever it lies; ``new`` holds the token's own key and value. Attending
    everything under a mask beats slicing the filled prefix, which would copy it.
    """
    weights, own = _cached_weights(query, cache.key, new.key, position, padding)
    value = cache.value
    weights = weights.astype(value.dtype)
    if query.dtype == jnp.bfloat16:
        weights = jnp.concatenate([weights, weights], axis=2)
    out = jnp.einsum("bhqk,bhkd->bhqd", weights, value, preferred_element_type=jnp.float32)
    out = out[:, :, :1] + own * new.value.astype(jnp.float32)
    return out.astype(query.dtype)


def _cached_weights(
    query: Array, key: Array, own_key: Array, position: Array, padding: Array
) -> tuple[Float[Array, "batch heads 1 seq"], Float[Array, "batch heads 1 1"]]:
    """The softmax of :func:`attend_cached`: over the cached keys, and of the token's own."""
    index = jnp.arange(key.shape[2])
    visible = (index[None, :] < position) & (index[None, :] >= padding[:, None])
    twice = query
    if query.dtype == jnp.bfloat16:  # as in attend
        twice = jnp.concatenate([query, query], axis=2)
    scores = jnp.einsum("bhqd,bhkd->bhqk", twice, key, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores[:, :, :1], MASKED)
    own = jnp.sum(query.astype(jnp.float32) * own_key.astype(jnp.float32), -1, keepdims=True)
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), own)
    weights, own = jnp.exp(scores - top), jnp.exp(own - top)
    total = weights.sum(axis=-1, keepdims=True) + own
    return weights / total, own / total


class Selection(NamedTuple):
    """The cached positions that a new token attends to, per head.

    ``kept`` says which of ``positions`` count: the share is of the visible positions, whose number
    differs from row to row. ``weights`` are the positions' attention weights, and ``own`` the new
    token's, which is always kept; ``rest`` is how many visible positions are left out.
    """

    positions: Int[Array, "batch heads selected"]
    kept: Bool[Array, "batch heads selected"]
    weights: Float[Array, "batch heads selected"]
    own: Float[Array, "batch heads 1 1"]
    rest: Float[Array, "batch"]


def select_cached(
    query: Float[Array, "batch heads 1 head_dim"],
    key: Float[Array, "batch heads seq head_dim"],
    new: LayerCache,
    position: Int[Array, ""],
    padding: Int[Array, "batch"],
    sparsity: float,
) -> Selection:
    """The share ``sparsity`` of the visible positions with the largest weights (paper, section 5).

    The weights are those of the softmax over all positions.
    """
    weights, own = _cached_weights(query, key, new.key, position, padding)
    top, index = jax.lax.top_k(weights[:, :, 0], math.ceil(sparsity * weights.shape[-1]))
    visible = (position - padding).astype(jnp.float32)
    count = jnp.ceil(sparsity * visible)
    kept = jnp.arange(top.shape[-1], dtype=jnp.float32) < count[:, None, None]
    kept = jnp.broadcast_to(kept, top.shape)
    # What is not kept is read as well, since shapes are fixed: let it be what is there.
    return Selection(
        jnp.where(kept, index, index[..., :1]), kept, jnp.where(kept, top, 0), own, visible - count
    )


def attend_selected(
    selection: Selection,
    value: Float[Array, "batch heads selected head_dim"] | Quantized,
    new: LayerCache,
    value_sum: Float[Array, "batch heads head_dim"],
) -> Float[Array, "batch heads 1 head_dim"]:
    """Attention to the selected positions, whose values are ``value``, and to the token itself.

    The weight of what is left out falls on the mean of its values (SparQ attention, Ribar et al.,
    2023), for which ``value_sum``, over all visible positions, is enough. FlexGen drops it.
    """
    x = jnp.where(selection.kept[..., None], dense(value, jnp.float32).astype(jnp.float32), 0)
    weights = selection.weights
    out = jnp.sum(weights[..., None] * x, axis=2, keepdims=True)
    rest = jnp.maximum(selection.rest, 1)[:, None, None]
    mean = (value_sum - x.sum(axis=2)) / rest
    dropped = 1 - weights.sum(axis=-1)[..., None, None] - selection.own
    dropped = jnp.where(selection.rest[:, None, None, None] > 0, dropped, 0)
    out = out + dropped * mean[:, :, None] + selection.own * new.value.astype(jnp.float32)
    return out.astype(new.value.dtype)


def sum_values(
    value: Float[Array, "batch heads seq head_dim"] | Quantized, padding: Int[Array, "batch"]
) -> Float[Array, "batch heads head_dim"]:
    """Over the positions that are not padding, in float32: what :func:`attend_selected` needs."""
    x = dense(value, jnp.float32).astype(jnp.float32)
    visible = jnp.arange(x.shape[2])[None, :] >= padding[:, None]
    return jnp.sum(jnp.where(visible[:, None, :, None], x, 0), axis=2)


def _project_qkv(params: Params, x: Array, config: OPTConfig) -> tuple[Array, Array, Array]:
    batch, seq, _ = x.shape

    def heads(y: Array) -> Array:
        y = y.reshape(batch, seq, config.num_attention_heads, config.head_dim)
        return y.transpose(0, 2, 1, 3)

    scale = jnp.asarray(config.head_dim**-0.5, x.dtype)
    return (
        heads(linear(params["q"], x) * scale),
        heads(linear(params["k"], x)),
        heads(linear(params["v"], x)),
    )


def _residual_attention(params: Params, hidden: Array, attended: Array, config: OPTConfig) -> Array:
    batch, _, seq, _ = attended.shape
    merged = attended.transpose(0, 2, 1, 3).reshape(batch, seq, config.hidden_size)
    hidden = hidden + linear(params["out"], merged)
    if not config.do_layer_norm_before:
        hidden = layer_norm(params.get("attention_norm", {}), hidden)
    return hidden


def _pre_norm(params: Params, name: str, hidden: Array, config: OPTConfig) -> Array:
    return layer_norm(params.get(name, {}), hidden) if config.do_layer_norm_before else hidden


def mlp(
    params: Params, hidden: Float[Array, "batch seq hidden"], config: OPTConfig
) -> Float[Array, "batch seq hidden"]:
    """The feed-forward half of a decoder layer, residual and norms included."""
    x = linear(params["fc1"], _pre_norm(params, "mlp_norm", hidden, config))
    hidden = hidden + linear(params["fc2"], _activation(config.activation_function, x))
    if not config.do_layer_norm_before:
        hidden = layer_norm(params.get("mlp_norm", {}), hidden)
    return hidden


def causal_visibility(padding: Int[Array, "batch"], seq: int) -> Bool[Array, "batch seq seq"]:
    """``[b, q, k]``: query ``q`` may see key ``k``: not after it, and not padding."""
    index = jnp.arange(seq)
    causal = index[None, :] <= index[:, None]
    return causal[None] & (index[None, None, :] >= padding[:, None, None])


def prefill_layer(
    params: Params,
    hidden: Float[Array, "batch seq hidden"],
    padding: Int[Array, "batch"],
    config: OPTConfig,
) -> tuple[
    Float[Array, "batch seq hidden"],
    tuple[Float[Array, "batch heads seq head_dim"], Float[Array, "batch heads seq head_dim"]],
]:
    """One decoder layer over whole prompts; returns all positions' keys and values as well."""
    q, k, v = _project_qkv(params, _pre_norm(params, "attention_norm", hidden, config), config)
    attended = attend_prompt(q, k, v, padding)
    return mlp(params, _residual_attention(params, hidden, attended, config), config), (k, v)


def decode_qkv(
    params: Params, hidden: Float[Array, "batch 1 hidden"], config: OPTConfig
) -> tuple[Float[Array, "batch heads 1 head_dim"], LayerCache]:
    """What attention needs of the new tokens: the scaled query, and their key and value."""
    normed = _pre_norm(params, "attention_norm", hidden, config)
    query, key, value = _project_qkv(params, normed, config)
    return query, LayerCache(key, value)


def decode_rest(
    params: Params,
    hidden: Float[Array, "batch 1 hidden"],
    attended: Float[Array, "batch heads 1 head_dim"],
    config: OPTConfig,
) -> Float[Array, "batch 1 hidden"]:
    """What comes after attention in a decoder layer."""
    return mlp(params, _residual_attention(params, hidden, attended, config), config)


def decode_layer(
    params: Params,
    hidden: Float[Array, "batch 1 hidden"],
    cache: LayerCache,
    position: Int[Array, ""],
    padding: Int[Array, "batch"],
    config: OPTConfig,
) -> tuple[Float[Array, "batch 1 hidden"], LayerCache]:
    """One decoder layer for one new token per sequence, whose index is ``position``.

    Returns:
        Hidden states, and the token's key and value ``(batch, heads, 1, head_dim)``, which belong
        into the cache at ``position``; the cache itself is only read.
    """
    query, new = decode_qkv(params, hidden, config)
    attended = attend_cached(query, cache, new, position, padding)
    return decode_rest(params, hidden, attended, config), new


def embed(
    params: Params,
    tokens: Int[Array, "batch seq"],
    first_position: Int[Array, ""] | int,
    padding: Int[Array, "batch"],
    config: OPTConfig,
) -> Float[Array, "batch seq hidden"]:
    """Token and position embeddings; ``first_position`` is the index of ``tokens[:, 0]``."""
    rows = dense(params["tokens"][tokens], params["positions"].dtype)
    return embed_rows(params, rows, first_position, padding, config)


def embed_rows(
    params: Params,
    rows: Float[Array, "batch seq embed"],
    first_position: Int[Array, ""] | int,
    padding: Int[Array, "batch"],
    config: OPTConfig,
) -> Float[Array, "batch seq hidden"]:
    """:func:`embed` with the tokens' rows of the table looked up already."""
    x = linear(params["project_in"], rows) if config.has_projection else rows
    index = first_position + jnp.arange(rows.shape[1])[None, :] - padding[:, None]
    # Padding sits at -1, as Hugging Face counts it; what is computed there is never seen.
    return x + params["positions"][jnp.maximum(index, -1) + POSITION_OFFSET]


def head(
    params: Params,
    token_table: Float[Array, "vocab embed"] | Quantized,
    hidden: Float[Array, "*dims hidden"],
    config: OPTConfig,
) -> Float[Array, "*dims vocab"]:
    """Final norm, projection and logits (float32). A tied model passes its embedding table."""
    if config.has_final_norm:
        hidden = layer_norm(params.get("norm", {}), hidden)
    if config.has_projection:
        hidden = linear(params["project_out"], hidden)
    token_table = dense(token_table, hidden.dtype)
    rows = hidden.reshape(-1, hidden.shape[-1])
    lonely = rows.shape[0] == 1 and rows.dtype == jnp.bfloat16  # as in _matmul
    if lonely:
        rows = jnp.concatenate([rows, rows])
    logits = jnp.einsum("rh,vh->rv", rows, token_table, preferred_element_type=jnp.float32)
    return (logits[:1] if lonely else logits).reshape(*hidden.shape[:-1], token_table.shape[0])


def _head_of(params: Params, hidden: Array, config: OPTConfig) -> Array:
    own = params.get("head", {})
    table = params["embed"]["tokens"] if config.tie_word_embeddings else own["tokens"]
    return head(own, table, hidden, config)


def _no_padding(tokens: Array) -> Array:
    return jnp.zeros(tokens.shape[0], jnp.int32)


def forward(
    params: Params,
    tokens: Int[Array, "batch seq"],
    config: OPTConfig,
    padding: Int[Array, "batch"] | None = None,
) -> Float[Array, "batch seq vocab"]:
    """Logits (float32) of every position: the unscheduled reference.

    Works under ``jax.jit`` (``config`` is hashable: a static argument), ``vmap`` and ``grad``.

    Args:
        padding: How many positions at the left of each row are padding; None: none.
    """
    padding = _no_padding(tokens) if padding is None else padding
    hidden = embed(params["embed"], tokens, 0, padding, config)
    for unit in config.units[1:-1]:
        hidden, _ = prefill_layer(params[unit], hidden, padding, config)
    return _head_of(params, hidden, config)


def prefill(
    params: Params,
    tokens: Int[Array, "batch seq"],
    config: OPTConfig,
    *,
    cache_len: int,
    padding: Int[Array, "batch"] | None = None,
) -> tuple[Float[Array, "batch vocab"], tuple[LayerCache, ...]]:
    """Logits (float32) of the last position, and a cache with room for ``cache_len`` positions."""
    padding = _no_padding(tokens) if padding is None else padding
    hidden = embed(params["embed"], tokens, 0, padding, config)
    caches = []
    for unit in config.units[1:-1]:
        hidden, (k, v) = prefill_layer(params[unit], hidden, padding, config)
        caches.append(write_prompt(k, v, cache_len))
    return _head_of(params, hidden[:, -1], config), tuple(caches)


def decode(
    params: Params,
    token: Int[Array, "batch"],
    caches: tuple[LayerCache, ...],
    position: Int[Array, ""] | int,
    config: OPTConfig,
    *,
    padding: Int[Array, "batch"] | None = None,
) -> tuple[Float[Array, "batch vocab"], tuple[LayerCache, ...]]:
    """Logits (float32) after ``token``, which takes index ``position`` of the padded sequence."""
    padding = _no_padding(token) if padding is None else padding
    position = jnp.asarray(position, jnp.int32)
    hidden = embed(params["embed"], token[:, None], position, padding, config)
    updated = []
    for unit, cache in zip(config.units[1:-1], caches, strict=True):
        hidden, new = decode_layer(params[unit], hidden, cache, position, padding, config)
        updated.append(write_token(cache, *new, position))
    return _head_of(params, hidden[:, -1], config), tuple(updated)
