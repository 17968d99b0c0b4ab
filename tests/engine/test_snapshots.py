"""A job that is stopped inside a block goes on inside it, to the same bytes."""

import dataclasses
import json
import os
import shutil

import pytest
from click.testing import CliRunner

import flexgen_jax as fg
from flexgen_jax.cli.app import main
from flexgen_jax.jobs.job import Completing, Job, JobError
from flexgen_jax.jobs.job_input import JobInput
from flexgen_jax.jobs.results import FileResults, StreamResults
from flexgen_jax.requests.sampling_params import SamplingParams
from scheduling import zigzag
from storage.store import StorageError
from tests.killing import killed
from tests.scheduling.strategies import in_parts

MODEL = "flexgen_jax/demo_model"
PARAMS = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)
DISK = fg.Split(device=0, host=0, disk=100)
MIXED = fg.Split(device=34, host=33, disk=33)
SHAPE = {"device_batch_size": 2, "num_device_batches": 3}

POLICIES = {
    "device": fg.Policy(**SHAPE),
    "mixed": fg.Policy(**SHAPE, weights=MIXED, cache=MIXED, hidden=MIXED),
    "codes": fg.Policy(**SHAPE, cache=MIXED, cache_bits=4),
    "sparse": fg.Policy(**SHAPE, cache=MIXED, attention_sparsity=0.5),
    "host attention": fg.Policy(**SHAPE, cache=DISK, host_attention=True),
    "no overlap": fg.Policy(**SHAPE, weights=DISK, overlap=False),
}


def apart(workload):
    return in_parts(zigzag(workload), workload)


class Stopped(BaseException):
    """The power goes."""


STOPPED = (Stopped, fg.ExecutionError)  # between two schedules, or within one


@pytest.fixture
def source(tmp_path):
    """Six requests, one block, of unequal lengths: sampled, penalised, stopped early, scored."""
    fields = [
        {"temperature": 1.0},
        {"max_tokens": 3},
        {"repetition_penalty": 1.5, "frequency_penalty": 0.5},
        {"logprobs": 2, "prompt_logprobs": 1},
        {"temperature": 0.8, "n": 1, "seed": 4},
        {"bad_words": ["a"]},
    ]
    lines = [{"prompt": "Once upon a time " * (i % 3 + 1), **f} for i, f in enumerate(fields)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "in.jsonl"


@pytest.fixture(scope="module")
def offload(tmp_path_factory):
    return str(tmp_path_factory.mktemp("offload"))


def run(llm, source, target, *, stop_after=None, seconds=1e-9):
    """``seconds`` of nearly nothing: a snapshot at every step border."""
    booked = 0

    def progress(count):
        nonlocal booked
        booked += count
        if stop_after is not None and booked >= stop_after:
            raise Stopped

    with JobInput(source) as lines, FileResults(target) as results:
        job = Job(llm, Completing(llm, PARAMS, "m"), lines, results, checkpoint_seconds=seconds)
        return job.run(progress=progress), booked


def computed(done):
    spans = done.report.timeline.spans
    return [(s.step, s.layer, s.batch) for s in spans if s.op == "Compute"]


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        *((name, "zigzag") for name in POLICIES),
        *(("mixed", schedule) for schedule in ("diagonal", "lock_step", "row_by_row")),
        ("host attention", apart),
    ],
)
def test_what_is_gone_on_with_gives_the_same_bytes(source, tmp_path, offload, name, schedule):
    with fg.LLM(MODEL, policy=POLICIES[name], schedule=schedule, offload_dir=offload) as llm:
        clean, tokens = run(llm, source, tmp_path / "clean", seconds=None)
        target = tmp_path / "out"
        for stop_after in (9, 20, 20):
            with pytest.raises(STOPPED):
                run(llm, source, target, stop_after=stop_after)
            assert list((tmp_path / "out.checkpoint").glob("*/state.json"))
        done, left = run(llm, source, target)
        assert target.read_bytes() == (tmp_path / "clean").read_bytes()
        assert left < tokens - 20
        assert done.report.generated_tokens == clean.report.generated_tokens
        assert done.report.seconds > done.report.timeline.seconds > 0
        # All steps are on the timeline, once.
        assert len(computed(done)) == len(set(computed(done)))
        if schedule in ("zigzag", "lock_step", apart):  # in others batches go on at the same time
            assert set(computed(done)) == set(computed(clean))
        assert done.report.rows_used == clean.report.rows_used
        assert [path.name for path in tmp_path.glob("out.*")] == ["out.job"]


