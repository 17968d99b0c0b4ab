"""A job is killed, runs out of disk or is asked for otherwise: what is finished is never lost, and
the output is the one of a job to which nothing happened, byte for byte."""

import dataclasses
import gzip
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

import flexgen_jax as fg
from flexgen_jax.cli.app import main
from flexgen_jax.engine.local_runner import LocalRunner
from flexgen_jax.jobs.job import Completing, Job
from flexgen_jax.jobs.job_input import JobError, JobInput
from flexgen_jax.jobs.results import FileResults
from flexgen_jax.planning.window_size import WindowSize
from storage.store import StorageError
from storage.wrappers import Faulty
from tests.interrupting import signal_in_block

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "flexgen_jax" / "demo_model")
MODEL = str(ROOT / "tests" / "goldens" / "pre_norm")


@pytest.fixture(scope="module")
def offload(tmp_path_factory):
    return str(tmp_path_factory.mktemp("offload"))


class Killer:
    """The process of ``kill_worker.py``."""

    def __init__(self, directory):
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "jobs" / "kill_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=directory,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def run(self, arguments, kill_at=None):
        line = json.dumps({"arguments": arguments, "kill_at": kill_at})
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def write_lines(path, count, seed=5, bad=()):
    """Prompts of unequal lengths; every line of ``bad`` is none."""
    random_ = random.Random(seed)
    with path.open("w") as file:
        for i in range(1, count + 1):
            ids = [random_.randint(4, 70) for _ in range(random_.randint(1, 12))]
            line = {"id": f"r{i}", "prompt_token_ids": ids, "max_tokens": random_.choice((2, 5))}
            if i % 3 == 0:  # sampled
                line |= {"temperature": 1.0}
            file.write("nonsense\n" if i in bad else json.dumps(line) + "\n")


def test_a_job_that_is_killed_again_and_again(tmp_path, offload):
    """A dozen times and more, from its first moment to its last."""
    source = tmp_path / "in.jsonl"
    write_lines(source, 99, bad=(7, 50, 51))
    arguments = ["generate", "--model", MODEL, "--offload-dir", offload, "-i", str(source)]
    arguments += ["--device-batch-size", "4", "--num-device-batches", "2", "--window", "32"]
    random_, kills, outputs, went_on = random.Random(11), 0, 0, 0
    with Killer(tmp_path) as killer:
        clean = killer.run([*arguments, "-o", str(tmp_path / "expected.jsonl")])
        assert clean["code"] == 0, (tmp_path / "stderr").read_text()
        expected = (tmp_path / "expected.jsonl").read_bytes()
        while kills < 12:
            outputs += 1
            target = tmp_path / f"out{outputs}.jsonl"
            while not target.exists():
                went_on += (tmp_path / f"{target.name}.partial").exists()
                kill_at = random_.randint(1, clean["moments"])
                code = killer.run([*arguments, "-o", str(target)], kill_at)["code"]
                kills += code == -signal.SIGKILL
                assert code in (0, -signal.SIGKILL), (tmp_path / "stderr").read_text()
            # Killed after its last step but one, it still has something to tidy up.
            assert target.read_bytes() == expected
            target.rename(tmp_path / "done")
    assert went_on >= 5
    records = [json.loads(line) for line in expected.splitlines()]
    good = [r["id"] for r in records if "error" not in r]
    assert good == [f"r{i}" for i in range(1, 100) if i not in (7, 50, 51)]
    assert [r["error"]["line"] for r in records if "error" in r] == [7, 50, 51]


GREEDY = fg.SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
BAD = (4, 30)


@pytest.fixture(scope="module")
def llm(offload):
    # Blocks are counted here; test_rolling_jobs.py is about jobs that are one block.
    policy = fg.Policy(device_batch_size=4, num_device_batches=2, refill=False)
    with fg.LLM(MODEL, policy=policy, offload_dir=offload) as llm:
        yield llm


@pytest.fixture
def source(tmp_path):
    lines = [json.dumps({"prompt_token_ids": [5 + i % 40, 6, 7][: 1 + i % 3]}) for i in range(50)]
    for line in BAD:
        lines[line - 1] = "nonsense"
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    return tmp_path / "in.jsonl"


