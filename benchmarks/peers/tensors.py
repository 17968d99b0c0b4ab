"""Reads the safetensors of a Hugging Face directory with numpy alone, a tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


class Tensors:
    """The tensors of all ``*.safetensors`` in ``folder``, by name, as float32."""

    def __init__(self, folder: str | Path) -> None:
        self.config: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text())
        self._found: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for file in sorted(Path(folder).glob("*.safetensors")):
            with file.open("rb") as opened:
                size = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(size))
            header.pop("__metadata__", None)
            self._found.update({name: (file, 8 + size, entry) for name, entry in header.items()})

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def __getitem__(self, name: str) -> np.ndarray:
        file, start, entry = self._found[name]
        begin, end = entry["data_offsets"]
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        values = np.fromfile(file, dtype, (end - begin) // dtype.itemsize, offset=start + begin)
        if entry["dtype"] == "BF16":  # the upper half of a float32
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32, copy=False).reshape(entry["shape"])
