"""A job that is one block: requests of the next window enter as the last of this one leave."""

import dataclasses
import json
import os
import random
import re
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner

import flexgen_jax as fg
from flexgen_jax.cli.app import main
from flexgen_jax.engine.effects import BlockEffects
from flexgen_jax.jobs.job import Completing, Job
from flexgen_jax.jobs.job_input import JobError, JobInput
from flexgen_jax.jobs.results import FileResults, StreamResults
from flexgen_jax.planning.window_size import WindowSize
from tests.interrupting import sender

MODEL = str(Path(__file__).parents[1] / "goldens" / "pre_norm")
PARAMS = fg.SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
COUNT, WINDOW = 60, 16
BAD = (4, 30)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    policy = fg.Policy(device_batch_size=2, num_device_batches=2)
    offload = str(tmp_path_factory.mktemp("offload"))
    with fg.LLM(MODEL, policy=policy, offload_dir=offload) as llm:
        yield llm


def write_lines(path, count):
    """Lengths of 1 to 20; some are sampled, some want several completions, bad lines among them."""
    draw, lines = random.Random(2), []
    for i in range(count):
        line = {"prompt_token_ids": [5 + i, 6, 7][: 1 + i % 3], "max_tokens": draw.randint(1, 20)}
        if i % 7 == 3:
            line |= {"n": 3, "temperature": 1.0}
        lines.append("nonsense" if i + 1 in BAD else json.dumps(line))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def source(tmp_path):
    return write_lines(tmp_path / "in.jsonl", COUNT)


def run(llm, source, target, *, on_window=None, seconds=None, progress=None):
    results = StreamResults() if target is None else FileResults(target)
    with JobInput(source) as lines, results as results:
        size = WindowSize.of(llm.policy.block_size, WINDOW)
        job = Job(
            llm,
            Completing(llm, PARAMS, "m"),
            lines,
            results,
            window_size=size,
            checkpoint_seconds=seconds,
        )
        return job.run(on_window=on_window, progress=progress)


@pytest.fixture
def expected(llm, source, tmp_path):
    return as_blocks(llm, source, tmp_path / "expected")


def as_blocks(llm, source, target):
    """As blocks give it that begin and end with the same requests."""
    rolling = llm.policy
    llm.policy = dataclasses.replace(rolling, refill=False)
    run(llm, source, target)
    llm.policy = rolling
    return target.read_bytes()


class Stopped(BaseException):
    """The power goes."""


def close_only(self, *_):
    """What the system does for a killed process: nothing is tidied up."""
    for file in (self._out, self._journal):
        if file is not None:
            file.close()


def test_windows_follow_one_another_without_a_gap(llm, source, expected, tmp_path, capfdbinary):
    open_, ended = [], [0]
    end_window = FileResults.end_window

    def on_window(window, blocks, left):
        open_.append(window.number - ended[0])

    def counting(self, *about):
        ended[0] += 1
        end_window(self, *about)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileResults, "end_window", counting)
        done = run(llm, source, tmp_path / "out", on_window=on_window)
    assert (tmp_path / "out").read_bytes() == expected
    assert max(open_) >= 1  # the one before was not finished
    assert (done.requests, done.errors) == (COUNT - len(BAD), len(BAD))
    report = done.report
    assert report.blocks == 1
    assert report.requests == COUNT - len(BAD)
    assert report.occupancy > 0.85
    assert report.passes <= 1.05 * report.ideal_passes
    # The results came in parts; the timeline is one, and begins where the block did.
    assert 0 < report.timeline.seconds <= report.seconds
    assert report.timeline.spans[0].start < report.timeline.seconds / 2
    # To a stream, too.
    run(llm, source, None)
    assert capfdbinary.readouterr().out == expected


@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
def test_every_step_may_be_the_last(llm, tmp_path, monkeypatch, step):
    """Whatever a process did last, the next one goes on; what was finished is not run again."""
    owner, name = os, step.split(".")[1]
    count, source = 40, write_lines(tmp_path / "in.jsonl", 40)
    expected = as_blocks(llm, source, tmp_path / "expected")
    real, finished, kept = getattr(owner, name), False, 0
    for at in [*range(8), *range(8, 100, 5)]:
        target, calls, tokens = tmp_path / f"{at}-out", [0], [0]

        def stop(*arguments, at=at, calls=calls, **options):
            calls[0] += 1
            if calls[0] == at + 1:
                raise Stopped
            return real(*arguments, **options)

        def progress(count, tokens=tokens):
            tokens[0] += count

        monkeypatch.setattr(owner, name, stop)
        monkeypatch.setattr(FileResults, "__exit__", close_only)
        try:
            run(llm, source, target)
            finished = True
        except (Stopped, fg.ExecutionError):  # windows are begun amid an operation
            pass
        monkeypatch.undo()
        if not finished and not (target.exists() and not Path(f"{target}.partial").exists()):
            with FileResults(target) as results:
                done = results.requests_finished
            report = run(llm, source, target, progress=progress)
            assert report.requests == count - len(BAD)
            assert report.errors == len(BAD)
            if done > 24:
                kept += 1
                assert tokens[0] < 0.6 * report.report.generated_tokens
        assert target.read_bytes() == expected
        assert [p.name for p in tmp_path.glob(f"{target.name}.*")] == [f"{target.name}.job"]
        if finished:
            break
    assert finished
    assert kept


