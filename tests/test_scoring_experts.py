"""Log-likelihoods of models with experts, from disk, against the unscheduled reference."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexgen_jax as fg
from flexgen_jax.compare import compare, ways_to_compress
from flexgen_jax.models import decoding
from flexgen_jax.scoring import perplexity
from flexgen_jax.weights.checkpoint import convert
from tests.test_families import DISK, GOLDENS, HOST

POLICY = fg.Policy(device_batch_size=2, num_device_batches=2, weights=HOST, experts=DISK)
forward = jax.jit(decoding.forward, static_argnames="config")


def reference(store):
    """Token ids -> log-probabilities (position, vocab)."""
    params, config = fg.load_params(store, dtype="float32"), fg.load_config(store)

    def logprobs(tokens):
        # Of one length, so of one program: what comes behind a token does not change it.
        ids = np.zeros((1, 24), np.int32)
        ids[0, : len(tokens)] = tokens
        logits = forward(params, jnp.asarray(ids), config)[0, : len(tokens)]
        return np.asarray(jax.nn.log_softmax(logits))

    return logprobs


def random_tokens(seed, length):
    return [int(i) for i in np.random.default_rng(seed).integers(0, 60, length)]


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def opened(request, tmp_path_factory):
    target = tmp_path_factory.mktemp("stores") / request.param
    store = convert(GOLDENS / request.param, target, dtype="float32")
    with fg.LLM(str(store), policy=POLICY, dtype="float32") as llm:
        yield llm, reference(store)


def test_scores_equal_the_reference(opened):
    """Of unequal lengths, in several batches."""
    llm, logprobs = opened
    lengths = [(1, 1), (5, 3), (12, 12), (20, 1), (2, 9), (8, 8), (3, 1)]
    prompts = [random_tokens(i, a) for i, (a, _) in enumerate(lengths)]
    continuations = [random_tokens(100 + i, b) for i, (_, b) in enumerate(lengths)]
    scores = llm.score(prompts, continuations)
    for score, prompt, continuation in zip(scores, prompts, continuations, strict=True):
        table = logprobs([*prompt, *continuation])[len(prompt) - 1 :]
        expected = table[np.arange(len(continuation)), continuation]
        np.testing.assert_allclose(score.logprobs, expected, rtol=1e-4, atol=1e-4)
        greedy = table[: len(continuation)].argmax(axis=-1).tolist() == continuation
        assert score.is_greedy == greedy


def test_prompt_logprobs_beside_generating(opened):
    llm, logprobs = opened
    prompts = [random_tokens(1, 6), random_tokens(2, 1), random_tokens(3, 11)]
    params = fg.SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, prompt_logprobs=1)
    for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
        table = logprobs([*prompt, *output.outputs[0].token_ids])
        first, *entries = output.prompt_logprobs
        assert first is None
        for row, token, entry in zip(table, prompt[1:], entries, strict=False):
            assert set(entry) == {token, int(row.argmax())}
            assert entry[token].logprob == pytest.approx(row[token], rel=1e-4)
            assert entry[token].rank == 1 + (row > row[token]).sum()
        assert len(entries) == len(prompt) - 1
        chosen = table[len(prompt) - 1 : -1].argmax(axis=-1)
        assert chosen.tolist() == list(output.outputs[0].token_ids)


def test_perplexity_equals_the_reference(opened):
    llm, logprobs = opened
    tokens = random_tokens(5, 24)
    table = logprobs(tokens)[:-1]
    found = perplexity(llm, tokens, context=24)
    expected = np.exp(-table[np.arange(23), tokens[1:]].mean())
    assert found.perplexity == pytest.approx(expected, rel=1e-4)


def test_what_codes_cost_is_what_the_reference_says(tmp_path):
    """Experts in codes, from disk: perplexity, distance and agreement of what codes stand for."""
    model = GOLDENS / "qwen3_moe"
    stores = {
        bits: convert(model, tmp_path / f"{bits}", dtype="float32", weight_bits=bits)
        for bits in (None, 4)
    }

    def make(**fields):
        policy = dataclasses.replace(POLICY, **fields)
        return fg.LLM(str(stores[policy.weight_bits]), policy=policy, dtype="float32")

    tokens = random_tokens(7, 5 * 16)
    plain, coded = compare(make, tokens, ways_to_compress(weight_bits=4), context=16, prompt_len=6)
    windows = np.reshape(tokens, (5, 16))
    of_each = {}
    for bits, found in ((None, plain), (4, coded)):
        logprobs = reference(stores[bits])
        of_each[bits] = np.stack([logprobs(window)[5:-1] for window in windows])
        forced = np.take_along_axis(of_each[bits], windows[:, 6:, None], axis=-1)
        assert found.perplexity == pytest.approx(np.exp(-forced.mean()), rel=1e-4)
    wanted, given = of_each[None], of_each[4]
    distance = (np.exp(wanted) * (wanted - given)).sum(axis=-1).mean()
    assert coded.kl_divergence == pytest.approx(distance, rel=1e-3)
    assert distance > 1e-3
    assert coded.top1_agreement == (wanted.argmax(axis=-1) == given.argmax(axis=-1)).mean()
    # Experts come from disk, and in codes they are smaller.
    assert 0 < coded.bytes_per_token["disk to host"] < 0.7 * plain.bytes_per_token["disk to host"]
