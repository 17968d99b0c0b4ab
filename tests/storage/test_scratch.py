"""Temporary directories that outlive neither a run nor its process."""

import fcntl
import os
import signal
import subprocess
import sys

import pytest

from storage.scratch import PREFIX, Scratch, remove_stale
from storage.store import StorageError


def test_it_is_gone_afterwards_with_all_in_it(tmp_path):
    with Scratch(tmp_path / "new") as scratch:
        (scratch.path / "cell").write_bytes(b"x")
        (scratch.path / "more").mkdir()
        assert scratch.path.parent == tmp_path / "new"
    assert not scratch.path.exists()
    scratch.close()  # again: nothing happens


def test_two_at_a_time_leave_each_other_alone(tmp_path):
    with Scratch(tmp_path) as one, Scratch(tmp_path) as other:
        assert one.path != other.path
        assert remove_stale(tmp_path) == []
        assert one.path.is_dir()


def test_one_that_is_not_locked_yet_is_not_taken_for_a_stale_one(tmp_path, monkeypatch):
    flock, removed = fcntl.flock, []

    def late(lock, operation):
        if operation == fcntl.LOCK_EX:  # the other comes between making and lock
            removed.append(remove_stale(tmp_path))
        flock(lock, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with Scratch(tmp_path) as scratch:
        assert removed == [[]]
        assert scratch.path.is_dir()


def marked(directory):
    """What a process that is gone leaves."""
    scratch = Scratch(directory)
    os.close(scratch._lock)
    return scratch.path


def test_what_is_called_like_one_and_is_none_is_left_alone(tmp_path):
    """By its name, its lock, or what the lock says."""
    elsewhere = marked(tmp_path / "elsewhere")
    content = (elsewhere / "flexgen-jax.lock").read_bytes()
    places = [tmp_path / f"{PREFIX}{i}" for i in range(5)] + [tmp_path / "scratch-thesis"]
    for place in places[:-2]:
        place.mkdir()
        (place / "data.txt").write_text("mine")
    (places[1] / "flexgen-jax.lock").write_text("")
    (places[2] / "flexgen-jax.lock").write_bytes(content + b"and more")
    os.mkfifo(places[3] / "flexgen-jax.lock")
    places[4].symlink_to(elsewhere)
    places[5].mkdir()
    (places[5] / "lock").write_text("")
    (places[5] / "flexgen-jax.lock").write_bytes(content)
    with Scratch(tmp_path):
        assert remove_stale(tmp_path) == []
    assert all((place / "data.txt").read_text() == "mine" for place in places[:4])
    assert places[4].is_symlink()
    assert places[5].is_dir()
    assert elsewhere.is_dir()
    stale = marked(tmp_path)
    assert remove_stale(tmp_path) == [stale]


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from storage.scratch import Scratch\n"
        "s = Scratch(Path(sys.argv[1])); (s.path / 'cell').write_bytes(b'x' * 1000)\n"
        "print(s.path, flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    left = process.stdout.readline().strip()
    with Scratch(tmp_path):
        assert os.path.isdir(left)  # its owner lives
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert os.path.isdir(left)
    other = tmp_path / f"{PREFIX}of-someone-else"
    other.mkdir()
    with Scratch(tmp_path):
        assert not os.path.exists(left)
        assert other.is_dir()


def test_too_little_space_is_said_with_figures(tmp_path):
    with Scratch(tmp_path) as scratch:
        scratch.require(1, "the cells")
        with pytest.raises(StorageError, match=r"the cells need 1000000.00 GB on disk and"):
            scratch.require(10**15, "the cells")


def test_where_it_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        StorageError, match=r"cannot make a directory for temporary files in .*file"
    ):
        Scratch(tmp_path / "file" / "below")
