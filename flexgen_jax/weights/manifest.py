"""What a weight store says about itself: ``flexgen_manifest.json``.

It is written last, so a directory that has one is complete. Owns the format's version; knows how
neither to make nor to read the arrays.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storage.array_file import StoreError, dtype_of, whole_numbers
from storage.json_text import digest_of, read_json

# Version 1 had no layout: its matrices are (in, out). Version 2 did not know its config. Version 3
# had no checksums. Up to version 4 a byte of 4-bit codes held two neighbours.
FORMAT_VERSION = 5
_READ = (1, 2, 3, 4, 5)
MANIFEST_NAME = "flexgen_manifest.json"


def array_directory(store: Path, name: str) -> Path:
    """Where the array of the stored tensor ``name`` lies, in a store or one that grows."""
    return store / name


class _OldCodes(Exception):
    """A store whose 4-bit codes lie in another order than they are read in."""


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """One stored tensor.

    Attributes:
        dtype: A name such as ``bfloat16``.
        checksum: Of the bytes, as :mod:`storage.checksums` has it; None: not known.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    checksum: str | None = dataclasses.field(default=None, compare=False)

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: str) -> TensorEntry:
        return cls(tuple(shape), dtype, math.prod(shape) * dtype_of(dtype).itemsize)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the weights came from.

    Attributes:
        name: For people: a hub name, a directory's name, or what made the weights.
        fingerprint: Hexadecimal; the same source has the same one.
    """

    name: str
    fingerprint: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of a weight store.

    Attributes:
        dtype: Of the weights as they are computed with.
        weight_bits: 4 or 8 if the weights are quantised, None if they are stored in ``dtype``.
        weight_group: Then the most elements that share a scale.
        layout: Of the matrices: ``in_out`` or ``out_in``.
        source: Where they came from.
        tensors: Flat name -> what is stored, in layer order.
        config: Of the values of ``config.json``, a hexadecimal digest; None: not known.
        files: Checksums of the other files beside the arrays (a tokenizer's), by name.
        format_version: Of the directory's layout.
    """

    dtype: str
    source: Source
    tensors: Mapping[str, TensorEntry]
    weight_bits: int | None = None
    weight_group: int | None = None
    layout: str = "in_out"
    config: str | None = None
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def nbytes(self) -> int:
        """Of all tensors together."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def save(self, directory: Path) -> None:
        """Writes the manifest so that it is there either whole or not at all."""
        values = {
            "format_version": self.format_version,
            "dtype": self.dtype,
            "weight_bits": self.weight_bits,
            "weight_group": self.weight_group,
            "layout": self.layout,
            "config": self.config,
            "source": dataclasses.asdict(self.source),
            "files": dict(self.files),
            "tensors": {name: dataclasses.asdict(e) for name, e in self.tensors.items()},
        }
        write_durably(
            directory / MANIFEST_NAME,
            json.dumps(with_seal(values), indent=1, allow_nan=False).encode() + b"\n",
        )

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Reads the manifest of the store at ``directory``.

        Raises:
            StoreError: none there, another version, or not what a manifest contains.
        """
        file = directory / MANIFEST_NAME
        try:
            values = read_json(file)
        except OSError as error:
            raise StoreError(
                f"{directory} is not a weight store: cannot read {file} ({error.strerror}); make "
                "one with 'flexgen-jax convert MODEL STORE'"
            ) from error
        except ValueError as error:
            raise StoreError(
                f"{file} is not valid JSON ({error}): the store is damaged, remove it and convert "
                "the model again"
            ) from error
        version = values.get("format_version") if isinstance(values, dict) else None
        if version not in _READ:
            newer = isinstance(version, int) and version > FORMAT_VERSION
            cure = "upgrade flexgen-jax, or convert" if newer else "convert"
            raise StoreError(
                f"{file}: the store has format version {version!r}, this flexgen-jax reads version "
                f"{FORMAT_VERSION}; {cure} the model again"
            )
        try:
            return cls._from_json(values)
        except _OldCodes:
            raise StoreError(
                f"{file}: 4-bit codes as format version {version} had them, this flexgen-jax packs "
                f"them otherwise (version {FORMAT_VERSION}); convert the model again"
            ) from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(
                f"{file}: missing or wrong entry ({type(error).__name__}: {error}); the store is "
                "damaged, remove it and convert the model again"
            ) from error

    @classmethod
    def _from_json(cls, values: Mapping[str, Any]) -> Manifest:
        # What has no checksums has no seal either.
        known, tensors = values["format_version"] >= 4, {}
        if known and values["seal"] != with_seal(values)["seal"]:
            raise ValueError("it is not what was written")
        files = dict(values["files"]) if known else {}
        if not all(isinstance(checksum, str) for checksum in files.values()):
            raise ValueError(f"files {files!r}")
        for name, entry in values["tensors"].items():
            found = TensorEntry.of(whole_numbers(entry["shape"]), entry["dtype"])
            checksum = entry["checksum"] if known else None
            if not isinstance(checksum, (str, type(None))):
                raise ValueError(f"checksum {checksum!r}")
            tensors[name] = dataclasses.replace(found, checksum=checksum)
            if entry["nbytes"] != tensors[name].nbytes:
                raise ValueError(f"{name}: nbytes {entry['nbytes']} do not fit its shape")
        bits, group = values["weight_bits"], values.get("weight_group")
        if bits == 4 and values["format_version"] < 5:
            raise _OldCodes
        whole = type(group) is int and group >= 2
        if not (whole if type(bits) is int and bits in (4, 8) else bits is group is None):
            raise ValueError(f"weight_bits {bits!r} in groups of {group!r}")
        layout = values.get("layout", "in_out")
        if layout not in ("in_out", "out_in"):
            raise ValueError(f"layout {layout!r}")
        config = values["config"] if values["format_version"] >= 3 else None
        if not isinstance(config, (str, type(None))):
            raise ValueError(f"config {config!r}")
        source = Source(str(values["source"]["name"]), str(values["source"]["fingerprint"]))
        return cls(
            dtype=dtype_of(values["dtype"]).name,
            source=source,
            tensors=tensors,
            weight_bits=bits,
            weight_group=group,
            layout=layout,
            config=config,
            files=files,
            format_version=values["format_version"],
        )


def with_seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` of a manifest with a digest of them: what is changed by accident is noticed."""
    return {**values, "seal": digest_of({**values, "seal": None})}


def write_durably(path: Path, content: bytes) -> None:
    """Replaces ``path`` by ``content``, atomically, and waits until the disk has it."""
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