def run(llm, source, target, *, on_window=None, params=GREEDY, window=16, restart=False):
    with JobInput(source) as lines, FileResults(target, restart=restart) as results:
        limits = WindowSize.of(llm.policy.block_size, window)
        job = Job(llm, Completing(llm, params, "m"), lines, results, window_size=limits)
        return job.run(on_window=on_window)


@pytest.fixture
def expected(llm, source, tmp_path):
    run(llm, source, tmp_path / "expected")
    return (tmp_path / "expected").read_bytes()


class Stopped(BaseException):
    """The power goes."""


def blocks_run(monkeypatch, stop_after=None):
    """Counts the blocks that are run; may stop before one."""
    real, count = LocalRunner._run_block, [0]

    def counted(self, *arguments):
        if count[0] == stop_after:
            raise Stopped
        count[0] += 1
        return real(self, *arguments)

    monkeypatch.setattr(LocalRunner, "_run_block", counted)
    return count


def close_only(self, *_):
    """What the system does for a killed process: nothing is tidied up."""
    for file in (self._out, self._journal):
        if file is not None:
            file.close()


@pytest.mark.parametrize("out", ["out", "out.gz"])
@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
def test_every_step_may_be_the_last(llm, source, expected, tmp_path, monkeypatch, step, out):
    """Whatever a process did last, the next one goes on, and no block is run twice but one."""
    owner, name = os, step.split(".")[1]
    real, at = getattr(owner, name), 0
    finished = False
    while not finished:
        target = tmp_path / f"{at}-{out}"
        calls = 0

        def stop(*arguments, at=at, **options):
            nonlocal calls
            calls += 1
            if calls == at + 1:
                raise Stopped
            return real(*arguments, **options)

        count = blocks_run(monkeypatch)
        monkeypatch.setattr(owner, name, stop)
        monkeypatch.setattr(FileResults, "__exit__", close_only)
        try:
            run(llm, source, target)
        except Stopped:
            pass
        else:
            finished = True
        monkeypatch.undo()
        total = count[0]
        if not finished and not (target.exists() and not Path(f"{target}.partial").exists()):
            count = blocks_run(monkeypatch)
            report = run(llm, source, target)
            monkeypatch.undo()
            total += count[0]
            assert report.requests == 48
            assert report.errors == 2
            assert report.report.generated_tokens == 48 * 3
            assert report.report.blocks == 6
        assert total in (6, 7)
        data = target.read_bytes()
        assert (gzip.decompress(data) if out.endswith(".gz") else data) == expected
        assert [p.name for p in tmp_path.glob(f"{target.name}.*")] == [f"{target.name}.job"]
        at += 1
    assert at > {"fsync": 15, "replace": 6}[name]


def interrupted(llm, source, target, monkeypatch, blocks=3, **options):
    """A job that was stopped after so many blocks."""
    blocks_run(monkeypatch, stop_after=blocks)
    with pytest.raises(Stopped):
        run(llm, source, target, **options)
    monkeypatch.undo()


def test_a_torn_journal(llm, source, tmp_path, monkeypatch):
    """Cut off anywhere, or overwritten by zeros: what is whole counts, the rest is done again."""
    target, partial = tmp_path / "out", tmp_path / "out.partial"
    run(llm, source, tmp_path / "expected", window=24)
    expected = (tmp_path / "expected").read_bytes()
    interrupted(llm, source, target, monkeypatch, blocks=5, window=24)
    whole, ordered = partial.read_bytes(), (tmp_path / "out.ordered").read_bytes()
    assert whole.count(b'"lines": [') == 2  # of the second window
    cuts = random.Random(1).sample(range(whole.index(b'{"window"'), len(whole)), 25)
    cuts.append(len(whole))
    counts = set()
    for cut in cuts:
        for tail in (b"", b"\0" * (len(whole) - cut), b'{"lines": [9]}\n'):
            partial.write_bytes(whole[:cut] + tail)
            (tmp_path / "out.ordered").write_bytes(ordered + b"half a window")
            target.unlink(missing_ok=True)
            count = blocks_run(monkeypatch)
            run(llm, source, target, window=24)
            monkeypatch.undo()
            assert target.read_bytes() == expected
            counts.add(count[0])
    assert counts == {1, 2, 3}


