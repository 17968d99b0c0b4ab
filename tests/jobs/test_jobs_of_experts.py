"""Jobs of models with experts on disk: stopped anywhere, they end in the bytes of an uninterrupted
run."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from click.testing import CliRunner

import flexgen_jax as fg
from flexgen_jax.cli.app import main
from flexgen_jax.jobs.job import Completing, Job
from flexgen_jax.jobs.job_input import JobInput
from flexgen_jax.jobs.results import FileResults
from flexgen_jax.planning.window_size import WindowSize
from flexgen_jax.weights.checkpoint import convert
from tests.killing import killed

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests" / "goldens" / "families" / "qwen3_moe"
PARAMS = fg.SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)
DISK = fg.Split(device=0, host=0, disk=100)
MIXED = fg.Split(device=30, host=30, disk=40)
SHAPE = {"device_batch_size": 2, "num_device_batches": 2, "weights": MIXED, "experts": DISK}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return str(convert(MODEL, tmp_path_factory.mktemp("stores") / "qwen3_moe", dtype="float32"))


def write_lines(path, count):
    """Of unequal lengths, some sampled, one a bad line."""
    draw, lines = random.Random(4), ["nonsense"]
    for i in range(count):
        ids = [5 + (7 * i + k) % 60 for k in range(1 + 3 * i % 8)]
        line = {"prompt_token_ids": ids, "max_tokens": draw.choice((2, 6, 9))}
        if i % 3 == 0:
            line["temperature"] = 1.0
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines))
    return path


class Stopped(BaseException):
    """The power goes."""


def run(llm, source, target, *, stop_after=None, seconds=None):
    """The tokens that were booked; ``seconds`` of nearly nothing: a snapshot at every border."""
    booked = 0

    def progress(count):
        nonlocal booked
        booked += count
        if stop_after is not None and booked >= stop_after:
            raise Stopped

    with JobInput(source) as lines, FileResults(target) as results:
        size = WindowSize.of(llm.policy.block_size, 6)
        asked = Completing(llm, PARAMS, "m")
        job = Job(llm, asked, lines, results, window_size=size, checkpoint_seconds=seconds)
        job.run(progress=progress)
    return booked


@pytest.mark.parametrize("seconds", [None, 1e-9], ids=["journal", "checkpoint"])
@pytest.mark.parametrize(
    ("schedule", "changes"),
    [
        ("zigzag", {"hidden": DISK}),
        ("diagonal", {"cache": MIXED, "refill": False}),
    ],
    ids=["rolling", "blocks"],
)
def test_a_job_that_is_stopped_again_and_again(store, tmp_path, caplog, schedule, changes, seconds):
    caplog.set_level("INFO", logger="flexgen_jax")
    source = write_lines(tmp_path / "in.jsonl", 14)
    policy = fg.Policy(**SHAPE, **changes)
    with fg.LLM(store, policy=policy, schedule=schedule, dtype="float32") as llm:
        tokens = run(llm, source, tmp_path / "clean")
        target = tmp_path / "out"
        for stop_after in (2 * tokens // 3, tokens // 7, tokens // 8):
            with pytest.raises((Stopped, fg.ExecutionError)):
                run(llm, source, target, stop_after=stop_after, seconds=seconds)
        left = run(llm, source, target, seconds=seconds)
    assert target.read_bytes() == (tmp_path / "clean").read_bytes()
    assert left < tokens
    assert ("snapshot read" in caplog.text) == (seconds is not None)


def test_a_process_that_is_killed(store, tmp_path):
    """Within a block, when the results of others are kept."""
    source = write_lines(tmp_path / "in.jsonl", 40)
    arguments = ["generate", "--model", store, "-i", str(source), "--ignore-eos", "--quiet"]
    arguments += ["--percent", "30", "30", "0", "50", "0", "0", "--experts-percent", "0", "0"]
    arguments += ["--device-batch-size", "2", "--num-device-batches", "2", "--dtype", "float32"]
    arguments += ["--window", "4", "--no-refill", "--offload-dir", str(tmp_path / "offload")]
    result = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "clean")])
    assert result.exit_code == 0, result.output
    arguments += ["-o", str(tmp_path / "out")]
    kept, states = tmp_path / "out.ordered", tmp_path / "out.checkpoint"
    durably = "flexgen_jax.engine.snapshots", "_write_durably"
    killed(*durably, 30, [*arguments, "--checkpoint-minutes", "1e-9"])
    assert kept.stat().st_size
    assert list(states.glob("*/state.json"))
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out").read_bytes() == (tmp_path / "clean").read_bytes()
    assert not states.exists()
