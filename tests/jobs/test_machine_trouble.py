"""What a machine may do to a job: a disk that hangs, clocks that jump, memory that runs out."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

import flexgen_jax as fg
from flexgen_jax import progress
from flexgen_jax.cli.app import main
from flexgen_jax.engine import block_run, executor, local_runner, snapshots
from flexgen_jax.jobs import job
from storage.wrappers import Faulty

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "tests" / "goldens" / "pre_norm")
ON_DISK = fg.Policy(
    device_batch_size=4, num_device_batches=2, weights=fg.Split(device=0, disk=100), overlap=True
)


@pytest.fixture(scope="module")
def offload(tmp_path_factory):
    return str(tmp_path_factory.mktemp("offload"))


@pytest.fixture
def arguments(tmp_path, offload):
    """Of a job of six blocks, all but the names of its command and output."""
    lines = [{"prompt_token_ids": [5 + i % 40, 6, 7][: 1 + i % 3]} for i in range(24)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    given = ["--model", MODEL, "--offload-dir", offload, "-i", str(tmp_path / "in.jsonl")]
    given += ["--device-batch-size", "2", "--num-device-batches", "2", "--window", "8"]
    return [
        *given,
        "--max-tokens",
        "3",
        "--ignore-eos",
        "--percent",
        *["0", "0", "100", "0", "100", "0"],
    ]


@pytest.fixture
def expected(tmp_path, arguments):
    result = CliRunner().invoke(main, ["generate", *arguments, "-o", str(tmp_path / "expected")])
    assert result.exit_code == 0, result.output
    return (tmp_path / "expected").read_bytes()


def program(tmp_path, text, arguments, **options):
    """Runs the command line after ``text``, in a process of its own."""
    lines = "import sys\nfrom flexgen_jax.cli.app import main\n" + text + "\nmain(sys.argv[1:])\n"
    return subprocess.run(
        [sys.executable, "-c", lines, "generate", *arguments, "-o", str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def goes_on(tmp_path, arguments, expected):
    result = CliRunner().invoke(main, ["generate", *arguments, "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "resuming: " in result.stderr
    assert (tmp_path / "out").read_bytes() == expected


# --- a disk that hangs ----------------------------------------------------------------------------

HANGS = """
import os, threading
from flexgen_jax.engine import executor
from storage.disk import DiskStore
executor.PATIENCE, load, loads = 0.1, DiskStore.load, []
def hanging(self, names, slot):
    loads.append(names)
    if len(loads) == 40:
        os.kill(os.getpid(), {signal})
        threading.Event().wait()
    return load(self, names, slot)
DiskStore.load = hanging
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_job_whose_disk_hangs(tmp_path, arguments, expected, number):
    done = program(tmp_path, HANGS.format(signal=int(number)), arguments)
    assert done.returncode == 128 + number, done.stderr
    *_, last = done.stderr.splitlines()
    assert "Error: interrupted: LoadWeights(step=" in last
    assert "did not come back: a disk or a device may hang; " in last
    assert "requests are finished and kept" in last
    goes_on(tmp_path, arguments, expected)


def test_in_python_an_interrupt_comes_back_and_says_what_hangs(offload, monkeypatch):
    monkeypatch.setattr(executor, "PATIENCE", 0.1)
    answers, count = threading.Event(), 0

    def hang(verb, names):
        nonlocal count
        count += verb == "load"
        if count == 4:
            os.kill(os.getpid(), signal.SIGINT)
            answers.wait()

    options = {"policy": ON_DISK, "offload_dir": offload}
    with fg.LLM(MODEL, **options, wrap_store=lambda tier, store: Faulty(store, hang)) as llm:
        with pytest.raises(KeyboardInterrupt) as caught:
            llm.generate([[5, 6]], fg.SamplingParams(max_tokens=4))
        (note,) = caught.value.__notes__
        assert note.startswith(("LoadWeights(step=", "LoadHidden(step=", "LoadCache(step="))
        answers.set()
        for thread in threading.enumerate():
            if thread.name.startswith("flexgen-"):
                thread.join()


# --- clocks that jump -----------------------------------------------------------------------------


class Jumping:
    """``time``, as a clock has it that is set back and forth by days."""

    def __init__(self):
        self._random, self._right = random.Random(3), time.time

    def __getattr__(self, name):
        return getattr(time, name)

    def now(self):
        return self._right() + self._random.uniform(-1e6, 1e6)

    monotonic = perf_counter = time = now


def test_clocks_that_jump(tmp_path, arguments, expected, monkeypatch):
    """The output stays, checkpoints are taken or not, and the bar shows something."""
    clock = Jumping()
    for module in (executor, block_run, local_runner, snapshots, job):
        monkeypatch.setattr(module, "time", clock)
    console = progress.Console(file=(tmp_path / "bar").open("w"), force_terminal=True)
    console.get_time = clock.now
    monkeypatch.setattr(progress, "console", console)
    monkeypatch.setattr(time, "time", clock.now)
    more = ["--checkpoint-minutes", "1", "--json", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(main, ["generate", *arguments, *more])
    monkeypatch.undo()
    console.file.close()
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out").read_bytes() == expected
    assert "generating" in (tmp_path / "bar").read_text()
    assert json.loads(result.stdout)["requests"] == 24


# --- memory that runs out -------------------------------------------------------------------------

MEMORY = Path("/sys/fs/cgroup/memory")  # cgroup v1; in v2 groups lie at the root
FILLS = """
from flexgen_jax.jobs.results import FileResults
add_part, parts, taken = FileResults.add_part, [], []
def filling(self, *arguments):
    add_part(self, *arguments)
    parts.append(None)
    while len(parts) == 3:
        taken.append(b"x" * (8 << 20))
FileResults.add_part = filling
"""


@contextlib.contextmanager
def memory_group(nbytes):
    """Of processes that may have so much together; skips where none can be made."""
    parent = MEMORY if MEMORY.is_dir() else MEMORY.parent
    group = parent / f"flexgen-jax-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        try:
            limit = "memory.limit_in_bytes" if parent is MEMORY else "memory.max"
            (group / limit).write_text(str(nbytes))
        except OSError as error:
            pytest.skip(f"memory cannot be limited here: {error}")
        for swap in ("memory.memsw.limit_in_bytes", "memory.swap.max"):
            with contextlib.suppress(OSError):
                if (group / swap).exists():
                    (group / swap).write_text(str(nbytes if "memsw" in swap else 0))
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


def test_the_systems_killer(tmp_path, arguments, expected):
    """It leaves no time for anything; what is finished is there all the same."""
    with memory_group(1 << 30) as processes:
        join = f"open({str(processes)!r}, 'w').write('0')\n"
        done = program(tmp_path, join + FILLS, arguments)
    assert done.returncode == -signal.SIGKILL, done.stderr
    goes_on(tmp_path, arguments, expected)
