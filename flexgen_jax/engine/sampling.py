"""Which token comes next: parameters as people write them, and as a batch computes them.

A request's tokens depend on its logits, its seed and its own tokens so far: every row draws from
its own random stream, so neighbours, blocks and schedules make no difference.

What changes logits comes in vLLM's order: repetition, frequency and presence penalties, logit bias,
tokens that are not allowed, bad words, stop tokens that would be too early, the form of the answer,
temperature, min-p, top-k, top-p.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from flexgen_jax.requests.sampling_params import SamplingParams

_MASKED = float(np.finfo(np.float32).min)
# In place of a token: the logits are not numbers; or none of the tokens may come.
NOT_NUMBERS, NOTHING_LEFT = -1, -2


class SamplingArrays(NamedTuple):
    """The parameters of a batch, one row a request. Stop ids are filled up with -1."""

    temperature: Float[Array, "batch"]
    top_k: Int[Array, "batch"]
    top_p: Float[Array, "batch"]
    min_p: Float[Array, "batch"]
    seed: UInt32[Array, "batch 2"]
    min_tokens: Int[Array, "batch"]
    stop_ids: Int[Array, "batch stops"]
    repetition: Float[Array, "batch"]
    presence: Float[Array, "batch"]
    frequency: Float[Array, "batch"]
    bias_ids: Int[Array, "batch biases"]
    bias: Float[Array, "batch biases"]
    only: Int[Array, "batch words"]  # a bit a token that may come; no bit: all may


class History(NamedTuple):
    """The tokens of each row so far, filled up with -1; ``banned``: those that may not come now."""

    prompt: Int[Array, "batch seq"]
    output: Int[Array, "batch steps"]
    banned: Int[Array, "batch words"]


@dataclasses.dataclass(frozen=True)
class SamplingFeatures:
    """What a batch's program must be able to do; what no request asks for is not compiled in."""

    random: bool = False
    truncated: bool = False
    delayed_stop: bool = False
    penalised: bool = False
    biased: bool = False
    limited: bool = False
    banning: bool = False
    guided: bool = False
    num_logprobs: int | None = None


class Sampled(NamedTuple):
    """One new token per row, and log-probabilities (natural log, of the unmodified logits).

    Where no token can be chosen, ``token`` is ``NOT_NUMBERS`` or ``NOTHING_LEFT``.

    ``rank`` is 1 for the likeliest token. The last four have no columns, or are empty, where no
    request of the batch asked for log-probabilities.
    """

    token: Int[Array, "batch"]
    logprob: Float[Array, "rows"]
    rank: Int[Array, "rows"]
    top_ids: Int[Array, "rows k"]
    top_logprobs: Float[Array, "rows k"]


def seed_words(params: SamplingParams, fallback: tuple[int, int], sample: int = 0) -> np.ndarray:
    """The two words of a request's random key: its own seed, or one drawn from ``fallback``.

    Args:
        sample: Which of the request's completions; each has a key of its own.
    """
    own = None if params.seed is None else params.seed % (1 << 64)
    if sample:
        parents = fallback if own is None else (own,)
        return np.random.SeedSequence(parents, spawn_key=(sample,)).generate_state(2, np.uint32)
    if own is not None:
        return np.array([own >> 32, own & 0xFFFFFFFF], np.uint32)
    return np.random.SeedSequence(fallback).generate_state(2, np.uint32)