def test_compiling_of_the_process_before_is_in_its_time(source, tmp_path, offload, monkeypatch):
    """Gone on with inside a block, a timeline is of both processes: so is what it leaves out."""
    clock = iter(range(10**6))
    monkeypatch.setattr("flexgen_jax.engine.block_run.compile_seconds", lambda: next(clock))
    with fg.LLM(MODEL, policy=POLICIES["device"], offload_dir=offload) as llm:
        with pytest.raises(STOPPED):
            run(llm, source, tmp_path / "out", stop_after=20)
        (state,) = (tmp_path / "out.checkpoint").glob("*/state.json")
        before = json.loads(state.read_text())["counts"]["compile_seconds"]
        report = run(llm, source, tmp_path / "out")[0].report
    assert before > 1
    assert before < report.timeline_compile_seconds <= report.compile_seconds + before


def test_a_snapshot_is_left_only_while_a_block_runs(source, tmp_path, offload):
    with fg.LLM(MODEL, policy=POLICIES["device"], offload_dir=offload) as llm:
        run(llm, source, tmp_path / "none", seconds=3600)  # never due
        with pytest.raises(STOPPED):
            run(llm, source, tmp_path / "none2", stop_after=20, seconds=3600)
        assert not (tmp_path / "none2.checkpoint").exists()
        assert not (tmp_path / "none2.partial").exists()


def test_a_damaged_snapshot_is_said(source, tmp_path, offload):
    # With refill, what is finished would not be run again, and those left in other company: the
    # same tokens, and log-probabilities that differ in the last digit.
    policy = dataclasses.replace(POLICIES["device"], refill=False)
    with fg.LLM(MODEL, policy=policy, offload_dir=offload) as llm:
        run(llm, source, tmp_path / "clean", seconds=None)
        target = tmp_path / "out"
        with pytest.raises(STOPPED):
            run(llm, source, target, stop_after=20)
        (state,) = (tmp_path / "out.checkpoint").glob("*/state.json")
        array = next(p for p in state.parent.rglob("zarr.json") if p.parent != state.parent)
        array.unlink()
        with pytest.raises(StorageError, match=r"is damaged .*; remove .*out\.checkpoint to begin"):
            run(llm, source, target)
        # A state that is torn is none: the block begins anew.
        state.write_text(state.read_text()[:100])
        run(llm, source, target)
        assert target.read_bytes() == (tmp_path / "clean").read_bytes()


