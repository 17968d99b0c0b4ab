"""How long requests turn out to be: read, drawn from, and chosen by."""

import dataclasses
import json
import re

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import flexgen_jax as fg
from flexgen_jax.cli.app import main
from flexgen_jax.models.registry import preset
from flexgen_jax.planning.auto import Auto, Model, Uniform
from flexgen_jax.planning.blocks import Room
from flexgen_jax.planning.lengths import MOST_KEPT
from flexgen_jax.planning.planner import Planner
from flexgen_jax.planning.refilling import Life, ideal_passes, play
from flexgen_jax.requests.request import Request
from scheduling.limits import Limits
from scheduling.peak import room_nbytes

ZIGZAG = fg.SCHEDULES["zigzag"]
# Most answers are short, a few run to the limit.
LONG_TAILED = fg.Lengths((*range(4, 36), 64, 128, 256, 512))


@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=60),
    st.integers(1, 6000),
    st.integers(1, 40),
)
def test_what_lengths_say(values, limit, count):
    lengths = fg.Lengths(tuple(values))
    ended = [min(value, limit) for value in values]
    assert lengths.expected(limit) == pytest.approx(sum(ended) / len(ended))
    longest = lengths.longest_of(count, limit)
    assert lengths.longest_of(1, limit) == pytest.approx(lengths.expected(limit))
    assert longest <= lengths.longest_of(count + 1, limit) + 1e-6
    assert lengths.longest_of(10**6, limit) == pytest.approx(max(ended))
    each = lengths.of_each([limit] * count)
    assert each == lengths.of_each([limit] * (count + 3))[:count]
    assert set(each) <= set(ended)


def test_lengths_of_many_are_like_the_sample():
    values = [1 + i * i % 701 for i in range(20_000)]
    lengths = fg.Lengths(tuple(values))
    assert len(lengths.sample) == MOST_KEPT
    mean = sum(values) / len(values)
    assert lengths.expected(10**6) == pytest.approx(mean, rel=0.01)
    for count in (64, 1000):
        each = lengths.of_each([10**6] * count)
        assert sum(each) / count == pytest.approx(mean, rel=0.05)
    limits = [1 + i % 9 for i in range(50)]
    assert all(n <= limit for n, limit in zip(lengths.of_each(limits), limits, strict=True))


@pytest.mark.parametrize("bad", [(), (0,), (-3, 5), (2.5,), (True,), ("7",)])
def test_what_is_no_length_is_refused(bad):
    with pytest.raises(ValueError, match="lengths must"):
        fg.Lengths(bad)


def _openai(choices, usage):
    body = {"choices": choices, "usage": {"completion_tokens": usage}}
    return {"id": "line-1", "response": {"status_code": 200, "body": body}, "error": None}


RECORDS = [
    (12, [12]),
    ({"id": 1, "text": "a", "token_ids": [5, 6, 7]}, [3]),
    ({"id": 2, "outputs": [{"token_ids": [1]}, {"token_ids": [1, 2]}]}, [1, 2]),
    (_openai([{"text": "a", "logprobs": None}], 9), [9]),
    (_openai([{"logprobs": {"tokens": ["a", "b"]}}, {"logprobs": {"tokens": ["c"]}}], 3), [1, 2]),
    (_openai([{"text": "a"}, {"text": "b"}], 8), [4, 4]),
    ({"id": 3, "error": {"line": 3, "message": "no"}}, []),
    ({"id": "line-4", "response": None, "error": {"code": "invalid_request"}}, []),
]


