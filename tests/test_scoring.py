"""Log-likelihoods, against the unscheduled reference."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flexgen_jax as fg
from flexgen_jax.models import opt
from flexgen_jax.scoring import perplexity, windows
from storage.wrappers import Logged

GOLDENS = Path(__file__).parent / "goldens"
DEMO = Path(fg.__file__).parent / "demo_model"
DISK = fg.Split(device=0, disk=100)


@pytest.fixture(scope="module")
def offload(tmp_path_factory):
    return str(tmp_path_factory.mktemp("offload"))


def open_llm(offload, model=GOLDENS / "pre_norm", **options):
    small = fg.Policy(device_batch_size=4, num_device_batches=3, weights=DISK)
    return fg.LLM(str(model), offload_dir=offload, **{"policy": small} | options)


def reference(llm):
    """Token ids -> log-probabilities (position, vocab) of the unscheduled model."""
    params, config = fg.load_params(llm.store), llm.config

    def logprobs(tokens):
        logits = opt.forward(params, jnp.asarray([tokens]), config)[0]
        return np.asarray(jax.nn.log_softmax(logits))

    return logprobs


def random_tokens(seed, length):
    return [int(i) for i in np.random.default_rng(seed).integers(0, 60, length)]


def test_scores_equal_the_reference(offload):
    """Unequal lengths, a prompt of one token, a continuation longer than its prompt."""
    lengths = [(1, 1), (5, 3), (17, 20), (30, 1), (2, 9), (8, 8), (3, 1), (12, 2), (1, 30)]
    prompts = [random_tokens(i, a) for i, (a, _) in enumerate(lengths)]
    continuations = [random_tokens(100 + i, b) for i, (_, b) in enumerate(lengths)]
    with open_llm(offload) as llm:
        logprobs = reference(llm)
        best = [int(logprobs(prompts[0])[-1].argmax())]
        scores = llm.score([*prompts, prompts[0]], [*continuations, best])
        assert llm.score([], []) == []
    for score, prompt, continuation in zip(scores, prompts, continuations, strict=False):
        table = logprobs([*prompt, *continuation])
        places = range(len(prompt) - 1, len(prompt) + len(continuation) - 1)
        expected = [table[i, t] for i, t in zip(places, continuation, strict=True)]
        np.testing.assert_allclose(score.logprobs, expected, rtol=1e-4, atol=1e-4)
        assert score.logprob == pytest.approx(sum(expected), rel=1e-4)
        assert score.token_ids == tuple(continuation)
        assert score.prompt_token_ids == tuple(prompt)
        greedy = all(table[i].argmax() == t for i, t in zip(places, continuation, strict=True))
        assert score.is_greedy == greedy
    assert scores[-1].is_greedy


def test_a_block_reads_the_weights_once(offload):
    reads = []

    def wrap(tier, store):
        return Logged(store, lambda verb, names, nbytes: reads.append((tier, verb, tuple(names))))

    many = fg.Policy(device_batch_size=4, num_device_batches=50, weights=DISK)
    prompts = [random_tokens(i, 5) for i in range(200)]
    with open_llm(offload, policy=many, wrap_store=wrap) as llm:
        assert len(llm.score(prompts, [[7]] * 200)) == 200
        assert llm.report.blocks == 1
        assert llm.report.placement["cache"].nbytes() == 0
    loads = [names for tier, verb, names in reads if verb == "load" and tier is fg.Tier.DISK]
    tensors = [name for names in loads for name in names if name != "embed.tokens"]
    assert len(tensors) == len(set(tensors))


def test_prompt_logprobs_beside_generating(offload):
    prompts = [random_tokens(1, 6), random_tokens(2, 1), random_tokens(3, 11)]
    params = [
        fg.SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, prompt_logprobs=k)
        for k in (2, 0, None)
    ]
    with open_llm(offload) as llm:
        logprobs = reference(llm)
        outputs = llm.generate(prompts, params)
        plain = llm.generate(prompts, fg.SamplingParams(temperature=0.0, max_tokens=2))
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in plain]
    assert outputs[2].prompt_logprobs is None
    assert outputs[1].prompt_logprobs == (None,)
    first, *entries = outputs[0].prompt_logprobs
    assert first is None
    table = logprobs(prompts[0])
    for i, entry in enumerate(entries):
        token, order = prompts[0][i + 1], np.argsort(-table[i])
        assert set(entry) == {token, int(order[0]), int(order[1])}
        assert entry[token].logprob == pytest.approx(table[i, token], rel=1e-4)
        assert entry[token].rank == 1 + (table[i] > table[i, token]).sum()
        assert entry[int(order[0])].rank == 1


def test_texts_are_tokenised_as_one(offload):
    with open_llm(offload, model=DEMO, say=lambda _: None) as llm:
        (score,) = llm.score(["To be, or not to be: that is"], [" the question"])
        whole = llm.encode("To be, or not to be: that is the question")
        assert [*score.prompt_token_ids, *score.token_ids] == whole
        (empty,) = llm.score([""], ["A text by itself"])
        assert list(empty.prompt_token_ids) == llm.encode("")
        likely, unlikely = llm.score(["The king", "The king"], [" is", "zzqx"])
        assert likely.logprob > unlikely.logprob


@pytest.mark.parametrize(
    ("prompt", "continuation", "words"),
    [
        ([], [5], "the prompt has no tokens"),
        ([5], [], "the continuation has no tokens"),
        ([5], [9999], "token id 9999 is outside the vocabulary"),
        ([5] * 300, [5] * 300, "too long"),
        ("text", [5], "must both be texts, or both be token ids"),
        ("text", "more", "no tokenizer"),
    ],
)
def test_bad_pairs_are_named_all_at_once(offload, prompt, continuation, words):
    with open_llm(offload) as llm:
        with pytest.raises(fg.RequestError, match="prompt 1: ") as caught:
            llm.score([[5], prompt], [[6], continuation])
        assert words in str(caught.value)
        with pytest.raises(fg.RequestError, match="2 prompts but 1 continuations"):
            llm.score([[5], [6]], [[7]])


@given(length=st.integers(2, 60), context=st.integers(2, 20), stride=st.integers(1, 19))
def test_windows_score_each_token_once_with_enough_before_it(length, context, stride):
    stride = min(stride, context - 1)
    seen = []
    for start, end, scored in windows(length, context, stride):
        assert end - start <= context
        for token in range(end - scored, end):
            assert token - start >= min(token, context - stride)
            seen.append(token)
    assert seen == list(range(1, length))


@pytest.mark.parametrize(("context", "stride"), [(20, 7), (16, None), (None, None), (2, 1)])
def test_perplexity_equals_the_reference(offload, context, stride):
    tokens = random_tokens(5, 50)
    with open_llm(offload) as llm:
        logprobs = reference(llm)
        found = perplexity(llm, tokens, context=context, stride=stride)
        room = llm.config.max_position_embeddings
    context = context or room
    total = 0.0
    for start, end, scored in windows(50, context, stride or max(1, context // 2)):
        table = logprobs(tokens[start:end])
        total += sum(table[i - 1 - start, tokens[i]] for i in range(end - scored, end))
    assert found.num_tokens == 49
    assert found.perplexity == pytest.approx(np.exp(-total / 49), rel=1e-4)


def test_windows_that_do_not_fit_are_refused(offload):
    with open_llm(offload) as llm:
        for options, words in (
            ({"context": 1}, "context must be from 2"),
            ({"context": 10_000}, "positions, got 10000"),
            ({"context": 8, "stride": 8}, "stride must be from 1 to context - 1 (7), got 8"),
        ):
            with pytest.raises(fg.RequestError) as caught:
                perplexity(llm, [5] * 20, **options)
            assert words in str(caught.value)
        with pytest.raises(fg.RequestError, match="1 tokens; at least 2"):
            perplexity(llm, [5])


def test_a_job_of_scores(offload, tmp_path):
    from click.testing import CliRunner

    from flexgen_jax.cli.app import main

    lines = [
        {"id": "a", "prompt": "The king", "continuation": " is"},
        "not json",
        {"prompt_token_ids": [2, 5], "continuation_token_ids": [7, 8]},
        {"id": "a", "prompt": "x", "continuation": "y"},
        {"prompt": "x"},
        {"prompt": "x", "continuation": ""},
        {"prompt": "x", "continuation": "y", "temperature": 1},
        {"custom_id": "c", "url": "/v1/completions", "body": {"prompt": "x"}},
        {"prompt": "x", "continuation_token_ids": [5]},
    ]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    command = ["score", "--model", str(DEMO), "-i", str(source), "-o", str(out), "--json"]
    done = CliRunner().invoke(main, [*command, "--offload-dir", offload])
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == len(lines)
    assert json.loads(done.stdout)["errors"] == 7
    with open_llm(offload, model=DEMO, say=lambda _: None) as llm:
        (score,) = llm.score(["The king"], [" is"])
    assert records[0]["id"] == "a"
    assert records[0]["logprob"] == pytest.approx(score.logprob, rel=1e-4)
    assert records[2]["token_ids"] == [7, 8]
    assert len(records[2]["logprobs"]) == 2
    words = ["not JSON", "used on line 1", "and a 'continuation'", "no tokens", "'temperature'"]
    bad = [r["error"]["message"] for r in records if r.get("error")]
    for word in (*words, "plain lines", "both be token ids"):
        assert any(word in message for message in bad), word
    same = CliRunner().invoke(main, ["score", "--model", "m", "-i", str(source), "-o", str(source)])
    assert same.exit_code == 2
    assert "same file" in same.output


def test_the_commands_print_figures(offload, tmp_path):
    from click.testing import CliRunner

    from flexgen_jax.cli.app import main

    text = tmp_path / "text.txt"
    text.write_text((DEMO / "held_out.txt").read_text(encoding="utf-8")[:1500])
    common = ["--model", str(DEMO), "--text", str(text), "--offload-dir", offload, "--quiet"]
    common += ["--dtype", "float32"]
    done = CliRunner().invoke(main, ["perplexity", *common, "--context", "64", "--json"])
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    with open_llm(offload, model=DEMO, dtype="float32", say=lambda _: None) as llm:
        found = perplexity(llm, text.read_text(), context=64)
    assert figures["perplexity"] == pytest.approx(found.perplexity, rel=1e-4)
    shown = CliRunner().invoke(main, ["perplexity", *common, "--context", "64"])
    assert f"over {found.num_tokens} tokens" in shown.output
    small = ["--context", "32", "--max-windows", "4", "--num-device-batches", "1"]
    ways = ["--weight-bits", "4", "--cache-bits", "8"]
    done = CliRunner().invoke(main, ["compare", *common, *small, *ways, "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    names = ["full precision", "4-bit weights", "8-bit cache", "all together"]
    assert [row["name"] for row in rows] == names
    assert rows[3]["policy"]["weight_bits"] == 4
    assert rows[3]["policy"]["cache_bits"] == 8
    table = CliRunner().invoke(main, ["compare", *common, *small, *ways, "--percent", *"000000"])
    assert table.exit_code == 0, table.output
    assert "disk to host, a token" in table.output
    nothing = CliRunner().invoke(main, ["compare", *common])
    assert nothing.exit_code == 2
    assert "nothing to compare" in nothing.output
    for ignored in (["--cache-bits", "4"], ["--attention-sparsity", "0.1"]):
        refused = CliRunner().invoke(main, ["perplexity", *common, *ignored])
        assert refused.exit_code == 2
        assert "change nothing here" in refused.output
    quantised = next(Path(offload).glob("stores/*4bit*"))
    refused = CliRunner().invoke(
        main, ["compare", *["--model", str(quantised)], *common[2:], *small, *ways]
    )
    assert refused.exit_code == 2
    assert "stored in 4 bits" in refused.output