@pytest.mark.parametrize("name", ["device", "disk", "sparse", "codes"])
def test_it_goes_on_inside_the_block(tmp_path, name):
    """From its checkpoints, with the requests that were in the rows; not from the journal alone."""
    disk = fg.Split(device=0, disk=100)
    changes = {
        "device": {},
        "disk": {"cache": disk, "hidden": disk, "weights": disk},
        "sparse": {"attention_sparsity": 0.5},
        "codes": {"cache_bits": 4, "cache": fg.Split(device=0, host=100)},
    }[name]
    policy = fg.Policy(device_batch_size=2, num_device_batches=2, **changes)
    source = write_lines(tmp_path / "in.jsonl", 34)  # three windows
    with fg.LLM(MODEL, policy=policy, offload_dir=str(tmp_path / "offload")) as llm:
        clean = run(llm, source, tmp_path / "clean").report.generated_tokens
        booked = [0]

        def progress(count):
            booked[0] += count
            if booked[0] % 61 >= 54 and booked[0] < 0.9 * clean:
                raise Stopped

        target, times = tmp_path / "out", 0
        while not target.exists():
            try:
                run(llm, source, target, seconds=1e-9, progress=progress)
            except (Stopped, fg.ExecutionError):
                times += 1
        assert times >= 3
        assert booked[0] < clean + 12 * times  # a step of all rows, twice
        assert target.read_bytes() == (tmp_path / "clean").read_bytes()


def test_what_was_finished_after_the_checkpoint_is_not_run_again(
    llm, source, expected, tmp_path, monkeypatch
):
    """The journal knows more than the snapshot: its rows are free for others."""
    target, booked = tmp_path / "out", [0]

    def progress(count):
        booked[0] += count
        if booked[0] >= 400:
            raise Stopped

    due = [True] * 3 + [False] * 10_000
    monkeypatch.setattr("flexgen_jax.engine.snapshots.Snapshots.due", lambda self: due.pop(0))
    with pytest.raises((Stopped, fg.ExecutionError)):
        run(llm, source, target, seconds=1.0, progress=progress)
    with FileResults(target) as results:
        assert results.requests_finished > 20
    booked[0] = -10_000
    run(llm, source, target, progress=progress)
    assert target.read_bytes() == expected
    assert [p.name for p in tmp_path.glob("out.*")] == ["out.job"]


def test_who_needs_more_room_comes_when_the_others_have_left(llm, tmp_path):
    lines = [{"prompt_token_ids": [5 + i % 40], "max_tokens": 3 + i % 5} for i in range(40)]
    lines[20] = {"prompt_token_ids": [6] * 20, "max_tokens": 40}
    answers_are_those_alone(llm, lines, tmp_path)


def answers_are_those_alone(llm, lines, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(llm, source, tmp_path / "out")
    records = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [r["id"] for r in records] == list(range(1, len(lines) + 1))
    prompts = [line["prompt_token_ids"] for line in lines]
    params = [dataclasses.replace(PARAMS, max_tokens=line["max_tokens"]) for line in lines]
    alone = [llm.generate(*pair)[0].outputs[0] for pair in zip(prompts, params, strict=True)]
    assert [r["token_ids"] for r in records] == [list(a.token_ids) for a in alone]


def test_a_long_prompt_comes_to_a_batch_that_has_only_begun(llm, tmp_path):
    """Its positions lie before those of the others, however few they have so far."""
    lines = [{"prompt_token_ids": [5 + i % 40], "max_tokens": 3 + i % 5} for i in range(WINDOW)]
    lines[0] = {"prompt_token_ids": [6] * 60, "max_tokens": 2}
    lines[5]["max_tokens"] = 20
    lines += [{"prompt_token_ids": [7 + i] * 60, "max_tokens": 3} for i in range(WINDOW)]
    answers_are_those_alone(llm, lines, tmp_path)


def test_an_input_that_cannot_be_read_on_is_the_jobs_error(llm, source, tmp_path, monkeypatch):
    """It is read on amid an operation; the message is not that one's."""
    lines, read = JobInput.lines, [0]

    def failing(self):
        for line in lines(self):
            read[0] += 1
            if read[0] > 40:
                raise JobError("the input is gone")
            yield line

    monkeypatch.setattr(JobInput, "lines", failing)
    with pytest.raises(JobError, match=r"^the input is gone$"):
        run(llm, source, tmp_path / "out")
    monkeypatch.undo()
    with FileResults(tmp_path / "out") as results:
        assert results.requests_finished > 10


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_and_says_how_to_go_on(
    source, tmp_path, monkeypatch, expected, number, code
):
    arguments = ["generate", "--model", MODEL, "--offload-dir", str(tmp_path / "offload")]
    arguments += ["-i", str(source), "-o", str(tmp_path / "out"), "--max-tokens", "20"]
    arguments += ["--device-batch-size", "2", "--num-device-batches", "2", "--ignore-eos"]
    send, parts, add_part, book = sender(monkeypatch), [], FileResults.add_part, BlockEffects._book

    def counting(self, records, sums):
        add_part(self, records, sums)
        parts.append(len(records))

    def booking(self, state):
        if len(parts) >= 3 and parts[-1] is not None:
            parts.append(None)
            send(number)
        book(self, state)

    monkeypatch.setattr(FileResults, "add_part", counting)
    monkeypatch.setattr(BlockEffects, "_book", booking)
    result = CliRunner().invoke(main, arguments)
    monkeypatch.undo()
    assert result.exit_code == code, result.output
    kept = re.search(r"interrupted: (\d+) requests are finished and kept", result.stderr)
    with FileResults(tmp_path / "out") as results:
        assert int(kept[1]) == results.requests_finished >= 6
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert f"resuming: {kept[1]} already finished" in result.stderr
    assert (tmp_path / "out").read_bytes() == expected
