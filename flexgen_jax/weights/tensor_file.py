"""What every file of named tensors offers, whatever its format."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import ml_dtypes
import numpy as np

# What weights are published in, by safetensors' names.
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
}
# What the codes of quantised weights are published in.
CODE_DTYPES = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}


class SourceError(ValueError):
    """A model's files that are incomplete, damaged or not what its config says."""


class ModelNotFoundError(SourceError):
    """No model there: neither a weight store, nor a Hugging Face directory, nor a hub name."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a file says about a tensor; ``offset`` orders them as they lie there."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int


class WeightFile(Protocol):
    """One file of named tensors."""

    entries: dict[str, Entry]

    def array(self, key: str) -> np.ndarray: ...

    def release(self) -> None:
        """Gives back the memory of arrays read so far, which are no longer used."""
        ...
