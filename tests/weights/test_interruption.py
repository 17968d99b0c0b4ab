import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flexgen_jax.weights.checkpoint import (
    SourceError,
    StoreError,
    convert,
    is_store,
    open_store,
)
from storage.array_file import ArrayWriter

ROOT = Path(__file__).parents[2]


class StopError(Exception):
    pass


def stop_at(name):
    def progress(done, total, tensor):
        if tensor == name:
            raise StopError

    return progress


def interrupt(model, store, name="layer_1.fc1.kernel", **more):
    """A conversion that ends in the middle of ``name``."""
    with pytest.raises(StopError):
        convert(model, store, progress=stop_at(name), **more)


def partial_of(store):
    return store.with_name(f".{store.name}.partial")


def inodes(directory):
    """Array -> what changes when its file is written again, of the arrays that are recorded."""
    lines = (directory / "conversion.jsonl").read_text().split("\n")[1:]
    names = [json.loads(line)["tensor"] for line in lines if line]
    files = {n: next(p for p in (directory / n / "c").rglob("*") if p.is_file()) for n in names}
    return {n: (f.stat().st_ino, f.stat().st_mtime_ns) for n, f in files.items()}


def start(code, *args):
    """A Python process that converts; its second argument is the store."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# Says so on standard output when half is done, and waits for a line on standard input.
CONVERT_AND_WAIT = """
import sys
from flexgen_jax.weights.checkpoint import convert
def progress(done, total, name):
    global waited
    if not waited and done > total // 2:
        waited = True
        print(name, flush=True)
        sys.stdin.readline()
