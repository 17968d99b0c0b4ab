"""Sampling: what parameters mean, and that rows do not see each other."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import flexgen_jax as fg
from flexgen_jax.cli.app import main
from flexgen_jax.engine.sampling import (
    History,
    batch_arrays,
    penalise,
    sample,
    seed_words,
    truncate,
)
from flexgen_jax.planning.blocks import last_blocks, make_blocks
from flexgen_jax.requests.request import Request
from flexgen_jax.requests.sampling_params import SamplingParams
from flexgen_jax.requests.stops import first_stop, stopped_by

VOCAB = 40


def draw(logits, params, step=0, rows=None, stops=None, fallback=0):
    rows = rows or len(params)
    seeds = [seed_words(p, (fallback, i)) for i, p in enumerate(params)]
    arrays, features = batch_arrays(params, seeds, stops or [[]] * len(params), rows)
    padded = jnp.concatenate([logits, jnp.zeros((rows - len(params), logits.shape[1]))])
    steps = np.full(len(padded), step, np.int32)
    return sample(padded.astype(jnp.float32), arrays, steps, features=features)


@pytest.fixture
def logits():
    return jnp.asarray(np.random.default_rng(0).normal(0, 2, (4, VOCAB)), jnp.float32)


def test_temperature_zero_is_arg_max(logits):
    out = draw(logits, [SamplingParams(temperature=0.0)] * 4)
    np.testing.assert_array_equal(out.token, np.argmax(logits, axis=1))


def test_a_temperature_next_to_zero_is_arg_max(logits):
    for temperature in (1e-30, 1e-37, 1e-40):
        params = [SamplingParams(temperature=temperature, seed=i) for i in range(4)]
        found = draw(50 * logits, params).token
        np.testing.assert_array_equal(found, jnp.argmax(logits, axis=1))


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
    st.sampled_from([2, 5, 12, 30]).flatmap(  # each is a program
        lambda n: st.lists(
            st.floats(-8, 8, width=32, allow_subnormal=False), min_size=n, max_size=n, unique=True
        )
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
        ("n", 0, "n must be an integer from 1 to 1024"),
        ("stop", [1], "stop must be a text"),
        ("prompt_logprobs", 99, "prompt_logprobs must be null or an integer from 0 to 20"),
        ("repetition_penalty", 0, "a number above 0"),
        ("logit_bias", {"x": 2.0}, "token ids and numbers"),
        ("allowed_token_ids", [], "at least one token id"),
        ("allowed_token_ids", [-1], "at least one token id"),
        ("allowed_token_ids", 5, "a list"),
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


def history(prompts, outputs, banned=None, steps=8):
    def filled(rows, width):
        return jnp.asarray([[*r, *[-1] * (width - len(r))] for r in rows], jnp.int32)

    return History(
        filled(prompts, max(map(len, prompts))),
        filled(outputs, steps),
        filled(banned or [[]] * len(prompts), 2),
    )


def greedy(logits, params, past):
    seeds = [seed_words(p, (0, i)) for i, p in enumerate(params)]
    arrays, features = batch_arrays(params, seeds, [[]] * len(params), len(params))
    steps = np.full(len(logits), 3, np.int32)
    out = sample(logits, arrays, steps, None, past, features=features)
    return [int(t) for t in out.token]


def test_penalties_by_hand():
    """Hugging Face's repetition penalty; OpenAI's presence and frequency penalties."""
    logits = jnp.asarray([[2.0, -1.0, 0.5, 0.0]])
    past = history([[0, 1]], [[2, 2, 3]])
    arrays, _ = batch_arrays(
        [SamplingParams(repetition_penalty=2.0, presence_penalty=0.3, frequency_penalty=0.1)],
        [np.zeros(2, np.uint32)],
        [[]],
        1,
    )
    found = penalise(logits, arrays, past)
    expected = [[2.0 / 2, -1.0 * 2, 0.5 / 2 - 2 * 0.1 - 0.3, 0.0 - 0.1 - 0.3]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


PENALTIES = st.builds(
    SamplingParams,
    temperature=st.just(0.0),
    repetition_penalty=st.sampled_from([1.0, 0.7, 1.5]),
    presence_penalty=st.sampled_from([0.0, 1.0, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-5, 5), max_size=3),
)
TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6)


@given(params=PENALTIES, prompt=TOKENS, output=TOKENS, other=PENALTIES, seed=st.integers(0, 99))
@settings(max_examples=40)
def test_what_a_row_has_had_is_its_own(params, prompt, output, other, seed):
    """The plain definition; and the same token beside another row."""
    row = np.random.default_rng(seed).normal(0, 2, VOCAB).astype(np.float32)
    wanted = row.copy()
    for token in {*prompt, *output}:
        wanted[token] = (
            wanted[token] / np.float32(params.repetition_penalty)
            if wanted[token] > 0
            else wanted[token] * np.float32(params.repetition_penalty)
        )
    for token in set(output):
        wanted[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    for token, bias in params.logit_bias.items():
        wanted[token] += bias
    (alone,) = greedy(jnp.asarray(row[None]), [params], history([prompt], [output]))
    assert wanted[alone] == pytest.approx(wanted.max(), abs=1e-4)
    both = jnp.asarray(np.stack([row[::-1], row]))
    past = history([[3], prompt], [[5, 5], output])
    assert greedy(both, [other, params], past)[1] == alone


def test_biases_and_banned_tokens():
    logits = jnp.asarray([[3.0, 2.0, 1.0, 0.0]] * 2)
    free = SamplingParams(temperature=0.0)
    pushed = SamplingParams(temperature=0.0, logit_bias={"3": 10, 0: -1})
    assert greedy(logits, [free, pushed], history([[0], [0]], [[], []])) == [0, 3]
    banning = SamplingParams(temperature=0.0, bad_words=["x"])
    past = history([[0], [0]], [[1], [1]], banned=[[0, 1], []])
    assert greedy(logits, [banning, banning], past) == [2, 0]


@given(
    allowed=st.lists(st.integers(0, VOCAB - 1), min_size=1),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=20)
def test_only_allowed_tokens_come(allowed, temperature, seed):
    """What a draw of the others' -inf would be: beside a bias, min-p, top-k, and a free row."""
    logits = np.random.default_rng(seed).normal(0, 2, (2, VOCAB)).astype(np.float32)
    fields = {"temperature": temperature, "seed": seed, "min_p": 0.05, "top_k": 4}
    fields["logit_bias"] = {int(logits[0].argmax()): 3.0}
    free = SamplingParams(temperature=1.0, seed=seed)
    mine = SamplingParams(**fields, allowed_token_ids=allowed)
    (here, beside) = draw(jnp.asarray(logits), [mine, free]).token
    masked = np.where(np.isin(np.arange(VOCAB), allowed), logits, -np.inf)
    wanted = draw(jnp.asarray(np.stack([masked[0], logits[1]])), [SamplingParams(**fields), free])
    assert here in allowed
    assert (here, beside) == tuple(wanted.token)


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", ["two"], (4, "two")),
        ("one two three", ["three", "two"], (4, "two")),
        ("one two three", ["tw", "two"], (4, "tw")),
        ("one two three", ["four"], None),
        ("", ["x"], None),
    ],
)
def test_the_first_stop_string(text, stops, expected):
    assert first_stop(text, stops) == expected