def flip(paths):
    content = bytearray(paths[0].read_bytes())
    content[len(content) // 2] ^= 1
    paths[0].write_bytes(content)


def swap(paths):
    first = paths[0].read_bytes()
    other = next(p for p in paths if p.read_bytes() != first)
    paths[0].write_bytes(other.read_bytes())
    other.write_bytes(first)


@pytest.fixture(scope="module")
def half(tmp_path_factory, offload):
    """A job that was stopped inside its block, and what comes of it."""
    directory = tmp_path_factory.mktemp("half")
    lines = [{"prompt": "Once upon a time " * (i % 3 + 1), "temperature": 1.0} for i in range(6)]
    (directory / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with fg.LLM(MODEL, policy=POLICIES["device"], offload_dir=offload) as llm:
        run(llm, directory / "in.jsonl", directory / "clean", seconds=None)
        with pytest.raises(STOPPED):
            run(llm, directory / "in.jsonl", directory / "out", stop_after=20)
        yield llm, directory


@pytest.fixture
def stopped(half, tmp_path):
    llm, directory = half
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    (state,) = (tmp_path / "out.checkpoint").glob("*/state.json")
    return llm, state


@pytest.mark.parametrize(
    "change", [flip, swap, lambda p: os.truncate(p[0], 9), lambda p: p[0].unlink()]
)
@pytest.mark.parametrize("files", ["*/c/**/*", "*/zarr.json", "_METADATA"])
def test_a_cell_that_is_not_what_was_saved_is_said(stopped, tmp_path, capfd, change, files):
    """In one line, whatever Orbax would make of it."""
    llm, state = stopped
    paths = sorted(p for p in state.parent.glob(f"cells_*/{files}") if p.is_file())
    if change is swap and len({p.read_bytes() for p in paths}) == 1:
        return  # nothing to be noticed
    change(paths)
    with pytest.raises(StorageError, match=r"is damaged \(.* is not what was saved\)") as caught:
        run(llm, tmp_path / "in.jsonl", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("change", ["token", "no checksum", "not JSON", "nested"])
def test_a_state_that_is_not_what_was_saved_is_none(stopped, tmp_path, caplog, change):
    llm, state = stopped
    values = json.loads(state.read_text())
    if change == "token":
        row = next(row for row in values["batches"][0]["rows"] if row)
        row["result"]["token_ids"][0] += 1
    elif change == "no checksum":
        del values["check"]
    text = {"not JSON": state.read_text()[:-30], "nested": "[" * 200_000}
    state.write_text(text.get(change, json.dumps(values)))
    run(llm, tmp_path / "in.jsonl", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "clean").read_bytes()
    assert "snapshot damaged" in caplog.text


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(
    source, tmp_path, offload, monkeypatch, caplog
):
    import orbax.checkpoint as ocp

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.Checkpointer, "save", full)
    with fg.LLM(MODEL, policy=POLICIES["device"], offload_dir=offload) as llm:
        run(llm, source, tmp_path / "out")
    assert "No space left on device" in caplog.text
    assert len((tmp_path / "out").read_text().splitlines()) == 6


def test_another_job_begins_anew(source, tmp_path, offload):
    with fg.LLM(MODEL, policy=POLICIES["device"], offload_dir=offload) as llm:
        target = tmp_path / "out"
        with pytest.raises(STOPPED):
            run(llm, source, target, stop_after=20)
        source.write_text(json.dumps({"prompt": "The"}))
        with pytest.raises(JobError, match="was started with different settings"):
            run(llm, source, target)
        (tmp_path / "out.partial").unlink()
        run(llm, source, target)
        assert len(target.read_text().splitlines()) == 1
        assert not (tmp_path / "out.checkpoint").exists()


def test_checkpoints_need_an_output_file(source, offload):
    with (
        fg.LLM(MODEL, policy=POLICIES["device"], offload_dir=offload) as llm,
        JobInput(source) as lines,
        StreamResults() as results,
        pytest.raises(JobError, match="give an output file"),
    ):
        Job(llm, Completing(llm, PARAMS, "m"), lines, results, checkpoint_seconds=60)
    arguments = ["generate", "--model", MODEL, "-i", str(source), "-o", "-"]
    result = CliRunner().invoke(main, [*arguments, "--checkpoint-minutes", "5"])
    assert result.exit_code == 2
    assert "give a file" in result.output


def test_a_killed_process_goes_on_inside_the_block(source, tmp_path, offload):
    """SIGKILL in the middle of saving, to a process that saves at every step."""
    arguments = [
        *("generate", "--model", MODEL, "-i", str(source), "--ignore-eos", "--quiet"),
        *("--gpu-batch-size", "2", "--num-gpu-batches", "3", "--percent", "0", "0", "0", "50", "0"),
        *("0", "--max-tokens", "30", "--offload-dir", offload),
    ]
    result = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "clean")])
    assert result.exit_code == 0, result.output
    target, saved = str(tmp_path / "out"), 12
    # The first call writes the mark, and every other one the state, when the arrays are there.
    arguments_once = [*arguments, "-o", target, "--checkpoint-minutes", "1e-9"]
    killed("flexgen_jax.engine.snapshots", "_write_durably", saved + 2, arguments_once)
    (kept,) = (tmp_path / "out.checkpoint").glob("*/state.json")
    assert kept.parent.name == str(saved - 1)
    assert list((tmp_path / "out.checkpoint" / str(saved)).glob("cells_*"))
    state = json.loads(kept.read_text())
    assert max(b["number"] + state["steps"] for b in state["batches"]) >= saved
    # Without the option, too.
    result = CliRunner().invoke(main, [*arguments, "-o", target])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out").read_bytes() == (tmp_path / "clean").read_bytes()
    assert not (tmp_path / "out.checkpoint").exists()