waited = False
convert(sys.argv[1], sys.argv[2], progress=progress)
"""

CONVERT = "import sys; from flexgen_jax.weights.checkpoint import convert; convert(*sys.argv[1:])"


def assert_sound(store, model, tiny):
    from safetensors.numpy import load_file

    state = load_file(model / "model.safetensors")
    tiny.assert_equal(tiny.read(store), tiny.expected_params(tiny.config, state), "float32")
    open_store(store)
    assert [p.name for p in store.parent.iterdir() if p.name.startswith(".")] == []
    assert not {".lock", "conversion.jsonl"} & {p.name for p in store.iterdir()}


def test_an_interrupted_conversion_goes_on_where_it_was(model, tmp_path, tiny):
    store = tmp_path / "store"
    interrupt(model, store)
    assert not store.exists()
    assert not is_store(partial_of(store))
    before = inodes(partial_of(store))
    assert before
    assert "layer_1.fc1.kernel" not in before
    lines, converted = [], []
    convert(model, store, say=lines.append, progress=lambda *c: converted.append(c))
    assert "resuming" in lines[0]
    assert f"{len(before)} of 36 tensors" in lines[0]
    assert not before.keys() & {name for _, _, name in converted}
    assert converted[-1][0] == converted[-1][1]
    for name, identity in before.items():
        file = next(p for p in (store / name / "c").rglob("*") if p.is_file())
        assert (file.stat().st_ino, file.stat().st_mtime_ns) == identity
    assert_sound(store, model, tiny)


def test_a_killed_conversion_goes_on_where_it_was(model, tmp_path, tiny):
    store = tmp_path / "store"
    with start(CONVERT_AND_WAIT, model, store) as process:
        assert process.stdout.readline().strip()
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not store.exists()
    before = inodes(partial_of(store))
    assert before
    lines = []
    convert(model, store, say=lines.append)
    assert "resuming" in lines[0]
    for name, identity in before.items():
        file = next(p for p in (store / name / "c").rglob("*") if p.is_file())
        assert (file.stat().st_ino, file.stat().st_mtime_ns) == identity
    assert_sound(store, model, tiny)


def test_what_is_recorded_but_damaged_is_written_again(model, tmp_path, tiny):
    store = tmp_path / "store"
    interrupt(model, store)
    first, second, *_ = inodes(partial_of(store))
    chunk = next(p for p in (partial_of(store) / first / "c").rglob("*") if p.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-1])
    shutil.rmtree(partial_of(store) / second)
    with open(partial_of(store) / "conversion.jsonl", "a") as journal:
        journal.write('\n{"tensor": "layer_1.fc1.ker')  # cut short by a crash
    convert(model, store)
    assert_sound(store, model, tiny)


def test_another_source_or_dtype_starts_anew(model, tmp_path, tiny):
    store = tmp_path / "store"
    interrupt(model, store)
    tiny.write_model(tmp_path / "other", seed=1)
    lines = []
    interrupt(tmp_path / "other", store, "layer_1.fc1.weight", dtype="bfloat16", say=lines.append)
    convert(tmp_path / "other", store, say=lines.append)
    assert lines == []
    assert_sound(store, tmp_path / "other", tiny)


def change_the_middle(model):
    """Of a size and with times as before: its ends say nothing of it."""
    file = model / "model.safetensors"
    before, middle = file.stat(), file.stat().st_size // 2
    with open(file, "r+b") as weights:
        weights.seek(middle)
        old = weights.read(4)
        weights.seek(middle)
        weights.write(bytes(byte ^ 1 for byte in old))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def widen(tiny, tmp_path):
    """A model whose middle is neither of its ends."""
    config = dataclasses.replace(tiny.config, ffn_dim=3000)
    tiny.write_model(tmp_path / "wide", config)
    return tmp_path / "wide"


@pytest.mark.parametrize("name", ["layer_0.q.kernel", "head.norm.scale"])
def test_a_source_that_changes_meanwhile_makes_no_store(tmp_path, tiny, name):
    model, store, changed = widen(tiny, tmp_path), tmp_path / "store", []

    def progress(done, total, tensor):
        if tensor == name and not changed:
            changed.append(name)
            change_the_middle(model)

    with pytest.raises(
        SourceError, match=r"wide was changed while it was converted.* run the same"
    ):
        convert(model, store, progress=progress)
    assert changed
    assert not store.exists()
    convert(model, store, say=lambda line: pytest.fail(line))  # begins anew
    expected = convert(model, tmp_path / "expected")
    assert {n: a.tobytes() for n, a in tiny.read(store).items()} == {
        n: a.tobytes() for n, a in tiny.read(expected).items()
    }


def test_a_source_that_changes_between_two_runs_is_read_anew(tmp_path, tiny):
    model, store = widen(tiny, tmp_path), tmp_path / "store"
    interrupt(model, store)
    change_the_middle(model)
    convert(model, store, say=lambda line: pytest.fail(line))
    assert convert(model, store) == store  # it is there, whatever the times of its source
    os.utime(model / "config.json")
    assert convert(model, store) == store


def test_a_store_that_changes_while_it_is_quantised(model, tmp_path):
    store = convert(model, tmp_path / "store", dtype="bfloat16")

    def progress(done, total, tensor):
        (store / "layer_1.fc1.weight" / "c" / "0" / "0").touch()

    with pytest.raises(SourceError, match="store was changed while it was converted"):
        convert(store, tmp_path / "codes", dtype="bfloat16", weight_bits=4, progress=progress)


def test_a_source_that_becomes_shorter_is_named(model, tmp_path):
    def progress(done, total, tensor):
        if tensor == "layer_1.fc1.kernel":
            os.truncate(model / "model.safetensors", 8192)

    with pytest.raises(
        SourceError, match=r"model\.safetensors is truncated: it has 8192 bytes now"
    ):
        convert(model, tmp_path / "store", progress=progress)


def test_a_store_that_becomes_shorter_while_it_is_quantised(model, tmp_path):
    store = convert(model, tmp_path / "store", dtype="bfloat16")

    def progress(done, total, tensor):
        for name in ("layer_1.fc1.weight", "head.norm.scale"):
            chunk = next(p for p in (store / name / "c").rglob("*") if p.is_file())
            os.truncate(chunk, 2)

    with pytest.raises(SourceError, match=r"/c/.* is truncated: 1 elements from 0 on, expected"):
        convert(store, tmp_path / "codes", dtype="bfloat16", weight_bits=4, progress=progress)


def test_nothing_is_left_of_a_conversion_without_progress(model, tmp_path):
    with pytest.raises(StopError):
        convert(model, tmp_path / "store", progress=lambda *_: (_ for _ in ()).throw(StopError))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny-opt"]


def test_a_directory_of_somebody_else_is_left_alone(model, tmp_path):
    foreign = tmp_path / ".store.partial"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    (foreign / ".lock").write_text("mine, too")
    with pytest.raises(StoreError, match=r"\.store\.partial is in the way: it contains notes\.txt"):
        convert(model, tmp_path / "store")
    for journal in ("of the conversion to metres\n", "{}\n", "[" * 200_000, "null\n\n\n"):
        (foreign / "conversion.jsonl").write_text(journal)
        with pytest.raises(StoreError, match=r"is in the way: it contains conversion\.jsonl"):
            convert(model, tmp_path / "store")
    (foreign / "conversion.jsonl").unlink()
    os.mkfifo(foreign / "conversion.jsonl")
    with pytest.raises(StoreError, match=r"is in the way: it contains conversion\.jsonl"):
        convert(model, tmp_path / "store")
    (foreign / "conversion.jsonl").unlink()
    (foreign / "conversion.jsonl").write_text("")
    with pytest.raises(StoreError, match=r"is in the way: it contains notes\.txt"):
        convert(model, tmp_path / "store")
    assert {p.name for p in foreign.iterdir()} == {"notes.txt", ".lock", "conversion.jsonl"}
    assert (foreign / ".lock").read_text() == "mine, too"


def test_what_an_earlier_version_has_begun_is_ours(model, tmp_path, tiny):
    store = tmp_path / "store"
    interrupt(model, store)
    journal = partial_of(store) / "conversion.jsonl"
    first, rest = journal.read_text().split("\n", 1)
    new = ("flexgen_jax_conversion", "facts")
    unmarked = {k: v for k, v in json.loads(first).items() if k not in new}
    journal.write_text(json.dumps(unmarked) + "\n" + rest)
    convert(model, store)
    assert_sound(store, model, tiny)


def test_a_second_process_waits_and_uses_what_the_first_made(model, tmp_path, tiny):
    store = tmp_path / "store"
    lines = []
    with start(CONVERT_AND_WAIT, model, store) as first:
        assert first.stdout.readline().strip()

        def say(line):
            lines.append(line)
            first.stdin.write("\n")
            first.stdin.flush()

        convert(model, store, say=say, progress=lambda *_: pytest.fail("converted twice"))
        _, errors = first.communicate()
    assert first.returncode == 0, errors
    assert len(lines) == 1
    assert "another process is converting" in lines[0]
    assert_sound(store, model, tiny)


def test_a_second_process_goes_on_when_the_first_dies(model, tmp_path, tiny):
    store = tmp_path / "store"
    lines = []
    with start(CONVERT_AND_WAIT, model, store) as first:
        assert first.stdout.readline().strip()

        def say(line):
            lines.append(line)
            os.kill(first.pid, signal.SIGKILL)

        convert(model, store, say=say)
    assert "another process is converting" in lines[0]
    assert "resuming" in lines[1]
    assert_sound(store, model, tiny)


def test_processes_that_start_together(model, tmp_path, tiny):
    store = tmp_path / "store"
    processes = [start(CONVERT, model, store) for _ in range(3)]
    results = [(process.communicate()[1], process.returncode) for process in processes]
    assert [code for _, code in results] == [0, 0, 0], results
    assert_sound(store, model, tiny)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("method", ["append", "close"])
def test_a_full_disk(model, tmp_path, tiny, monkeypatch, number, method):
    store = tmp_path / "store"
    original = getattr(ArrayWriter, method)

    def full(self, *args):
        if self.file.directory.name == "layer_1.fc1.kernel":
            raise OSError(number, os.strerror(number))
        original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ArrayWriter, method, full)
        with pytest.raises(StoreError) as caught:
            convert(model, store)
    message = str(caught.value)
    for words in ("disk is full", "layer_1.fc1.kernel needs 1,536 bytes", str(tmp_path), "resumes"):
        assert words in message
    assert "are free" in message
    assert not store.exists()
    assert not (partial_of(store) / "layer_1.fc1.kernel").exists()
    assert not is_store(partial_of(store))
    convert(model, store)
    assert_sound(store, model, tiny)


def test_too_little_space_is_seen_before_anything_is_written(model, tmp_path, tiny, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=12_345))
        with pytest.raises(StoreError, match=r"not enough space in .*12,345 are free"):
            convert(model, tmp_path / "store")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny-opt"]


def test_a_place_that_cannot_be_written(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot write .*file"):
        convert(model, tmp_path / "file" / "store")
