"""Attention as pure functions: of whole prompts, of one new token to a cache, and to a part of it.

Knows no model: a query comes projected, rotated and scaled. Heads may be grouped: of ``heads``
query heads and ``kv_heads`` heads of keys and values, query head ``h`` attends to head
``h // group``, where ``group = heads // kv_heads``. Keys are not repeated: the queries of a group
are rows of one matrix product.

What families of models add to the plain softmax are arguments:

* ``window``: a query at index ``q`` sees the keys ``q - window < k <= q``; None: all before it.
* ``soft_cap``: scores become ``soft_cap * tanh(scores / soft_cap)`` before they are masked.
* ``sinks``: per query head, a learned score without a value, which takes its share of the weights.

Sequences are padded on the left by ``padding[row]`` positions, which nobody sees. What is computed
for a query that sees nothing at all means nothing, but is finite. Scores and softmax are float32.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from flexgen_jax.models.kv_cache import LayerCache
from flexgen_jax.models.packed import dense
from flexgen_jax.models.quantization import Quantized

# Finite, so that the rows of padding, which see no key at all, stay free of NaN.
MASKED = float(np.finfo(np.float32).min)

# Of one head's prompt: up to so many positions, all scores at once; beyond, in blocks. On XLA's CPU
# backend, where this was measured, what counts is that the scores in hand stay in the cache.
WHOLE_POSITIONS = 512
QUERY_BLOCK = 256
KEY_BLOCK = 256
# Up to so many bytes of scores, those of all heads and rows at once; beyond, in steps of a few.
ONCE_NBYTES = 2**24
STEP_NBYTES = {"cpu": 2**21, "gpu": 2**26}

# Whether XLA's CPU backend shares a batch of small float32 products among the cores.
_SHARES_ROWS = jax.__version_info__ >= (0, 12)


def attend(
    query: Float[Array, "batch heads queries head_dim"],
    key: Float[Array, "batch kv_heads keys head_dim"],
    value: Float[Array, "batch kv_heads keys head_dim"],
    visible: Bool[Array, "batch #queries keys"],
    *,
    soft_cap: float | None = None,
    sinks: Float[Array, "heads"] | None = None,
) -> Float[Array, "batch heads queries head_dim"]:
    """Softmax attention, all scores at once; ``visible`` says which key each query may see.

    Raises:
        ValueError: The query's heads are no multiple of the key's.
    """
    return _attend(query, key, value, visible, None if sinks is None else sinks[None], soft_cap)


def _attend(
    query: Array,
    key: Array,
    value: Array,
    visible: Array,
    sinks: Float[Array, "#batch heads"] | None,
    soft_cap: float | None,
) -> Array:
    batch, heads, queries, head_dim = query.shape
    kv_heads, group = key.shape[1], group_size(query, key)
    query = query.reshape(batch, kv_heads, group * queries, head_dim)
    # One bfloat16 query row is 12 times slower than two on XLA's CPU backend.
    if query.shape[2] == 1 and query.dtype == jnp.bfloat16:
        query = jnp.concatenate([query, query], axis=2)
    scores = _scores(query, key, soft_cap)
    if group > 1:
        visible = jnp.broadcast_to(visible, (batch, queries, key.shape[2]))
        visible = jnp.tile(visible, (1, group, 1))
    scores = jnp.where(visible[:, None], scores, MASKED)
    if sinks is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        sink = sinks.astype(jnp.float32).reshape(-1, kv_heads, group)
        # A lonely query's second row comes by broadcasting.
        sink = jnp.repeat(sink, queries, axis=2)[..., None]
        top = jnp.maximum(scores.max(axis=-1, keepdims=True), sink)
        weights = jnp.exp(scores - top)
        weights = weights / (weights.sum(axis=-1, keepdims=True) + jnp.exp(sink - top))
    weights = weights.astype(value.dtype)
    out = jnp.einsum("bhqk,bhkd->bhqd", weights, value, preferred_element_type=jnp.float32)
    out = out[:, :, : group * queries].reshape(batch, heads, queries, head_dim)
    return out.astype(value.dtype)


def group_size(query: Array, key: Array) -> int:
    """How many query heads share one head of keys; both are ``(batch, heads, ...)``."""
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads % kv_heads:
        raise ValueError(
            f"{heads} query heads cannot share {kv_heads} key heads evenly: "
            "the first must be a multiple of the second"
        )
    return heads // kv_heads


def _scores(query: Array, key: Array, soft_cap: float | None) -> Array:
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
    return _capped(scores, soft_cap)


def _capped(scores: Array, soft_cap: float | None) -> Array:
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def causal_visibility(
    padding: Int[Array, "batch"], seq: int, window: int | None = None
) -> Bool[Array, "batch seq seq"]:
    """``[b, q, k]``: query ``q`` may see key ``k``: not after it, in its window, not padding."""
    index = jnp.arange(seq)
    return _visible(index, index, padding, window)


def _visible(
    query: Int[Array, "queries"],
    key: Int[Array, "keys"],
    padding: Int[Array, "batch"],
    window: int | None,
) -> Bool[Array, "batch queries keys"]:
    """Of the queries and keys at these indices."""
    causal = key[None, :] <= query[:, None]
    if window is not None:
        causal = causal & (key[None, :] > query[:, None] - window)
    return causal[None] & (key[None, None, :] >= padding[:, None, None])


# --- prompts --------------------------------------------------------------------------------------


def attend_prompt(
    query: Float[Array, "batch heads seq head_dim"],
    key: Float[Array, "batch kv_heads seq head_dim"],
    value: Float[Array, "batch kv_heads seq head_dim"],
    padding: Int[Array, "batch"],
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "heads"] | None = None,
    flash: Literal["cudnn", "xla"] | None = None,
) -> Float[Array, "batch heads seq head_dim"]:
    """Causal attention of whole prompts: a few heads at a time, and long prompts in blocks.

    What it takes beside its arguments and result is :func:`prompt_workspace_nbytes`.

    Args:
        flash: How ``jax.nn.dot_product_attention`` is to compute it; None: ``cudnn``'s flash
            attention on a GPU for what it knows, which is 16 bits, heads of up to 128, no soft cap
            and no sinks; all else as described above.

    Raises:
        ValueError: ``flash`` is to compute what it does not know, or the query's heads are no
            multiple of the key's.
    """
    group = group_size(query, key)
    batch, kv_heads, seq, head_dim = key.shape
    plain = soft_cap is None and sinks is None
    if flash is not None and not plain:
        raise ValueError(f"flash={flash!r} knows neither soft caps nor sinks: leave it at None")
    if flash is None and jax.default_backend() == "gpu" and query.dtype != jnp.float32:
        flash = "cudnn" if plain and head_dim <= 128 and head_dim % 8 == 0 else None
    if flash is not None:
        visible = causal_visibility(padding, seq, window)[:, None]
        query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
        out = jax.nn.dot_product_attention(
            query, key, value, mask=visible, scale=1.0, is_causal=True, implementation=flash
        )
        return out.swapaxes(1, 2)

    pairs = batch * kv_heads
    at_once = _pairs_at_once(pairs, group, seq, jax.default_backend())
    if seq <= WHOLE_POSITIONS and at_once == pairs:
        visible = causal_visibility(padding, seq, window)
        return attend(query, key, value, visible, soft_cap=soft_cap, sinks=sinks)
    out = _by_pairs(
        query.reshape(pairs, group, seq, head_dim),
        key.reshape(pairs, 1, seq, head_dim),
        value.reshape(pairs, 1, seq, head_dim),
        jnp.repeat(padding, kv_heads),
        None if sinks is None else jnp.tile(sinks.reshape(kv_heads, group), (batch, 1)),
        window=window,
        soft_cap=soft_cap,
        at_once=at_once,
    )
    return out.reshape(query.shape)


def prompt_workspace_nbytes(
    rows: int,
    seq: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    itemsize: int = 4,
    backend: str = "cpu",
) -> int:
    """Bytes that :func:`attend_prompt` takes beside its arguments and its result, at most.

    That grows with ``seq``, not with its square. A window does not change it.

    Args:
        itemsize: Of the arguments' dtype, in bytes.
        backend: Of the device it is computed on, as JAX calls it. On a GPU, cuDNN takes no more.
    """
    pairs, group = rows * kv_heads, heads // kv_heads
    at_once = _pairs_at_once(pairs, group, seq, backend)
    queries, keys = _block_shape(seq)
    scores = 2 * at_once * group * queries * keys * 4  # and weights
    if seq <= WHOLE_POSITIONS and at_once == pairs:
        return scores
    step = scores + at_once * (2 * group * queries + keys) * head_dim * 4
    # XLA copies what a loop only reads, unless it knows that nobody writes to it meanwhile.
    return step + pairs * (group + 2) * seq * head_dim * itemsize


def _pairs_at_once(pairs: int, group: int, seq: int, backend: str) -> int:
    """How many pairs of a row and a key head are attended to in one step: it divides ``pairs``."""
    nbytes = 4 * group * math.prod(_block_shape(seq))
    if seq <= WHOLE_POSITIONS and pairs * nbytes <= ONCE_NBYTES:
        return pairs
    most = STEP_NBYTES["cpu" if backend == "cpu" else "gpu"] // nbytes
    return max((n for n in range(1, min(pairs, most) + 1) if pairs % n == 0), default=1)


def _block_shape(seq: int) -> tuple[int, int]:
    """How many queries by how many keys a step takes of each head."""
    if seq <= WHOLE_POSITIONS:
        return seq, seq
    return min(QUERY_BLOCK, seq), min(KEY_BLOCK, seq)


def _by_pairs(
    query: Float[Array, "pairs group seq head_dim"],
    key: Float[Array, "pairs 1 seq head_dim"],
    value: Float[Array, "pairs 1 seq head_dim"],
    padding: Int[Array, "pairs"],
    sinks: Float[Array, "pairs group"] | None,
    *,
    window: int | None,
    soft_cap: float | None,
    at_once: int,
) -> Float[Array, "pairs group seq head_dim"]:
    """Causal attention of pairs of a row and a key head, ``at_once`` of them in each step."""
    seq = query.shape[2]

    # Neither integers nor loops over as many blocks as can be seen have a derivative: of all at
    # once.
    @jax.custom_jvp
    def attended(query: Array, key: Array, value: Array, sinks: Array | None) -> Array:
        compute = _attend_whole if seq <= WHOLE_POSITIONS else _attend_blocks
        return compute(query, key, value, padding, sinks, window, soft_cap, at_once)

    @attended.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
        def plain(query: Array, key: Array, value: Array, sinks: Array | None) -> Array:
            visible = causal_visibility(padding, seq, window)
            return _attend(query, key, value, visible, sinks, soft_cap)

        return attended(*primals), jax.jvp(plain, primals, tangents)[1]

    return attended(query, key, value, sinks)


def _codes(x: Array) -> Array:
    """Floats of 16 bits as integers, all others as they are.

    XLA of jax 0.10 takes a slice of bfloat16 on the CPU from a copy of the whole in float32.
    """
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _floats(codes: Array, dtype: jnp.dtype) -> Array:
    """The inverse of :func:`_codes`."""
    return codes if codes.dtype == dtype else jax.lax.bitcast_convert_type(codes, dtype)


def _attend_whole(
    query: Float[Array, "pairs group seq head_dim"],
    key: Float[Array, "pairs 1 seq head_dim"],
    value: Float[Array, "pairs 1 seq head_dim"],
    padding: Int[Array, "pairs"],
    sinks: Float[Array, "pairs group"] | None,
    window: int | None,
    soft_cap: float | None,
    at_once: int,
) -> Float[Array, "pairs group seq head_dim"]:
    """All scores of ``at_once`` pairs in each step."""
    dtype = query.dtype
    arrays = (_codes(query), _codes(key), _codes(value), padding, sinks)

    def step(arrays: tuple) -> Array:
        *codes, padding, sinks = arrays
        query, key, value = (_floats(x, dtype) for x in codes)
        visible = causal_visibility(padding, query.shape[2], window)
        return _codes(_attend(query, key, value, visible, sinks, soft_cap))

    steps = jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), arrays)
    return _floats(jax.lax.map(step, steps).reshape(query.shape), dtype)


def _attend_blocks(
    query: Float[Array, "pairs group seq head_dim"],
    key: Float[Array, "pairs 1 seq head_dim"],
    value: Float[Array, "pairs 1 seq head_dim"],
    padding: Int[Array, "pairs"],
    sinks: Float[Array, "pairs group"] | None,
    window: int | None,
    soft_cap: float | None,
    at_once: int,
) -> Float[Array, "pairs group seq head_dim"]:
    """With a running softmax: blocks of queries, each over the blocks of keys that it can see.

    The last block of each kind ends where the prompt does, and so may overlap the one before: its
    queries are computed twice, and its keys are masked where they have been seen.
    """
    pairs, group, seq, head_dim = query.shape
    dtype = query.dtype
    query, key, value = _codes(query), _codes(key), _codes(value)
    rows, columns = _block_shape(seq)
    query_blocks = -(-seq // rows)

    def of_queries(step: Array, out: Array) -> Array:
        first = step // query_blocks * at_once
        start = jnp.minimum(step % query_blocks * rows, seq - rows)
        index = start + jnp.arange(rows)
        block = jax.lax.dynamic_slice(
            query, (first, 0, start, 0), (at_once, group, rows, head_dim)
        ).reshape(at_once, 1, group * rows, head_dim)
        block = _floats(block, dtype)
        pads = jax.lax.dynamic_slice_in_dim(padding, first, at_once)

        def over_keys(number: Array, state: tuple) -> tuple:
            top, total, mean = state
            begin, size = (
                jnp.minimum(number * columns, seq - columns),
                (at_once, 1, columns, head_dim),
            )
            seen = begin + jnp.arange(columns)
            keys, values = (
                _floats(jax.lax.dynamic_slice(x, (first, 0, begin, 0), size), dtype)
                for x in (key, value)
            )
            visible = _visible(index, seen, pads, window) & (seen >= number * columns)
            scores = _scores(block, keys, soft_cap).reshape(at_once, group, rows, columns)
            scores = jnp.where(visible[:, None], scores, MASKED)
            scores = scores.reshape(at_once, 1, group * rows, columns)
            higher = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
            weights, shrink = jnp.exp(scores - higher), jnp.exp(top - higher)
            more = jnp.einsum(
                "bhqk,bhkd->bhqd",
                weights.astype(dtype),
                values,
                preferred_element_type=jnp.float32,
            )
            total = total * shrink + weights.sum(axis=-1, keepdims=True)
            return higher, total, mean * shrink + more

        # A sink is a score without a value, seen before all others.
        if sinks is None:
            top = jnp.full((at_once, 1, group * rows, 1), MASKED)
        else:
            top = jax.lax.dynamic_slice_in_dim(sinks.astype(jnp.float32), first, at_once)
            top = jnp.repeat(top, rows, axis=1)[:, None, :, None]
        total = jnp.full(top.shape, 0.0 if sinks is None else 1.0)
        state = (top, total, jnp.zeros((at_once, 1, group * rows, head_dim)))
        out_of_window = 0 if window is None else start - window + 1
        end = (start + rows + columns - 1) // columns
        # At least one block, lest queries of padding divide by nothing.
        begin = jnp.minimum(jnp.maximum(pads.min(), out_of_window) // columns, end - 1)
        _, total, mean = jax.lax.fori_loop(begin, end, over_keys, state)
        attended = (mean / total).astype(dtype).reshape(at_once, group, rows, head_dim)
        return jax.lax.dynamic_update_slice(out, _codes(attended), (first, 0, start, 0))

    steps = pairs // at_once * query_blocks
    out = jax.lax.fori_loop(0, steps, of_queries, jnp.zeros_like(query))
    return _floats(out, dtype)


# --- one new token, and a cache -------------------------------------------------------------------


def attend_cached(
    query: Float[Array, "batch heads 1 head_dim"],
    cache: LayerCache,
    new: LayerCache,
    position: Int[Array, ""],
    padding: Int[Array, "batch"],
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "heads"] | None = None,
) -> Float[Array, "batch heads 1 head_dim"]:
    """Attention of one new token per row to the cache before ``position``, and to itself.

    The cache is only read, wherever it lies; ``new`` holds the token's own key and value. Attending
    everything under a mask beats slicing the filled prefix, which would copy it.

    A cache of ``size`` positions may be a ring: index ``i`` holds the newest position before
    ``position`` that is ``i`` modulo ``size``. A cache as long as the sequence is such a ring, too.

    Raises:
        ValueError: The query's heads are no multiple of the key's.
    """
    weights, own, _ = _cached_weights(
        query, cache.key, new.key, position, padding, window, soft_cap, sinks
    )
    value = cache.value
    weights = _rows(weights.astype(value.dtype))
    out = jnp.einsum("bhqk,bhkd->bhqd", weights, value, preferred_element_type=jnp.float32)
    out = out[:, :, : own.shape[2]] + own * new.value.astype(jnp.float32)
    return out.astype(query.dtype).reshape(query.shape)


def _cached_weights(
    query: Array,
    key: Array,
    own_key: Array,
    position: Array,
    padding: Array,
    window: int | None,
    soft_cap: float | None,
    sinks: Array | None,
) -> tuple[
    Float[Array, "batch kv_heads group seq"],
    Float[Array, "batch kv_heads group 1"],
    Float[Array, "batch kv_heads group 1"] | None,
]:
    """The softmax of :func:`attend_cached`: over the cached keys, of the token's own, of sinks."""
    batch, kv_heads, size, head_dim = key.shape
    group = group_size(query, key)
    query = query.reshape(batch, kv_heads, group, head_dim)
    held = _held(position, size)
    visible = held[None, :] >= jnp.maximum(padding, 0)[:, None]
    if window is not None:
        visible = visible & (held > position - window)[None, :]
    scores = _capped(_few_scores(_rows(query), key)[:, :, :group], soft_cap)
    scores = jnp.where(visible[:, None, None], scores, MASKED)
    own = jnp.sum(query.astype(jnp.float32) * own_key.astype(jnp.float32), -1, keepdims=True)
    own = _capped(own, soft_cap)
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), own)
    if sinks is None:
        weights, own = jnp.exp(scores - top), jnp.exp(own - top)
        total = weights.sum(axis=-1, keepdims=True) + own
        return weights / total, own / total, None
    sink = sinks.astype(jnp.float32).reshape(kv_heads, group, 1)
    top = jnp.maximum(top, sink)
    weights, own, sink = jnp.exp(scores - top), jnp.exp(own - top), jnp.exp(sink - top)
    total = weights.sum(axis=-1, keepdims=True) + own + sink
    return weights / total, own / total, sink / total