@given(
    text=st.text(alphabet="ab é€😀", max_size=60),
    stop=st.text(alphabet="ab é€", min_size=1, max_size=4),
)
def test_a_stop_string_ends_at_the_token_that_completes_it(text, stop):
    """Tokens are bytes here: characters and stop strings come in pieces."""
    tokens: list[int] = []

    def decode(ids):
        return bytes(ids).decode("utf-8", errors="replace")

    for byte in text.encode():
        tokens.append(byte)
        found = stopped_by(tokens, [stop, "never"], decode)
        assert (found == stop) == (stop in decode(tokens))
        if found:
            break
    assert (stop in text) == (stop in decode(tokens))


DEMO = "flexgen_jax/demo_model"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    policy = fg.Policy(device_batch_size=4, num_device_batches=2)
    with fg.LLM(DEMO, policy=policy, offload_dir=str(tmp_path_factory.mktemp("off"))) as llm:
        yield llm


def completed(llm, prompt="Once upon a time", **choices):
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 24, **choices})
    return llm.generate([prompt], params)[0].outputs[0]


def test_stop_strings_end_a_request(demo):
    free = completed(demo)
    # Not where a token begins or ends.
    cut = len(demo.tokenizer.decode(free.token_ids[:9])) + 1
    stop = free.text[cut : cut + 5]
    stopped = completed(demo, stop=stop)
    assert stopped.text == free.text[: free.text.index(stop)]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert stop in demo.tokenizer.decode(stopped.token_ids)
    assert stop not in demo.tokenizer.decode(stopped.token_ids[:-1])
    assert completed(demo, stop=["no such text", stop]).text == stopped.text
    late = completed(demo, stop=stop, min_tokens=24)
    assert late.finish_reason in ("stop", "length")
    assert len(late.token_ids) == 24
    beside = demo.generate(
        ["Once upon a time", "The little dog"] * 3,
        [
            SamplingParams(temperature=0.0, max_tokens=24, stop=s)
            for s in [(), stop, stop, (), stop, ()]
        ],
    )
    assert beside[2].outputs[0].text == beside[4].outputs[0].text == stopped.text
    assert beside[0].outputs[0].text == free.text


