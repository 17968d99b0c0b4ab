"""Many replicas over a real local Ray of two workers: the outputs of one process, whatever dies."""

import dataclasses
import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

import flexgen_jax as fg
from flexgen_jax.cli.app import main
from flexgen_jax.jobs.results import FileResults
from flexgen_jax.replicas.ray_cluster import RETRIES, Settled, WorkerError, Workers
from flexgen_jax.replicas.ray_runner import Worker, _answer, _Failed, replicated

ray = pytest.importorskip("ray")
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`\\w+` is deprecated:DeprecationWarning"),  # Ray's own
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "flexgen_jax" / "demo_model")
BLOCKS = ["--device-batch-size", "4", "--num-device-batches", "2", "--window", "16"]
BLOCKS += ["--no-refill"]  # several blocks of a window, each given to whoever is idle
WORDS = ["the", "tide", "comes", "in", "and", "out", "again", "my", "lord", "says", "nothing"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of all processes: what one has compiled the others need not."""
    values = {
        "RAY_AUTH_MODE": "disabled",  # which would write a token into the home directory
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def cluster(environment):
    options = {"include_dashboard": False, "object_store_memory": 100_000_000}
    ray.init(address="local", num_cpus=2, logging_level="error", log_to_driver=False, **options)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def offload(tmp_path_factory):
    return str(tmp_path_factory.mktemp("offload"))


@pytest.fixture(scope="module")
def store(offload):
    with fg.LLM(DEMO, offload_dir=offload) as llm:
        return str(llm.store)


def lines(count, bad=()):
    """Unequal prompts, some sampled, of OpenAI's form, or twice; those of ``bad`` are none."""
    random_ = random.Random(5)
    found = []
    for i in range(1, count + 1):
        text = " ".join(random_.choices(WORDS, k=random_.randint(1, 8)))
        line = {"prompt": text, "max_tokens": random_.choice((2, 5))}
        if i % 3 == 0:
            line |= {"temperature": 1.0}
        if i % 11 == 0:
            line |= {"n": 2, "temperature": 1.0}
        if i % 4 == 0:
            line = {"custom_id": f"r{i}", "url": "/v1/completions", "body": line}
        else:
            line = {"id": f"r{i}", **line}
        found.append("nonsense" if i in bad else json.dumps(line))
    return found


@pytest.fixture(scope="module")
def job(tmp_path_factory, offload):
    """A job's arguments but for its output, and what one process makes of it."""
    directory = tmp_path_factory.mktemp("job")
    source = directory / "in.jsonl"
    source.write_text("\n".join(lines(44, bad=(3, 20))) + "\n")
    arguments = ["generate", "--model", DEMO, "--offload-dir", offload, "-i", str(source), *BLOCKS]
    assert run([*arguments, "-o", str(directory / "one.jsonl")]).exit_code == 0
    return arguments, (directory / "one.jsonl").read_bytes()


def run(arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


OVER_RAY = ["--ray", "--ray-workers", "2"]


def workers():
    """Processes of the actors of this very Ray: there may be others on the machine."""
    parents, found = {}, []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            stat = (path / "stat").read_text()
            parents[int(path.name)] = int(stat.rpartition(")")[2].split()[1])
            if (path / "cmdline").read_bytes().startswith(b"ray::Worker"):
                found.append(int(path.name))
        except OSError:
            continue

    def ours(pid):
        while pid in parents:
            pid = parents[pid]
            if pid == os.getpid():
                return True
        return False

    return sorted(filter(ours, found))


def on_block(monkeypatch, act):
    """Calls ``act`` with the count of blocks when one has been kept."""
    kept, add_part = [0], FileResults.add_part

    def counting(self, *about):
        add_part(self, *about)
        kept[0] += 1
        act(kept[0])

    monkeypatch.setattr(FileResults, "add_part", counting)
    return kept


def test_workers_that_are_killed_leave_the_outputs_of_one_process(
    cluster, job, tmp_path, monkeypatch
):
    arguments, expected = job
    killed = []

    def kill(blocks):
        if blocks in (1, 3):
            killed.append(random.Random(blocks).choice(workers()))
            os.kill(killed[-1], signal.SIGKILL)

    kept = on_block(monkeypatch, kill)
    done = run([*arguments, *OVER_RAY, "-o", tmp_path / "out.jsonl"])
    assert done.exit_code == 0, done.output
    assert "42 succeeded, 2 failed" in done.output
    assert len(killed) == 2
    assert kept[0] >= 6  # windows of 16, 16 and what is left
    assert (tmp_path / "out.jsonl").read_bytes() == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.job"]


def test_workers_refill_and_one_process_goes_on(cluster, job, tmp_path, monkeypatch):
    arguments, expected = job
    arguments = [argument for argument in arguments if argument != "--no-refill"]
    done = run([*arguments, *OVER_RAY, "-o", tmp_path / "out.jsonl", "--json"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out.jsonl").read_bytes() == expected
    assert json.loads(done.stdout)["occupancy"] > 0.5
    stopped(monkeypatch, [*arguments, *OVER_RAY, "-o", tmp_path / "half.jsonl"])
    done = run([*arguments, "-o", tmp_path / "half.jsonl"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "half.jsonl").read_bytes() == expected


def stopped(monkeypatch, arguments):
    """Runs until two blocks are kept, and there is Ctrl-C."""

    def stop(blocks):
        if blocks == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        on_block(patch, stop)
        done = run(arguments)
    assert done.exit_code == 130, done.output
    assert "run the same command again to resume" in done.output


def test_one_process_goes_on_where_many_stopped(cluster, job, tmp_path, monkeypatch):
    arguments, expected = job
    output = ["-o", tmp_path / "out.jsonl.gz"]
    stopped(monkeypatch, [*arguments, *OVER_RAY, *output])
    kept = on_block(monkeypatch, lambda blocks: None)
    done = run([*arguments, *output])
    assert done.exit_code == 0, done.output
    assert "resuming: " in done.output
    assert kept[0] == 4
    import gzip

    assert gzip.decompress((tmp_path / "out.jsonl.gz").read_bytes()) == expected


def test_many_go_on_where_one_process_stopped_and_policy_auto_stays(
    cluster, offload, tmp_path, monkeypatch
):
    """Over Parquet, whose rows are read as lines are."""
    rows = [json.loads(line) for line in lines(24) if "custom_id" not in line]
    rows[4] |= {"prompt": None}
    source = tmp_path / "in.parquet"
    # As Arrow has them: with a null where a row has no such field.
    names = {name: None for row in rows for name in row}
    table = pyarrow.Table.from_pylist([{**names, **row} for row in rows])
    pyarrow.parquet.write_table(table, source)
    plain = tmp_path / "in.jsonl"
    rows[4].pop("prompt")
    plain.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["generate", "--model", DEMO, "--offload-dir", offload, "--device-batch-size", "4"]
    arguments += ["--window", "8", "--no-refill"]
    assert run([*arguments, "-i", plain, "-o", tmp_path / "one.jsonl"]).exit_code == 0
    arguments += ["-i", source, "-o", tmp_path / "out.jsonl"]
    stopped(monkeypatch, arguments)
    done = run([*arguments, *OVER_RAY])
    assert done.exit_code == 0, done.output
    assert "resuming: " in done.output
    found = (tmp_path / "out.jsonl").read_bytes()
    assert found == (tmp_path / "one.jsonl").read_bytes()
    assert "found none of them" in json.loads(found.splitlines()[4])["error"]["message"]


def test_another_input_is_refused(cluster, job, tmp_path, monkeypatch):
    arguments, _ = job
    output = ["-o", tmp_path / "out.jsonl"]
    stopped(monkeypatch, [*arguments, *output])
    other = tmp_path / "in.jsonl"
    other.write_text("\n".join(lines(9)) + "\n")
    done = run([*arguments, "-i", other, *OVER_RAY, *output])
    assert done.exit_code == 2
    assert "was started with different settings: input" in done.output


def test_map_batches_makes_what_one_process_makes(cluster, store, tmp_path):
    rows = [{"id": f"r{i}", "prompt": " ".join(WORDS[: 1 + i % 9])} for i in range(24)]
    rows = [{**row, "max_tokens": 3 + i % 2, "note": i} for i, row in enumerate(rows)]
    rows = [{**row, "n": None, "temperature": None} for row in rows]
    rows[7]["prompt"] = None
    rows[8] |= {"n": 2, "temperature": 1.0}
    policy = fg.Policy(device_batch_size=4, num_device_batches=2)
    begun = tmp_path / "begun"

    def zigzag(workload):
        """Of the third block to begin the worker is killed."""
        with begun.open("a") as file:
            file.write(".")
        if len(begun.read_text()) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return fg.SCHEDULES["zigzag"](workload)

    dataset = fg.ray.map_batches(
        ray.data.from_items(rows),
        model=store,
        sampling_params=fg.SamplingParams(temperature=0.0, logprobs=1),
        num_workers=2,
        batch_size=8,
        keep=["note"],
        policy=policy,
        schedule=zigzag,
    )
    found = {row["id"]: row for row in dataset.take_all()}
    assert len(begun.read_text()) > 3
    assert len(found) == len(rows)
    assert len(json.loads(found.pop("r8")["outputs"])) == 2
    bad = found.pop("r7")
    assert bad["text"] is None
    assert "found none of them" in bad["error"]["message"]
    good = [row for row in rows if row["prompt"] is not None and row["n"] is None]
    with fg.LLM(store, policy=policy) as llm:
        params = [
            fg.SamplingParams(temperature=0.0, logprobs=1, max_tokens=row["max_tokens"])
            for row in good
        ]
        expected = llm.generate([row["prompt"] for row in good], params)
    for row, output in zip(good, expected, strict=True):
        completion, answer = output.outputs[0], found[row["id"]]
        assert answer["text"] == completion.text
        assert answer["token_ids"] == list(completion.token_ids)
        assert answer["finish_reason"] == completion.finish_reason
        assert answer["note"] == row["note"]
        assert answer["error"] is None
        assert len(json.loads(answer["logprobs"])) == len(completion.token_ids)


def test_workers_in_numbers(cluster):
    said = []
    one = Workers().settled(said.append)
    assert (one.count, one.num_cpus, one.num_gpus, one.beside) == (1, 2, 0, 1)
    two = Workers(2).settled(said.append)
    assert (two.count, two.num_cpus, two.beside) == (2, 1, 2)
    assert said == []
    Workers(2, num_cpus=2).settled(said.append)
    assert "has room for 1 of 2 workers of 2 CPU each" in said.pop()
    Workers(1, num_gpus=1).settled(said.append)
    assert "has room for 0 of 1 workers" in said.pop()
    with pytest.raises(ValueError, match="num_cpus of the workers must be at least 0, got -1"):
        Workers(num_cpus=-1)


def test_sigterm_ends_a_ray_of_its_own(job, environment, tmp_path):
    arguments, expected = job
    output = tmp_path / "out.jsonl"
    source = Path(arguments[arguments.index("-i") + 1]).read_text()
    command = [*(arguments[: arguments.index("-i")]), "-i", "-", *BLOCKS, "-o", str(output)]
    process = subprocess.Popen(
        [sys.executable, "-m", "flexgen_jax", *command, *OVER_RAY],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "RAY_ADDRESS": ""},
    )
    process.stdin.write(source)
    process.stdin.flush()  # not its end, without which the job has none
    partial = tmp_path / "out.jsonl.partial"

    def something_is_finished():
        # A block, or already its whole window, which drops the entries of blocks.
        said = partial.read_bytes() if partial.exists() else b""
        return re.search(rb'"block": |"windows": [1-9]', said)

    while process.poll() is None and not something_is_finished():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 143, said
    assert "requests are finished and kept" in said
    assert CliRunner().invoke(main, command, input=source).exit_code == 0
    assert output.read_bytes() == expected


def arguments_of(store, **changes):
    return {"model": store, "policy": fg.Policy(), "schedule": "zigzag", "seed": 0, **changes}


def test_a_machine_without_the_model_is_named():
    found = Worker(arguments_of("/nowhere"), 1).about()
    assert "finds no weight store at /nowhere: every machine needs" in found.message
    assert not found.again


def test_policy_auto_is_of_the_workers_share(cluster, store, monkeypatch):
    for name in ("device_memory", "available_memory"):
        monkeypatch.setattr(f"flexgen_jax.planning.auto.{name}", lambda: 10**9)

    def limits(beside, **changes):
        worker = Worker(arguments_of(store, policy="auto", **changes), beside)
        return worker.about().machine.limits

    assert [limits(beside).device for beside in (1, 2, 4)] == [8e8, 4e8, 2e8]
    assert [limits(beside, device_memory="3MB").device for beside in (1, 2)] == [3e6, 3e6]
    monkeypatch.undo()
    arguments = arguments_of(store, policy="auto", fixed={"device_batch_size": 2})
    with replicated(Settled(1, 1, 0, {}, 1), {**arguments, "device_memory": "500MB"}) as llm:
        assert len(llm.generate(["the"] * 3, fg.SamplingParams(max_tokens=2))) == 3
        assert llm.policy.device_batch_size == 2
        assert llm.limits.device == 500 * 10**6
        assert llm.why
        assert llm.report.why == llm.why


def block_of(store):
    with fg.LLM(store, policy=fg.Policy(device_batch_size=2, num_device_batches=2)) as llm:
        params = fg.SamplingParams(max_tokens=2)
        requests = [llm.request(i, {"prompt_token_ids": [5 + i]}, params) for i in range(3)]
        (block,) = llm.planner.blocks(requests)
        return block, llm.policy


def test_what_fails_in_a_worker_is_an_answer(store, monkeypatch):
    block, policy = block_of(store)
    worker = Worker(arguments_of(store), 1)
    with monkeypatch.context() as patch:
        torn = fg.ExecutionError("compute(0, 0, 0)", OSError("torn"))
        patch.setattr(
            "flexgen_jax.engine.block_run.execute", lambda *_, **__: (_ for _ in ()).throw(torn)
        )
        assert worker.run(block, policy) == _Failed("compute(0, 0, 0) failed: torn", again=True)
    assert len(worker.run(block, policy).outputs) == 3
    worker._close()


def test_a_worker_whose_disk_is_full_says_so_and_the_next_attempt_may_do(store, monkeypatch):
    block, policy = block_of(store)
    policy = dataclasses.replace(policy, cache=fg.Split(device=0, disk=100))
    worker = Worker(arguments_of(store), 1)

    def full(file, buffers, offset):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("storage.chunks.os.pwritev", full)
        failed = worker.run(block, policy)
    assert failed.again
    assert "cannot write" in failed.message
    assert "No space left on device" in failed.message
    assert len(worker.run(block, policy).outputs) == 3
    worker._close()


class Flaky(Worker):
    """Fails as often as a file says, in whichever process."""

    def run(self, block, policy):
        path = Path(os.environ["FLAKY"])
        left = int(path.read_text())
        if left:
            path.write_text(str(left - 1))
            return _Failed("torn", again=True)
        return super().run(block, policy)


@pytest.mark.parametrize("times", [RETRIES, RETRIES + 1])
def test_a_block_that_fails_is_tried_again_and_then_said(
    cluster, store, tmp_path, monkeypatch, times
):
    (tmp_path / "left").write_text(str(times))
    monkeypatch.setattr("flexgen_jax.replicas.ray_runner.Worker", Flaky)
    remote = {"num_cpus": 1, "num_gpus": 0, "resources": {}}
    remote |= {"runtime_env": {"env_vars": {"FLAKY": str(tmp_path / "left")}}}
    monkeypatch.setattr(Settled, "remote", lambda self: remote)
    with replicated(Settled(1, 1, 0, {}, 1), arguments_of(store)) as llm:
        if times > RETRIES:
            with pytest.raises(WorkerError, match="torn"):
                llm.generate(["the tide"], fg.SamplingParams(max_tokens=2))
            return
        found = llm.generate(["the tide"], fg.SamplingParams(max_tokens=2))
        assert llm.report.generated_tokens == 2
    with fg.LLM(store, policy=fg.Policy()) as llm:
        assert llm.generate(["the tide"], fg.SamplingParams(max_tokens=2)) == found


def test_workers_that_differ_are_refused(cluster, store, monkeypatch):
    class Other(Worker):
        def about(self):
            found = super().about()
            return dataclasses.replace(found, software={"jax": str(os.getpid())})

    monkeypatch.setattr("flexgen_jax.replicas.ray_runner.Worker", Other)

    def until_both_have_come():
        with replicated(Settled(2, 1, 0, {}, 2), arguments_of(store)) as llm:
            for _ in range(100):
                llm.generate(["the tide", "comes"], fg.SamplingParams(max_tokens=2))

    with pytest.raises(ValueError, match="the workers differ, and so would their results"):
        until_both_have_come()


def test_the_cluster_has_no_room_for_some(cluster, store):
    with replicated(Settled(3, 1, 0, {}, 3), arguments_of(store)) as llm:
        assert llm.runner.num_replicas == 3
        assert len(llm.generate(["the", "tide"], fg.SamplingParams(max_tokens=2))) == 2


def test_a_call_that_failed_for_good():
    ref = ray.put(_Failed("too many stages", again=False))
    with pytest.raises(ValueError, match="too many stages"):
        _answer(ref, again=True)


def test_a_cluster_that_is_not_there(job, tmp_path):
    arguments = [
        *job[0],
        "-o",
        str(tmp_path / "out.jsonl"),
        "--ray",
        "--ray-address",
        "127.0.0.1:1",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "flexgen_jax", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "no Ray cluster at 127.0.0.1:1: nothing answers there. Start one with" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ray-workers", "2"], "--ray-workers: for jobs over Ray; give --ray, too"),
        (["--ray-address", "auto"], "--ray-address: for jobs over Ray; give --ray, too"),
        (["--ray", "--trace", "t.json"], "--trace or --plot: for one process only"),
        (["--ray", "-o", "-"], "--output -: for one process only"),
        (["--ray", "--checkpoint-minutes", "1"], "--checkpoint-minutes: for one process only"),
    ],
)
def test_options_that_do_not_go_together(job, tmp_path, options, message):
    done = run([*job[0], "-o", tmp_path / "out.jsonl", *options])
    assert done.exit_code == 2
    assert message in done.output


def test_without_ray_the_cure_is_named(job, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    done = run([*job[0], "-o", tmp_path / "out.jsonl", "--ray"])
    assert done.exit_code == 2
    assert "pip install 'flexgen-jax[ray]'" in done.output
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ImportError, match=r"pip install 'flexgen-jax\[ray\]'"):
        fg.ray.map_batches(None, model=DEMO)


def test_without_pyarrow_the_cure_is_named(job, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "in.parquet").write_bytes(b"PAR1")
    done = run([*job[0], "-i", tmp_path / "in.parquet", "-o", tmp_path / "out.jsonl"])
    assert "Parquet needs pyarrow" in done.output
    assert "pip install 'flexgen-jax[ray]'" in done.output


def test_a_parquet_file_that_is_damaged_is_said(job, tmp_path):
    (tmp_path / "in.parquet").write_bytes(b"PAR1 and no more")
    done = run([*job[0], "-i", tmp_path / "in.parquet", "-o", tmp_path / "out.jsonl"])
    assert done.exit_code != 0
    assert "in.parquet: damaged" in done.output