def test_lengths_are_read_of_numbers_and_of_outputs(tmp_path):
    path = tmp_path / "lengths"
    path.write_text("\n\n".join(json.dumps(record) for record, _ in RECORDS) + "\n")
    expected = sorted(n for _, lengths in RECORDS for n in lengths)
    assert fg.Lengths.read(path) == fg.Lengths(tuple(expected)) == fg.Lengths.of(str(path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no lengths: expected a number of new tokens a line"),
        (json.dumps(RECORDS[-1][0]), "has no lengths"),
        ("5\nfive\n", "line 2: expected a number of new tokens (1 or more), or a record"),
        ("5\n0\n", "line 2: expected a number .* got 0"),
        ("1.5", "line 1: expected .* got 1.5"),
        ("[3]", r"line 1: expected .* got \[3\]"),
        ('{"prompt": "a"}', "line 1: expected .* got {'prompt': 'a'}"),
        (json.dumps({"token_ids": []}), "line 1: expected"),
        (json.dumps({"response": {"body": {"choices": 5}}}), "line 1: expected"),
        ("\x1f\x8b\x08", "line 1: expected"),
        ("[" * 100_000, "line 1: expected"),
    ],
)
def test_what_is_no_file_of_lengths_is_named(text, words, tmp_path):
    path = tmp_path / "lengths"
    path.write_text(text)
    with pytest.raises(ValueError, match="expected") as caught:
        fg.Lengths.read(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < 400 + len(str(path))
    assert words in message or re.search(words, message)


def small(**choices):
    return Model(preset("facebook/opt-125m"), "bfloat16", **choices)


def chosen(model, job, limits, lengths=None, **fixed):
    laptop = fg.Hardware.preset("t4")
    found = Auto(fixed).choose(model, job, laptop, limits, schedule=ZIGZAG, lengths=lengths)
    return found.best


def test_a_job_of_expected_lengths_takes_less_time_in_the_room_of_its_limit():
    model, job, limits = small(), Uniform(64, 512), Limits(device=4e9, host=8e9, disk=1e12)
    unknown, known = chosen(model, job, limits), chosen(model, job, limits, LONG_TAILED)
    blocks = chosen(model, job, limits, LONG_TAILED, refill=False)
    assert known.seconds < blocks.seconds < unknown.seconds
    assert known.policy.block_size >= blocks.policy.block_size
    at_most = fg.Lengths((512,))
    assert chosen(model, job, limits, at_most) == unknown
    assert chosen(model, job, limits, at_most, refill=False).seconds == unknown.seconds


def requests(count):
    """Long prompts and large limits are rare, and not the same ones."""
    for i in range(count):
        limit = 512 if i % 50 == 7 else 16
        params = fg.SamplingParams(max_tokens=limit, ignore_eos=True)
        yield Request(i, None, (5,) * (400 if i % 50 == 3 else 20), params)


@pytest.mark.parametrize("lengths", [None, LONG_TAILED], ids=["unknown", "known"])
def test_every_row_of_a_block_that_is_refilled_has_room_for_the_longest(lengths):
    """So it is chosen: what every block and row of the job takes fits."""
    job, model = list(requests(300)), small()
    # The weights take a quarter of it; blocks of rows of their own lengths would fit easily.
    limits = Limits(device=1e9, host=0, disk=0)
    policy = chosen(model, job, limits, lengths).policy
    planner = Planner(model, policy, "zigzag", ZIGZAG, fg.Hardware.preset("t4"))
    (block,) = planner.blocks(job)
    room = Room.of(job)
    assert {batch.cache_len for batch in block.batches} == {room.positions}
    taken = room_nbytes(planner.workload(block), shared=False)
    assert not limits.exceeded(taken)
    looked_at, _ = model.blocks_of(job, lengths)(policy)[0]
    assert room_nbytes(looked_at, shared=False) == taken
    # Blocks of rows that are as long as their own requests need take far less.
    paper = dataclasses.replace(policy, refill=False)
    looked_at, _ = model.blocks_of(job, lengths)(paper)[-1]
    assert room_nbytes(looked_at, shared=False)[fg.Tier.DEVICE] < 0.8 * taken[fg.Tier.DEVICE]


SHAPE = {"device_batch_size": 4, "num_device_batches": 4}
DISK = fg.Split(device=0, disk=100)


@pytest.mark.parametrize(
    "choices",
    [{}, {"weights": DISK}, {"weights": DISK, "cache": DISK, "overlap": False}],
    ids=["in memory", "weights on disk", "no overlap"],
)
def test_a_plan_says_what_a_long_job_is_expected_to_take(choices):
    config = fg.OPTConfig(
        vocab_size=512,
        hidden_size=256,
        num_hidden_layers=3,
        ffn_dim=1024,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    policy, lengths = fg.Policy(**SHAPE, **choices), fg.Lengths((*range(1, 20), 40, 80))
    common = {"prompt_len": 20, "gen_len": 60, "schedule": ("zigzag", ZIGZAG)}
    hardware = fg.Hardware.preset("laptop")
    without = fg.plan(config, policy, hardware, **common).to_json()
    found = fg.plan(config, policy, hardware, **common, lengths=lengths)
    figures = found.to_json()
    expected = figures.pop("expected")
    # What a person asks is answered of such a job.
    answer, of_a_block = figures.pop("answer"), without.pop("answer")
    assert answer["tokens_per_second"] == expected[0]["tokens_per_second"]
    assert {**answer, "tokens_per_second": 0, "job": 0} == {
        **of_a_block,
        "tokens_per_second": 0,
        "job": 0,
    }
    assert figures == without
    counts = lengths.of_each([60] * 16 * policy.block_size)
    lives = [Life(32, count) for count in counts]
    for forecast, figures in zip(found.expected, expected, strict=True):
        played = play(lives, **SHAPE, refill=forecast.refill)
        assert (forecast.occupancy, forecast.passes) == (played.occupancy, played.passes)
        assert forecast.ideal_passes == ideal_passes(counts, 16)
        # Simulated from end to end, it takes as long.
        changed = dataclasses.replace(policy, refill=forecast.refill)
        job = fg.plan(config, changed, hardware, **common).simulate_job(lengths, len(lives))
        assert (job.occupancy, job.passes) == (played.occupancy, played.passes)
        assert (job.tokens, job.ideal_passes) == (sum(counts), forecast.ideal_passes)
        assert forecast.seconds == pytest.approx(job.timeline.seconds, rel=0.1)
        assert figures["tokens_per_second"] == pytest.approx(sum(counts) / forecast.seconds)
    refilled, blocks = found.expected
    assert refilled.passes_over_ideal < 1.1 < blocks.passes_over_ideal
    assert refilled.seconds < blocks.seconds


def test_the_command_says_so_too(tmp_path):
    path = tmp_path / "lengths"
    path.write_text("3\n5\n28\n")
    run = ["plan", "--model", "facebook/opt-125m", "--hardware", "laptop", "--prompt-len", "16"]
    run += ["--gpu-batch-size", "4", "--num-gpu-batches", "2", "--lengths", str(path)]
    done = CliRunner().invoke(main, run)
    assert done.exit_code == 0, done.output
    assert re.search(r"expected of 128 requests with 12\.\d new tokens on average:", done.output)
    assert re.search(r"  with refill .* tokens/s.*\n  without refill .* passes over", done.output)
    simulated = ["simulate", *run[1:], "--gen-len", "32", "--json"]
    refilled, blocks = (
        json.loads(CliRunner().invoke(main, [*simulated, *more, "--requests", "40"]).stdout)
        for more in ([], ["--no-refill"])
    )
    assert refilled[0]["requests"] == blocks[0]["requests"] == 40
    assert refilled[0]["tokens_per_second"] > 1.2 * blocks[0]["tokens_per_second"]
    assert refilled[0]["passes_over_ideal"] < 1.1 < blocks[0]["passes_over_ideal"]
    done = CliRunner().invoke(main, [*simulated[:-1], "--compare", "row_by_row"])
    assert done.stdout.count("  32 requests with ") == 2  # four blocks' worth
    done = CliRunner().invoke(main, ["simulate", *run[1:-2], "--requests", "40"])
    assert "--requests goes with --lengths" in done.output
    path.write_text("many\n")
    done = CliRunner().invoke(main, run)
    assert done.exit_code == 2
    assert f"{path}, line 1: expected a number of new tokens" in done.output


def test_lengths_are_for_auto(tmp_path):
    path = tmp_path / "lengths"
    path.write_text("5\n")
    with pytest.raises(ValueError, match="lengths are for policy 'auto'"):
        fg.LLM("facebook/opt-125m", policy=fg.Policy(), lengths=[5])
    run = ["generate", "--model", "m", "-i", str(path), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(main, [*run, "--percent", *"000000", "--lengths", str(path)])
    assert done.exit_code == 2
    assert "--lengths: for policy auto" in done.output
    path.write_text("none\n")
    done = CliRunner().invoke(main, [*run, "--lengths", str(path)])
    assert done.exit_code == 2
    assert f"{path}, line 1: expected a number of new tokens" in done.output
