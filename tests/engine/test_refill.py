"""Finished rows make room for the next requests: each request's tokens are those it has alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flexgen_jax as fg
from flexgen_jax.engine import kernels
from flexgen_jax.planning.refilling import ideal_passes
from storage.slots import Slot

GOLDENS = Path(__file__).parents[1] / "goldens"
EXPECTED = json.loads((GOLDENS / "expected.json").read_text())
VARIANT = sorted(EXPECTED["variants"])[0]
HOST, DISK = fg.Split(device=0, host=100), fg.Split(device=0, disk=100)
MIXED = fg.Split(device=30, host=30, disk=40)
PROMPTS = EXPECTED["prompts"]
TOKENS = EXPECTED["variants"][VARIANT]["tokens"]  # of transformers
MOST = min(24, *map(len, TOKENS))


def policy(**changes):
    return fg.Policy(**{"device_batch_size": 4, "num_device_batches": 3} | changes)


@pytest.fixture(scope="module")
def offload(tmp_path_factory):
    return str(tmp_path_factory.mktemp("offload"))


@pytest.fixture(scope="module")
def opened(offload):
    def open_(**options):
        return fg.LLM(str(GOLDENS / VARIANT), offload_dir=offload, **options)

    return open_


def job(count, seed=0, vocab=80, **params):
    """Prompts of unequal lengths, and how many tokens each is to have."""
    rng = np.random.default_rng(seed)
    prompts = [[int(t) for t in rng.integers(4, vocab, n)] for n in rng.integers(1, 20, count)]
    lengths = np.clip(np.exp(rng.normal(1.5, 0.9, count)), 1, MOST).astype(int)
    return prompts, [
        fg.SamplingParams(temperature=0.0, max_tokens=int(n), ignore_eos=True, **params)
        for n in lengths
    ]


def tokens_of(outputs):
    return [[list(c.token_ids) for c in o.outputs] for o in outputs]


@pytest.fixture(scope="module")
def alone(opened):
    """Of each request of ``job(40)``, in a block of its own kind: without refill."""
    prompts, params = job(40)
    with opened(policy=policy(refill=False)) as llm:
        return tokens_of(llm.generate(prompts, params))


METHODS = [
    {},
    {"weights": DISK, "cache": DISK, "hidden": DISK},
    {"weights": HOST, "cache": HOST, "hidden": HOST},
    {"weights": MIXED, "cache": MIXED, "hidden": MIXED},
    {"cache": HOST, "host_attention": True},
    {"cache": DISK, "host_attention": True, "overlap": False},
    {"num_stages": 2},
    {"num_stages": 3, "num_groups": 2, "weights": DISK, "cache": DISK},
]


@pytest.mark.parametrize("changes", METHODS, ids=str)
def test_tokens_are_those_without_refill(changes, opened, alone):
    prompts, params = job(40)
    with opened(policy=policy(**changes)) as llm:
        assert tokens_of(llm.generate(prompts, params)) == alone
        report = llm.report
    lengths = [p.max_tokens for p in params]
    order = sorted(range(40), key=lambda i: (-len(prompts[i]), -lengths[i], i))
    assert report.ideal_passes == ideal_passes([lengths[i] for i in order], 12)
    assert report.rows_used == report.generated_tokens == sum(lengths)
    if "num_stages" not in changes:  # where each group takes a pass of its own
        assert report.passes <= 1.15 * report.ideal_passes
    assert report.occupancy > 0.7
    assert report.blocks == 1


@pytest.mark.parametrize("schedule", sorted(fg.SCHEDULES))
def test_any_schedule_refills(schedule, opened, alone):
    prompts, params = job(40)
    with opened(policy=policy(weights=DISK, cache=MIXED), schedule=schedule) as llm:
        assert tokens_of(llm.generate(prompts, params)) == alone


@pytest.mark.parametrize(
    "changes",
    [
        {"cache_bits": 4},
        {"cache_bits": 8, "cache": DISK},
        {"attention_sparsity": 0.3},
        {"attention_sparsity": 0.3, "cache": HOST},
        {"attention_sparsity": 0.3, "cache": DISK, "cache_bits": 4},
        {"attention_sparsity": 0.3, "cache": HOST, "host_attention": True},
    ],
    ids=str,
)
def test_methods_that_change_tokens_change_them_alike(changes, opened):
    prompts, params = job(24)
    found = []
    for refill in (False, True):
        with opened(policy=policy(**changes, refill=refill)) as llm:
            found.append(tokens_of(llm.generate(prompts, params)))
    assert found[0] == found[1]


@pytest.mark.usefixtures("optimised")
def test_the_same_rows_give_the_same_bits_wherever_they_lie(opened):
    """Who has which row when depends on tokens and order alone, and so do the logits."""
    prompts, params = job(30, seed=9)
    reference = None
    for changes in (
        {},
        {"overlap": False, "cache": DISK},
        {"weights": DISK, "cache": MIXED, "hidden": HOST},
        {"weights": MIXED, "hidden": DISK, "overlap": False},
    ):
        logits = []

        def keep(step, batch, values, logits=logits):
            logits.append((batch, np.asarray(values).tobytes()))

        with opened(policy=policy(**changes)) as llm:
            llm.generate(prompts, params, on_logits=keep)
        reference = reference or logits
        assert logits == reference


def everything(count):
    """Sampled, several completions, scored, stopped, penalised, biased, banned: with logprobs."""
    fields = [
        {"temperature": 0.9, "seed": 3},
        {"temperature": 1.2, "n": 3},
        {"prompt_logprobs": 2},
        {"stop_token_ids": [12, 61]},
        {"repetition_penalty": 1.4, "presence_penalty": 0.3},
        {"logit_bias": {7: 4.0}, "min_tokens": 3},
        {"logprobs": 3, "allowed_token_ids": [*range(0, 60, 3), 61]},
        {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.01},
    ]
    prompts, params = job(count, seed=5)
    return prompts, [
        fg.SamplingParams(
            **{"temperature": 0.0} | fields[i % 8] | {"max_tokens": max(3, p.max_tokens)}
        )
        for i, p in enumerate(params)
    ]


def about(output):
    """What does not depend on the last bits of logits."""
    scored = output.prompt_logprobs
    return (
        [(list(c.token_ids), c.finish_reason, c.stop_reason, c.index) for c in output.outputs],
        [c.logprobs and [list(entry) for entry in c.logprobs] for c in output.outputs],
        scored and [entry and list(entry) for entry in scored],
    )


@pytest.mark.parametrize("changes", [{}, {"weights": DISK, "cache": HOST, "num_stages": 2}])
def test_whatever_is_asked_is_answered_alike(changes, opened):
    prompts, params = everything(24)
    found = []
    for refill in (False, True):
        with opened(policy=policy(**changes, refill=refill)) as llm:
            outputs = llm.generate(prompts, params)
            found.append([about(o) for o in outputs])
            assert [o.request_id for o in outputs] == [str(i) for i in range(24)]
    assert found[0] == found[1]


def test_scores_come_without_a_step_more(opened):
    """One new token each: whole batches begin anew, and nobody joins."""
    texts = [[5 + i % 60, 9, 11, 2 + i % 7][: 2 + i % 3] for i in range(40)]
    found = []
    for refill in (False, True):
        with opened(policy=policy(refill=refill)) as llm:
            found.append(llm.score(texts, [[7, 8, 9]] * 40))
            report = llm.report
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=1e-5)
    assert report.passes == -(-40 // 12)


def test_what_was_loaded_is_kept_until_every_program_has_read_it(opened, monkeypatch):
    """Also those of a step beside which newcomers are prefilled, and those that score prompts."""
    made, read = [], []

    def noting(name, marker_of):
        function = getattr(kernels, name)

        def noted(*arguments, **options):
            result = function(*arguments, **options)
            made.append(marker_of(result))
            return result

        noted._cache_size = function._cache_size  # programs are counted by it
        monkeypatch.setattr(kernels, name, noted)

    for name in ("embed", "prefill_layer", "decode_layer"):
        noting(name, lambda result: result[-1])
    noting("score", lambda result: result.token)
    release = Slot.release

    def releasing(slot, readers):
        readers = list(readers)
        read.extend(readers)
        release(slot, readers)

    monkeypatch.setattr(Slot, "release", releasing)
    prompts, params = job(20, prompt_logprobs=1)
    with opened(policy=policy(weights=DISK, cache=DISK, hidden=DISK)) as llm:
        llm.generate(prompts, params)
    released = set(map(id, read))
    assert len(made) > 100
    assert all(id(marker) in released for marker in made)


@pytest.mark.parametrize("schedule", ["zigzag", "lock_step"])
def test_a_batch_that_is_empty_as_a_run_ends_is_filled_in_the_next(schedule, opened, monkeypatch):
    monkeypatch.setattr("flexgen_jax.engine.block_run.MOST_OPS", 200)  # runs of 16 steps
    lengths = [17, 20, 20, 20]  # the first one's last step is the run's
    params = [fg.SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in lengths]
    shape = {"device_batch_size": 1, "num_device_batches": 2}
    with opened(policy=policy(**shape), schedule=schedule) as llm:
        llm.generate([PROMPTS[0][:1] * 9, *[PROMPTS[0][:1]] * 3], params)
        assert llm.report.passes == llm.report.ideal_passes == 40


shares = st.sampled_from([fg.Split(), HOST, DISK, MIXED])


@given(
    lengths=st.lists(st.integers(1, MOST), min_size=1, max_size=30),
    stops=st.sets(st.integers(4, 79), max_size=4),
    shape=st.sampled_from([(4, 3), (2, 4), (4, 1), (1, 2)]),
    weights=shares,
    cache=shares,
    hidden=shares,
    schedule=st.sampled_from(sorted(fg.SCHEDULES)),
    overlap=st.booleans(),
    stages=st.integers(1, 2),
    most_ops=st.sampled_from([200, 50_000]),
)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nothing_is_lost_or_run_twice(
    opened, lengths, stops, shape, weights, cache, hidden, schedule, overlap, stages, most_ops
):
    """Whoever has come and gone before: a request's greedy tokens are those it has alone."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(lengths))]
    params = [
        fg.SamplingParams(
            temperature=0.0, max_tokens=n, ignore_eos=True, stop_token_ids=sorted(stops)
        )
        for n in lengths
    ]
    changes = {
        "device_batch_size": shape[0],
        "num_device_batches": shape[1],
        "weights": weights,
        "cache": cache,
        "hidden": hidden,
        "overlap": overlap,
        "num_stages": stages,
    }
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flexgen_jax.engine.block_run.MOST_OPS", most_ops)
        with opened(policy=policy(**changes), schedule=schedule) as llm:
            outputs = llm.generate(prompts, params, on_block=told.extend)
            report = llm.report
    for i, (output, length) in enumerate(zip(outputs, lengths, strict=True)):
        whole = TOKENS[i % len(PROMPTS)][:length]
        ends = [k for k, token in enumerate(whole) if token in stops]
        assert list(output.outputs[0].token_ids) == (whole[: ends[0] + 1] if ends else whole)
    assert sorted(int(o.request_id) for o in told) == list(range(len(lengths)))
    generated = sum(len(o.outputs[0].token_ids) for o in outputs)
    assert report.rows_used == report.generated_tokens == generated
    if stages == 1 and schedule in ("zigzag", "lock_step"):
        assert report.passes <= 1.1 * report.ideal_passes + 2
