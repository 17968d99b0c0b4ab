"""A model whose weights were found complete, in a weight store or where they were published."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexgen_jax.models.family import Config
from flexgen_jax.weights.huggingface import COMPANION_FILES
from flexgen_jax.weights.manifest import Manifest
from flexgen_jax.weights.weight_format import WeightFormat
from storage.array_file import ArrayFile
from storage.json_text import digest_of


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """A model that was found complete.

    Attributes:
        path: The directory.
        config: Of the model.
        manifest: What the store says about itself, or would say.
        arrays: Flat name -> array file of everything stored, in layer order.
        format: How parameters are stored.
    """

    path: Path
    config: Config
    manifest: Manifest
    arrays: Mapping[str, ArrayFile]
    format: WeightFormat

    @property
    def dtype(self) -> str:
        """The name of the weights' dtype."""
        return self.manifest.dtype

    def identity(self) -> dict[str, Any]:
        """What tells these weights, and what is computed with them, from others: plain JSON."""
        manifest = self.manifest
        return {
            "source": manifest.source.fingerprint,
            "dtype": manifest.dtype,
            "bits": manifest.weight_bits,
            "group": manifest.weight_group,
            # What ends a text included, which is not in the config's own file.
            "config": hashlib.sha256(repr(self.config).encode()).hexdigest(),
            "tensors": digest_of({n: [e.shape, e.dtype] for n, e in manifest.tensors.items()}),
        }

    def tokenizer_digest(self) -> str:
        """Hexadecimal; of the files that say how a text becomes tokens."""
        digest = hashlib.sha256()
        for name in sorted({*COMPANION_FILES} - {"generation_config.json"}):
            if (self.path / name).is_file():
                content = hashlib.sha256((self.path / name).read_bytes()).hexdigest()
                digest.update(f"{name} {content}\n".encode())
        return digest.hexdigest()
