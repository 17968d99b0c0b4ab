"""The state of a block on its way, kept on disk: a job that is killed goes on inside the block.

At a step border that state is small in kind: the cache, the tokens so far, and how many steps are
done. Arrays are saved through Orbax, some cells at a time, so that memory holds a few of them; what
is plain lies beside them as JSON, written last, which makes a snapshot one. The directory begins
with a mark: what lacks it is somebody else's, and nothing is removed there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flexgen_jax.logs import event
from scheduling.timeline import Timeline
from storage.checksums import checksum_of
from storage.json_text import sealed, unsealed
from storage.store import StorageError

Arrays = dict[str, np.ndarray]  # of a cell, by the name of the part

_GROUP_NBYTES = 256 << 20
_STATE = "state.json"
_MARK = "flexgen_jax_checkpoint"
# Another text is of another version: in the first, a byte of 4-bit codes held two neighbours.
_MARKED = b"The state of a running block of flexgen-jax (2); removed when the block is finished.\n"


@dataclasses.dataclass(frozen=True)
class State:
    """A block at a step border.

    Attributes:
        batches: Who is in the rows of each, as plain JSON.
        room: Of a row of a rolling block, as numbers; None: of another block.
        finished: What was finished, but not handed out.
        counts: What the block has taken so far, in seconds, bytes and the like.
        steps: How many its earlier runs of the schedule took.
        timeline: Measured so far.
        peak_bytes: By the name of the tier.
    """

    batches: list[dict[str, Any]]
    room: tuple[int, int, int] | None
    finished: list[dict[str, Any]]
    counts: dict[str, float]
    steps: int
    timeline: Timeline
    peak_bytes: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**plain, "timeline": self.timeline.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> State:
        """The inverse of :meth:`to_json`."""
        timeline = Timeline.from_json(values["timeline"])
        return cls(**{**values, "timeline": timeline})


def are_kept_in(directory: Path) -> bool:
    """Whether snapshots were kept in ``directory``: it has the mark."""
    try:
        return (directory / _MARK).read_bytes() == _MARKED
    except OSError:
        return False


def check_place(directory: Path) -> None:
    """Refuses a directory that holds what is not a snapshot.

    Raises:
        StorageError: the message names what is there.
    """
    if not os.path.lexists(directory) or are_kept_in(directory):
        return
    found = "it is not a directory"
    if directory.is_dir():
        first = next(directory.iterdir(), None)
        if first is None:
            return
        found = f"it holds {first.name}, which is not a checkpoint of this version of flexgen-jax"
    raise StorageError(
        f"{directory} is in the way of the job's checkpoints: {found}; move it away, or give "
        "another output"
    )


def remove(directory: Path) -> None:
    """Removes the snapshots in ``directory``, and itself if nothing else is there."""
    if not are_kept_in(directory):
        return
    for path in _snapshots_in(directory):
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        (directory / _MARK).unlink()
        directory.rmdir()


def _snapshots_in(directory: Path) -> list[Path]:
    """The latest first. A name that is no number is somebody else's."""
    try:
        names = [path.name for path in directory.iterdir()]
    except OSError:
        return []
    numbers = [int(name) for name in names if re.fullmatch("0|[1-9][0-9]{0,8}", name)]
    return [directory / str(number) for number in sorted(numbers, reverse=True)]


class Snapshots:
    """Where a job keeps the state of its current block.

    Args:
        directory: Made when there is something to keep.
        seconds: How often; the time that saving takes is not counted.

    Raises:
        StorageError: the directory holds something else.
    """

    def __init__(self, directory: Path, seconds: float) -> None:
        check_place(directory)
        self._directory, self._seconds = directory.absolute(), seconds
        self._since = time.monotonic()

    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._since >= self._seconds

    def of(self, **block: Any) -> Snapshot:
        """Those of the block that is called so."""
        return Snapshot(self, self._directory, block)

    def clear(self) -> None:
        """The block's results are safe: nothing of it is needed any more."""
        remove(self._directory)

    def saved(self) -> None:
        """Counts the time from now on."""
        self._since = time.monotonic()