def test_another_job_is_refused_with_what_differs(llm, source, expected, tmp_path, monkeypatch):
    target = tmp_path / "out"
    interrupted(llm, source, target, monkeypatch)
    kept = (tmp_path / "out.partial").read_bytes()
    cases = {
        "max_tokens was 3, is now 4": {"params": dataclasses.replace(GREEDY, max_tokens=4)},
        "window requests was 16, is now 24": {"window": 24},
    }
    for words, change in cases.items():
        with pytest.raises(JobError, match=words):
            run(llm, source, target, **change)
    before, text = llm.policy, source.read_text()
    llm.policy = dataclasses.replace(before, device_batch_size=2)
    with pytest.raises(JobError, match="policy device_batch_size was 4, is now 2"):
        run(llm, source, target)
    llm.policy = before
    source.write_text(text + "\n{}")
    with pytest.raises(JobError, match=r"input bytes was .*; input digest was"):
        run(llm, source, target)
    source.write_text(text)
    assert (tmp_path / "out.partial").read_bytes() == kept
    llm.policy = dataclasses.replace(before, cache=fg.Split(device=0, host=100), overlap=False)
    run(llm, source, target)  # where things lie may be changed on the way
    llm.policy = before
    assert target.read_bytes() == expected


def test_a_model_that_was_changed_is_another_one(llm, source, tmp_path, monkeypatch):
    """Its config, what ends a text, its tokenizer: with files that a store does not guard."""
    store, target = fg.convert(MODEL, tmp_path / "store"), tmp_path / "out"
    shutil.copy(Path(DEMO) / "tokenizer.json", store)
    config, manifest = store / "config.json", store / "flexgen_manifest.json"
    values = json.loads(manifest.read_text())
    del values["config"]
    manifest.write_text(json.dumps({**values, "format_version": 2}))
    tokenizer = (store / "tokenizer.json").read_text()
    other_heads = json.dumps({**json.loads(config.read_text()), "num_attention_heads": 1})
    changes = [
        (config, other_heads, "weights config"),
        (store / "generation_config.json", '{"eos_token_id": 7}', "weights config"),
        (store / "tokenizer.json", tokenizer + "\n", "tokenizer files"),
    ]
    with fg.LLM(str(store), policy=llm.policy) as first:
        interrupted(first, source, target, monkeypatch)
    for file, text, said in changes:
        before = file.read_bytes() if file.exists() else None
        file.write_text(text)
        with (
            fg.LLM(str(store), policy=llm.policy) as other,
            pytest.raises(JobError, match=f"{said} was .*, is now "),
        ):
            run(other, source, target)
        file.unlink()
        if before is not None:
            file.write_bytes(before)
    with fg.LLM(str(store), policy=llm.policy) as same:
        assert run(same, source, target).requests == 48


def test_a_job_begins_anew_if_asked(llm, source, tmp_path, monkeypatch):
    target = tmp_path / "out"
    interrupted(llm, source, target, monkeypatch)
    count = blocks_run(monkeypatch)
    report = run(llm, source, target, params=fg.SamplingParams(max_tokens=1), restart=True)
    assert count[0] == 6
    assert report.report.generated_tokens == 48
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out", "out.job"]


def test_a_pipe_that_says_something_else_is_noticed(llm, source, tmp_path, monkeypatch):
    """Nobody knows what a pipe will say; but what was read of it is compared."""

    def pipe(data):
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data)))

    target, data = tmp_path / "out", source.read_bytes()
    pipe(data)
    run(llm, Path("-"), target)
    expected = target.read_bytes()
    assert b"[29]" in data  # in the window that was begun, as [6 is in the one before
    for wrong in (data.replace(b"[6", b"[7", 1), data.replace(b"[29]", b"[28]"), data[:40], b""):
        pipe(wrong)
        with pytest.raises(JobError, match="complete, from a job with another input"):
            run(llm, Path("-"), target)
        assert target.read_bytes() == expected
        target.unlink()
        blocks_run(monkeypatch, stop_after=3)
        pipe(data)
        with pytest.raises(Stopped):
            run(llm, Path("-"), target)
        monkeypatch.undo()
        pipe(wrong)
        with pytest.raises(JobError, match="is not the input that the job was started with"):
            run(llm, Path("-"), target)
        pipe(data)
        run(llm, Path("-"), target)
        assert target.read_bytes() == expected


