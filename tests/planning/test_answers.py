"""What a person asks of a plan, in its first lines; and what would make a model fit."""

import dataclasses
import json
import re

import pytest
from click.testing import CliRunner

import flexgen_jax as fg
from flexgen_jax.cli.app import main
from flexgen_jax.cli.plan_words import answered
from flexgen_jax.planning.answer import ALLOWED_BY
from flexgen_jax.planning.remedies import DoesNotFitError

HALF_ON_DISK = fg.Policy.from_percent(
    50, 0, 100, 0, 100, 0, device_batch_size=4, num_device_batches=2
)


def planned(model="facebook/opt-125m", policy=HALF_ON_DISK, hardware="laptop", **options):
    lengths = {"prompt_len": 32, "gen_len": 8}
    return fg.plan(model, policy, hardware, **{**lengths, **options})


def run(*arguments):
    return CliRunner().invoke(main, ["plan", *map(str, arguments)])


def test_the_busiest_is_what_the_simulated_streams_say():
    found = planned()
    answer, summary = found.answer, found.timeline.summary()
    # Weights come from the disk alone, so link and stream are as busy; nothing shares the link.
    assert answer.limit == "disk to host"
    assert answer.share == pytest.approx(summary["load weights"]["share"], rel=0.02)
    within = planned(policy=fg.Policy(device_batch_size=4, num_device_batches=2))
    assert within.answer.limit == "device compute"
    assert within.answer.share == pytest.approx(1.0, rel=0.02)


def test_a_stream_whose_work_lies_on_several_links_is_named_itself():
    slow = fg.Hardware.preset("t4").scaled({"host_to_device": 12.89 / 2})
    policy = fg.Policy.from_percent(0, 0, 100, 0, 100, 0, device_batch_size=1)
    assert planned(policy=policy, hardware=slow).answer.limit == "load weights"


@pytest.mark.parametrize("count", [3, 8, 20, 1000])
def test_a_job_takes_its_full_blocks_and_one_of_the_rest(count):
    found = planned(requests=count)
    blocks, rest = divmod(count, 8)
    seconds = found.answer.seconds - blocks * found.seconds
    assert found.answer.requests == count
    if not rest:
        assert seconds == pytest.approx(0, abs=1e-9)
    else:
        # Of four requests one batch, of three a smaller one.
        assert 0 < seconds <= found.seconds
        assert seconds < found.seconds or rest > 4


def test_auto_takes_no_block_larger_than_the_job():
    few, many = planned(policy="auto", requests=2), planned(policy="auto")
    assert few.policy.block_size <= 4 < many.policy.block_size
    assert many.answer.requests == 1000
    with pytest.raises(ValueError, match="requests must be 1 or more, got 0"):
        planned(requests=0)


def test_of_known_lengths_the_answer_is_of_the_job_expected():
    found = planned(lengths=[2, 4, 8], requests=60)
    (refilled, _) = found.expected
    assert found.answer.tokens_per_second == refilled.tokens_per_second
    assert found.answer.seconds == pytest.approx(refilled.seconds * 60 / refilled.requests)


def test_the_first_lines_answer():
    common = ["--model", "facebook/opt-6.7b", "--prompt-len", 128, "--hardware", "t4"]
    shown = run(*common, "--requests", 64)
    assert shown.exit_code == 0, shown.output
    lines = shown.output.splitlines()
    figures = json.loads(run(*common, "--requests", 64, "--json").stdout)
    answer = figures["answer"]
    assert lines[0].startswith("It fits: weights ")
    assert "64 prompts of 128 tokens with 32 new ones take " in lines[1]
    assert lines[2].startswith("Limited by: ")
    assert f"({answer['limit']['name']}), busy {answer['limit']['share']:.0%}" in lines[2]
    assert lines[3].startswith("What would help most: ")
    best = max(figures["would_help"].items(), key=lambda item: item[1], default=None)
    if best is not None:
        assert (answer["best_help"]["name"], answer["best_help"]["times"]) == best
        assert best[0] in lines[3]
    assert lines[4] == ""
    assert answer["fits"]
    assert answer["job"]["requests"] == 64
    assert sum(answer["where"]["weights"].values()) == pytest.approx(100)


