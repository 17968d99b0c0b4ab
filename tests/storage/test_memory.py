"""Aligned memory, the page cache, and how much memory there is."""

import mmap
import os

import numpy as np
import pytest

from storage import memory
from storage.memory import PAGE, aligned_bytes, available_memory, populate, resident_fraction


@pytest.mark.parametrize("nbytes", [0, 1, PAGE, PAGE + 1, (1 << 20) - 1, 1 << 20, (3 << 20) + 5])
@pytest.mark.parametrize("touch", [False, True])
def test_blocks_have_their_size_and_begin_on_a_page(nbytes, touch):
    block = aligned_bytes(nbytes, touch=touch)
    assert block.nbytes == nbytes
    assert block.dtype == np.uint8
    if nbytes:
        assert block.ctypes.data % PAGE == 0
        block[-1] = 7  # writable to its end
    if touch and nbytes > 1:
        assert not block[:-1].any()


def test_pages_that_a_file_no_longer_has_are_an_error(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(4 * PAGE))
    with file.open("rb") as f:
        region = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
    view = np.frombuffer(region, np.uint8)
    os.truncate(file, PAGE)
    with pytest.raises(OSError, match="became shorter"):
        populate(view)


def test_the_page_cache_can_be_asked_and_filled(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(os.urandom(64 * PAGE))
    with file.open("rb") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        region = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
    view = np.frombuffer(region, np.uint8)
    assert 0 <= resident_fraction(view) <= 1
    populate(view)
    assert resident_fraction(view) == 1
    assert view.tobytes() == file.read_bytes()
    populate(view[:0])
    assert resident_fraction(view[:0]) == 1


def test_populating_works_on_kernels_without_the_call(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"x" * 5 * PAGE)

    class Old:
        def madvise(self, *_):
            return -1

    with file.open("rb") as f:
        view = np.frombuffer(mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
    monkeypatch.setattr(memory, "_libc", Old())
    populate(view)


def test_available_memory_respects_the_cgroup(monkeypatch):
    limits = {"memory.max": None, "memory.current": None}
    monkeypatch.setattr(memory, "_meminfo", lambda field: 1000)
    monkeypatch.setattr(memory, "_cgroup_file", limits.get)
    assert available_memory() == 1000
    limits.update({"memory.max": 800, "memory.current": 300})
    assert available_memory() == 500
    limits.update({"memory.max": 5000})
    assert available_memory() == 1000
    limits.update({"memory.current": 6000})
    assert available_memory() == 0


def test_the_machine_has_memory():
    assert available_memory() > 1 << 20
