"""Writes a weight store so that it appears whole or not at all, and an interruption costs little.

The store grows in a sibling directory ``.NAME.partial``, under a lock; a journal there names the
tensors that are complete and on the disk. Finished, the directory is renamed. Knows the layout of
the store (an Orbax checkpoint with raw array files), and not where the weights come
from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from flexgen_jax.logs import event
from flexgen_jax.weights.manifest import (
    MANIFEST_NAME,
    Manifest,
    TensorEntry,
    array_directory,
    write_durably,
)
from storage.array_file import StoreError, create_array, describe_array, dtype_of
from storage.checksums import tensor_checksum
from storage.json_text import parse_json, sealed, unsealed

Progress = Callable[[int, int, str], None]
Say = Callable[[str], None]

_JOURNAL = "conversion.jsonl"
_MARK = "flexgen_jax_conversion"  # the first key of a journal
_FIRST_LINE = 1 << 16  # bytes that hold it
# What a journal without the mark has, of the versions before it.
_UNMARKED = {"fingerprint", "dtype", "weight_bits"}
_LOCK = ".lock"
_FULL = (errno.ENOSPC, errno.EDQUOT)
# Directories and metadata of one array take a few blocks of the file system.
_OVERHEAD_NBYTES = 16 << 10


def write_store(
    store: Path,
    manifest: Manifest,
    blocks: Callable[[str], Iterator[np.ndarray]],
    *,
    order: Sequence[str],
    files: Mapping[str, bytes],
    facts: str = "",
    check_source: Callable[[], None] = lambda: None,
    progress: Progress | None = None,
    say: Say | None = None,
) -> Path:
    """Writes what ``manifest`` lists to ``store``, or finds it there already.

    Args:
        store: The directory to be.
        manifest: Its content; source, dtype and ``weight_bits`` decide whether what an earlier
            run left is continued or begun anew.
        blocks: name -> the tensor's elements, in C order and in pieces of any shape.
        order: Of the names, as the source is best read.
        files: Written beside the arrays, name -> content.
        facts: Of the source's files; if they are others than of an earlier run, it begins anew.
        check_source: Raises if they are others when all is read: then there is no store.
        progress: Called as (bytes done, bytes in all, tensor) after each piece.
        say: Called with a line when there is something to wait for or to resume.

    Raises:
        StoreError: ``store`` is something else, or cannot be written.
    """
    store = Path(os.path.abspath(store))
    if _is_there(store, manifest):
        return store
    partial = store.with_name(f".{store.name}.partial")
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _cannot_write(store.parent, error)
    with _locked(partial, store, say):
        if _is_there(store, manifest):  # another process wrote it while this one waited
            return store
        journal = _Journal(partial, manifest, facts)
        if journal.done and say:
            say(
                f"resuming the conversion to {store}: {len(journal.done)} of "
                f"{len(manifest.tensors)} tensors are there"
            )
        _check_space(partial, store, manifest, journal)
        begun, there = time.perf_counter(), len(journal.done)
        event("conversion begun", store=str(store), nbytes=manifest.nbytes, tensors_there=there)
        _write_tensors(partial, manifest, blocks, order, journal, progress)
        check_source()
        try:
            _finish(partial, _with_checksums(manifest, journal.done, files), files)
            os.rename(partial, store)
            _sync_directory(store.parent)
            (store / _JOURNAL).unlink()
        except OSError as error:
            _cannot_write(store, error)
        event("conversion finished", store=str(store), seconds=time.perf_counter() - begun)
    return store


def _write_tensors(
    partial: Path,
    manifest: Manifest,
    blocks: Callable[[str], Iterator[np.ndarray]],
    order: Sequence[str],
    journal: _Journal,
    progress: Progress | None,
) -> None:
    total = manifest.nbytes
    done = sum(manifest.tensors[name].nbytes for name in journal.done)
    for name in order:
        if name in journal.done:
            continue
        entry = manifest.tensors[name]
        with _writing(partial, name, entry):
            writer = create_array(
                array_directory(partial, name), entry.shape, dtype_of(entry.dtype)
            )
        try:
            for block in blocks(name):
                with _writing(partial, name, entry):
                    writer.append(block)
                done += block.nbytes
                if progress:
                    progress(done, total, name)
            with _writing(partial, name, entry):
                writer.close()
                journal.record(name, writer.checksum)
            event("tensor converted", level=logging.DEBUG, tensor=name, nbytes=entry.nbytes)
        finally:
            writer.abandon()


def _with_checksums(
    manifest: Manifest, checksums: Mapping[str, str], files: Mapping[str, bytes]
) -> Manifest:
    entries = {
        name: dataclasses.replace(entry, checksum=checksums[name])
        for name, entry in manifest.tensors.items()
    }
    # Of the config the manifest has a digest of the values.
    beside = {n: tensor_checksum(content) for n, content in files.items() if n != "config.json"}
    return dataclasses.replace(manifest, tensors=entries, files=beside)


def _finish(partial: Path, manifest: Manifest, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        write_durably(partial / name, content)
    for name, values in _orbax_metadata(manifest).items():
        write_durably(partial / name, json.dumps(values, allow_nan=False).encode())
    manifest.save(partial)
    _sync_directory(partial)


def _orbax_metadata(manifest: Manifest) -> dict[str, Any]:
    """The two files by which Orbax knows a directory of zarr3 arrays as a checkpoint.

    The arrays are declared as numpy's: a restore without a target then needs no sharding, and a
    target with shardings still gives jax arrays.
    """
    tree = {}
    for name in manifest.tensors:
        keys = name.split(".")
        tree[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
    now = time.time_ns()
    return {
        "_METADATA": {
            "tree_metadata": tree,
            "use_ocdbt": False,
            "use_zarr3": True,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        },
        "_CHECKPOINT_METADATA": {
            "item_handlers": "orbax.checkpoint._src.handlers.pytree_checkpoint_handler."
            "PyTreeCheckpointHandler",
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": now,
            "commit_timestamp_nsecs": now,
            "custom_metadata": {},
        },
    }


def _is_there(store: Path, manifest: Manifest) -> bool:
    """Whether ``store`` is what is to be written; raises if it is anything else."""
    if not os.path.lexists(store):
        return False
    if not (store / MANIFEST_NAME).is_file():
        if store.is_dir() and not any(store.iterdir()):
            return False
        raise StoreError(
            f"{store} exists and is not a weight store; it is left alone: choose another directory"
        )
    existing = Manifest.load(store)
    if _identity(existing) != _identity(manifest):
        raise StoreError(
            f"{store} exists already: it holds {_described(existing)}, but "
            f"{_described(manifest)} was requested; remove it, or choose another directory"
        )
    for name in existing.tensors:
        describe_array(array_directory(store, name))
    return True


def _described(manifest: Manifest) -> str:
    bits = f" quantised to {manifest.weight_bits} bits" if manifest.weight_bits else ""
    group = f" in groups of {manifest.weight_group}" if manifest.weight_bits else ""
    source = manifest.source
    return f"{source.name} in {manifest.dtype}{bits}{group} (source {source.fingerprint[:12]})"


def _identity(manifest: Manifest) -> dict[str, Any]:
    return {
        "fingerprint": manifest.source.fingerprint,
        "dtype": manifest.dtype,
        "weight_bits": manifest.weight_bits,
        "weight_group": manifest.weight_group,
    }


class _Journal:
    """Which tensors in ``partial`` are complete; clears what belongs to another conversion."""

    def __init__(self, partial: Path, manifest: Manifest, facts: str) -> None:
        self._path = partial / _JOURNAL
        self.done: dict[str, str] = {}  # name -> checksum
        identity = {_MARK: 2, **_identity(manifest), "layout": manifest.layout, "facts": facts}
        recorded = self._read(identity)
        if recorded is None:
            _clear(partial)
            with open(self._path, "w", encoding="utf-8") as file:
                file.write(json.dumps(identity, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())  # what comes later is ours by this line
            return
        for name, entry in manifest.tensors.items():
            if name in recorded and _is_complete(array_directory(partial, name), entry):
                self.done[name] = recorded[name]
            else:
                shutil.rmtree(array_directory(partial, name), ignore_errors=True)

    def _read(self, identity: dict[str, Any]) -> dict[str, str] | None:
        try:
            first, *lines = self._path.read_bytes().splitlines(keepends=True)
            if parse_json(first) != identity:
                return None
        except (OSError, ValueError):
            return None
        found = {}
        for line in lines:
            # A line cut short by a crash, or changed.
            with contextlib.suppress(ValueError, KeyError):
                values = unsealed(line)
                found[str(values["tensor"])] = str(values["checksum"])
        return found

    def record(self, name: str, checksum: str) -> None:
        """``name`` is on the disk. If the line itself gets lost, it is only written again."""
        with open(self._path, "ab") as file:
            # The first newline ends a line cut short.
            file.write(b"\n" + sealed({"tensor": name, "checksum": checksum}))
        self.done[name] = checksum


def _is_complete(directory: Path, entry: TensorEntry) -> bool:
    try:
        array = describe_array(directory)
    except StoreError:
        return False
    return array.raw and array.shape == entry.shape and array.dtype.name == entry.dtype


def _clear(partial: Path) -> None:
    """Removes everything but the lock, whose file must outlive what it protects.

    The journal last: by it the rest is ours.
    """
    for path in partial.iterdir():
        if path.name in (_LOCK, _JOURNAL):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    (partial / _JOURNAL).unlink(missing_ok=True)


def _refuse_foreign(partial: Path) -> None:
    """Raises if ``partial`` holds what no conversion has put there."""
    # Twice: another process may have begun in between, or have finished.
    if _foreign_in(partial) is None or (found := _foreign_in(partial)) is None:
        return
    raise StoreError(
        f"{partial} is in the way: it contains {found}, and no conversion made it; move it away"
    )


def _foreign_in(partial: Path) -> str | None:
    """The name of something in a directory without a conversion's journal; None: there is none."""
    journal, first = partial / _JOURNAL, b""
    try:
        if os.path.lexists(journal):
            if not journal.is_file():
                return _JOURNAL
            with open(journal, "rb") as file:
                first = file.read(_FIRST_LINE).partition(b"\n")[0].strip(b"\0")
        others = sorted(p.name for p in partial.iterdir() if p.name not in (_LOCK, _JOURNAL))
    except OSError:
        return None
    with contextlib.suppress(ValueError):
        values = parse_json(first)
        if isinstance(values, dict) and (_MARK in values or values.keys() >= _UNMARKED):
            return None
    # A process that ends while it begins leaves a journal of nothing.
    return _JOURNAL if first else next(iter(others), None)


