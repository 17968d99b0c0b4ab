"""Sampling: what parameters mean, and that rows do not see each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_jax.sampling import batch_arrays, sample, seed_words, truncate
from flexgen_jax.sampling_params import SamplingParams

VOCAB = 40


def draw(logits, params, step=0, rows=None, stops=None, fallback=0):
    rows = rows or len(params)
    seeds = [seed_words(p, (fallback, i)) for i, p in enumerate(params)]
    arrays, features = batch_arrays(params, seeds, stops or [[]] * len(params), rows)
    padded = jnp.concatenate([logits, jnp.zeros((rows - len(params), logits.shape[1]))])
    return sample(padded.astype(jnp.float32), arrays, np.int32(step), features=features)


@pytest.fixture
def logits():
    return jnp.asarray(np.random.default_rng(0).normal(0, 2, (4, VOCAB)), jnp.float32)


def test_temperature_zero_is_arg_max(logits):
    out = draw(logits, [SamplingParams(temperature=0.0)] * 4)
    np.testing.assert_array_equal(out.token, np.argmax(logits, axis=1))


def test_a_row_draws_the_same_whatever_its_neighbours(logits):
    """Alone, among greedy rows, among truncated rows, on another row: the same token."""
    mine = SamplingParams(temperature=1.3, seed=7)
    others = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.7, top_k=3, seed=1),
        SamplingParams(temperature=2.0, top_p=0.5, min_p=0.1, logprobs=2, min_tokens=3),
    ]
    for step in range(20):
        alone = int(draw(logits[:1], [mine], step).token[0])
        for other in others:
            there = draw(logits[jnp.array([1, 0])], [other, mine], step, rows=4)
            assert int(there.token[1]) == alone


def test_seed_and_step_change_the_draw(logits):
    flat = jnp.zeros((1, VOCAB))
    tokens = {
        (seed, step): int(draw(flat, [SamplingParams(temperature=1.0, seed=seed)], step).token[0])
        for seed in range(5)
        for step in range(5)
    }
    assert len(set(tokens.values())) > 10
    again = int(draw(flat, [SamplingParams(temperature=1.0, seed=3)], 4).token[0])
    assert again == tokens[3, 4]


def test_requests_without_a_seed_differ_by_place_and_by_the_models_seed():
    params = SamplingParams()
    words = {tuple(seed_words(params, (s, i))) for s in range(3) for i in range(3)}
    assert len(words) == 9
    assert tuple(seed_words(SamplingParams(seed=2**40 + 5), (0, 0))) == (256, 5)


def test_draws_follow_the_softmax():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    params = [SamplingParams(temperature=1.0, seed=i) for i in range(2000)]
    tokens = np.asarray(draw(jnp.tile(logits, (2000, 1)), params).token)
    shares = np.bincount(tokens, minlength=4) / 2000
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.15, 0.05], atol=0.04)


def kept(logits, **kw):
    args = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | kw
    out = truncate(
        jnp.asarray(logits, jnp.float32),
        jnp.int32(args["top_k"]),
        jnp.float32(args["top_p"]),
        jnp.float32(args["min_p"]),
    )
    return set(np.flatnonzero(np.asarray(out) > -1e30))


def test_truncation_by_hand():
    logits = np.log([0.4, 0.1, 0.3, 0.2])
    assert kept(logits) == {0, 1, 2, 3}
    assert kept(logits, top_k=2) == {0, 2}
    assert kept(logits, top_k=9) == {0, 1, 2, 3}
    assert kept(logits, top_p=0.39) == {0}
    assert kept(logits, top_p=0.69) == {0, 2}
    assert kept(logits, top_p=0.71) == {0, 2, 3}
    assert kept(logits, min_p=0.6) == {0, 2}
    assert kept(logits, min_p=1.0) == {0}
    # top-p counts what top-k left: 0.4/0.7 alone reaches one half
    assert kept(logits, top_k=2, top_p=0.5) == {0}


@given(
    st.lists(
        st.floats(-8, 8, width=32, allow_subnormal=False), min_size=2, max_size=30, unique=True
    ),
    st.integers(0, 40),
    st.floats(1 / 64, 1.0, width=32),
    st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9, 1.0]),
)
def test_truncation_agrees_with_the_plain_definition(values, top_k, top_p, min_p):
    logits = np.asarray(values, np.float64)
    keep = np.ones(len(logits), bool)
    if min_p > 0:
        keep &= logits >= logits.max() + np.log(min_p) - 1e-4
    order = np.argsort(-logits)
    probabilities = np.where(keep, np.exp(logits - logits.max()), 0)
    if top_k:
        keep[order[top_k:]] = False
        probabilities[order[top_k:]] = 0
    probabilities /= probabilities.sum()
    mass = np.cumsum(probabilities[order]) - probabilities[order]
    sure_in = {int(t) for t, m in zip(order, mass, strict=True) if keep[t] and m < top_p - 1e-4}
    maybe = {int(t) for t, m in zip(order, mass, strict=True) if keep[t] and m < top_p + 1e-4}
    if top_p == 1:
        sure_in, maybe = set(np.flatnonzero(keep)), set(np.flatnonzero(keep))
    got = kept(values, top_k=top_k, top_p=top_p, min_p=min_p)
    near_min_p = {
        int(i)
        for i in np.flatnonzero(abs(logits - logits.max() - np.log(max(min_p, 1e-30))) < 2e-4)
    }
    assert sure_in - near_min_p <= got <= maybe | near_min_p
    assert int(np.argmax(logits)) in got


def test_min_tokens_holds_stop_tokens_back(logits):
    best = int(np.argmax(logits[0]))
    params = [SamplingParams(temperature=0.0, min_tokens=2)]
    for step, allowed in ((0, False), (1, False), (2, True)):
        token = int(draw(logits[:1], params, step, stops=[[best, 3]]).token[0])
        assert (token == best) == allowed


def test_logprobs_are_of_the_unmodified_logits(logits):
    params = [SamplingParams(temperature=1.7, seed=3, logprobs=5)] * 4
    out = draw(logits, params)
    expected = np.asarray(jax.nn.log_softmax(logits, axis=1))
    for row in range(4):
        token = int(out.token[row])
        assert float(out.logprob[row]) == pytest.approx(expected[row, token], abs=1e-5)
        assert int(out.rank[row]) == 1 + int((expected[row] > expected[row, token]).sum())
        best = np.argsort(-expected[row])[:5]
        np.testing.assert_array_equal(out.top_ids[row], best)
        np.testing.assert_allclose(out.top_logprobs[row], expected[row, best], atol=1e-5)


def test_logprobs_zero_gives_the_chosen_token_only(logits):
    out = draw(logits, [SamplingParams(temperature=0.0, logprobs=0)] * 4)
    assert out.top_ids.shape == (4, 0)
    assert out.logprob.shape == (4,)


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("temperature", -0.1, "from 0 to 1e+06"),
        ("temperature", float("nan"), "from 0 to 1e+06"),
        ("temperature", "hot", "a number"),
        ("top_k", -2, "from -1 to 2147483647"),
        ("top_p", 0.0, "(0, 1]"),
        ("top_p", 1.1, "(0, 1]"),
        ("min_p", 2, "[0, 1]"),
        ("max_tokens", 0, "at least 1"),
        ("max_tokens", True, "an integer"),
        ("min_tokens", 17, "max_tokens (16)"),
        ("seed", 1.5, "integer"),
        ("logprobs", 21, "from 0 to 20"),
        ("stop_token_ids", "</s>", "list of token ids"),
        ("ignore_eos", 1, "true or false"),
        ("n", 2, "not supported yet"),
        ("stop", "\n", "not supported yet"),
        ("prompt_logprobs", 99, "prompt_logprobs must be null or an integer from 0 to 20"),
        ("repetition_penalty", 1.2, "not supported yet"),
        ("logit_bias", {1: 2.0}, "not supported yet"),
    ],
)
def test_bad_values_are_refused_by_name(field, value, word):
    with pytest.raises(ValueError, match=field) as caught:
        SamplingParams(**{field: value})
    assert word in str(caught.value)


def test_hugging_face_names():
    assert SamplingParams(max_new_tokens=5).max_tokens == 5
    assert SamplingParams(do_sample=False).temperature == 0
    assert SamplingParams(do_sample=True).temperature == 1
    with pytest.raises(ValueError, match="two names"):
        SamplingParams(max_tokens=4, max_new_tokens=5)
    with pytest.raises(ValueError, match="contradicts"):
        SamplingParams(temperature=0.0, do_sample=True)


def test_updated_overlays_a_lines_fields():
    base = SamplingParams(temperature=0.0, max_tokens=32)
    assert base.updated({}) == base
    assert base.updated({"max_tokens": 4, "seed": 1}).max_tokens == 4
    assert base.updated({"max_new_tokens": 4}).max_tokens == 4
    assert base.updated({"do_sample": True}).temperature == 1
    assert base.updated({"temperature": None, "stop_token_ids": [3]}).stop_token_ids == (3,)
    with pytest.raises(ValueError, match="unknown sampling field 'temprature'"):
        base.updated({"temprature": 1})
