"""Reads a model once from end to end and says what of it is not what was written."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from flexgen_jax.models.family import ConfigError
from flexgen_jax.models.registry import load_config
from flexgen_jax.weights.checkpoint import check_config, entries_of
from flexgen_jax.weights.huggingface import COMPANION_FILES
from flexgen_jax.weights.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest, array_directory
from flexgen_jax.weights.tensor_file import ModelNotFoundError
from storage.array_file import ArrayFile, StoreError, describe_array
from storage.checksums import TensorChecksum, tensor_checksum

Progress = Callable[[int, int, str], None]
_PIECE = 8 << 20


@dataclasses.dataclass(frozen=True)
class Verified:
    """What :func:`verify` found.

    Attributes:
        path: Of the model.
        tensors: How many were read; ``checked``: how many of them have a checksum.
        nbytes: Of the tensors that were read.
        seconds: That it took.
        problems: One line for each thing that is wrong.
        recorded: Whether checksums were taken of what is there.
    """

    path: Path
    tensors: int
    checked: int
    nbytes: int
    seconds: float
    problems: tuple[str, ...]
    recorded: bool = False

    @property
    def sound(self) -> bool:
        """Nothing is wrong, as far as can be said."""
        return not self.problems

    def summary(self) -> str:
        """A line for people."""
        rate = self.nbytes / self.seconds / 1e9 if self.seconds else 0.0
        much = f"{self.tensors} tensors, {self.nbytes / 1e9:.2f} GB"
        lines = [f"{self.path}: read {much} in {self.seconds:.1f} s ({rate:.1f} GB/s)"]
        if self.recorded:
            lines.append("checksums of what is there were recorded")
        elif not self.checked:
            lines.append(
                "it carries no checksums: sizes and shapes are right, the bytes cannot be judged; "
                "'flexgen-jax verify --record' takes checksums of what is there now"
            )
        elif self.checked < self.tensors:
            lines.append(f"{self.tensors - self.checked} tensors carry no checksum")
        if self.problems:
            lines.append(f"{len(self.problems)} things are wrong")
        elif self.checked and not self.recorded:
            lines.append("nothing is wrong")
        return "; ".join(lines)


def verify(
    model: str | Path, *, record: bool = False, progress: Progress | None = None
) -> Verified:
    """Reads everything of a weight store once, and holds it against its checksums.

    Args:
        model: The directory.
        record: Take checksums of what is there and keep them, where nothing else is wrong: for a
            store that has none, or whose tokenizer was changed on purpose.
        progress: Called as (bytes read, bytes in all, tensor).

    Raises:
        ModelNotFoundError: there is no weight store.
        StoreError: its manifest cannot be read.
    """
    path = Path(os.path.abspath(model))
    if not (path / MANIFEST_NAME).exists():
        raise ModelNotFoundError(
            f"{model} is not a weight store: it has no {MANIFEST_NAME}; 'flexgen-jax convert' "
            "makes one of a model"
        )
    begun = time.perf_counter()
    manifest = Manifest.load(path)
    problems = list(_structure(path, manifest))
    total, done, checked = manifest.nbytes, 0, 0
    checksums: dict[str, str] = {}
    for name, entry in manifest.tensors.items():
        try:
            found = _checksum(describe_array(array_directory(path, name)))
        except (StoreError, OSError) as error:
            problems.append(str(error))
            continue
        checked += entry.checksum is not None
        checksums[name] = found
        if not record and entry.checksum not in (None, found):
            problems.append(
                f"{name}: the bytes are not those that were written (checksum {found}, expected "
                f"{entry.checksum})"
            )
        done += entry.nbytes
        if progress:
            progress(done, total, name)
    beside = {n: tensor_checksum((path / n).read_bytes()) for n in _beside(path)}
    if not record:
        problems += [
            f"{path / name}: it is not what was written"
            for name, expected in manifest.files.items()
            if beside.get(name) != expected
        ]
    recorded = record and not problems
    if recorded:
        tensors = {
            name: dataclasses.replace(entry, checksum=checksums[name])
            for name, entry in manifest.tensors.items()
        }
        dataclasses.replace(
            manifest, tensors=tensors, files=beside, format_version=FORMAT_VERSION
        ).save(path)
    seconds = time.perf_counter() - begun
    return Verified(path, len(checksums), checked, done, seconds, tuple(problems), recorded)


def _beside(path: Path) -> Iterator[str]:
    return (name for name in COMPANION_FILES if (path / name).is_file())


def _structure(path: Path, manifest: Manifest) -> Iterator[str]:
    """What is wrong whatever the tensors hold."""
    try:
        config = load_config(path)
        check_config(path, manifest)
        entries_of(path, config, manifest)
    except (StoreError, ConfigError) as error:
        yield str(error)


def _checksum(file: ArrayFile) -> str:
    """Of what ``file`` holds, read in pieces."""
    found = TensorChecksum()
    if not file.raw:  # whatever its codecs are
        import tensorstore as ts

        kvstore = {"driver": "file", "path": f"{file.directory}/"}
        try:
            array = ts.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()
            content = np.asarray(array.read().result())
        except ValueError as error:
            raise StoreError(f"{file.directory}: {str(error).partition(chr(10))[0]}") from error
        found.add(np.ascontiguousarray(content).reshape(-1).view(np.uint8))
        return str(found)
    block, left = memoryview(bytearray(min(_PIECE, file.nbytes))), file.nbytes
    with open(file.chunk, "rb", buffering=0) as chunk:
        os.posix_fadvise(chunk.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while left and (got := chunk.readinto(block[: min(_PIECE, left)])):
            found.add(block[:got])
            left -= got
    if left:
        raise StoreError(f"{file.chunk} became shorter while it was read")
    return str(found)