def test_a_disk_that_fills(source, expected, tmp_path, offload):
    """The system itself refuses to write on: a limit to the size of files."""
    target = tmp_path / "out"
    program = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from flexgen_jax.cli.app import main\n"
        "import flexgen_jax.llm, flexgen_jax.weights.checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))\n"
        "main(sys.argv[2:])\n"
    )
    arguments = ["generate", "--model", MODEL, "--offload-dir", offload, "-i", str(source)]
    arguments += ["-o", str(target), "--window", "16", "--max-tokens", "3", "--ignore-eos"]
    arguments += ["--device-batch-size", "4", "--num-device-batches", "2"]

    def limited(nbytes):
        return subprocess.run(
            [sys.executable, "-c", program, str(nbytes), *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )

    for nbytes in (3900, len(expected) - 500):
        done = limited(nbytes)
        assert done.returncode == 1, done.stderr
        assert "cannot write" in done.stderr
        assert "File too large" in done.stderr
        assert "Traceback" not in done.stderr
        assert "run the same command again to resume" in done.stderr
    done = limited(10**9)
    assert "resuming: " in done.stderr
    assert done.returncode == 0, done.stderr
    assert target.read_bytes() == expected


def test_a_directory_that_cannot_be_written(tmp_path, source, offload):
    if os.geteuid():
        tmp_path.chmod(0o555)
    target = "/sys/out.jsonl" if not os.geteuid() else str(tmp_path / "out")
    arguments = ["generate", "--model", "no/such-model", "-i", str(source), "-o", target]
    result = CliRunner().invoke(main, arguments)
    tmp_path.chmod(0o755)
    assert result.exit_code == 2
    assert "cannot write" in result.stderr  # before the model is looked for
    assert result.stderr.count("\n") == 1


def test_a_store_that_turns_unreadable(source, expected, tmp_path, offload):
    """In the middle of the job; and it can be read again."""
    policy = fg.Policy(
        device_batch_size=4,
        num_device_batches=2,
        weights=fg.Split(device=0, disk=100),
        refill=False,
    )
    broken = False

    def fault(verb, names):
        return StorageError("the disk is gone") if broken and verb == "load" else None

    def breaking(window, blocks, left):
        nonlocal broken
        broken = window.number == 2

    options = {"policy": policy, "offload_dir": offload}
    with fg.LLM(MODEL, **options, wrap_store=lambda tier, store: Faulty(store, fault)) as llm:
        with pytest.raises(fg.ExecutionError, match="the disk is gone"):
            run(llm, source, tmp_path / "out", on_window=breaking)
        with FileResults(tmp_path / "out") as results:
            assert results.requests_finished == 32
        broken = False
        run(llm, source, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == expected


@pytest.mark.parametrize(("mode", "small"), [("direct", 0), ("direct", 1 << 20), ("mapped", 0)])
def test_a_chunk_that_is_cut_off_in_the_middle(source, expected, tmp_path, mode, small):
    """One error that names the file; mended, the job goes on."""
    store = fg.convert(MODEL, tmp_path / "store")
    policy = fg.Policy(
        device_batch_size=4,
        num_device_batches=2,
        weights=fg.Split(device=0, disk=100),
        refill=False,
    )
    arguments = {"policy": policy, "disk": fg.DiskContext(mode=mode, small_nbytes=small)}
    chunk = max(store.rglob("*/c/*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    whole = chunk.read_bytes()

    def cut(window, blocks, left):
        if window.number == 1:
            os.truncate(chunk, len(whole) // 2)

    named = re.escape(str(chunk.parent.parent))
    with fg.LLM(str(store), **arguments) as llm, pytest.raises(fg.ExecutionError, match=named):
        run(llm, source, tmp_path / "out", on_window=cut)
    with pytest.raises(ValueError, match="store"):
        fg.LLM(str(store), **arguments)
    chunk.write_bytes(whole)
    with fg.LLM(str(store), **arguments) as llm:
        with FileResults(tmp_path / "out") as results:
            assert results.requests_finished == 16
        run(llm, source, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == expected


def test_what_auto_came_to_is_kept(source, tmp_path, offload, monkeypatch, allowing):
    """More memory may be free when the job goes on; the policy is still that of the beginning."""
    arguments = ["generate", "--model", MODEL, "--offload-dir", offload, "-i", str(source)]
    arguments += ["--max-tokens", "3", "--json", "--no-refill", "-o"]
    out, other = str(tmp_path / "out"), str(tmp_path / "other")
    blocks_run(monkeypatch, stop_after=3)
    with pytest.raises(Stopped):
        CliRunner().invoke(main, [*arguments, out, "--device-memory", str(allowing(180_000))])
    monkeypatch.undo()
    wrong = CliRunner().invoke(main, [*arguments, out, "--temperature", "1"])
    assert wrong.exit_code == 2
    assert "temperature was 0.0, is now 1.0" in wrong.stderr
    assert "or start over with --restart" in wrong.stderr
    wrong = CliRunner().invoke(main, [*arguments, out, "--device-batch-size", "31"])
    assert wrong.exit_code == 2
    assert "device_batch_size was" in wrong.stderr
    result = CliRunner().invoke(main, [*arguments, out])
    assert result.exit_code == 0, result.output
    assert re.search(r"resuming: \d+ already finished", result.stderr)
    kept = json.loads(result.stdout)
    fresh = json.loads(CliRunner().invoke(main, [*arguments, other]).stdout)
    assert kept["requests"] == fresh["requests"] == 48
    assert kept["errors"] == 2
    assert kept["policy"]["device_batch_size"] < fresh["policy"]["device_batch_size"]
    assert kept["blocks"] > fresh["blocks"]
    found = [
        [json.loads(line).get("token_ids") for line in Path(p).read_text().splitlines()]
        for p in (out, other)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_job_and_says_how_to_go_on(
    source, tmp_path, offload, monkeypatch, number, code
):
    arguments = ["generate", "--model", MODEL, "--offload-dir", offload, "-i", str(source)]
    arguments += ["-o", str(tmp_path / "out"), "--max-tokens", "3"]
    arguments += ["--device-batch-size", "4", "--num-device-batches", "2", "--no-refill"]
    signal_in_block(monkeypatch, number, 3)
    before = signal.getsignal(signal.SIGTERM)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code, result.output
    assert "interrupted: 16 requests are finished and kept" in result.stderr
    assert "run the same command again to resume" in result.stderr
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.undo()
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert len((tmp_path / "out").read_text().splitlines()) == 50


def test_nothing_is_left_of_a_job_that_finished_nothing(llm, source, tmp_path, monkeypatch):
    interrupted(llm, source, tmp_path / "out", monkeypatch, blocks=0)
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_damaged_output_is_not_taken_for_whole(llm, source, tmp_path, monkeypatch):
    target, ordered = tmp_path / "out", tmp_path / "out.ordered"
    interrupted(llm, source, target, monkeypatch, blocks=4)
    whole = ordered.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    ordered.write_bytes(flipped)
    with pytest.raises(JobError, match=r"out\.ordered is damaged: the first .* start over with"):
        run(llm, source, target)
    ordered.write_bytes(whole[:100])
    with pytest.raises(JobError, match=r"out\.ordered is damaged: it has 100 bytes of"):
        run(llm, source, target)
    for version in (1, 99):
        header, rest = (tmp_path / "out.partial").read_bytes().split(b"\n", 1)
        other = json.dumps({**json.loads(header), "flexgen_jax_job": version}).encode()
        (tmp_path / "out.partial").write_bytes(other + b"\n" + rest)
        with pytest.raises(
            JobError, match=r"is of another version of .* start over with --restart"
        ):
            run(llm, source, target)
    assert run(llm, source, target, restart=True).requests == 48


def test_an_output_that_has_its_name_is_checked_as_well(llm, source, tmp_path, monkeypatch):
    """Stopped between the last two steps, with the output of another job in its place."""
    target = tmp_path / "out"
    with monkeypatch.context() as patch:
        replace = os.replace

        def stop(source, to):
            if Path(to).suffix == ".job":
                raise Stopped
            replace(source, to)

        patch.setattr(FileResults, "__exit__", close_only)
        patch.setattr(os, "replace", stop)
        with pytest.raises(Stopped):
            run(llm, source, target)
    whole = target.read_bytes()
    target.write_bytes(whole.replace(b"1", b"2"))
    with pytest.raises(JobError, match="out is damaged"):
        run(llm, source, target)
    target.write_bytes(whole)
    assert run(llm, source, target).requests == 48
    assert not (tmp_path / "out.partial").exists()


# In what is written at one stroke, which is refused; and in what may be torn, and is done again.
EDITS = [
    (rb'"nbytes": \d+', b'"nbytes": 0'),
    (rb'"nbytes": \d+', b'"nbytes": null'),
    (rb'"done": false', b'"done": true'),
    (rb'"windows": \d+', b'"windows": 2'),
    (rb'"line": \d+', b'"line": 40'),
    (rb'"identity": \{', b'"identity": {"a": {}, '),
    (rb'"policy": \{', b'"policy": null, "more": {'),
]
EDITS_OF_ENTRIES = [
    (rb'"lines": \[\d+', b'"lines": [1'),
    (rb'"sizes": \[\d+', b'"sizes": [1'),
    (rb'"crc32": \d+', b'"crc32": 7'),
    (rb'"last_line": \d+', b'"last_line": 20'),
    (rb'"token_ids": \[\d', b'"token_ids": [9'),
]


@pytest.mark.parametrize(("found", "replacement"), [*EDITS, *EDITS_OF_ENTRIES])
def test_an_edited_journal_gives_no_other_output(
    llm, source, expected, tmp_path, monkeypatch, found, replacement
):
    interrupted(llm, source, tmp_path / "out", monkeypatch)
    journal = tmp_path / "out.partial"
    text = re.sub(found, replacement, journal.read_bytes(), count=1)
    assert text != journal.read_bytes()
    journal.write_bytes(text)
    refused = (found, replacement) in EDITS
    if refused:
        with pytest.raises(
            JobError, match=r"out\.partial is damaged: .* start over with --restart"
        ):
            run(llm, source, tmp_path / "out")
        assert journal.read_bytes() == text
    run(llm, source, tmp_path / "out", restart=refused)
    assert (tmp_path / "out").read_bytes() == expected


def test_completions_that_take_several_blocks(llm, tmp_path, monkeypatch):
    """Stopped before any block, a request is whole or not there; the report knows of all blocks."""
    asked = [(1, 3), (1, 20), (0, 1), (1, 9), (0, 1), (1, 2)]  # a block has 8 rows
    lines = [
        json.dumps({"prompt_token_ids": [5 + i] * (9 - i), "temperature": t, "n": n})
        for i, (t, n) in enumerate(asked)
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines))
    count = blocks_run(monkeypatch)
    clean = run(llm, source, tmp_path / "clean")
    monkeypatch.undo()
    expected = (tmp_path / "clean").read_bytes()
    records = [json.loads(line) for line in expected.splitlines()]
    assert [len(r["outputs"]) if "outputs" in r else 1 for r in records] == [n for _, n in asked]
    assert clean.report.requests == 6
    assert clean.report.generated_tokens == 3 * sum(n for _, n in asked)
    assert clean.report.blocks == count[0] > 5
    for stop_after in range(1, count[0]):
        target = tmp_path / f"{stop_after}"
        interrupted(llm, source, target, monkeypatch, blocks=stop_after)
        resumed = run(llm, source, target)
        assert target.read_bytes() == expected
        assert resumed.report.blocks == clean.report.blocks
        assert resumed.report.requests == 6
