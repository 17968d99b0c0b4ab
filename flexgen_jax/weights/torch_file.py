"""PyTorch's own format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from flexgen_jax.weights.tensor_file import Entry, SourceError


class TorchFile:
    """A PyTorch state dict, mapped where its format (since PyTorch 1.6) allows that."""

    def __init__(self, path: Path) -> None:
        try:
            import torch
        except ImportError as error:
            raise SourceError(
                f"{path} is in PyTorch's format, which needs PyTorch to be read: pip install "
                "'flexgen-jax[torch-bin]', or get the model's safetensors files"
            ) from error
        self._torch, self._path = torch, path
        self._size = path.stat().st_size
        try:
            try:
                state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                state = torch.load(path, map_location="cpu", weights_only=True)
            tensors = {k: v.detach() for k, v in state.items() if torch.is_tensor(v)}
        except Exception as error:  # torch raises whatever its unpickler and unzipper do
            reason = str(error).partition("\n")[0]
            raise SourceError(
                f"{path} is truncated, or no PyTorch weights ({reason}); download the model again"
            ) from error
        self._state: dict[str, Any] = {}
        self.entries: dict[str, Entry] = {}
        for position, (key, tensor) in enumerate(tensors.items()):
            if not isinstance(key, str):
                raise SourceError(f"{path}: a tensor is called {key!r}, which is not text")
            try:
                if tensor.layout != torch.strided or tensor.device.type != "cpu":
                    raise TypeError(f"it is {tensor.layout} on {tensor.device}")
                dtype = self._numpy(tensor[:0] if tensor.ndim else tensor).dtype
            except (TypeError, RuntimeError) as error:
                raise SourceError(
                    f"{path}: tensor {key} is {tensor.dtype} and no plain array of numbers that "
                    f"can be read ({str(error).partition(chr(10))[0]})"
                ) from error
            self._state[key] = tensor
            self.entries[key] = Entry(tuple(tensor.shape), dtype, position)

    def _numpy(self, tensor: Any) -> np.ndarray:
        if tensor.dtype == self._torch.bfloat16:
            bits = tensor.contiguous().view(self._torch.int16).numpy()
            return bits.view(ml_dtypes.bfloat16)
        return tensor.numpy()

    def array(self, key: str) -> np.ndarray:
        size = self._path.stat().st_size
        if size < self._size:  # what it no longer has would end the process
            raise SourceError(
                f"{self._path} is truncated: it has {size} bytes now, and had {self._size} "
                "before; download the model again"
            )
        return self._numpy(self._state[key])

    def release(self) -> None:
        pass  # the pages of a mapped file go when it does
