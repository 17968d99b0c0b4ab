"""Something breaks in one of the streams: one error that says what, and nothing is left behind."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

import flexgen_jax as fg
import storage.chunks
import storage.disk
from storage.store import StorageError
from storage.wrappers import Faulty

MODEL = str(Path(__file__).parents[1] / "goldens" / "pre_norm")
PROMPTS = [[5, 6, 7]] * 4
PARAMS = fg.SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
ALL_ON_DISK = fg.Policy(
    device_batch_size=2,
    num_device_batches=2,
    weights=fg.Split(device=0, disk=100),
    cache=fg.Split(device=0, disk=100),
    hidden=fg.Split(device=0, disk=100),
)


def run(offload, **options):
    options = {"policy": ALL_ON_DISK, "offload_dir": str(offload)} | options
    with fg.LLM(MODEL, **options) as llm:
        return llm.generate(PROMPTS, PARAMS)


def nothing_is_left(offload):
    names = [t.name for t in threading.enumerate() if t.name.startswith("flexgen")]
    assert names == []
    assert not offload.exists() or not any(offload.iterdir())


FAULTS = [
    ("load", "layer_1.fc1.weight", "LoadWeights(step="),
    ("load", "cache.layer_1.batch_1", "LoadCache(step="),
    ("put", "cache.layer_0.batch_0", "StoreCache(step=0, layer=1, batch=0)"),
    ("append", "cache.layer_1.batch_0", "StoreCache(step="),
    ("load", "hidden.batch_1", "LoadHidden(step="),
    ("put", "hidden.batch_0", "StoreHidden(step="),
    ("take", "embed.tokens", "Compute(step="),
]
NAMES = sorted(fg.SCHEDULES)
# Every fault with two schedules and every schedule with several faults.
PAIRS = [(f, NAMES[(i + k) % len(NAMES)]) for i, f in enumerate(FAULTS) for k in (0, 3)]


@pytest.mark.parametrize(
    ("fault", "schedule"), PAIRS, ids=lambda p: p if isinstance(p, str) else p[2]
)
@pytest.mark.parametrize("after", [0, 7])
def test_a_fault_in_any_stream_ends_the_run_with_one_error(tmp_path, fault, schedule, after):
    verb, name, op = fault
    count = 0

    def broken(did, names):
        nonlocal count
        if did == verb and (name == names or (not isinstance(names, str) and name in names)):
            count += 1
            if count == after + 1 or verb == "put":
                return StorageError(f"cannot {verb} {name}: broken on purpose")
        return None

    with pytest.raises(fg.ExecutionError) as caught:
        run(tmp_path, schedule=schedule, wrap_store=lambda _, store: Faulty(store, broken))
    assert str(caught.value).startswith(op)
    assert f"cannot {verb} {name}: broken on purpose" in str(caught.value)
    assert op.split("(", maxsplit=1)[0] == type(caught.value.op).__name__
    nothing_is_left(tmp_path)
    assert len(run(tmp_path)) == len(PROMPTS)  # and the next run is none the worse


@pytest.mark.parametrize(
    ("call", "number", "words", "of_weights"),
    [
        ("pwritev", errno.ENOSPC, "No space left on device", False),
        ("preadv", errno.EIO, "Input/output error", False),
        ("preadv", errno.EIO, "Input/output error", True),
    ],
)
def test_what_the_system_says_is_said_with_the_file(
    tmp_path, monkeypatch, call, number, words, of_weights
):
    real, count = getattr(os, call), 0
    where = MODEL if of_weights else str(tmp_path)

    def failing(file, *arguments):
        nonlocal count
        if Path(f"/proc/self/fd/{file}").readlink().is_relative_to(where):
            count += 1
            if count > 20:
                raise OSError(number, os.strerror(number))
        return real(file, *arguments)

    monkeypatch.setattr(os, call, failing)
    disk = fg.DiskContext(mode="direct", small_nbytes=0, chunk_positions=4)
    with pytest.raises(fg.ExecutionError, match=words) as caught:
        run(tmp_path, disk=disk)
    assert where in str(caught.value)
    monkeypatch.undo()
    nothing_is_left(tmp_path)


def test_a_full_disk_in_the_middle_of_a_run(tmp_path, monkeypatch):
    """The space was there when the run began, and something else took it."""
    disk = fg.DiskContext(mode="mapped", chunk_positions=4)
    real, written = os.pwritev, 0

    def filling(file, buffers, offset):
        nonlocal written
        written += sum(map(len, buffers))
        if written > 200_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, buffers, offset)

    monkeypatch.setattr(storage.chunks.os, "pwritev", filling)
    with pytest.raises(fg.ExecutionError, match=r"Store\w+\(.*cannot write .*No space left"):
        run(tmp_path, disk=disk)
    nothing_is_left(tmp_path)


def test_too_little_space_is_refused_before_anything_runs(tmp_path, monkeypatch):
    run(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match=r"need 0\.00 GB on disk and .* has 0\.00 GB free"):
        run(tmp_path)
    nothing_is_left(tmp_path)


def test_an_interrupt_leaves_nothing_behind(tmp_path):
    program = (
        "import signal, sys, threading\n"
        "import pytest\n"
        "import flexgen_jax as fg\n"
        "from tests.engine.test_faults import ALL_ON_DISK, MODEL, PARAMS, PROMPTS\n"
        "from tests.interrupting import sender\n"
        "send = sender(pytest.MonkeyPatch())\n"
        "def stop(step, batch, logits):\n"
        "    if (step, batch) == (5, 0): send(signal.SIGINT)\n"
        "try:\n"
        "    with fg.LLM(MODEL, policy=ALL_ON_DISK, offload_dir=sys.argv[1]) as llm:\n"
        "        llm.generate(PROMPTS, PARAMS, on_logits=stop)\n"
        "except KeyboardInterrupt:\n"
        "    left = [t.name for t in threading.enumerate() if 'flexgen' in t.name]\n"
        "    print('interrupted', left)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.stdout == "interrupted []\n", done.stderr
    assert not any(tmp_path.iterdir())


def test_a_killed_run_is_cleaned_up_by_the_next(tmp_path):
    program = (
        "import os, signal, sys\n"
        "import flexgen_jax as fg\n"
        "from tests.engine.test_faults import ALL_ON_DISK, MODEL, PARAMS, PROMPTS\n"
        "def stop(step, batch, logits):\n"
        "    if step == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "with fg.LLM(MODEL, policy=ALL_ON_DISK, offload_dir=sys.argv[1]) as llm:\n"
        "    llm.generate(PROMPTS, PARAMS, on_logits=stop)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        check=False,
        stderr=subprocess.DEVNULL,
    )
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1  # what was left
    run(tmp_path)
    nothing_is_left(tmp_path)
