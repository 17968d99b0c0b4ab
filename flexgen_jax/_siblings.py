"""Notices a user's own ``storage.py`` or ``scheduling.py`` that shadows our package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent.parent


def check() -> None:
    """Checks both names, without importing what is not imported yet.

    Raises:
        ImportError: one of them is not our sibling; the message names the file and the cure.
    """
    for name in ("scheduling", "storage"):
        module = sys.modules.get(name)
        if module is not None:
            found = getattr(module, "__file__", None)
        else:
            spec = importlib.util.find_spec(name)
            found = spec.origin if spec is not None else None
        if found is None or Path(found).resolve().parent != _HERE / name:
            raise ImportError(
                f"flexgen_jax needs its own package {name!r} (in {_HERE}), but Python finds "
                f"{found or 'none'}. Rename that file, or run `python -P`, which keeps the "
                "script's directory off the import path."
            )