def _rows(x: Float[Array, "batch kv_heads group dim"]) -> Float[Array, "batch kv_heads rows dim"]:
    """``x`` with the rows that XLA's CPU backend multiplies fastest: no lonely one.

    One row of bfloat16 takes up to 12 times as long as two. Of float32 it has one core to itself
    with jax 0.12, where two rows have all of them; with 0.10 a second row only costs.
    """
    if x.shape[2] > 1 or (x.dtype == jnp.float32 and not _SHARES_ROWS):
        return x
    return jnp.concatenate([x, x], axis=2)


def _few_scores(
    query: Float[Array, "batch kv_heads rows head_dim"],
    key: Float[Array, "batch kv_heads seq head_dim"],
) -> Float[Array, "batch kv_heads rows seq"]:
    """Scores of a few queries a head.

    The keys are the left operand, and the heads one axis: the other way round jax 0.10 transposes
    all keys first, which takes up to three times as long. Only float32 with jax 0.12 is a tenth
    faster the other way.
    """
    if query.dtype == jnp.float32 and _SHARES_ROWS:
        return _scores(query, key, None)
    batch, heads, count, dim = query.shape
    seq = key.shape[2]
    pairs = key.reshape(-1, seq, dim), query.reshape(-1, count, dim)
    scores = jnp.einsum("pkd,pqd->pkq", *pairs, preferred_element_type=jnp.float32)
    return scores.reshape(batch, heads, seq, count).swapaxes(2, 3)


