"""What every way of publishing quantised matrices has in common."""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np

from flexgen_jax.models.family import Source
from flexgen_jax.weights.tensor_file import Entry, SourceError

if TYPE_CHECKING:
    from flexgen_jax.models.packed import Packed
    from flexgen_jax.models.published_codes import PackedIntegers

Shape = tuple[int, ...]
FLOATS = ("float16", "bfloat16", "float32")


class Make(Protocol):
    """What makes the leaf of some outputs of a matrix."""

    def __call__(
        self, arrays: Mapping[str, Any], *, rows: tuple[int, int], swapped: bool
    ) -> Packed:
        """Args:
        arrays: By what follows the matrix's name. ``rows``: The outputs.
        swapped: The transpose of how they lie is wanted.
        """


@dataclasses.dataclass(frozen=True)
class Codes:
    """How one matrix lies in codes.

    Attributes:
        tensors: What travels, by what follows the matrix's name.
        make: Their leaf.
    """

    tensors: tuple[str, ...]
    make: Make


@dataclasses.dataclass(frozen=True)
class Module:
    """A linear layer in a checkpoint.

    Attributes:
        name: In the checkpoint. ``where``: Its file, for people.
        tensors: What there is of it, by what follows the name.
        read: One of these, whole.
        experts: The tensors have so many along a first axis; None: no such axis.
    """

    name: str
    n_in: int
    n_out: int
    tensors: Mapping[str, Entry]
    read: Callable[[str], np.ndarray]
    where: str
    experts: int | None = None

    def wrong(self, what: str) -> SourceError:
        """To be raised."""
        return SourceError(
            f"{self.where}: {self.name} {what}; download the model again, or take another "
            "checkpoint of it"
        )

    def check(self, tensor: str, shapes: Collection[Shape], dtypes: Sequence[str]) -> Entry:
        """What the file says of ``tensor``.

        Raises:
            SourceError: it is missing, or of another shape or dtype.
        """
        if tensor not in self.tensors:
            raise self.wrong(f"is in codes, but has no tensor {tensor}")
        entry = self.tensors[tensor]
        if entry.shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
            raise self.wrong(f"has {tensor} of shape {list(entry.shape)}, expected {expected}")
        if entry.dtype.name not in dtypes:
            raise self.wrong(f"has {tensor} in {entry.dtype}, expected {' or '.join(dtypes)}")
        return entry


class Scheme(abc.ABC):
    """How the matrices of one checkpoint are quantised.

    Attributes:
        name: For people.
        skipped: Modules that are not, by name or, behind ``re:``, by a pattern.
        layout: Which way the codes lie.
        unused: Tensors of a module that nobody needs here.
        joint: What stands between a module's name and a tensor's.
    """

    name: str
    skipped: tuple[str, ...] = ()
    layout: Literal["in_out", "out_in"] = "out_in"
    unused: ClassVar[frozenset[str]] = frozenset()
    joint: ClassVar[str] = "."

    def lies(self, source: Source) -> tuple[str, bool] | None:
        """What a checkpoint calls the module whose floats lie at ``source``, and whether a
        parameter's transpose is its (n_out, n_in); None: that is never in codes."""
        module = source.key.removesuffix(".weight")
        return None if module == source.key else (module, source.transposed)

    @abc.abstractmethod
    def holds(self, tensors: Mapping[str, Entry]) -> bool:
        """Whether a module with these is in codes, whatever the config says."""

    @abc.abstractmethod
    def codes(self, module: Module) -> Codes:
        """How ``module`` lies.

        Raises:
            SourceError: not as the scheme has it, or in a way that is not read.
        """

    @abc.abstractmethod
    def planned(self, n_in: int, n_out: int) -> dict[str, tuple[Shape, str]]:
        """Tensor -> shape and dtype of a matrix, by the config alone."""

    def covers(self, module: str) -> bool:
        """Whether ``module`` is quantised, by the config alone."""
        return not any(_matches(pattern, module) for pattern in self.skipped)


def _matches(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], module) is not None
        except re.error:
            return False
    return f".{pattern}." in f".{module}."


def packed_integers(
    module: Module,
    *,
    kind: str,
    bits: int,
    words: str,
    scales: str,
    zeros: str,
    groups: str = "",
    zeros_less_one: bool = False,
) -> Make:
    """What makes :class:`PackedIntegers` of ``module``: ``words`` and the like are the names of its
    tensors, of which zeros and groups may be missing."""

    def make(arrays: Mapping[str, Any], *, rows: tuple[int, int], swapped: bool) -> PackedIntegers:
        from flexgen_jax.models.published_codes import PackedIntegers

        return PackedIntegers(
            n_in=module.n_in,
            n_out=module.n_out,
            rows=rows,
            swapped=swapped,
            words=arrays[words],
            scales=arrays[scales],
            zeros=arrays.get(zeros),
            groups=arrays.get(groups),
            kind=kind,
            bits=bits,
            zeros_less_one=zeros_less_one,
        )

    return make


def number(said: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """An integer of the config.

    Raises:
        SourceError: it is none.
    """
    value = said.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise SourceError(f"quantization_config: {name} must be an integer, got {value!r}")
    return value


def names(said: Mapping[str, Any], *fields: str) -> tuple[str, ...]:
    """Lists of names of the config, those of ``fields`` that are there."""
    found = [said.get(field) or [] for field in fields]
    if not all(isinstance(x, list) and all(isinstance(n, str) for n in x) for x in found):
        raise SourceError(f"quantization_config: {' and '.join(fields)} must be lists of names")
    return tuple(name for part in found for name in part)


def refused(what: str, instead: str) -> SourceError:
    """To be raised of what the config asks for."""
    return SourceError(f"its weights are quantised with {what}, which is not read: {instead}")


def group_counts(n_in: int, size: int) -> int:
    """How many groups of ``size`` there are; -1: one."""
    return 1 if size <= 0 else -(-n_in // size)


def words(count: int, bits: int) -> int:
    """Of 32 bits, that hold ``count`` codes."""
    return -(-count // (32 // bits))