class Snapshot:
    """The state of one block. The latest counts."""

    def __init__(self, kept: Snapshots, directory: Path, block: dict[str, Any]) -> None:
        self._kept, self._directory, self._block = kept, directory, block
        self._latest: Path | None = None
        self.due = kept.due

    def load(self) -> tuple[State, Iterator[tuple[str, Arrays]]] | None:
        """The state and, lazily, the cells by name; None: none is kept of this block.

        Raises:
            StorageError: while reading the cells: they are damaged.
        """
        for path in _snapshots_in(self._directory):
            if not (path / _STATE).exists():
                continue  # a process ended while it saved
            try:
                values = unsealed((path / _STATE).read_bytes())
                block, groups = values.pop("block"), values.pop("groups")
                state = State.from_json(values)
            except (OSError, ValueError, KeyError, TypeError) as error:
                event("snapshot damaged", level=logging.WARNING, path=str(path), why=str(error))
                continue
            if block == self._block:
                event("snapshot read", path=str(path))
                self._latest = path
                return state, _cells(path, groups)
        return None

    def save(self, state: State, cells: Iterator[tuple[str, Arrays]]) -> None:
        """Saves, and drops what was saved of the block before.

        What cannot be written is said and left out: the run is worth more than a way back to it.
        """
        begun = time.perf_counter()
        latest = _snapshots_in(self._directory)[:1]
        path = self._directory / str(int(latest[0].name) + 1 if latest else 0)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            if not are_kept_in(self._directory):
                _write_durably(self._directory / _MARK, _MARKED)
            path.mkdir()
            nbytes, groups = 0, list[Files]()
            for group in _groups(cells):
                nbytes += sum(a.nbytes for arrays in group.values() for a in arrays.values())
                with _checkpointer() as checkpointer:
                    checkpointer.save(path / f"cells_{len(groups)}", group)
                groups.append(_files(path / f"cells_{len(groups)}"))
            values = {"block": self._block, "groups": groups, **state.to_json()}
            new = path / f"{_STATE}.new"
            _write_durably(new, sealed(values))
            os.replace(new, path / _STATE)
        except (OSError, ValueError) as error:
            shutil.rmtree(path, ignore_errors=True)
            why = getattr(error, "strerror", None) or str(error)
            event("snapshot failed", level=logging.WARNING, path=str(path), why=why)
        else:
            seconds = time.perf_counter() - begun
            event("snapshot saved", path=str(path), nbytes=nbytes, seconds=seconds)
            if self._latest is not None:
                shutil.rmtree(self._latest, ignore_errors=True)
            self._latest = path
        self._kept.saved()


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _groups(cells: Iterator[tuple[str, Arrays]]) -> Iterator[dict[str, Arrays]]:
    """Each is a checkpoint of its own, which costs some ten milliseconds, and is held at once."""
    group: dict[str, Arrays] = {}
    nbytes = 0
    for name, arrays in cells:
        group[name] = arrays
        nbytes += sum(a.nbytes for a in arrays.values())
        if nbytes >= _GROUP_NBYTES:
            yield group
            group, nbytes = {}, 0
    if group:
        yield group


Files = dict[str, int]  # of a group, by their path below it -> checksum


def _files(directory: Path) -> Files:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): checksum_of(path) for path in files}


def _cells(path: Path, groups: list[Files]) -> Iterator[tuple[str, Arrays]]:
    for number, known in enumerate(groups):
        directory = path / f"cells_{number}"
        try:
            # Before Orbax reads them: its threads print what goes wrong, each for itself.
            found = _files(directory)
            wrong = [name for name in {*known, *found} if known.get(name) != found.get(name)]
            if wrong:
                raise ValueError(f"{directory / min(wrong)} is not what was saved")
            with _checkpointer() as checkpointer:
                group = checkpointer.restore(directory)
        except Exception as error:  # whatever Orbax and TensorStore raise
            raise _damaged(path, str(error).partition("\n")[0]) from error
        yield from group.items()


def _damaged(path: Path, why: str) -> StorageError:
    return StorageError(
        f"the checkpoint {path} is damaged ({why}); remove {path.parent} to begin the block anew"
    )


@contextlib.contextmanager
def _checkpointer() -> Iterator[Any]:
    import orbax.checkpoint as ocp

    logger = logging.getLogger("absl")  # warns of what was not asked for: OCDBT
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # Compressing codes and random bits takes long and gains nothing.
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=False, use_zarr3=True, use_compression=False
        )
        with ocp.Checkpointer(handler) as checkpointer:
            yield checkpointer
    finally:
        logger.setLevel(level)
