"""Checksums that were taken of a checkpoint in place: ``flexgen_checksums.json`` beside it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from flexgen_jax.weights.manifest import with_seal, write_durably
from storage.array_file import StoreError
from storage.json_text import read_json

RECORDED_NAME = "flexgen_checksums.json"


@dataclasses.dataclass(frozen=True)
class Recorded:
    """Checksums by name: of tensors as they lie, and of the other files beside them."""

    tensors: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def save(self, directory: Path) -> None:
        """Keeps them beside the checkpoint."""
        values = with_seal(dataclasses.asdict(self))
        text = json.dumps(values, indent=1, allow_nan=False)
        write_durably(directory / RECORDED_NAME, text.encode() + b"\n")


def read_recorded(directory: Path) -> Recorded:
    """What was taken; nothing if nothing was.

    Raises:
        StoreError: the file cannot be read, or was changed.
    """
    file = directory / RECORDED_NAME
    if not file.exists():
        return Recorded()
    try:
        values = read_json(file)
        if values["seal"] != with_seal(values)["seal"]:
            raise ValueError("it is not what was written")
        return Recorded(dict(values["tensors"]), dict(values["files"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{file}: {error}; remove it, and take checksums anew with 'flexgen-jax verify "
            "--record'"
        ) from error