def test_bad_words_do_not_come(demo):
    free = completed(demo)
    words = [w for w in free.text.replace(".", " ").split() if len(w) > 2]
    for word in dict.fromkeys(words[:4]):
        changed = completed(demo, bad_words=[word])
        assert f" {word} " not in f" {changed.text} "
    assert completed(demo, bad_words=["no such word at all"]).text == free.text


def test_penalties_change_what_comes(demo):
    free = completed(demo, max_tokens=48)
    varied = completed(demo, max_tokens=48, frequency_penalty=2.0, presence_penalty=2.0)
    assert len(set(varied.token_ids)) > len(set(free.token_ids))
    assert completed(demo, max_tokens=48, repetition_penalty=1e5).token_ids != free.token_ids
    token = free.token_ids[0]
    assert token not in completed(demo, logit_bias={token: -100}).token_ids
    with_logprobs = completed(demo, logit_bias={token: -100}, logprobs=1)
    entry = with_logprobs.logprobs[0]
    assert token in entry  # log-probabilities are of the unmodified logits


def test_a_model_without_a_tokenizer_says_what_it_cannot(tmp_path):
    store = fg.convert_dummy(fg.OPTConfig.load(Path("tests/goldens/pre_norm")), tmp_path / "s")
    with fg.LLM(str(store), policy=fg.Policy(), offload_dir=str(tmp_path)) as llm:
        for name in ("stop", "bad_words"):
            with pytest.raises(fg.RequestError, match=f"no tokenizer files, which {name} needs"):
                llm.generate([[5, 6]], SamplingParams(**{name: "x"}))
        with pytest.raises(fg.RequestError, match="logit_bias token id 999999 is outside"):
            llm.generate([[5, 6]], SamplingParams(logit_bias={999999: 1}))
        with pytest.raises(fg.RequestError, match="allowed token id 999999 is outside"):
            llm.generate([[5, 6]], SamplingParams(allowed_token_ids=[5, 999999]))


