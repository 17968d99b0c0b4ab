"""What can be computed with, by the names that people give it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from storage.array_file import StoreError

DTYPES = ("float32", "bfloat16")
_OTHER_NAMES = {"float": "float32", "half": "float16", "bf16": "bfloat16", "fp32": "float32"}


def checked_dtype(dtype: Any) -> str | None:
    """The name of a dtype that is computed with; None: ``"auto"``, the model's own.

    Args:
        dtype: ``"auto"``, a name (vLLM's ``"float"`` too), or the type itself: ``jnp.bfloat16``,
            ``np.float32``.

    Raises:
        StoreError: it cannot be computed with; the message says why.
    """
    if dtype is None or dtype == "auto":
        return None
    name = dtype
    if not isinstance(dtype, str):
        try:
            # JAX's types of numbers have a dtype of their own; NumPy's have only a descriptor.
            own = getattr(dtype, "dtype", dtype)
            name = np.dtype(own if isinstance(own, np.dtype) else dtype).name
        except TypeError:
            name = repr(dtype)
    name = _OTHER_NAMES.get(name, name)
    if name in DTYPES:
        return str(name)
    if name == "float16":
        raise StoreError(
            f"dtype {dtype!r}: float16 is read, but not computed with, since it overflows where "
            "bfloat16 does not, and is slow on CPUs; weights in float16 stay as they lie and are "
            "computed with in bfloat16: leave dtype out, or pass 'auto', 'bfloat16' or 'float32'"
        )
    raise StoreError(f"dtype must be auto, {' or '.join(DTYPES)}, got {dtype!r}")


def usual_dtype(published: Any) -> str:
    """What weights of the dtype ``published`` are computed with."""
    return "bfloat16" if published in (np.dtype(np.float16), ml_dtypes.bfloat16) else "float32"