@pytest.mark.parametrize("name", sorted(ALLOWED_BY))
def test_the_option_that_is_named_does_what_it_says(name):
    """Also beside a policy that is given, where nothing is searched for."""
    found = dataclasses.replace(planned(), would_help={name: 2.0, "twice the disk": 1.5})
    said = answered(found)[3]
    assert "to buy, twice the disk: 1.50 times as fast" in said
    (option,) = re.findall(rf"to allow, {name} \((.+?)\): 2.00 times as fast", said)
    common = ["--model", "facebook/opt-125m", "--prompt-len", 32, "--gen-len", 2]
    common += ["--hardware", "t4", "--percent", *(0, 100, 0, 100, 0, 100), "--json"]
    policies = []
    for more in ([], option.split()):
        done = run(*common, *more)
        assert done.exit_code == 0, done.output
        policies.append(json.loads(done.stdout)["policy"])
    field = ALLOWED_BY[name]
    assert policies[0][field] != policies[1][field]


def test_a_policy_that_does_not_fit_says_what_is_short():
    percent = ["--percent", *(100, 0) * 3, "--gpu-batch-size", 8, "--num-gpu-batches", 1]
    common = ["--model", "facebook/opt-30b", "--prompt-len", 512, "--hardware", "t4"]
    shown = run(*common, *percent)
    assert shown.exit_code == 0, shown.output
    first = shown.output.splitlines()[0]
    assert first.startswith("It does not fit: ")
    assert "GB of device memory are missing" in first
    answer = json.loads(run(*common, *percent, "--json").stdout)["answer"]
    assert not answer["fits"]
    assert answer["short_bytes"]["device"] > 40e9


@pytest.fixture(scope="module")
def too_large():
    """A model whose weights fit nowhere, on a machine of each kind."""
    found = {}
    for name in ("laptop", "t4"):
        small = {"device_memory": 2e8, "host_memory": 1e8, "disk": 2.5e8, "runtime_memory": 0.0}
        hardware = fg.Hardware.from_json({**fg.Hardware.preset(name).to_json(), **small})
        with pytest.raises(DoesNotFitError) as caught:
            planned("facebook/opt-350m", "auto", hardware, help_wanted=True)
        found[name] = hardware, caught.value
    return found


@pytest.mark.parametrize("name", ["laptop", "t4"])
def test_each_remedy_makes_it_fit_and_little_less_does_not(too_large, name):
    hardware, error = too_large[name]
    assert "It would fit with any one of these: " in str(error)
    assert any(remedy.fixed for remedy in error.remedies)
    sizes = [remedy for remedy in error.remedies if remedy.more_bytes]
    assert {remedy.tier for remedy in sizes} >= {"disk"}
    for remedy in error.remedies:
        values = hardware.to_json()
        field = {"disk": "disk", "host": "host_memory"}.get(remedy.tier, "device_memory")
        values[field] += remedy.more_bytes or 0
        found = planned(
            "facebook/opt-350m", "auto", fg.Hardware.from_json(values), fixed=remedy.fixed
        )
        assert not found.misfits
        if remedy.more_bytes:
            values[field] -= 0.25 * remedy.more_bytes
            with pytest.raises(ValueError, match="nothing fits"):
                planned("facebook/opt-350m", "auto", fg.Hardware.from_json(values))


def test_what_fits_nowhere_is_json_too(tmp_path, too_large):
    hardware, error = too_large["laptop"]
    file = tmp_path / "small.json"
    file.write_text(json.dumps(hardware.to_json()))
    done = run(
        *("--model", "facebook/opt-350m", "--prompt-len", 32, "--gen-len", 8),
        *("--hardware", file, "--json"),
    )
    assert done.exit_code == 2
    assert json.loads(done.stdout) == error.to_json()
    assert "nothing fits within" in done.stderr
    assert "more disk space" in done.stderr


def test_a_smaller_block_is_a_remedy():
    small = {"device_memory": 2e8, "host_memory": 2e8, "disk": 1e9, "runtime_memory": 0.0}
    hardware = fg.Hardware.from_json({**fg.Hardware.preset("laptop").to_json(), **small})
    with pytest.raises(DoesNotFitError) as caught:
        planned(
            "facebook/opt-125m",
            "auto",
            hardware,
            prompt_len=1024,
            help_wanted=True,
            fixed={"device_batch_size": 64, "num_device_batches": 4},
        )
    assert caught.value.remedies[0].name == "a smaller block"
