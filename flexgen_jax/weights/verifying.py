"""Reads a model once from end to end and says what of it is not what was written."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from flexgen_jax.models.family import ConfigError
from flexgen_jax.models.registry import load_config
from flexgen_jax.weights.checkpoint import check_config, entries_of, is_ready, is_store, open_model
from flexgen_jax.weights.huggingface import COMPANION_FILES
from flexgen_jax.weights.manifest import FORMAT_VERSION, Manifest, array_directory
from flexgen_jax.weights.recorded import Recorded
from flexgen_jax.weights.tensor_file import ModelNotFoundError
from storage.array_file import ArrayFile, StoreError, describe_array
from storage.checksums import TensorChecksum, is_finite, tensor_checksum

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
    """Reads everything of a model once, and holds it against its checksums.

    Args:
        model: The directory: a weight store, or a checkpoint that is used in place.
        record: Take checksums of what is there and keep them, where nothing else is wrong: for a
            model that has none, or whose tokenizer was changed on purpose.
        progress: Called as (bytes read, bytes in all, tensor).

    Raises:
        ModelNotFoundError: there is neither.
        StoreError, SourceError, ConfigError: what it says about itself cannot be read.
    """
    path = Path(os.path.abspath(model))
    begun = time.perf_counter()
    problems: list[str] = []
    if is_store(path):
        manifest = Manifest.load(path)
        problems += _structure(path, manifest)
        place = functools.partial(array_directory, path)
        find: Callable[[str], ArrayFile] = lambda name: describe_array(place(name))  # noqa: E731
    elif is_ready(path):
        opened = open_model(path)
        manifest, find = opened.manifest, opened.arrays.__getitem__
    else:
        raise ModelNotFoundError(
            f"{model} is neither a weight store nor a directory of safetensors; 'flexgen-jax "
            "convert' makes a store of another model"
        )
    total, done, checked = manifest.nbytes, 0, 0
    checksums: dict[str, str] = {}
    for name, entry in manifest.tensors.items():
        try:
            file = find(name)
            found, finite = _checksum(file)
        except (StoreError, OSError) as error:
            problems.append(str(error))
            continue
        if not finite:
            problems.append(f"{name} in {file.chunk} has values that are not numbers")
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
    if recorded and is_store(path):
        tensors = {
            name: dataclasses.replace(entry, checksum=checksums[name])
            for name, entry in manifest.tensors.items()
        }
        dataclasses.replace(
            manifest, tensors=tensors, files=beside, format_version=FORMAT_VERSION
        ).save(path)
    elif recorded:
        Recorded(checksums, beside).save(path)
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


def _checksum(file: ArrayFile) -> tuple[str, bool]:
    """Of what ``file`` holds, read in pieces; and whether it is as finite as it is to be."""
    found, finite = TensorChecksum(), True
    if not file.raw:  # whatever its codecs are
        import tensorstore as ts

        kvstore = {"driver": "file", "path": f"{file.directory}/"}
        try:
            array = ts.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()
            content = np.asarray(array.read().result())
        except ValueError as error:
            raise StoreError(f"{file.directory}: {str(error).partition(chr(10))[0]}") from error
        found.add(np.ascontiguousarray(content).reshape(-1).view(np.uint8))
        return str(found), finite
    block, left = np.empty(min(_PIECE, file.nbytes), np.uint8), file.nbytes
    with open(file.chunk, "rb") as chunk:
        chunk.seek(file.offset or 0)
        os.posix_fadvise(chunk.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while left and (got := chunk.readinto(block[: min(_PIECE, left)].data)):
            found.add(block[:got])
            if file.finite:
                finite = finite and is_finite(block[:got].view(file.dtype))
            left -= got
    if left:
        raise StoreError(f"{file.chunk} became shorter while it was read")
    return str(found), finite
