"""How a parameter is stored: as it is, or as codes and scales.

The rule: matrices that are multiplied with, and the token table, are quantised; norms, biases and
positions, which are a thousandth of the bytes, keep the store's dtype. A quantised parameter
``NAME`` is stored as ``NAME.codes`` and ``NAME.affine`` (:class:`quantization.Quantized`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from flexgen_jax.models.config import OPTConfig
from flexgen_jax.models.params import param_shapes
from flexgen_jax.weights.manifest import TensorEntry
from storage.array_file import StoreError

if TYPE_CHECKING:
    from flexgen_jax.models.quantization import Quantized

Pieces = Callable[[str], Iterator[np.ndarray]]

_BLOCK = 1 << 20  # elements that are quantised at a time


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """What the weights of a store are.

    Attributes:
        dtype: That they are computed with, and stored in unless quantised.
        bits: 4 or 8: quantised; None: not.
        group: The most elements that share a scale.
    """

    dtype: str
    bits: int | None = None
    group: int | None = None

    def __str__(self) -> str:
        return self.dtype if self.bits is None else f"{self.dtype}-{self.bits}bit-g{self.group}"

    def quantizes(self, name: str) -> bool:
        """Whether parameter ``name`` is stored in codes."""
        return self.bits is not None and name.endswith((".kernel", ".tokens"))

    @functools.lru_cache(maxsize=16)  # noqa: B019 # formats are few and small
    def entries(self, config: OPTConfig) -> dict[str, TensorEntry]:
        """What is stored of a model: name -> entry, in layer order."""
        found = {}
        for name, shape in param_shapes(config).items():
            for stored in self.stored_names(name):
                if stored == name:
                    found[stored] = TensorEntry.of(shape, self.dtype)
                else:
                    found[stored] = TensorEntry.of(*self._fields(shape)[stored.rpartition(".")[2]])
        return found

    def stored_names(self, name: str) -> tuple[str, ...]:
        """Of parameter ``name``."""
        return (f"{name}.codes", f"{name}.affine") if self.quantizes(name) else (name,)

    def _fields(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], str]]:
        from flexgen_jax.models.quantization import quantized_shapes

        assert self.bits is not None
        assert self.group is not None
        return quantized_shapes(shape, self.bits, self.group)

    def order(self, names: Sequence[str]) -> tuple[str, ...]:
        """The stored names of parameters ``names``, in the order that costs least to write."""
        return tuple(stored for name in names for stored in self.stored_names(name))

    def blocks(self, config: OPTConfig, dense: Pieces) -> Pieces:
        """The stored elements, from the parameters' (``dense``: name -> pieces in C order)."""
        if self.bits is None:
            return dense
        shapes, kept = param_shapes(config), _Kept()

        def stored(name: str) -> Iterator[np.ndarray]:
            parameter, _, field = name.rpartition(".")
            if field not in ("codes", "affine") or not self.quantizes(parameter):
                yield from dense(name)
            elif field == "affine" and kept.name == parameter:
                yield from kept.affine
            else:
                kept.begin(parameter)
                for rows in _rows(dense(parameter), shapes[parameter][-1]):
                    quantized = _quantize(rows, self.bits or 0, self.group or 0, parameter)
                    kept.affine.append(np.asarray(quantized.affine))
                    if field == "codes":
                        yield np.asarray(quantized.codes)
                kept.name = parameter
                if field == "affine":  # the codes were written by a run that was interrupted
                    yield from kept.affine

        return stored

    def assemble(self, flat: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict:
        """Stored arrays -> parameters, by name; quantised ones as :class:`Quantized`."""
        from flexgen_jax.models.quantization import Quantized

        found: dict[str, Any] = {}
        for name, array in flat.items():
            parameter, _, field = name.rpartition(".")
            if field == "codes":
                affine, bits = flat[f"{parameter}.affine"], self.bits or 0
                found[parameter] = Quantized(array, affine, bits, shapes[parameter][-1])
            elif field != "affine":
                found[name] = array
        return found


class _Kept:
    """The scales of the parameter whose codes were written last: a sixteenth of its elements."""

    name: str | None = None

    def __init__(self) -> None:
        self.affine: list[np.ndarray] = []

    def begin(self, name: str) -> None:
        self.name, self.affine = None, []


def _rows(blocks: Iterator[np.ndarray], width: int) -> Iterator[np.ndarray]:
    """Pieces of any shape, regrouped into matrices of about ``_BLOCK`` elements."""
    wanted = max(1, _BLOCK // width) * width
    parts: list[np.ndarray] = []
    have = 0
    for block in blocks:
        left = block.reshape(-1)
        while left.size:
            part, left = left[: wanted - have], left[wanted - have :]
            parts.append(part)
            have += part.size
            if have == wanted:
                yield np.concatenate(parts).reshape(-1, width)
                parts, have = [], 0
    if parts:
        yield np.concatenate(parts).reshape(-1, width)


def _quantize(rows: np.ndarray, bits: int, group: int, name: str) -> Quantized:
    import jax

    if not np.isfinite(rows.astype(np.float32)).all():
        raise StoreError(
            f"{name} has infinities or NaN, which codes cannot hold: the weights are damaged, or "
            "overflowed; store them without --weight-bits"
        )
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return _compiled()(rows, bits=bits, group=group)


@cache
def _compiled() -> Any:
    import jax

    from flexgen_jax.models.quantization import quantize

    return jax.jit(quantize, static_argnames=("bits", "group"))