@contextlib.contextmanager
def _locked(partial: Path, store: Path, say: Say | None) -> Iterator[None]:
    """Holds the lock on ``partial``, which exists; leaves no lock and no useless directory."""
    _refuse_foreign(partial)
    lock = partial / _LOCK
    try:
        handle = _acquire(lock, store, say)
    except OSError as error:
        _cannot_write(partial, error)
    try:
        yield
    finally:
        try:
            if partial.is_dir() and not _has_progress(partial):
                _clear(partial)
            # After success the directory, lock included, has moved.
            for path in (lock, store / _LOCK):
                if _is_open_as(handle, path):
                    path.unlink()
            if partial.is_dir() and not any(partial.iterdir()):
                partial.rmdir()
        except OSError:
            pass  # a read-only or vanished directory must not hide what went wrong before
        finally:
            os.close(handle)


def _acquire(lock: Path, store: Path, say: Say | None) -> int:
    while True:
        lock.parent.mkdir(exist_ok=True)
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # its holder has just finished
            continue
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if say:
                    say(f"another process is converting to {store}; waiting for it")
                fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_open_as(handle, lock):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the holder removed it when done: what was locked is no longer the lock


def _is_open_as(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError:
        return False


def _has_progress(partial: Path) -> bool:
    """Whether there is anything to resume, or anything that is not ours to remove."""
    try:
        return len((partial / _JOURNAL).read_text(encoding="utf-8").splitlines()) > 1
    except OSError:
        return any(path.name != _LOCK for path in partial.iterdir())


def _check_space(partial: Path, store: Path, manifest: Manifest, journal: _Journal) -> None:
    left = [
        e.nbytes + _OVERHEAD_NBYTES for n, e in manifest.tensors.items() if n not in journal.done
    ]
    free = shutil.disk_usage(partial).free
    if sum(left) > free:
        raise StoreError(
            f"not enough space in {store.parent} for {store.name}: {sum(left):,} bytes are still "
            f"to be written, {free:,} are free; make room or choose another directory, then run "
            "the same command again"
        )


@contextlib.contextmanager
def _writing(partial: Path, name: str, entry: TensorEntry) -> Iterator[None]:
    """Turns a failed write into one :class:`StoreError`; the tensor's remains are removed."""
    try:
        yield
    except OSError as error:
        shutil.rmtree(array_directory(partial, name), ignore_errors=True)
        if error.errno not in _FULL:
            _cannot_write(array_directory(partial, name), error)
        raise StoreError(
            f"the disk is full ({error.strerror or error}): writing {name} needs {entry.nbytes:,} "
            f"bytes in {partial}, {shutil.disk_usage(partial).free:,} are free; make room and run "
            "the same command again: it resumes with this tensor"
        ) from error


def _cannot_write(path: Path, error: OSError) -> NoReturn:
    hint = "; make room and run the same command again: it resumes" * (error.errno in _FULL)
    raise StoreError(f"cannot write {path}: {error.strerror or error}{hint}") from error


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
