"""How a parameter is stored: which way a matrix lies, and as it is or as codes and scales.

The rule: what its record calls quantised (matrices that are multiplied with, and the token table)
is stored in codes where weights are quantised; norms, biases and positions, which are a thousandth
of the bytes, keep the store's dtype. A quantised parameter ``NAME`` is stored as ``NAME.codes`` and
``NAME.affine`` (:class:`~flexgen_jax.models.quantization.Quantized`).

A matrix is stored as ``....kernel`` (n_in, n_out) or as ``....weight`` (n_out, n_in): see
:data:`LAYOUTS`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from flexgen_jax.models.family import Config, Param
from flexgen_jax.models.params import param_records
from flexgen_jax.weights.manifest import TensorEntry

if TYPE_CHECKING:
    from flexgen_jax.models.quantization import Quantized

Pieces = Callable[[str], Iterator[np.ndarray]]

# Layout of matrices -> the last part of their stored names.
LAYOUTS = {"in_out": "kernel", "out_in": "weight"}

# Elements that are quantised at a time: what stays in a core's cache while it is fitted is five
# times as fast as what does not.
_BLOCK = 1 << 16


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """What the weights of a store are.

    Attributes:
        dtype: That they are computed with, and stored in unless quantised.
        bits: 4 or 8: quantised; None: not.
        group: The most elements that share a scale.
        layout: Of matrices, a key of :data:`LAYOUTS`.
    """

    dtype: str
    bits: int | None = None
    group: int | None = None
    layout: str = "in_out"

    @classmethod
    def usual(cls, dtype: str, bits: int | None = None, group: int | None = None) -> WeightFormat:
        """With the layout that is made now: the faster one for few rows on a CPU.

        Of bfloat16 that is (out, in), as published: up to twice as fast with jax 0.10, no slower
        with 0.12. Of float32 CPUs differ, and (in, out) stays what it was: docs/models.md.
        """
        return cls(dtype, bits, group, "in_out" if dtype == "float32" else "out_in")

    def __str__(self) -> str:
        return self.dtype if self.bits is None else f"{self.dtype}-{self.bits}bit-g{self.group}"

    def quantizes(self, config: Config, name: str) -> bool:
        """Whether parameter ``name`` is stored in codes."""
        return self.bits is not None and param_records(config)[name].quantized

    def kept_dtype(self, config: Config, name: str) -> str:
        """That parameter ``name`` is stored in unless quantised."""
        return "float32" if param_records(config)[name].exact else self.dtype

    @property
    def coded(self) -> bool:
        """Whether the weights cannot be quantised, since they are."""
        return self.bits is not None

    @property
    def unpacks(self) -> bool:
        """Whether any parameter is."""
        return self.bits is not None

    def unpacked(self, config: Config, name: str) -> bool:
        """Whether parameter ``name`` takes a dense copy to compute with."""
        return self.quantizes(config, name)

    def settles(self, config: Config, stored: str) -> bool:
        """Whether the array ``stored`` is another one on the device and the host."""
        return False

    def settled(self, config: Config, stored: str, array: np.ndarray) -> np.ndarray:
        """The array ``stored`` as the device and the host keep it, of no more bytes."""
        return array

    def transposes(self, config: Config, name: str) -> bool:
        """Whether parameter ``name`` is stored the other way round than its record has it."""
        return self.layout == "out_in" and param_records(config)[name].role == "matrix"

    def array_name(self, config: Config, name: str) -> str:
        """What parameter ``name`` is called as it lies."""
        if not self.transposes(config, name):
            return name
        return f"{name.rpartition('.')[0]}.{LAYOUTS[self.layout]}"

    def array_shape(self, config: Config, name: str) -> tuple[int, ...]:
        """The shape of parameter ``name`` as it lies."""
        shape = param_records(config)[name].shape
        return shape[::-1] if self.transposes(config, name) else shape

    def entries(self, config: Config) -> dict[str, TensorEntry]:
        """What is stored of a model: name -> entry, in layer order."""
        return self._entries(config)

    @functools.lru_cache(maxsize=16)  # noqa: B019 # formats are few and small
    def _entries(self, config: Config) -> dict[str, TensorEntry]:
        records, names = param_records(config), self._stored_names(config)
        found: dict[str, TensorEntry] = {}
        known: dict[tuple[Param, int], TensorEntry] = {}  # a model with experts has many alike
        for name, record in records.items():
            for place, stored in enumerate(names[name]):
                entry = known.get((record, place))
                if entry is None:
                    entry = known[record, place] = self._entry(config, name, stored)
                found[stored] = entry
        return found

    def _entry(self, config: Config, name: str, stored: str) -> TensorEntry:
        shape = self.array_shape(config, name)
        if self.quantizes(config, name):
            return TensorEntry.of(*self._fields(shape)[stored.rpartition(".")[2]])
        return TensorEntry.of(shape, self.kept_dtype(config, name))

    @functools.lru_cache(maxsize=16)  # noqa: B019 # as above
    def _stored_names(self, config: Config) -> dict[str, tuple[str, ...]]:
        """Of each parameter."""
        found = {}
        known: dict[tuple[Param, str], tuple[str, ...]] = {}  # what comes behind the module
        for name, record in param_records(config).items():
            module, _, leaf = name.rpartition(".")
            behind = known.get((record, leaf))
            if behind is None:
                stored = self.stored_names(config, name)
                behind = known[record, leaf] = tuple(s.removeprefix(module) for s in stored)
            found[name] = tuple(module + rest for rest in behind)
        return found

    def stored_names(self, config: Config, name: str) -> tuple[str, ...]:
        """Of parameter ``name``."""
        array = self.array_name(config, name)
        if self.quantizes(config, name):
            return (f"{array}.codes", f"{array}.affine")
        return (array,)

    @functools.lru_cache(maxsize=16)  # noqa: B019 # as above
    def _parameters(self, config: Config) -> dict[str, str]:
        """Stored name -> parameter."""
        return {s: name for name in param_records(config) for s in self.stored_names(config, name)}

    def _fields(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], str]]:
        from flexgen_jax.models.quantization import quantized_shapes

        assert self.bits is not None
        assert self.group is not None
        return quantized_shapes(shape, self.bits, self.group)

    def order(self, config: Config, names: Sequence[str]) -> tuple[str, ...]:
        """The stored names of parameters ``names``, in the order that costs least to write."""
        of_each = self._stored_names(config)
        return tuple(stored for name in names for stored in of_each[name])

    def pieces(self, config: Config, dense: Pieces) -> Pieces:
        """The stored elements, from the parameters'.

        Args:
            dense: Parameter -> pieces of it in C order, the way round that they are stored.
        """
        parameters, kept = self._parameters(config), _Kept()

        def stored(name: str) -> Iterator[np.ndarray]:
            parameter = parameters[name]
            if not self.quantizes(config, parameter):
                yield from dense(parameter)
                return
            field = name.rpartition(".")[2]
            if field == "affine" and kept.name == parameter:
                yield from kept.affine
                return
            kept.begin(parameter)
            width = self.array_shape(config, parameter)[-1]
            for rows in _rows(dense(parameter), width):
                quantized = _quantize(rows, self.bits or 0, self.group or 0)
                kept.affine.append(np.asarray(quantized.affine))
                if field == "codes":
                    yield np.asarray(quantized.codes)
            kept.name = parameter
            if field == "affine":  # the codes were written by a run that was interrupted
                yield from kept.affine

        return stored

    def assemble(
        self, config: Config, flat: Mapping[str, Any], settled: Container[str] = ()
    ) -> dict[str, Any]:
        """Stored arrays -> arrays by the names they are computed with; codes as ``Quantized``.

        Args:
            flat: By their names: whole, or all the same rows of them.
            settled: Those that were :meth:`settled`.
        """
        from flexgen_jax.models.quantization import Quantized

        found: dict[str, Any] = {}
        parameters = self._parameters(config)
        for name, array in flat.items():
            parameter = parameters[name]
            if not self.quantizes(config, parameter):
                found[name] = array
                continue
            plain, _, field = name.rpartition(".")
            if field == "codes":
                width = self.array_shape(config, parameter)[-1]
                found[plain] = Quantized(array, flat[f"{plain}.affine"], self.bits or 0, width)
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


def _quantize(rows: np.ndarray, bits: int, group: int) -> Quantized:
    import jax

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return _compiled()(rows, bits=bits, group=group)


@cache
def _compiled() -> Any:
    import jax

    from flexgen_jax.models.fitting import quantize_fitted
    from flexgen_jax.models.quantization import quantize

    def chosen(x: Any, *, bits: int, group: int) -> Quantized:
        # Of 8 bits the whole range leaves a hundredth of the error of 4.
        return quantize_fitted(x, group=group) if bits == 4 else quantize(x, bits=bits, group=group)

    return jax.jit(chosen, static_argnames=("bits", "group"))