def batch_arrays(
    params: Sequence[SamplingParams],
    seeds: Sequence[np.ndarray],
    stop_ids: Sequence[Sequence[int]],
    rows: int,
    *,
    num_stops: int = 1,
    num_biases: int = 1,
    num_words: int = 1,
) -> tuple[SamplingArrays, SamplingFeatures]:
    """Parameters of a batch of ``rows`` rows, the last of which may be padding (greedy).

    Args:
        num_stops: Columns of stop ids, at least. ``num_biases``: of biases. ``num_words``: of
            the tokens that are allowed, 32 in each.
    """
    padded = [*params, *[SamplingParams(temperature=0.0)] * (rows - len(params))]
    stops = [*map(list, stop_ids), *[[]] * (rows - len(params))]
    most = max(num_stops, *(len(s) for s in stops))
    words = np.zeros((rows, 2), np.uint32)
    if len(params):
        words[: len(params)] = np.stack(list(seeds))
    widest = max(num_biases, *(len(p.logit_bias) for p in padded))
    bias_ids = np.full((rows, widest), -1, np.int32)
    bias = np.zeros((rows, widest), np.float32)
    for row, p in enumerate(params):
        bias_ids[row, : len(p.logit_bias)] = list(p.logit_bias)
        bias[row, : len(p.logit_bias)] = list(p.logit_bias.values())
    only = np.zeros((rows, max(num_words, *map(words_of, padded))), np.uint32)
    for row, p in enumerate(params):
        ids = np.asarray(p.allowed_token_ids or (), np.uint32)
        np.bitwise_or.at(only[row], ids // 32, np.uint32(1) << ids % 32)
    sampled = [p for p in params if p.temperature > 0]
    counts = [p.logprobs for p in params if p.logprobs is not None]
    arrays = SamplingArrays(
        temperature=jnp.asarray([p.temperature for p in padded], jnp.float32),
        top_k=jnp.asarray([max(0, p.top_k) for p in padded], jnp.int32),
        top_p=jnp.asarray([p.top_p for p in padded], jnp.float32),
        min_p=jnp.asarray([p.min_p for p in padded], jnp.float32),
        seed=jnp.asarray(words),
        min_tokens=jnp.asarray([p.min_tokens for p in padded], jnp.int32),
        stop_ids=jnp.asarray([[*s, *[-1] * (most - len(s))] for s in stops], jnp.int32),
        repetition=jnp.asarray([p.repetition_penalty for p in padded], jnp.float32),
        presence=jnp.asarray([p.presence_penalty for p in padded], jnp.float32),
        frequency=jnp.asarray([p.frequency_penalty for p in padded], jnp.float32),
        bias_ids=jnp.asarray(bias_ids),
        bias=jnp.asarray(bias),
        only=jnp.asarray(only.view(np.int32)),
    )
    features = SamplingFeatures(
        random=bool(sampled),
        truncated=any(p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in sampled),
        delayed_stop=any(p.min_tokens > 0 for p in params),
        penalised=any(map(_penalised, params)),
        biased=any(p.logit_bias for p in params),
        limited=any(p.allowed_token_ids is not None for p in params),
        banning=any(p.bad_words for p in params),
        guided=any(p.structured_outputs is not None for p in params),
        num_logprobs=max(counts) if counts else None,
    )
    return arrays, features


def words_of(p: SamplingParams) -> int:
    """How many words the bits of its allowed tokens take: a power of two, for few programs."""
    if p.allowed_token_ids is None:
        return 1
    return 1 << (max(p.allowed_token_ids) // 32).bit_length()


def _penalised(p: SamplingParams) -> bool:
    penalties = p.repetition_penalty, p.presence_penalty, p.frequency_penalty
    return penalties != (1.0, 0.0, 0.0)


def _counts(tokens: Int[Array, "batch any"], vocab: int) -> Int[Array, "batch vocab"]:
    """How often each token comes; what is negative is none."""
    rows = jnp.arange(tokens.shape[0])[:, None]
    places = jnp.where(tokens >= 0, tokens, vocab)
    return jnp.zeros((tokens.shape[0], vocab), jnp.int32).at[rows, places].add(1, mode="drop")


def penalise(
    logits: Float[Array, "batch vocab"], arrays: SamplingArrays, history: History
) -> Float[Array, "batch vocab"]:
    """Repetition penalty over prompt and output (CTRL, Keskar et al. 2019), then frequency and
    presence penalties over the output (as OpenAI defines them)."""
    output = _counts(history.output, logits.shape[1])
    seen = (output > 0) | (_counts(history.prompt, logits.shape[1]) > 0)
    factor = jnp.where(seen, arrays.repetition[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / factor, logits * factor)
    often = output.astype(jnp.float32)
    logits -= arrays.frequency[:, None] * often
    return logits - arrays.presence[:, None] * jnp.minimum(often, 1.0)


def truncate(
    logits: Float[Array, "vocab"], top_k: Array, top_p: Array, min_p: Array
) -> Float[Array, "vocab"]:
    """Masks what min-p, top-k and top-p exclude, in that order; the likeliest always stays."""
    vocab = logits.shape[0]
    logits = jnp.where(
        (min_p > 0) & (logits < logits.max() + jnp.log(jnp.maximum(min_p, 1e-30))), _MASKED, logits
    )
    descending = -jnp.sort(-logits)
    kept = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)
    allowed = jnp.arange(vocab) < kept
    probabilities = jax.nn.softmax(jnp.where(allowed, descending, _MASKED))
    # A token stays if those before it do not reach top_p yet: the smallest set that does.
    before = jnp.cumsum(probabilities) - probabilities
    allowed &= (before < top_p) | (top_p >= 1)
    allowed = allowed.at[0].set(True)
    threshold = jnp.min(jnp.where(allowed, descending, jnp.inf))
    return jnp.where(logits < threshold, _MASKED, logits)


def _draw(logits: Array, arrays: SamplingArrays, steps: Array, truncated: bool) -> Array:
    def one(row: Array, a: SamplingArrays, step: Array) -> Array:
        # Less would make several logits infinite, of which the first would be taken.
        scaled = row / jnp.where(a.temperature > 0, jnp.maximum(a.temperature, 1e-30), 1.0)
        if truncated:
            scaled = truncate(scaled, a.top_k, a.top_p, a.min_p)
        key = jax.random.fold_in(jax.random.wrap_key_data(a.seed, impl="threefry2x32"), step)
        # Gumbel-max: the arg max of noisy logits is a draw from their softmax.
        noisy = scaled + jax.random.gumbel(key, row.shape, jnp.float32)
        return jnp.argmax(jnp.where(a.temperature > 0, noisy, row))

    return jax.vmap(one)(logits, arrays, steps)


def _bits(words: Int[Array, "batch words"], count: int) -> Bool[Array, "batch count"]:
    """The first ``count`` bits of each row; what is missing is none."""
    shifts = jnp.arange(32, dtype=jnp.int32)
    bits = (words[:, :, None] >> shifts) & 1
    bits = bits.reshape(words.shape[0], -1)[:, :count] != 0
    return jnp.pad(bits, ((0, 0), (0, count - bits.shape[1])))


def scores(logits: Float[Array, "rows vocab"], token: Int[Array, "rows"], k: int) -> Sampled:
    """Log-probability and rank of ``token`` in each row, and the ``k`` likeliest tokens."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, token[:, None], axis=1)
    rank = 1 + jnp.sum(logprobs > chosen, axis=1, dtype=jnp.int32)
    top, ids = jax.lax.top_k(logprobs, k)
    return Sampled(token, chosen[:, 0], rank, ids.astype(jnp.int32), top)


@partial(jax.jit, static_argnames="features")
def sample(
    logits: Float[Array, "batch vocab"],
    arrays: SamplingArrays,
    steps: Int[Array, "batch"],
    forced: Int[Array, "batch"] | None = None,
    history: History | None = None,
    allowed: Int[Array, "batch words"] | None = None,
    *,
    features: SamplingFeatures,
) -> Sampled:
    """Draws the token of generated index ``steps[row]`` (0: the first) of every row.

    Where ``forced`` is not negative, that is the token. ``history`` is looked at where a feature
    needs it. ``allowed``, where answers are guided: a bit a token, the lowest of the first word
    first.
    """
    raw = logits
    rows = jnp.arange(logits.shape[0])[:, None]
    if features.penalised:
        assert history is not None
        logits = penalise(logits, arrays, history)
    if features.biased:
        ids = jnp.where(arrays.bias_ids >= 0, arrays.bias_ids, logits.shape[1])
        logits = logits.at[rows, ids].add(arrays.bias, mode="drop")
    if features.limited:
        free = jnp.all(arrays.only == 0, axis=1, keepdims=True)
        logits = jnp.where(free | _bits(arrays.only, logits.shape[1]), logits, _MASKED)
    if features.banning:
        assert history is not None
        ids = jnp.where(history.banned >= 0, history.banned, logits.shape[1])
        logits = logits.at[rows, ids].set(_MASKED, mode="drop")
    if features.delayed_stop:
        early = steps < arrays.min_tokens
        ids = jnp.where(early[:, None] & (arrays.stop_ids >= 0), arrays.stop_ids, logits.shape[1])
        logits = logits.at[rows, ids].set(_MASKED, mode="drop")
    if features.guided:
        assert allowed is not None
        logits = jnp.where(_bits(allowed, logits.shape[1]), logits, _MASKED)
    if features.random:
        token = _draw(logits, arrays, steps, features.truncated)
    else:
        token = jnp.argmax(logits, axis=-1)
    token = jnp.where(logits.max(axis=-1) > _MASKED, token.astype(jnp.int32), NOTHING_LEFT)
    if forced is not None:
        token = jnp.where(forced >= 0, forced, token)
    # A NaN is less than nothing. Minus infinity is the logit of what cannot come.
    token = jnp.where(jnp.all(raw < jnp.inf, axis=-1), token, NOT_NUMBERS)
    k = features.num_logprobs
    if k is None:
        none = jnp.zeros(0, jnp.float32)
        return Sampled(
            token, none, none.astype(jnp.int32), jnp.zeros((0, 0), jnp.int32), none[None]
        )
    return scores(raw, jnp.maximum(token, 0), k)._replace(token=token)