def _held(length: Int[Array, ""] | int, size: int) -> Int[Array, "size"]:
    """Which position lies at each index of a ring after ``length`` of them; negative: none."""
    return length - 1 - (length - 1 - jnp.arange(size)) % size


class Selection(NamedTuple):
    """The cached positions that a new token attends to, per head of keys and values.

    ``kept`` says which of ``positions`` count: the share is of the visible positions, whose number
    differs from row to row. ``weights`` are the positions' attention weights, and ``own`` the new
    token's, which is always kept; ``rest`` is how many visible positions are left out. ``sink`` is
    the weight of the sinks, which have no value; None where there are none.
    """

    positions: Int[Array, "batch kv_heads selected"]
    kept: Bool[Array, "batch kv_heads selected"]
    weights: Float[Array, "batch kv_heads group selected"]
    own: Float[Array, "batch kv_heads group 1"]
    rest: Float[Array, "batch"]
    sink: Float[Array, "batch kv_heads group 1"] | None


def select_cached(
    query: Float[Array, "batch heads 1 head_dim"],
    key: Float[Array, "batch kv_heads seq head_dim"],
    new: LayerCache,
    position: Int[Array, ""],
    padding: Int[Array, "batch"],
    sparsity: float,
    *,
    soft_cap: float | None = None,
    sinks: Float[Array, "heads"] | None = None,
) -> Selection:
    """The share ``sparsity`` of the visible positions with the largest weights (paper, section 5).

    The weights are those of the softmax over all positions, and of a group of heads their sum, so
    that the group's values are fetched once. The keys are not a ring.
    """
    weights, own, sink = _cached_weights(
        query, key, new.key, position, padding, None, soft_cap, sinks
    )
    top, index = jax.lax.top_k(weights.sum(axis=2), math.ceil(sparsity * weights.shape[-1]))
    if weights.shape[2] == 1:
        top = top[:, :, None]
    else:
        top = jnp.take_along_axis(weights, index[:, :, None], axis=-1)
    visible = (position - padding).astype(jnp.float32)
    count = jnp.ceil(sparsity * visible)
    kept = jnp.arange(index.shape[-1], dtype=jnp.float32) < count[:, None, None]
    kept = jnp.broadcast_to(kept, index.shape)
    # What is not kept is read as well, since shapes are fixed: let it be what is there.
    return Selection(
        positions=jnp.where(kept, index, index[..., :1]),
        kept=kept,
        weights=jnp.where(kept[:, :, None], top, 0),
        own=own,
        rest=visible - count,
        sink=sink,
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
    of_group = (weights[:, :, member, :, None] for member in range(weights.shape[2]))
    out = jnp.stack([jnp.sum(w * x, axis=2) for w in of_group], axis=2)
    rest = jnp.maximum(selection.rest, 1)[:, None, None]
    mean = (value_sum - x.sum(axis=2)) / rest
    dropped = 1 - weights.sum(axis=-1, keepdims=True) - selection.own
    if selection.sink is not None:
        dropped = dropped - selection.sink
    dropped = jnp.where(selection.rest[:, None, None, None] > 0, dropped, 0)
    out = out + dropped * mean[:, :, None] + selection.own * new.value.astype(jnp.float32)
    batch, kv_heads, group, head_dim = out.shape
    return out.astype(new.value.dtype).reshape(batch, kv_heads * group, 1, head_dim)


def sum_values(
    value: Float[Array, "batch kv_heads seq head_dim"] | Quantized,
    padding: Int[Array, "batch"],
    length: Int[Array, ""] | int | None = None,
) -> Float[Array, "batch kv_heads head_dim"]:
    """Over the positions that are not padding, in float32: what :func:`attend_selected` needs.

    Args:
        length: ``value`` is a ring, of sequences of so many positions; None: they are in turn.
    """
    x = dense(value, jnp.float32).astype(jnp.float32)
    position = jnp.arange(x.shape[2]) if length is None else _held(length, x.shape[2])
    visible = position[None, :] >= padding[:, None]
    return jnp.sum(jnp.where(visible[:, None, :, None], x, 0), axis=2)
