"""Stages in several processes: real ones, over loopback, with gloo."""

import contextlib
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import flexgen_jax as fg
from flexgen_jax.cli.app import main
from flexgen_jax.distributed.sentry import answers
from flexgen_jax.distributed.stage_devices import stage_devices
from flexgen_jax.models.params import unit_names
from flexgen_jax.planning.stage_layout import layers_of
from flexgen_jax.weights.checkpoint import open_store
from flexgen_jax.weights.weight_format import WeightFormat
from scheduling.stages import hosts_of
from tests.engine.test_stages import DEMO, MIXED, generate, policy

ROOT = Path(__file__).parents[2]
# Shows what is wrong sooner than the default; a busy machine must not be taken for a lost one.
TIMEOUT = "20"
MIXED_PERCENT = ["34", "33", "34", "33", "34", "33"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Path(fg.convert(str(DEMO), tmp_path_factory.mktemp("made") / "store"))


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


FIRST_PORT = 65535 - 2**12 + 1  # of Slurm's coordinator in JAX, which adds the job's id


def port_is_free(port):
    with socket.socket() as listening:
        try:
            listening.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class Pipeline:
    """So many processes, which are the context's: none outlives it."""

    def __init__(self, arguments, count=2, cwd=None, variables=lambda index: {}):
        address = f"127.0.0.1:{free_port()}"
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment.pop("JAX_NUM_CPU_DEVICES", None)
        self.processes = [
            subprocess.Popen(
                [sys.executable, *arguments(index, address)],
                env={**environment, **variables(index)},
                cwd=cwd,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(count)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.communicate()

    def ends(self):
        """Of each process the exit code, the standard output and the standard error."""
        found = []
        for process in self.processes:
            output, errors = process.communicate()
            found.append((process.returncode, output, errors))
        return found


def job(tmp_path, store, *options, index=None, address="", name="out.jsonl", timeout=TIMEOUT):
    """A command line: of process ``index``, or None: of a single one."""
    arguments = ["generate", "--model", str(store), "--offload-dir", str(tmp_path / "offload")]
    arguments += ["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / name), *options]
    if index is not None:
        arguments += ["--coordinator", address, "--num-processes", "2"]
        arguments += ["--process-id", str(index), "--process-timeout", timeout]
    return arguments


@pytest.fixture
def lines(tmp_path):
    prompts = [[5 + i % 7] * (1 + i % 5) for i in range(24)]
    text = [json.dumps({"prompt_token_ids": ids, "max_tokens": 12}) for ids in prompts]
    (tmp_path / "in.jsonl").write_text("\n".join(["no json", *text]))
    return [*MIXED_OPTIONS]


MIXED_OPTIONS = ["--percent", *MIXED_PERCENT, "--device-batch-size", "2"]
MIXED_OPTIONS += ["--num-device-batches", "3", "--window", "6"]


@pytest.fixture
def expected(tmp_path, store, lines):
    result = CliRunner().invoke(main, job(tmp_path, store, *lines, name="alone.jsonl"))
    assert result.exit_code == 0, result.output
    return (tmp_path / "alone.jsonl").read_bytes()


WORKER = """
import sys
import jax

index, address, stages, path = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
jax.config.update("jax_num_cpu_devices", -(-stages // 2))
from flexgen_jax.distributed.processes import initialize
from flexgen_jax.machine.kept_programs import keep_programs
import flexgen_jax as fg
from tests.engine.test_stages import PROMPTS, PARAMS, MIXED, policy

keep_programs()
initialize(address, 2, index, timeout=20)
chosen = policy(stages, weights=MIXED, cache=MIXED, hidden=MIXED)
with fg.LLM(path, policy=chosen, schedule=sys.argv[5]) as llm:
    if llm.leads:
        outputs = llm.generate(PROMPTS, PARAMS)
        assert llm.generate(PROMPTS[:1], PARAMS[:1])[0] == outputs[0]
        print(repr(outputs))
    else:
        llm.follow()
"""


@pytest.mark.parametrize(("stages", "schedule"), [(2, "zigzag"), (3, "diagonal")])
def test_two_processes_give_what_one_device_gives(tmp_path, store, stages, schedule):
    alone, _ = generate(str(tmp_path), policy(weights=MIXED, cache=MIXED))

    def arguments(index, address):
        return ["-c", WORKER, str(index), address, str(stages), str(store), schedule]

    with Pipeline(arguments, cwd=ROOT) as pipeline:
        (code, output, errors), follower = pipeline.ends()
    assert code == 0, errors
    assert follower[0] == 0, follower[2]
    assert output.splitlines()[-1] == repr(alone)


def only_of(store, target, layers):
    """A copy of a store that has ``layers`` only."""
    shutil.copytree(store, target)
    config = fg.OPTConfig.load(store / "config.json")
    form = WeightFormat.usual(open_store(store).manifest.dtype)
    names = {name for layer in layers for name in unit_names(config, config.units[layer])}
    needed = {form.array_name(config, name) for name in names}
    dropped = [path for path in target.iterdir() if path.is_dir() and path.name not in needed]
    for path in dropped:
        shutil.rmtree(path)
    assert dropped
    return target


def test_a_job_of_slurm_each_process_with_its_layers_only(tmp_path, store, lines, expected):
    stages = layers_of(fg.OPTConfig.load(store / "config.json"), 2)
    parts = [only_of(store, tmp_path / str(i), layers) for i, layers in enumerate(stages)]
    job_id = next(filter(port_is_free, range(FIRST_PORT, 2**16))) - FIRST_PORT

    def variables(index):
        """What Slurm tells a task, as far as JAX asks."""
        return {
            "SLURM_JOB_ID": str(job_id),
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": str(index),
            "SLURM_LOCALID": str(index),
            "SLURM_STEP_NUM_NODES": "1",
        }

    def arguments(index, address):
        options = (*lines, "--json", "--distributed", "--process-timeout", TIMEOUT)
        return ["-m", "flexgen_jax", *job(tmp_path, parts[index], *options)]

    with Pipeline(arguments, variables=variables) as pipeline:
        (code, output, errors), (following, said, complaint) = pipeline.ends()
    assert code == 0, errors
    assert (following, said) == (0, ""), complaint
    assert (tmp_path / "out.jsonl").read_bytes() == expected
    report = json.loads(output)  # what gloo says goes elsewhere
    assert report["policy"]["num_stages"] == 2
    assert report["errors"] == 1


# The command line, which keeps a third part of the results only when its standard input is closed:
# what happens to it or to others before comes in the middle of the job, on a fast machine, too.
GATED = """
import sys
from flexgen_jax.cli.entry import main
from flexgen_jax.jobs.results import FileResults

add_part, parts = FileResults.add_part, []

def adding(self, *about):
    if len(parts) == 2:
        sys.stdin.read()
    parts.append(None)
    add_part(self, *about)

FileResults.add_part = adding
main()
"""


def gated(index):
    return ["-c", GATED, "--log-level", "info"] if index == 0 else ["-m", "flexgen_jax"]


def begun(process):
    """Waits until two parts of the results are kept."""
    said = []
    for line in process.stderr:
        said.append(line)
        if sum("results kept" in line for line in said) == 2:
            return
    raise AssertionError("no two parts were kept:\n" + "".join(said))


@pytest.mark.parametrize("killed", [0, 1])
def test_the_other_ends_and_names_the_stage_when_one_is_killed(
    tmp_path, store, lines, expected, killed
):
    def arguments(index, address):
        where = job(tmp_path, store, *lines, index=index, address=address)
        return [*gated(index), *where]

    with Pipeline(arguments) as pipeline:
        begun(pipeline.processes[0])
        pipeline.processes[killed].send_signal(signal.SIGKILL)
        pipeline.processes[killed].wait()
        code, _, errors = pipeline.ends()[1 - killed]
    assert code not in (0, None)
    stages = ["(stage 0, layers 0 to 3)", "(stage 1, layers 4 to 7)"]
    assert f"lost process {killed} {stages[killed]}" in errors
    if killed == 1:
        assert code == 1
        assert "requests are finished and kept" in errors
    with Pipeline(arguments) as pipeline:
        (code, _, errors), _ = pipeline.ends()
    assert code == 0, errors
    assert "resuming:" in errors
    assert (tmp_path / "out.jsonl").read_bytes() == expected


def test_one_that_hangs_is_taken_for_lost(tmp_path, store, lines):
    def arguments(index, address):
        where = job(tmp_path, store, *lines, index=index, address=address, timeout="6")
        return [*gated(index), *where]

    with Pipeline(arguments) as pipeline:
        leader, follower = pipeline.processes
        begun(leader)
        follower.send_signal(signal.SIGSTOP)
        _, errors = leader.communicate()
    assert leader.returncode == 1
    assert "lost process 1 (stage 1, layers 4 to 7): no sign of life for" in errors


def test_one_that_never_comes(tmp_path, store, lines):
    def arguments(index, address):
        where = job(tmp_path, store, *lines, index=index, address=address, timeout="2")
        return ["-m", "flexgen_jax", *where]

    with Pipeline(arguments, count=1) as pipeline:
        ((code, _, errors),) = pipeline.ends()
    assert code != 0
    assert "Error: not all of the 2 processes joined at 127.0.0.1:" in errors
    assert "within 2 s" in errors


def test_what_fails_in_one_is_said_by_all(tmp_path, store, lines):
    """Here: options that differ. The one that notices says so, and the leader, too."""

    def arguments(index, address):
        seed = ["--seed", str(index)]
        where = job(tmp_path, store, *lines, *seed, index=index, address=address)
        return ["-m", "flexgen_jax", *where]

    with Pipeline(arguments) as pipeline:
        (code, _, errors), (following, _, complaint) = pipeline.ends()
    assert (code, following) == (1, 2)
    assert "Error: the seed is 1 here and 0 in process 0: start all" in complaint
    assert "process 1 (stage 1, layers 4 to 7) failed: the seed is 1 here" in errors


def test_an_interrupt_ends_all_and_says_how_to_go_on(tmp_path, store, lines):
    def arguments(index, address):
        where = job(tmp_path, store, *lines, index=index, address=address)
        return [*gated(index), *where]

    with Pipeline(arguments) as pipeline:
        leader, _ = pipeline.processes
        begun(leader)
        leader.send_signal(signal.SIGINT)
        (code, _, errors), (following, _, complaint) = pipeline.ends()
    assert code == 130
    assert "interrupted: " in errors
    assert "run the same command again to resume" in errors
    assert following != 0
    assert "process 0 (stage 0, layers 0 to 3) failed: interrupted" in complaint


def test_garbage_at_the_coordinators_port_changes_nothing(tmp_path, store, lines, expected):
    """From before the others join, until it is answered or not."""
    found, said = [], [b"GET / HTTP/1.1\r\n\r\n", pickle.dumps([os.getcwd]), os.urandom(1 << 16)]
    said += [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 4096, b""]

    def arguments(index, address):
        found.append(address)
        return ["-m", "flexgen_jax", *job(tmp_path, store, *lines, index=index, address=address)]

    with Pipeline(arguments) as pipeline:
        host, port = found[0].split(":")
        while said and pipeline.processes[0].poll() is None:
            # Not there yet; or it hangs up on what it does not understand.
            with contextlib.suppress(OSError), socket.create_connection((host, int(port))) as peer:
                garbage = said.pop()
                peer.sendall(garbage)
        (code, _, errors), (following, _, complaint) = pipeline.ends()
    assert not said
    assert code == 0, errors
    assert following == 0, complaint
    assert (tmp_path / "out.jsonl").read_bytes() == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--coordinator", "127.0.0.1:1"], "--num-processes and --process-id belong together"),
        (["--process-id", "0"], "belong together"),
        (["--process-timeout", "5"], "--process-timeout: for several processes"),
        (["--distributed", "--checkpoint-minutes", "1"], "for one process only"),
        (
            ["--coordinator", "node0", "--num-processes", "2", "--process-id", "0"],
            "the coordinator's address must be HOST:PORT, got 'node0'",
        ),
    ],
)
def test_options_that_do_not_belong_together(tmp_path, store, lines, options, words):
    result = CliRunner().invoke(main, job(tmp_path, store, *lines, *options))
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_port_that_is_taken(tmp_path, store, lines):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        result = CliRunner().invoke(main, job(tmp_path, store, *lines, index=0, address=address))
    assert result.exit_code == 2
    assert "the coordinator cannot listen on port" in result.stderr


def test_a_machine_that_is_no_cluster(tmp_path, store, lines):
    def arguments(index, address):
        return ["-m", "flexgen_jax", *job(tmp_path, store, *lines, "--distributed")]

    with Pipeline(arguments, count=1) as pipeline:
        ((code, _, errors),) = pipeline.ends()
    assert code == 2
    assert "which processes there are is not known" in errors


def test_what_one_process_cannot(tmp_path, store, monkeypatch):
    with fg.LLM(str(store), policy=policy()) as llm:
        assert llm.leads
        with pytest.raises(ValueError, match="nobody to follow"):
            llm.follow()
    monkeypatch.setattr("flexgen_jax.distributed.stage_devices.process_count", lambda: 3)
    with pytest.raises(ValueError, match="num_stages 2 over 3 processes: each of them needs"):
        stage_devices(2)


def test_stages_are_dealt_to_hosts_in_order():
    assert hosts_of(4, 2) == (0, 0, 1, 1)
    assert hosts_of(3, 2) == (0, 0, 1)
    assert hosts_of(2, 2) == (0, 1)


def test_whether_somebody_answers():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        assert answers(address)
    assert not answers(address)