def test_a_job_takes_them_all(tmp_path):
    lines = [
        {"prompt": "Once upon a time", "stop": ["."], "repetition_penalty": 1.1},
        {"prompt": "Once upon a time", "logit_bias": {"7": -5}, "bad_words": ["the"]},
        {"prompt": "Once upon a time", "stop": [""]},
        {"prompt": "Once upon a time", "presence_penalty": 3},
        {
            "custom_id": "o",
            "url": "/v1/completions",
            "body": {"prompt": "Once upon a time", "stop": ".", "frequency_penalty": 0.5},
        },
        {"prompt": "Once upon a time", "best_of": 2},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    command = ["generate", "--model", DEMO, "--offload-dir", tmp_path, "-i", source, "-o", target]
    command += ["--max-tokens", 32, "--presence-penalty", 0.1, "--stop", "!!", "--quiet"]
    done = CliRunner().invoke(main, [str(c) for c in command])
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in target.read_text().splitlines()]
    assert records[0]["stop_reason"] == "."
    assert "." not in records[0]["text"]
    assert " the " not in records[1]["text"]
    assert "stop must be a text that is not empty" in records[2]["error"]["message"]
    assert "presence_penalty must be a number from -2 to 2" in records[3]["error"]["message"]
    (choice,) = records[4]["response"]["body"]["choices"]
    assert choice["finish_reason"] == "stop"
    message = records[5]["error"]["message"]
    assert "unknown sampling field 'best_of'" in message
    assert "known: allowed_token_ids, bad_words, detokenize" in message


def test_several_completions_are_drawn_each_by_itself(demo):
    hot = {"max_tokens": 6, "temperature": 1.5, "ignore_eos": True, "logprobs": 1}
    prompts = ["Once upon a time", "The dog", "A"]
    params = [
        SamplingParams(n=5, seed=3, prompt_logprobs=0, **hot),
        SamplingParams(seed=4, **hot),
        SamplingParams(n=2, seed=5, **hot),
    ]
    single = demo.generate(prompts, [dataclasses.replace(p, n=1) for p in params])
    assert demo.policy.block_size >= 5
    several = demo.generate(prompts, params)
    assert [len(o.outputs) for o in several] == [5, 1, 2]
    assert [o.prompt for o in several] == prompts
    for one, more in zip(single, several, strict=True):
        assert one.outputs[0].token_ids == more.outputs[0].token_ids
        assert one.prompt_logprobs == more.prompt_logprobs
        assert [c.index for c in more.outputs] == list(range(len(more.outputs)))
        assert len({c.token_ids for c in more.outputs}) == len(more.outputs)
        assert all(len(c.logprobs) == 6 for c in more.outputs)
    assert demo.report.requests == 3
    assert demo.report.generated_tokens == 8 * 6
    streamed = demo.generate_iter(prompts, params, window=1)
    assert [[c.token_ids for c in o.outputs] for o in streamed] == [
        [c.token_ids for c in o.outputs] for o in several
    ]


def test_greedy_completions_would_all_be_the_same():
    with pytest.raises(ValueError, match="n=2 completions of greedy decoding are all the same"):
        SamplingParams(n=2, temperature=0.0)


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9)), min_size=1, max_size=30),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_completions_stay_together(asked, rows, batches):
    """In order, in one block if it has room; none is lost."""
    requests = [
        Request(i, None, (5,) * length, SamplingParams(n=n)) for i, (length, n) in enumerate(asked)
    ]
    blocks = list(make_blocks(requests, device_batch_size=rows, num_device_batches=batches))
    found = [[(r.index, r.sample) for r in block.requests] for block in blocks]
    assert all(len(block) <= rows * batches for block in found)
    flat = [pair for block in found for pair in block]
    assert sorted(flat) == [(i, k) for i, (_, n) in enumerate(asked) for k in range(n)]
    for index, (_, n) in enumerate(asked):
        assert [k for i, k in flat if i == index] == list(range(n))
        ends = {last_blocks(blocks)[b] for b, block in enumerate(found) if (index, 0) in block}
        homes = [b for b, block in enumerate(found) if any(i == index for i, _ in block)]
        assert len(homes) == 1 or n > rows * batches
        assert max(homes) <= ends.pop()
